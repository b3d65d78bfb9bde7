"""All torch of the engine: the state of every image on the device, and one step of many images at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.request import GenerateParams, ModelInfo, Start
from ddpm_core import data, hub, layout, record
from ddpm_core.checkpoint import CheckpointError, Model, load_model, verify
from ddpm_core.diffusion import q_sample
from ddpm_core.network import Network, OnnxNetwork, Padded, flops, pick_device
from ddpm_core.noise import noise
from ddpm_core.plans import SamplingPlan
from ddpm_core.sampling import step


def read(reference: str, sha256: str | None = None) -> Model:
    """A model directory or hub id; its weights must be those of its card, and of `sha256` where it is given.

    Raises:
        CheckpointError: the model cannot be used, or draws what is no picture.
    """
    directory = hub.locate(reference)
    model = load_model(directory, hub.name_of(reference))
    if (channels := model.config.in_channels) not in (1, 3):
        path = layout.unet_folder(directory) / "config.json"
        raise CheckpointError(
            f"{path}: in_channels={channels} is not supported: the service makes grey or RGB pictures; supported: 1, 3"
        )
    verify(directory, model, sha256)
    return dataclasses.replace(model, class_names=record.class_names(directory, model))


def info_of(model: Model, device: str, runtime: str) -> ModelInfo:
    """What the outside needs to know of a model."""
    return ModelInfo(
        model.name, model.sha256, device, model.config.image_shape,
        model.schedule.num_train_steps, model.num_classes, model.schedule.alphas_cumprod, runtime,
        {steps: plan.sha256 for steps, plan in model.learned.items()},
        model.distilled_steps, not model.needs_label, model.class_names,
    )  # fmt: skip


@dataclasses.dataclass(eq=False)
class Row:
    """One image on its way."""

    seed: int
    label: int | None
    guidance_scale: float
    plan: SamplingPlan
    start: Start | None
    done: int = 0  # steps
    slot: int | None = None  # its place in the device's state, from its first step to its release

    @property
    def network_rows(self) -> int:
        return 1 if self.guidance_scale == 1 else 2

    @property
    def finished(self) -> bool:
        return self.done == len(self.plan)


class Runner:
    """One model on one device.

    The state is x[k], the last x's, and x_0_hat[k], the last predictions, newest first: (K, slots, C, H, W). It grows
    with the images that have begun and the history that their samplers want; nothing of it is copied back but what
    is asked for.
    """

    def __init__(self, model: Model, device: torch.device, network: Network) -> None:
        self.model, self.device, self.network = model, device, network
        self.pad_to(1)
        shape = model.config.image_shape
        self._x = torch.zeros(1, 0, *shape, device=device)
        self._x_0_hat = torch.zeros(1, 0, *shape, device=device)
        self._free: list[int] = []
        # The self-check tries more than a distilled network is for; what clients ask for is checked before.
        any_plan = dataclasses.replace(model, scheduler=dataclasses.replace(model.scheduler, distilled_steps=None)).plan
        self.plan = functools.lru_cache(maxsize=64)(any_plan)

    @classmethod
    def load(cls, reference: str, device: str, sha256: str | None = None) -> Runner:
        """From a model directory or hub id; its weights must be those of its card, and of `sha256` where it is given.

        Raises:
            CheckpointError: the model cannot be used. ValueError: the device cannot.
        """
        where = pick_device(device)
        model = read(reference, sha256)
        network = model.network(where, export=True)
        if isinstance(network, OnnxNetwork):
            torch.set_num_threads(1)  # two pools that spin on the same cores wait for each other
        return cls(model, where, network)

    def pad_to(self, multiple: int) -> None:
        """From now on network calls have a multiple of so many rows."""
        self.rows_multiple = multiple
        self._denoiser = self.model.denoiser(Padded(self.network, multiple))

    @property
    def info(self) -> ModelInfo:
        """What the outside needs to know of the model."""
        runtime = "onnxruntime" if isinstance(self.network, OnnxNetwork) else "torch"
        return info_of(self.model, str(self.device), runtime)

    @property
    def flops(self) -> int:
        """Of one network row."""
        return flops(self.model.net)

    def row(self, params: GenerateParams, index: int) -> Row:
        """Image `index` of a request, before its first step."""
        plan = self.plan(
            params.sampler, params.steps, eta=params.eta, start=None if params.start is None else params.start.t
        )
        scale = params.guidance_scale if params.guided(index) else 1.0
        return Row(params.seeds[index], params.labels[index], scale, plan, params.start)

    @torch.inference_mode()
    def begin(self, row: Row) -> None:
        """Gives an image its place and its first x."""
        self._grow(row.plan)
        x, slot = self._first_x(row).to(self.device), self._free[-1]
        self._x_0_hat[:, slot] = 0
        self._x[:, slot] = 0
        self._x[0, slot] = x[0]
        row.slot = self._free.pop()  # last: what was raised before may be tried again

    def _first_x(self, row: Row) -> Tensor:
        """Where a chain starts, (1, C, H, W) on the CPU."""
        eps = noise(row.seed, 0, self.model.config.image_shape)[None]
        if row.start is None:
            return eps
        x_0 = data.to_unit(torch.from_numpy(row.start.pixels))[None]
        return q_sample(x_0, eps, float(self.model.schedule.alphas_cumprod[row.start.t]))

    def _grow(self, plan: SamplingPlan) -> None:
        """Makes room for one more image of this plan."""

        def grown(state: Tensor, history: int, slots: int) -> Tensor:
            new = state.new_zeros(max(history, state.shape[0]), slots, *state.shape[2:])
            new[: state.shape[0], : state.shape[1]] = state
            return new

        slots = self._x.shape[1]
        more = max(8, slots) if not self._free else 0
        if more or plan.a.shape[1] > self._x.shape[0] or plan.b.shape[1] > self._x_0_hat.shape[0]:
            x, x_0_hat = (
                grown(self._x, plan.a.shape[1], slots + more),
                grown(self._x_0_hat, plan.b.shape[1], slots + more),
            )
            self._x, self._x_0_hat = x, x_0_hat  # both or none
            self._free.extend(range(slots + more - 1, slots - 1, -1))

    @torch.inference_mode()
    def spoil(self, row: Row) -> None:
        """Makes an image NaN, for the self-check: its neighbours must not notice."""
        self._x[:, row.slot] = float("nan")

    def release(self, row: Row) -> None:
        """Takes an image's place back."""
        if row.slot is not None:
            self._free.append(row.slot)
            row.slot = None

    def padding(self, rows: int) -> int:
        """Network rows that a call of so many is padded by."""
        return -rows % self.rows_multiple

    def advance(self, rows: Sequence[Row]) -> dict[Row, Exception]:
        """One step of every row. Where it raises, halves are tried, so that only those end that must; returns them."""
        try:
            new = self._step(rows)
        except Exception as error:
            if len(rows) == 1:
                return {rows[0]: error}
            half = len(rows) // 2
            return self.advance(rows[:half]) | self.advance(rows[half:])
        try:
            self._write(rows, *new)
        except Exception as error:  # half of it may be written: no second try
            return dict.fromkeys(rows, error)
        return {}

    def probe(self) -> None:
        """Makes one step of an image of its own. Raises what the step raises."""
        row = self.row(GenerateParams("probe", (0,), (self.info.plain_label,), "ddim", 1, 0.0, 1.0), 0)
        failed = self.advance([row])
        self.release(row)
        for error in failed.values():
            raise error

    @torch.inference_mode()
    def _step(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """The rows' next x and x_0_hat histories, (K, B, C, H, W). Changes nothing but what begins."""
        for row in rows:
            if row.slot is None:
                self.begin(row)
        slots = self._slots(rows)
        history = max(row.plan.a.shape[1] for row in rows), max(row.plan.b.shape[1] for row in rows)
        t, abar, a, b, d = self._coefficients(rows, *history)
        xs = self._x[: history[0], slots]
        labels, scales = self._guidance(rows)
        x_0_hat = self._denoiser(xs[0], t, abar, labels, scales)
        x_0_hats = torch.cat([x_0_hat[None], self._x_0_hat[: history[1] - 1, slots]])
        x = step(xs.unbind(), x_0_hats.unbind(), a, b, d, self._fresh_noise(rows))
        new = torch.cat([x[None], xs[:-1]])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # an error belongs to its step, and a step's time to it
        return new, x_0_hats

    @torch.inference_mode()
    def _write(self, rows: Sequence[Row], xs: Tensor, x_0_hats: Tensor) -> None:
        slots = self._slots(rows)
        self._x[: len(xs), slots] = xs
        self._x_0_hat[: len(x_0_hats), slots] = x_0_hats
        for row in rows:
            row.done += 1

    def _slots(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.slot for row in rows], device=self.device)

    def _coefficients(self, rows: Sequence[Row], x_history: int, x_0_history: int) -> Sequence[Tensor]:
        """The next plan row of every image: t (B,), alpha_bar (B,), a (B, Ka), b (B, Kb), d (B,), in one transfer."""
        table = np.zeros((len(rows), 3 + x_history + x_0_history))
        for line, row in zip(table, rows, strict=True):
            plan, i = row.plan, row.done
            line[:3] = plan.timesteps[i], plan.alpha_bars[i], plan.d[i]
            line[3 : 3 + plan.a.shape[1]] = plan.a[i]
            line[3 + x_history : 3 + x_history + plan.b.shape[1]] = plan.b[i]
        on_device = torch.from_numpy(table).to(self.device)
        return (
            *on_device[:, :2].unbind(1),
            *torch.split(on_device[:, 3:], [x_history, x_0_history], 1),
            on_device[:, 2],
        )

    def _guidance(self, rows: Sequence[Row]) -> tuple[Tensor | None, Tensor | None]:
        """Labels and guidance scales, where the model takes labels."""
        if not self.model.takes_labels:
            return None, None
        null = self.model.null_label
        labels = torch.tensor([null if row.label is None else row.label for row in rows], device=self.device)
        return labels, torch.tensor([row.guidance_scale for row in rows], device=self.device)

    def _fresh_noise(self, rows: Sequence[Row]) -> Tensor | None:
        """z of every row that wants one, zeros for the others; None where none does."""
        if not any(row.plan.d[row.done] for row in rows):
            return None
        shape = self.model.config.image_shape
        z = [noise(row.seed, row.done + 1, shape) if row.plan.d[row.done] else torch.zeros(shape) for row in rows]
        return torch.stack(z).to(self.device)

    def x(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """The rows' x, (B, C, H, W), copied from the device."""
        out: NDArray[np.float32] = self._x[0, self._slots(rows)].cpu().numpy()
        return out

    def x_0_hat(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """The rows' latest x_0_hat, (B, C, H, W), copied from the device."""
        out: NDArray[np.float32] = self._x_0_hat[0, self._slots(rows)].cpu().numpy()
        return out

    def first_x(self, row: Row) -> NDArray[np.float32]:
        """Where a row's chain started, (C, H, W)."""
        out: NDArray[np.float32] = self._first_x(row)[0].numpy()
        return out


def to_pixels(x: Tensor | NDArray[np.float32]) -> NDArray[np.uint8]:
    """(B, C, H, W) in [-1, 1] -> uint8."""
    pixels: NDArray[np.uint8] = data.to_uint8(torch.as_tensor(x)).numpy()
    return pixels
