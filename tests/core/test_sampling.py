"""The reverse process: one step, the noise stream, batches that do not matter, network calls, guidance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_core import samplers, schedules
from ddpm_core.denoiser import Denoiser
from ddpm_core.noise import MAX_SEED, noise
from ddpm_core.plans import SamplingPlan
from ddpm_core.sampling import SampleStep, draw_noise, sample, step

SCHEDULE = schedules.cosine(50)
SHAPE = (1, 4, 5)
PLANS = {
    "ddpm": samplers.build(SCHEDULE, "ddpm"),
    "ddpm_large": samplers.build(SCHEDULE, "ddpm", 11, variance="fixed_large"),
    "ddim": samplers.build(SCHEDULE, "ddim", 7),
    "ddim_eta": samplers.build(SCHEDULE, "ddim", 7, eta=0.6),
    "dpmpp_2m": samplers.build(SCHEDULE, "dpmpp_2m", 6),
}


class Recorder:
    """A network whose every number depends on its own pixel, t and label alone; it keeps what it was asked."""

    def __init__(self) -> None:
        self.times: list[list[float]] = []
        self.labels: list[list[int] | None] = []

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        self.times.append(t.tolist())
        self.labels.append(None if label is None else label.tolist())
        shift = (t / 50).to(x_t.dtype)[:, None, None, None]
        if label is not None:
            shift = shift + label.to(x_t.dtype)[:, None, None, None]
        y = x_t + shift
        return y / (y.abs() + 1)


def run(plan: SamplingPlan, seeds: list[int], labels: list[int] | None = None) -> list[SampleStep]:
    denoiser = Denoiser(Recorder(), "epsilon", 1.0, None if labels is None else 10)
    given = None if labels is None else torch.tensor(labels)
    return list(sample(denoiser, plan, draw_noise(seeds, 0, torch.empty(0, *SHAPE)), seeds, labels=given))


# step


def test_step_is_the_linear_combination_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    x, older, hat, hat_older, z = torch.randn(5, 3, *SHAPE, generator=generator, dtype=torch.float64)
    a, b, d = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (3, 2), (3,)))
    new = step([x, older], [hat, hat_older], a, b, d, z)
    for i in range(3):
        wanted = a[i, 0] * x[i] + a[i, 1] * older[i] + b[i, 0] * hat[i] + b[i, 1] * hat_older[i] + d[i] * z[i]
        assert torch.allclose(new[i], wanted, rtol=1e-12, atol=1e-14)


def test_a_coefficient_of_0_leaves_its_term_out_even_where_it_is_nan() -> None:
    """Row 0 has a 0 before every NaN, row 1 has numbers there: 0 * NaN must not reach row 0, nor 0 * inf."""
    nan, one = torch.full((2, *SHAPE), float("nan")), torch.ones(2, *SHAPE)
    infinite = torch.full((2, *SHAPE), float("inf"))
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0, 0.0], [1.0, 3.0]])
    new = step([nan], [one, infinite], a, b, torch.tensor([0.0, 1.0]), nan)
    assert torch.equal(new[0], one[0])
    assert bool(new[1].isnan().all())


def test_a_row_has_the_same_bits_beside_rows_that_look_further_back() -> None:
    """Terms of coefficient 0 change nothing, not even the sign of a zero or what lies in an unused history."""
    generator = torch.Generator().manual_seed(0)
    x, x_0_hat, z = (torch.randn(4, *SHAPE, generator=generator) for _ in range(3))
    x[0], x_0_hat[0] = -0.0, -0.0
    a, b, d = torch.tensor([[0.3], [0.0], [1.0], [-2.0]]), torch.tensor([[0.7], [1.0], [0.0], [0.5]]), torch.zeros(4)
    short = step([x], [x_0_hat], a, b, d, None)
    more = torch.zeros(4, 2)
    junk = torch.full_like(x, float("nan"))
    long = step([x, junk, junk], [x_0_hat, junk, junk], torch.cat([a, more], 1), torch.cat([b, more], 1), d, z)
    assert short.numpy().tobytes() == long.numpy().tobytes()


def test_a_step_without_noise_needs_none() -> None:
    x = torch.ones(1, *SHAPE)
    assert torch.equal(step([x], [x], torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1), None), 2 * x)


# The noise stream


@pytest.mark.parametrize(("seed", "k"), [(0, 0), (0, 1), (7, 0), (MAX_SEED, 1000)])
def test_noise_is_numpys_philox_with_seed_and_k_as_its_key(seed: int, k: int) -> None:
    """The 128-bit key holds the seed in its low half and k in its high half."""
    generator = np.random.Generator(np.random.Philox(key=seed + (k << 64)))
    wanted = generator.standard_normal((3, 4, 5), dtype=np.float32)
    drawn = noise(seed, k, (3, 4, 5))
    assert drawn.dtype == torch.float32
    assert np.array_equal(drawn.numpy(), wanted)


def test_noise_differs_for_every_seed_and_every_k() -> None:
    drawn = torch.stack([noise(seed, k, SHAPE) for seed in range(20) for k in range(20)]).flatten(1)
    assert len(drawn.unique(dim=0)) == 400


def test_noise_is_standard_normal_and_uncorrelated_along_the_chain() -> None:
    """400 x 500 numbers: mean, variance and the products of neighbours within 5 standard errors."""
    drawn = torch.stack([noise(3, k, (1, 20, 25)) for k in range(400)]).double().flatten(1)
    n = drawn.numel()
    assert abs(float(drawn.mean())) < 5 / n**0.5
    assert abs(float(drawn.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((drawn[1:] * drawn[:-1]).mean())) < 5 / n**0.5


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_outside_its_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed} must be 0"):
        noise(seed, 0, SHAPE)


def test_draw_noise_stacks_the_images_in_the_type_asked_for() -> None:
    drawn = draw_noise([5, 9], 2, torch.empty(0, *SHAPE, dtype=torch.float64))
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn[1], noise(9, 2, SHAPE).double())


# Batches


@pytest.mark.parametrize("labels", [None, [3, 1, 4, 1, 5, 9, 2]], ids=["unconditional", "labels"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_an_image_is_the_same_bit_for_bit_in_any_batch(plan: SamplingPlan, labels: list[int] | None) -> None:
    """Image i depends on its seed and label alone: batches of 1, 3 and 7, in either order, every state on the way."""
    seeds = [11, 5, 0, MAX_SEED, 8, 5, 123456789]
    whole = run(plan, seeds, labels)
    for chosen in ([3], [2, 3, 4], [6, 3, 0], [*range(6, -1, -1)]):
        part = run(plan, [seeds[i] for i in chosen], None if labels is None else [labels[i] for i in chosen])
        for some, every in zip(part, whole, strict=True):
            assert torch.equal(some.x, every.x[chosen])
            assert torch.equal(some.x_0_hat, every.x_0_hat[chosen])
    final = whole[-1].x
    assert torch.equal(final[1], final[5]) == (labels is None)  # the same seed, with another label where there are any
    assert not torch.equal(final[0], final[1])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_last_state_is_the_last_x_0_hat(plan: SamplingPlan) -> None:
    steps = run(plan, [1, 2])
    assert [s.index for s in steps] == list(range(len(plan)))
    assert torch.equal(steps[-1].x, steps[-1].x_0_hat)
    assert float(steps[-1].x.abs().max()) <= 1


def test_row_i_draws_noise_number_i_plus_1() -> None:
    """With x_0_hat = 0, the state after row 0 is a x_T + d z: x_T is noise 0, z is noise 1."""
    plan, seeds = PLANS["ddpm"], [4]
    denoiser = Denoiser(lambda x, t, label: torch.zeros_like(x), "sample", None, None)
    first = next(sample(denoiser, plan, noise(4, 0, SHAPE)[None], seeds))
    wanted = plan.a[0, 0] * noise(4, 0, SHAPE).double() + plan.d[0] * noise(4, 1, SHAPE).double()
    assert torch.allclose(first.x[0].double(), wanted, atol=1e-6)


# Network calls


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_one_row_of_a_plan_is_one_network_call_at_its_timestep(plan: SamplingPlan) -> None:
    network = Recorder()
    x = draw_noise([1, 2], 0, torch.empty(0, *SHAPE))
    assert len(list(sample(Denoiser(network, "epsilon", None, None), plan, x, [1, 2]))) == len(plan)
    assert network.times == [[t, t] for t in plan.timesteps.tolist()]


def test_a_chain_that_is_not_asked_on_calls_the_network_no_more() -> None:
    """sample() is lazy: a caller who stops after two rows has paid for two."""
    network = Recorder()
    chain = sample(Denoiser(network, "epsilon", None, None), PLANS["ddpm"], torch.zeros(1, *SHAPE), [1])
    next(chain), next(chain)
    assert len(network.times) == 2


# Guidance


def guide(network: Recorder, x: Tensor, labels: Tensor | None, scale: list[float] | None) -> Tensor:
    """x_0_hat of a network that predicts x_0, with null label 10 and no clipping."""
    t, abar = torch.zeros(len(x)), torch.full((len(x),), 0.5, dtype=torch.float64)
    guidance = None if scale is None else torch.tensor(scale)
    return Denoiser(network, "sample", None, 10)(x, t, abar, labels, guidance)


@pytest.mark.parametrize("scale", [None, [1.0, 1.0, 1.0]])
def test_guidance_of_1_costs_one_network_row_an_image(scale: list[float] | None) -> None:
    network, x = Recorder(), draw_noise([0, 1, 2], 0, torch.empty(0, *SHAPE))
    labels = torch.tensor([1, 2, 3])
    assert torch.equal(guide(network, x, labels, scale), Recorder()(x, torch.zeros(3), labels))
    assert network.labels == [[1, 2, 3]]


def test_a_mixed_batch_pays_two_rows_for_its_guided_images_alone() -> None:
    """eps_u + s (eps_c - eps_u) for each row's own s, in one call; s = 0 is the unconditional network."""
    network, x = Recorder(), draw_noise(range(4), 0, torch.empty(0, *SHAPE))
    labels, scale = torch.tensor([1, 2, 3, 4]), [1.0, 3.0, 0.0, 1.0]
    got = guide(network, x, labels, scale)
    assert network.labels == [[1, 2, 3, 4, 10, 10]]
    conditional = Recorder()(x, torch.zeros(4), labels)
    unconditional = Recorder()(x, torch.zeros(4), torch.full((4,), 10))
    for i, s in enumerate(scale):
        wanted = unconditional[i] + s * (conditional[i] - unconditional[i])
        assert torch.allclose(got[i], wanted, atol=1e-6)
    assert torch.equal(got[[0, 3]], conditional[[0, 3]])


def test_no_labels_means_the_null_label() -> None:
    network = Recorder()
    guide(network, torch.zeros(2, *SHAPE), None, None)
    assert network.labels == [[10, 10]]


def test_the_guided_result_is_clipped_once_after_combination() -> None:
    """A guided row that leaves +-clip is clipped; its two raw outputs were not."""
    x, abar = torch.zeros(1, *SHAPE), torch.full((1,), 0.5, dtype=torch.float64)

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        return torch.where(label == 10, 3.0, 2.0)[:, None, None, None].expand(-1, *SHAPE)

    denoiser = Denoiser(network, "sample", 1.0, 10)
    got = denoiser(x, torch.zeros(1), abar, torch.tensor([0]), torch.tensor([2.5]))
    assert torch.equal(got, torch.full_like(x, 0.5))  # 3 + 2.5 (2 - 3); clipped first it would be 1


def test_an_unconditional_network_refuses_labels_and_guidance() -> None:
    denoiser = Denoiser(Recorder(), "sample", None, None)
    x, t, abar = torch.zeros(1, *SHAPE), torch.zeros(1), torch.full((1,), 0.5)
    with pytest.raises(ValueError, match="unconditional"):
        denoiser(x, t, abar, torch.tensor([0]))
    with pytest.raises(ValueError, match="unconditional"):
        denoiser(x, t, abar, None, torch.tensor([2.0]))
    assert denoiser(x, t, abar, None, torch.tensor([1.0])).shape == x.shape
