"""ddpm_core.metrics against closed forms, constructed sets and loops over all pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ddpm_core import metrics


def with_moments(mean: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """2 F points whose mean and diagonal covariance (N - 1) are exactly these."""
    f = len(mean)
    offsets = torch.diag((variances * (2 * f - 1) / 2).sqrt())
    return mean + torch.cat([offsets, -offsets])


def test_frechet_distance_of_diagonal_covariances_is_the_hand_computed_one() -> None:
    a = with_moments(torch.tensor([0.0, 1, 2]).double(), torch.tensor([1.0, 4, 9]).double())
    b = with_moments(torch.tensor([3.0, 1, -2]).double(), torch.tensor([16.0, 1, 9]).double())
    by_hand = (9 + 0 + 16) + (1 - 4) ** 2 + (2 - 1) ** 2 + (3 - 3) ** 2  # means, then roots of the variances
    assert metrics.frechet_distance(a, b) == pytest.approx(by_hand, abs=1e-9)


def test_frechet_distance_of_rotated_sets_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
    b = torch.randn(60, 6, generator=generator, dtype=torch.float64) + 1
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    distance = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance, rel=1e-10)


def test_frechet_distance_of_gaussian_samples_approaches_the_closed_form() -> None:
    """Correlated Gaussians that commute: the same eigenvectors, other eigenvalues, so the roots subtract."""
    generator = torch.Generator().manual_seed(1)
    vectors, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    std_a, std_b = torch.tensor([1.0, 2, 3, 0.5, 1]).double(), torch.tensor([2.0, 1, 3, 1, 4]).double()
    mean = torch.tensor([1.0, 0, -1, 0, 2]).double()
    exact = float(mean.square().sum() + (std_a - std_b).square().sum())

    def error(n: int) -> float:
        z_a, z_b = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
        found = metrics.frechet_distance((z_a * std_a) @ vectors.T, (z_b * std_b) @ vectors.T + mean)
        return abs(found - exact)

    assert error(200_000) < 0.15
    assert error(200_000) < error(200)


def test_frechet_distance_is_symmetric_and_zero_of_equal_sets() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 300, 20, generator=generator, dtype=torch.float64)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), rel=1e-9)
    assert 0 <= metrics.frechet_distance(a, a) < 1e-9
    assert 0 <= metrics.frechet_distance(a[:5], a[:5]) < 1e-4  # fewer images than features: singular


@pytest.mark.parametrize(
    ("a", "b"), [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 3), (5, 4)), ((5,), (5, 1)), ((0, 3), (5, 3))]
)
def test_frechet_distance_refuses(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be|at least 2"):
        metrics.frechet_distance(torch.ones(a), torch.ones(b))


def test_class_balance_of_known_counts() -> None:
    balance = metrics.class_balance(torch.tensor([0, 0, 0, 1, 1, 2]), 4)
    assert balance.counts == (3, 2, 1, 0)
    assert balance.samples == 6
    assert (balance.rarest_share, balance.commonest_share) == (0, 0.5)
    assert balance.chi_square == pytest.approx((1.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 1.5)
    assert balance.degrees_of_freedom == 3


def test_class_balance_against_other_shares() -> None:
    balance = metrics.class_balance(torch.tensor([0, 0, 0, 1]), 2, torch.tensor([30, 10]))
    assert balance.chi_square == pytest.approx(0)
    assert math.isclose(balance.commonest_share, 0.75)


@pytest.mark.parametrize(
    ("labels", "classes", "shares"), [([], 3, None), ([3], 3, None), ([-1], 3, None), ([0], 1, None), ([0], 2, [1, 0])]
)
def test_class_balance_refuses(labels: list[int], classes: int, shares: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"labels|shares"):
        metrics.class_balance(
            torch.tensor(labels, dtype=torch.long), classes, None if shares is None else torch.tensor(shares)
        )


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kernel_distance_is_the_sum_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binkowski et al.'s estimator, pair by pair, without x = x; chunks that do not divide the sets change nothing."""
    a, b = normal(7, 3, seed=0), normal(5, 3, seed=1) + 1
    monkeypatch.setattr(metrics, "CHUNK", 2)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within_a = sum(kernel(x, y) for x, y in itertools.permutations(a, 2)) / (7 * 6)
    within_b = sum(kernel(x, y) for x, y in itertools.permutations(b, 2)) / (5 * 4)
    between = sum(kernel(x, y) for x, y in itertools.product(a, b)) / (7 * 5)
    assert metrics.kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_kernel_distance_is_unbiased_at_every_number_of_images() -> None:
    """Its mean over many small draws is 0 for equal distributions, and for a shift what many images say."""

    def draws(n: int, shift: float, count: int) -> torch.Tensor:
        x, y = normal(count, n, 4, seed=n), normal(count, n, 4, seed=n + 1) + shift
        return torch.tensor([metrics.kernel_distance(a, b) for a, b in zip(x, y, strict=True)])

    for n in (3, 20):
        equal = draws(n, 0.0, 400)
        assert abs(equal.mean()) <= 4 * equal.std() / 20
        assert (equal < 0).any()
    few, many = draws(5, 0.7, 400), draws(2000, 0.7, 3)
    assert abs(few.mean() - many.mean()) <= 4 * few.std() / 20 + 4 * many.std()
    assert many.min() > 0.5


def test_precision_and_recall_of_constructed_sets() -> None:
    """Real points on a line 1 apart: their radii are 2 inside (k = 3), so generated ones within reach are precise."""
    real = torch.stack([torch.arange(20.0), torch.zeros(20)], 1)
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    assert metrics.precision_recall(real, real + torch.tensor([0.0, 100.0])) == (0.0, 0.0)
    one_mode = torch.stack([9.5 + torch.arange(-2.0, 3.0) / 100, torch.zeros(5)], 1)  # precise, but of one place
    precision, recall = metrics.precision_recall(real, one_mode)
    assert (precision, recall) == (1.0, 0.0)
    half = torch.cat([real, real + torch.tensor([0.0, 50.0])])  # everything real, and as much that is not
    assert metrics.precision_recall(real, half) == (0.5, 1.0)


def test_precision_and_recall_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """k = 1: radii of 0, 1, 3 are 1, 1, 2; of the generated 5.5, 5, -1.5 they are 0.5, 0.5, 6.5."""
    monkeypatch.setattr(metrics, "CHUNK", 2)
    real, generated = torch.tensor([[0.0], [1], [3]]), torch.tensor([[5.5], [5], [-1.5]])
    precision, recall = metrics.precision_recall(real, generated, k=1)
    assert precision == pytest.approx(1 / 3)  # only 5 is within 2 of 3
    assert recall == 1.0  # all within 6.5 of -1.5
    assert metrics.precision_recall(generated, real, k=1) == (recall, precision)


@pytest.mark.parametrize(("a", "b"), [((3, 2), (9, 2)), ((9, 2), (3, 2)), ((9, 2), (9, 3))])
def test_precision_and_recall_refuse(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be|at least 4"):
        metrics.precision_recall(torch.ones(a), torch.ones(b))


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 2, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_a_copier_is_one_also_where_the_test_images_were_trained_on() -> None:
    real = torch.cat([torch.zeros(5), torch.arange(1.0, 96.0)])  # five of a hundred lie in the training set
    assert metrics.near_copies(torch.zeros(20), real) == 1


def test_nearest_distances_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 3)
    some, references = images(7, 0), images(11, 1)
    every = (some[:, None].double() - references[None].double()).flatten(2).norm(dim=2) / 255
    torch.testing.assert_close(metrics.nearest_distances(some, references), every.min(1).values, rtol=1e-6, atol=0)
    black, white = torch.zeros(1, 2, 4, 4, dtype=torch.uint8), torch.full((1, 2, 4, 4), 255, dtype=torch.uint8)
    assert float(metrics.nearest_distances(black, white)) == pytest.approx(math.sqrt(32))
    with pytest.raises(ValueError, match="cannot be held against"):
        metrics.nearest_distances(some, references[:, :1])
    with pytest.raises(ValueError, match="cannot be held against"):
        metrics.nearest_distances(some, references[:0])


def test_copies_of_training_images_are_found() -> None:
    """Real images have 1 % by definition, exact and slightly changed copies are found, fresh images are not."""
    train, test = images(300, 2), images(1000, 3)
    real = metrics.nearest_distances(test, train)
    assert metrics.near_copies(real, real) == pytest.approx(0.01)
    copies = train[:200].clone()
    assert metrics.nearest_distances(copies, train).max() == 0
    copies[:, 0, 0, 0] ^= 3
    fresh = images(200, 4)
    share = metrics.near_copies(metrics.nearest_distances(torch.cat([copies, fresh]), train), real)
    assert share == pytest.approx(0.5, abs=0.03)
