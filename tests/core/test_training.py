"""Training: batches, timesteps, the loss, the average, the learning rate, resuming bit for bit, and divergence."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm_core import data, diffusion, losses, optimizers, runs, schedules
from ddpm_core import recipe as draws
from ddpm_core.diffusion import Prediction
from ddpm_core.losses import DenoisingLoss
from ddpm_core.recipe import Recipe
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.training import Ema, Objective, Predict, Trainer, TrainingDiverged
from ddpm_core.unet import UNet
from tests.networks import DIGITS

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
SCHEDULE = schedules.cosine(100)
CPU = torch.device("cpu")


def digits(count: int) -> data.ImageSet:
    """The first of scikit-learn's 8x8 digits."""
    whole = data.load("digits", Path(), train=True)
    return dataclasses.replace(whole, images=whole.images[:count], labels=whole.labels[:count])


def constant_images(count: int = 64) -> data.ImageSet:
    """One image many times: whoever knows it knows eps from x_t alone."""
    image = torch.linspace(0, 255, 64).to(torch.uint8).reshape(1, 1, 8, 8)
    return data.ImageSet("constant", image.repeat(count, 1, 1, 1), torch.zeros(count, dtype=torch.long), 1)


class Oracle(nn.Module):
    """Says the exact target for constant_images(), plus `shift` in x_0; its one parameter has no effect on that."""

    def __init__(self, prediction: Prediction, shift: float = 0.0) -> None:
        super().__init__()
        self.prediction, self.shift = prediction, shift
        self.unused = nn.Parameter(torch.zeros(1))
        self.x_0 = data.to_unit(constant_images(1).images)
        self.t = torch.empty(0)  # of the last call

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.t = t
        abar = torch.from_numpy(SCHEDULE.alphas_cumprod)[t]
        x_t = x_t.double()
        x_0 = (self.x_0.double() + self.shift).expand_as(x_t)
        eps = diffusion.to_eps(x_0, x_t, abar)
        return diffusion.target(self.prediction, x_0, eps, abar) + 0 * self.unused


class Scripted(nn.Module):
    """Predicts a learned constant; where the script says so, its gradient is NaN or infinite."""

    def __init__(self, bad: dict[int, float]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), 0.5))
        self.bad, self.calls = bad, 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        factor = self.bad.get(self.calls, 1.0)
        self.calls += 1
        return (self.value * factor).reshape(1, 1, 1, 1).expand_as(x_t)


def trainer_of(
    net: nn.Module,
    recipe: Recipe,
    images: data.ImageSet | None = None,
    prediction: Prediction = "epsilon",
    null_label: int | None = None,
) -> Trainer:
    return Trainer(net, loss_of(recipe, images, prediction, null_label), recipe, device=CPU)


def loss_of(
    recipe: Recipe,
    images: data.ImageSet | None = None,
    prediction: Prediction = "epsilon",
    null_label: int | None = None,
) -> DenoisingLoss:
    return DenoisingLoss(images or constant_images(), SCHEDULE, prediction, recipe, null_label=null_label, device=CPU)


def tiny_unet(seed: int, dropout: float = 0.0) -> UNet:
    torch.manual_seed(seed)
    return UNet(dataclasses.replace(DIGITS, sample_size=8, dropout=dropout))


# Batches and timesteps


@pytest.mark.parametrize(("size", "batch_size"), [(103, 16), (96, 16), (10, 7), (7, 20)])
def test_every_epoch_holds_every_image_once(size: int, batch_size: int) -> None:
    """The stream of indices, cut into pieces of `size` wherever batches end, is one permutation after another."""
    recipe = Recipe(steps=1, batch_size=batch_size, seed=3)
    batches = [draws.batch_indices(recipe, step, size) for step in range(4 * size // batch_size + 1)]
    assert {len(batch) for batch in batches} == {batch_size}
    epochs = torch.cat(batches)[: 4 * size].reshape(4, size)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(size).expand(4, size))
    assert len(epochs.unique(dim=0)) == 4


def test_the_order_of_an_epoch_does_not_depend_on_who_drew_before() -> None:
    first = draws.epoch_order(1, 0, 50).clone()
    draws.epoch_order.cache_clear()
    torch.manual_seed(99)
    assert torch.equal(draws.epoch_order(1, 0, 50), first)


def test_another_seed_gives_another_order_of_the_images() -> None:
    orders = torch.stack([draws.epoch_order(seed, 0, 50) for seed in (0, 1, 2, 2**31 - 1)])
    assert len(orders.unique(dim=0)) == 4


def test_another_seed_or_step_draws_other_timesteps_and_noise() -> None:
    """All images are equal, so that a loss differs through t and eps alone."""
    losses = set()
    for seed in (0, 1, 2, 2**31 - 1):
        trainer = trainer_of(Scripted({}), Recipe(steps=9, batch_size=8, seed=seed))
        for trainer.step in range(3):
            losses.add(float(trainer.loss().detach()))
    assert len(losses) == 12


def test_stratified_timesteps_hit_every_stratum() -> None:
    """One t in each of B equal parts of 0 .. T-1, not the same ones every time."""
    recipe = Recipe(steps=1, batch_size=20, timesteps="stratified")
    drawn = [draws.sample_timesteps(recipe, 1000, torch.Generator().manual_seed(s)) for s in range(50)]
    for t in drawn:
        assert (t // 50).tolist() == list(range(20))
    assert len(torch.stack(drawn).unique(dim=0)) == 50


def test_more_strata_than_timesteps_repeat_every_one_equally() -> None:
    recipe = Recipe(steps=1, batch_size=40, timesteps="stratified")
    t = draws.sample_timesteps(recipe, 10, torch.Generator().manual_seed(0))
    assert t.bincount().tolist() == [4] * 10


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_timesteps_are_uniform(kind: Any) -> None:
    """Chi-square over 50 values of 50,000 draws: 49 degrees of freedom, mean 49, bound 49 + 5 sqrt(98) = 98.5."""
    recipe = Recipe(steps=1, batch_size=500, timesteps=kind)
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([draws.sample_timesteps(recipe, 50, generator) for _ in range(100)])
    counts = t.bincount(minlength=50).double()
    assert len(counts) == 50
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 98.5


# The loss


def test_min_snr_weights_are_the_papers() -> None:
    """gamma = 5: min(snr, 5) / snr for eps, min(snr, 5) for x_0, min(snr, 5) / (snr + 1) for v."""
    snr = torch.tensor([0.1, 5.0, 20.0], dtype=torch.float64)
    assert losses.snr_weights("epsilon", snr, 5.0).tolist() == pytest.approx([1, 1, 0.25])
    assert losses.snr_weights("sample", snr, 5.0).tolist() == pytest.approx([0.1, 5, 5])
    assert losses.snr_weights("v_prediction", snr, 5.0).tolist() == pytest.approx([0.1 / 1.1, 5 / 6, 5 / 21])


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_target_has_no_loss(prediction: Prediction, gamma: float) -> None:
    trainer = trainer_of(Oracle(prediction), Recipe(steps=1, min_snr_gamma=gamma), prediction=prediction)
    assert float(trainer.loss().detach()) < 1e-8


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_known_error_in_x_0_has_its_known_loss(prediction: Prediction) -> None:
    """An error of 0.1 in x_0 is snr 0.01 in eps, 0.01 in x_0 and (snr + 1) 0.01 in v, for each image's own t."""
    net = Oracle(prediction, 0.1)
    loss = float(trainer_of(net, Recipe(steps=1, batch_size=200), prediction=prediction).loss().detach())
    snr = torch.from_numpy(SCHEDULE.snr)[net.t]
    wanted = {"epsilon": snr, "sample": torch.ones(200), "v_prediction": snr + 1}[prediction].mean() * 0.01
    assert loss == pytest.approx(float(wanted), rel=1e-4)


def test_min_snr_makes_the_three_losses_one() -> None:
    """Clipped weights count an error in x_0 as min(snr, gamma), whatever the network predicts."""
    recipe = Recipe(steps=1, min_snr_gamma=5.0)
    losses = [float(trainer_of(Oracle(p, 0.1), recipe, prediction=p).loss().detach()) for p in PREDICTIONS]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert losses[0] < 0.05


class TwoAnswers(nn.Module):
    """Says one number with a label and another without."""

    def __init__(self, labelled: float, unlabelled: float) -> None:
        super().__init__()
        self.labelled, self.unlabelled = (nn.Parameter(torch.tensor(v)) for v in (labelled, unlabelled))
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        return torch.where(label == 1, self.unlabelled, self.labelled)[:, None, None, None].expand_as(x_t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_guidance_adds_keeps_the_guided_prediction_where_it_is(prediction: Prediction) -> None:
    """Target c of the label, u of none: the network that says u + s (c - u) has no error left in the mean."""
    c, u, s = 0.7, 0.3, 2.5
    net = TwoAnswers(u + s * (c - u), u)
    loss = loss_of(Recipe(steps=1, guidance_scale=s), prediction=prediction, null_label=1)
    x_t = torch.zeros(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    added = loss.guidance(net(x_t, labels, labels), net(x_t, labels, torch.ones_like(labels)))
    assert not added.requires_grad
    assert (c + added[0]).flatten()[0] == pytest.approx(u + s * (c - u))
    assert not added[1].any()


def test_guidance_is_refused_where_it_could_not_be_learned() -> None:
    with pytest.raises(ValueError, match="needs label_drop above 0"):
        Recipe(steps=1, guidance_scale=2.0, label_drop=0.0)
    with pytest.raises(ValueError, match="without dropout"):
        runs.TrainingRun(
            dataclasses.replace(DIGITS, dropout=0.1), SchedulerConfig(), Recipe(steps=1, guidance_scale=2.0),
            bf16=False, compile=False, started_from={}, data="", data_root="", data_options=data.Options(),
            data_facts={},
        )  # fmt: skip


def test_guidance_of_1_costs_no_call_and_a_network_without_labels_has_none() -> None:
    for scale, calls in ((1.0, 1), (2.0, 2)):
        net = TwoAnswers(0.5, 0.5)
        trainer_of(net, Recipe(steps=1, guidance_scale=scale), null_label=1).loss()
        assert net.calls == calls
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a network with labels"):
        trainer_of(Oracle("epsilon"), Recipe(steps=1, guidance_scale=2.0))


def test_saying_nothing_costs_the_variance_of_eps() -> None:
    """0 for eps: E eps^2 = 1, within 5 standard errors sqrt(2 / N) of N = 128 x 64 numbers."""
    loss = float(trainer_of(Scripted({0: 0.0}), Recipe(steps=1, batch_size=128)).loss().detach())
    assert abs(loss - 1) < 5 * math.sqrt(2 / (128 * 64))


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (1.0, 1000, 1000), (0.1, 53, 147)])
def test_label_drop_replaces_that_share_of_labels(share: float, low: int, high: int) -> None:
    """Of 1000 labels; 0.1 within 5 standard deviations sqrt(1000 0.1 0.9) = 9.5."""
    seen: list[Tensor] = []

    class Listener(Scripted):
        def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            assert label is not None
            seen.append(label)
            return super().forward(x_t, t)

    images, recipe = digits(1000), Recipe(steps=1, batch_size=1000, label_drop=share)
    trainer_of(Listener({}), recipe, images, null_label=10).loss()
    dropped = seen[0] == 10
    assert low <= int(dropped.sum()) <= high
    kept = images.labels[draws.batch_indices(recipe, 0, 1000)]
    assert torch.equal(seen[0][~dropped], kept[~dropped])


# The average and the learning rate


def test_ema_of_constant_weights_has_its_closed_form() -> None:
    """After n updates the start is left with weight prod_k min(0.9, (1 + k) / (10 + k)), and the rest is new.

    120 updates: the cap of 0.9 is reached at the 80th.
    """
    net = nn.Linear(3, 2)
    ema = Ema(net, 0.9)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.fill_(2.0)
    left = 1.0
    for step in range(1, 121):
        ema.update(net, step)
        left *= min(0.9, (1 + step) / (10 + step))
        assert torch.allclose(ema.weights["weight"], 2 + left * (start - 2), atol=1e-6)


def test_the_average_is_a_copy_of_its_own() -> None:
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.9)
    before = ema.weights["weight"].clone()
    with torch.no_grad():
        net.weight.add_(1)
    assert torch.equal(ema.weights["weight"], before)


def test_the_learning_rate_warms_up_holds_and_decays_to_0() -> None:
    """10 steps of warm-up, then the peak, then linear over the last 40 of 100 steps; the last step is lr / 40."""
    trainer = trainer_of(Scripted({}), Recipe(steps=100, lr=0.1, warmup_steps=10, decay=0.4))
    rates = []
    for trainer.step in range(101):
        rates.append(trainer.lr())
    assert rates[:10] == pytest.approx([0.01 * k for k in range(1, 11)])
    assert rates[10:61] == pytest.approx([0.1] * 51)
    assert rates[60:] == pytest.approx([0.1 * (40 - k) / 40 for k in range(41)])


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    trainer = trainer_of(Scripted({}), Recipe(steps=50, lr=0.1, warmup_steps=0))
    for trainer.step in (0, 25, 49):
        assert trainer.lr() == 0.1


def test_a_time_budget_counts_the_seconds_spent() -> None:
    trainer = trainer_of(Scripted({}), Recipe(time_budget_s=10.0, lr=0.1, warmup_steps=0, decay=0.5))
    for elapsed_s, progress, lr in ((0.0, 0.0, 0.1), (7.5, 0.75, 0.05), (12.0, 1.0, 0.0)):
        trainer.elapsed_s = elapsed_s
        assert (trainer.progress, trainer.lr()) == pytest.approx((progress, lr))
    assert list(trainer.train()) == []


# Training


def test_a_step_reports_what_it_did() -> None:
    trainer = trainer_of(Scripted({}), Recipe(steps=3, batch_size=8, lr=0.01, warmup_steps=2, clip_grad=1e-3))
    stats = list(trainer.train())
    assert [s.step for s in stats] == [1, 2, 3]
    assert [s.lr for s in stats] == pytest.approx([0.005, 0.01, 0.01])
    assert [s.progress for s in stats] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all(s.grad_norm > 1e-3 for s in stats)  # the norm before clipping
    assert 0 < stats[0].elapsed_s < stats[1].elapsed_s < stats[2].elapsed_s


def test_training_reduces_the_loss_of_a_small_unet() -> None:
    """From 1, the loss of a network that starts at 0, to less than 0.5 in 60 steps on 100 digits."""
    recipe = Recipe(steps=60, batch_size=32, lr=4e-3, warmup_steps=5, timesteps="stratified")
    trainer = trainer_of(tiny_unet(0), recipe, digits(100), null_label=10)
    losses = [s.loss for s in trainer.train()]
    assert losses[0] == pytest.approx(1, abs=0.15)
    assert sum(losses[-10:]) / 10 < 0.5


@pytest.mark.parametrize(("dropout", "optimizer"), [(0.0, "adamw"), (0.3, "adamw"), (0.3, "muon")])
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, dropout: float, optimizer: optimizers.Name
) -> None:
    """12 steps at once, and 5 + save + load into another network + 7: every tensor of the state is equal.

    100 images in batches of 32: step 5 is in the middle of an epoch, and both parts cross the end of one.
    """
    recipe = Recipe(
        steps=12, batch_size=32, lr=1e-3, warmup_steps=3, decay=0.5, min_snr_gamma=5.0, weight_decay=0.01,
        optimizer=optimizer,
    )  # fmt: skip

    def fresh(seed: int) -> Trainer:
        return trainer_of(tiny_unet(seed, dropout), recipe, digits(100), "v_prediction", null_label=10)

    whole = fresh(0)
    stats = list(whole.train())

    first = fresh(0)
    for done in first.train():
        if done.step == 5:
            break
    path = tmp_path / "state.safetensors"
    save_file({k: v.contiguous() for k, v in first.state_tensors().items()}, path)

    second = fresh(1)
    torch.manual_seed(12345)
    second.load_state_tensors(load_file(path), step=first.step, elapsed_s=first.elapsed_s)
    resumed = list(second.train())

    assert [(s.step, s.loss, s.lr, s.grad_norm) for s in resumed] == [
        (s.step, s.loss, s.lr, s.grad_norm) for s in stats[5:]
    ]
    wanted, got = whole.state_tensors(), second.state_tensors()
    assert wanted.keys() == got.keys()
    assert {key.split(".")[0] for key in wanted} == {"net", "ema", "optimizer"}
    for key in wanted:
        assert torch.equal(wanted[key], got[key]), key


def test_dropout_is_at_work_in_training() -> None:
    """Otherwise the test above would show nothing: with dropout another step has another mask."""
    recipe = Recipe(steps=1, batch_size=8)
    nets = [tiny_unet(0, dropout) for dropout in (0.0, 0.5)]
    for net in nets:
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.05)
    torch.manual_seed(0)
    losses = [float(trainer_of(net, recipe, digits(50), null_label=10).loss().detach()) for net in nets]
    assert losses[0] != losses[1]


def test_training_leaves_the_callers_random_numbers_alone() -> None:
    trainer = trainer_of(tiny_unet(0, 0.3), Recipe(steps=2, batch_size=8), digits(50), null_label=10)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    list(trainer.train())
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    """Step 3 is bad: it is counted and reported to nobody, and every tensor is as after step 2."""
    trainer = trainer_of(Scripted({2: bad}), Recipe(steps=4, batch_size=8, lr=0.01, warmup_steps=0))
    assert trainer.train_step() is not None
    assert trainer.train_step() is not None
    before = {k: v.clone() for k, v in trainer.state_tensors().items()}
    assert trainer.train_step() is None
    assert trainer.step == 3
    after = trainer.state_tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert trainer.train_step() is not None
    assert not torch.equal(trainer.state_tensors()["net.value"], before["net.value"])


def test_20_bad_steps_on_end_raise() -> None:
    trainer = trainer_of(Scripted(dict.fromkeys(range(2, 100), math.nan)), Recipe(steps=100, batch_size=8))
    stats = trainer.train()
    next(stats), next(stats)
    with pytest.raises(TrainingDiverged, match="was not finite in 20 steps on end, up to step 22"):
        next(stats)
    assert (trainer.step, trainer.skipped) == (22, 20)
    assert bool(trainer.state_tensors()["net.value"].isfinite())


def test_19_bad_steps_and_a_good_one_go_on() -> None:
    bad = {k: math.nan for k in range(60) if k % 20 != 19}
    trainer = trainer_of(Scripted(bad), Recipe(steps=60, batch_size=8))
    assert [s.step for s in trainer.train()] == [20, 40, 60]
    assert trainer.skipped == 57


class Spoiled:
    """An objective that makes one number of one tensor's gradient NaN or infinite at some steps; its loss stays."""

    def __init__(self, objective: Objective, net: nn.Module, bad: dict[int, tuple[str, float]]) -> None:
        self.objective, self.parameters, self.bad = objective, dict(net.named_parameters()), bad

    def __call__(self, predict: Predict, step: int) -> Tensor:
        if step in self.bad:
            name, value = self.bad[step]

            def spoil(gradient: Tensor) -> Tensor:
                hook.remove()
                return gradient.index_put([torch.zeros((), dtype=torch.long)] * gradient.ndim, torch.tensor(value))

            hook = self.parameters[name].register_hook(spoil)
        return self.objective(predict, step)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_with_bad_steps_is_the_one_without_them(optimizer: optimizers.Name) -> None:
    """Steps 3 and 4 of 6 spoil one number of a gradient, of a matrix and of a bias: before and after them every tensor
    of a U-Net's weights, average and moments is the same, and what comes later is as if the two had never been tried.
    """
    recipe = Recipe(steps=6, batch_size=8, lr=1e-3, warmup_steps=0, optimizer=optimizer)
    bad = {2: ("mid_block.resnets.0.conv1.weight", math.nan), 3: ("conv_in.bias", math.inf)}

    def fresh() -> Trainer:
        return trainer_of(tiny_unet(0), recipe, digits(100), "v_prediction", null_label=10)

    def copy(trainer: Trainer) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in trainer.state_tensors().items()}

    trainer = fresh()
    trainer.objective = Spoiled(trainer.objective, trainer.net, bad)
    states = {stats.step: copy(trainer) for stats in trainer.train()}
    assert (list(states), trainer.step, trainer.skipped) == ([1, 2, 5, 6], 6, 2)

    without = fresh()
    for without.step in (0, 1, 4, 5):
        if without.step == 4:  # where the two bad steps were, the state of step 2
            assert all(torch.equal(v, states[2][k]) for k, v in without.state_tensors().items())
        assert without.train_step() is not None
    wanted = without.state_tensors()
    assert wanted.keys() == states[6].keys()
    assert {key.split(".")[0] for key in wanted} == {"net", "ema", "optimizer"}
    assert all(torch.equal(v, states[6][k]) and bool(v.isfinite().all()) for k, v in wanted.items())


def test_a_spoiled_gradient_is_spoiled_once_and_its_loss_is_not() -> None:
    """Otherwise the test above would show less."""
    trainer = trainer_of(tiny_unet(0), Recipe(steps=1, batch_size=8), digits(100), null_label=10)
    objective = Spoiled(trainer.objective, trainer.net, {0: ("conv_in.bias", math.nan)})
    for step, wanted in ((0, ["conv_in.bias"]), (1, [])):
        trainer.net.zero_grad()
        loss = objective(trainer.predict, step)
        loss.backward()  # type: ignore[no-untyped-call]
        assert math.isfinite(float(loss.detach()))
        gradients = {k: p.grad for k, p in trainer.net.named_parameters() if p.grad is not None}
        assert [k for k, gradient in gradients.items() if not gradient.isfinite().all()] == wanted


# Refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("lr", -1e-3),
        ("lr", 1.5),
        ("lr", math.nan),
        ("warmup_steps", -1),
        ("decay", 1.1),
        ("weight_decay", -0.1),
        ("clip_grad", 0.0),
        ("ema_decay", 1.1),
        ("min_snr_gamma", -1.0),
        ("label_drop", 1.5),
        ("seed", -1),
        ("seed", 2**31),
    ],
)
def test_a_recipe_refuses_numbers_outside_their_range(field: str, value: float) -> None:
    fields: dict[str, Any] = {"steps": 1, field: value}
    with pytest.raises(ValueError, match=f"{field}={value} must be"):
        Recipe(**fields)


@pytest.mark.parametrize("length", [{}, {"steps": 5, "time_budget_s": 5.0}, {"steps": -1}, {"time_budget_s": -1.0}])
def test_a_recipe_needs_either_steps_or_a_time_budget(length: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either steps or a time budget"):
        Recipe(**length)
