"""Training: one step, the moving average, and train(), a generator that its caller watches and interrupts.

What is learned is an objective's business (losses.py, trajectories.py), files are runs.py's, progress bars and signals
training_loop.py's. Everything random in step k is a function of (seed, k), and so is the batch: a state saved after
step k and resumed goes on bit for bit as if never interrupted. (With a time budget the learning rate follows the clock,
and no two runs are the same.)

Several processes (parallel.py) each compute a part of every batch; what they decide on is a number that all of them
have, or they would wait for each other for ever.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ddpm_core import optimizers
from ddpm_core.parallel import ONE, Ranks
from ddpm_core.recipe import Recipe, seed_of

Predict = Callable[..., Tensor]
"""The network in training: x_t (B, C, H, W), t (B,), and labels (B,) where it takes them -> its output, float32."""

Objective = Callable[[Predict, int], Tensor]
"""What is learned: the network and the number of a step -> the loss of this rank's part of that step's batch."""

MAX_BAD_STEPS = 20  # consecutive steps without a finite gradient before training gives up


class TrainingDiverged(RuntimeError):
    """The loss or its gradient stayed NaN or infinite; the weights are those of the last good step."""


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What one optimizer step did."""

    step: int  # steps done so far, this one counted in
    loss: float  # of the whole batch
    lr: float
    grad_norm: float
    elapsed_s: float  # seconds of training so far, resumed ones counted in
    progress: float  # 0 .. 1


class Ema:
    """Exponential moving average of the weights, float32: these are what ships."""

    def __init__(self, net: nn.Module, max_decay: float) -> None:
        self.max_decay = max_decay
        self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """After step number `step` (1, 2, ...); early on the average spans about the last ninth of the steps."""
        decay = min(self.max_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), list(net.state_dict().values()), 1 - decay)


class Trainer:
    """A network in training: its weights, their average, the optimizer, and how far it is."""

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        recipe: Recipe,
        *,
        device: torch.device,
        compile_net: bool = False,
        bf16: bool = False,
        ranks: Ranks = ONE,
    ) -> None:
        self.objective, self.recipe, self.device, self.bf16, self.ranks = objective, recipe, device, bf16, ranks
        self.net = net.to(device).to(memory_format=torch.channels_last).train()
        forward = ranks.data_parallel(self.net)
        self.forward = torch.compile(forward) if compile_net else forward
        self.ema = Ema(net, recipe.ema_decay)
        if ranks.rank:
            self.ema.weights.clear()  # only rank 0 saves them
        self.optimizers = optimizers.build(
            self.net, recipe.optimizer, adam_betas=recipe.adam_betas, weight_decay=recipe.weight_decay
        )
        self.step = 0
        self.skipped = 0  # steps that changed nothing, their loss or gradient not being finite
        self.elapsed_s = 0.0
        self.stop = False  # to be set by whoever wants this rank, and so all, to stop
        self.stopping = False  # whether any rank was to stop when the last step was taken

    @property
    def progress(self) -> float:
        """0 .. 1, in steps or in time, whichever the recipe counts."""
        r = self.recipe
        return min(1.0, self.step / r.steps if r.steps else self.elapsed_s / r.time_budget_s)

    def lr(self) -> float:
        """The learning rate of the next step."""
        r = self.recipe
        warmup = min(1.0, (self.step + 1) / r.warmup_steps) if r.warmup_steps else 1.0
        decay = min(1.0, (1 - self.progress) / r.decay) if r.decay else 1.0
        return r.lr * warmup * decay

    def loss(self) -> Tensor:
        """The loss of this rank's part of the next step's batch."""
        return self.objective(self.predict, self.step)

    def predict(self, *inputs: Tensor) -> Tensor:
        """The network's output in float32, computed in bfloat16 where the run has it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output: Tensor = self.forward(*inputs)
        return output.float()

    def train_step(self) -> tuple[float, float, float] | None:
        """One optimizer step: loss, lr, gradient norm. None where one of them is not finite: nothing was changed."""
        lr = self.lr()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # dropout draws from the global generator
            torch.manual_seed(seed_of(self.recipe.seed, "dropout", self.step, self.ranks.rank))
            loss_tensor = self.loss()
            loss_tensor.backward()  # type: ignore[no-untyped-call]
        own_norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_grad)  # of a gradient that all have
        sums = self.ranks.sum(float(loss_tensor.detach()), float(own_norm), self.stop)
        loss, norm = (total / self.ranks.world for total in sums[:2])
        self.stopping = sums[2] > 0
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
        self.net.zero_grad()
        self.step += 1
        if not finite:
            self.skipped += 1
        elif self.ranks.rank == 0:
            self.ema.update(self.net, self.step)
        return (loss, lr, norm) if finite else None

    def train(self) -> Iterator[StepStats]:
        """Trains to the end of the recipe, yielding after every step. Leave the loop at will: the state is whole.

        Raises:
            TrainingDiverged: the loss or its gradient was not finite for MAX_BAD_STEPS steps on end.
        """
        bad = 0
        while self.progress < 1:
            start = time.monotonic()
            done = self.train_step()
            self.elapsed_s += time.monotonic() - start
            if self.recipe.time_budget_s:
                self.elapsed_s = self.ranks.of_first(self.elapsed_s)
            if done is None:
                bad += 1
                if bad == MAX_BAD_STEPS:
                    raise TrainingDiverged(
                        f"the loss or its gradient was not finite in {bad} steps on end, up to step {self.step:,}"
                    )
                continue
            bad = 0
            loss, lr, norm = done
            yield StepStats(self.step, loss, lr, norm, self.elapsed_s, self.progress)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that changes in training, by name; step, elapsed_s and skipped are beside it."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.weights.items()}
        for which, optimizer in enumerate(self.optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{which}.{index}.{k}": v for k, v in slots.items()}
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor], *, step: int, elapsed_s: float, skipped: int = 0) -> None:
        """The inverse of state_tensors."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.net.load_state_dict(part("net."))
        for k, v in self.ema.weights.items():
            v.copy_(tensors[f"ema.{k}"])
        # The fused optimizer walks over memory as it lies: moments need the layout of their parameter (channels last).
        for which, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            slots: dict[int, dict[str, Tensor]] = {}
            for k, v in part(f"optimizer.{which}.").items():
                index, name = k.split(".")
                parameter = parameters[int(index)]
                slots.setdefault(int(index), {})[name] = torch.empty_like(parameter).copy_(v) if v.dim() else v
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        self.step, self.elapsed_s, self.skipped = step, elapsed_s, skipped
