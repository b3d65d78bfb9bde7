"""The check at start-up: networks whose rows are not their own are found out, padded, pinned or reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine.runner import Runner
from app.engine.selfcheck import MOST_FLOPS, find_exactness, measure, prepare
from ddpm_core.checkpoint import Model
from tests.service.conftest import Service
from tests.service.engine.conftest import CPU, Counting, Stepped

TINY = 2.0**-20


class Spoiled(Counting):
    """Adds a trifle that depends on what a row should not know."""

    def __init__(self, trifle: Callable[[Tensor, Tensor], Tensor | float]) -> None:
        super().__init__()
        self.trifle = trifle

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return super().__call__(x_t, t, label) + TINY * self.trifle(x_t, t)


def by_position(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.arange(len(x_t))[:, None, None, None]


NETWORKS = {
    "its own": (lambda x, t: 0.0, True, 1),
    "size": (lambda x, t: len(x), True, 8),
    "size modulo 2": (lambda x, t: len(x) % 2, True, 2),
    "size modulo 4": (lambda x, t: len(x) % 4, True, 4),
    "large sizes": (lambda x, t: len(x) > 20, True, 8),
    "one size": (lambda x, t: len(x) == 27, True, 2),
    "position": (by_position, False, 1),
    "neighbours": (lambda x, t: x.mean(), False, 1),
    "the row before": (lambda x, t: x.roll(1, 0), False, 1),
    "NaN beside it": (lambda x, t: float(x.isnan().any()), False, 1),
    "NaN beside it in a pair": (lambda x, t: float(x.isnan().any() and len(x) == 2), True, 4),
    "other timesteps beside it": (lambda x, t: float((t != t[0]).any()), False, 1),
    "the last row": (lambda x, t: x[-1:].mean(), False, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_row_depends_on_is_found(model: Model, name: str) -> None:
    trifle, exact, multiple = NETWORKS[name]
    runner = Runner(model, CPU, Spoiled(trifle))
    found = find_exactness(runner, most=32, pin=8)
    assert (found.exact, found.rows_multiple) == (exact, multiple)
    assert runner.rows_multiple == multiple
    assert ("not exact" in found.how) == (not exact)


@pytest.mark.parametrize("name", [name for name, (_, exact, _) in NETWORKS.items() if exact])
def test_a_brief_check_ends_with_the_same_bits(make_engine: Callable[..., Stepped], name: str) -> None:
    """What is made here at the command line is what a service makes, even where their multiples differ."""
    trifle = NETWORKS[name][0]
    full, brief = (make_engine(Spoiled(trifle), exact=True, batch_rows=None, brief=brief) for brief in (False, True))
    assert brief.engine.rows_limit <= 8
    asked = {"seeds": tuple(range(11)), "labels": (3, None) * 5 + (4,), "guidance_scale": 2.0, "steps": 3}
    assert (brief.alone(**asked).x == full.alone(**asked).x).all()


def test_padding_is_counted_and_done(make_engine: Callable[..., Stepped]) -> None:
    """After the check no call has another size than the ones that were found to be safe."""
    network = Spoiled(lambda x, t: len(x) % 4)
    stepped = make_engine(network, exact=True, batch_rows=None)
    assert (stepped.engine.exactness.exact, stepped.engine.exactness.rows_multiple) == (True, 4)
    network.calls.clear()
    stepped.submit("a", n=3)
    stepped.submit("b", n=2, guidance_scale=2.0)
    stepped.finish()
    assert network.calls
    assert not [rows for rows in network.calls if rows % 4]
    registry = stepped.engine.metrics.registry
    assert registry.get_sample_value("ddpm_padding_rows_total", {"model": "model"}) == sum(network.calls) - 4 * (
        3 + 2 * 2
    )


def test_a_pinned_network_sees_one_size_alone(make_engine: Callable[..., Stepped]) -> None:
    network = Spoiled(lambda x, t: len(x))
    stepped = make_engine(network, exact=True, batch_rows=None)
    assert stepped.engine.rows_limit == 8
    network.calls.clear()
    first = stepped.alone(n=1, seed=3).x
    together = [stepped.submit("a", n=5, seed=2), stepped.submit("b", n=9, seed=9, sampler="ddpm")]
    stepped.finish()
    assert set(network.calls) == {8}
    alone = stepped.alone(n=1, seed=3, labels=(1,)).x
    assert together[0].result(0).x[1].tobytes() == alone[0].tobytes()
    assert first.tobytes() != alone.tobytes()  # another label: the comparison can fail


def test_a_large_network_is_pinned_to_what_a_step_may_cost(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a lone picture would wait for eight of them."""
    runner = Runner(model, CPU, Spoiled(lambda x, t: len(x)))
    monkeypatch.setitem(MOST_FLOPS, "cpu", 3.5 * runner.flops)
    exactness, _, rows = prepare(runner, exact=True, batch_rows=None)
    assert (exactness.exact, exactness.rows_multiple, rows) == (True, 3, 3)


@pytest.mark.parametrize("name", ["size modulo 4", "neighbours"])
def test_health_says_what_was_found(
    make_service: Callable[..., Service], model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trifle, exact, _ = NETWORKS[name]
    monkeypatch.setattr(Runner, "load", lambda directory, device, sha256: Runner(model, CPU, Spoiled(trifle)))
    health = make_service().request("GET", "/health").json()["engine"]
    assert health["exact"] is exact
    assert ("multiple of 4" in health["exactness"]) == exact
    assert ("not exact" in health["exactness"]) != exact


def test_it_can_be_spared(make_service: Callable[..., Service]) -> None:
    health = make_service(exact=False).request("GET", "/health").json()["engine"]
    assert health["exact"] is False
    assert "DDPM_EXACT" in health["exactness"]


def test_the_real_network_is_exact_here(model_dir: Path, model: Model) -> None:
    """On every machine that runs these tests ONNX Runtime's rows have been their own; the engine would pad if not."""
    found = find_exactness(Runner.load(str(model_dir), "cpu"), most=32, pin=8)
    assert found.exact


def test_the_step_time_is_measured_as_far_as_steps_stay_short(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(model, CPU, Counting())
    assert [rows for rows, _ in measure(runner, 32).points] == [1, 2, 4, 8, 16, 32]
    runner.pad_to(4)
    assert [rows for rows, _ in measure(runner, 8).points] == [4, 8]
    monkeypatch.setattr("app.engine.selfcheck.LONGEST_S", 0.0)
    runner.pad_to(1)
    assert [rows for rows, _ in measure(runner, 32).points] == [1]
