"""The engine, step by step: what shares a network call, what ends and with what answer. No test waits on a clock."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.admission import Bounds
from app.engine.engine import Engine
from app.engine.request import (
    Cancelled,
    DeadlinePassed,
    DeadlineTooSoon,
    DuplicateRequest,
    EngineBusy,
    EngineError,
    EngineNotReady,
    Progress,
    Start,
)  # fmt: skip
from app.engine.runner import Runner
from app.engine.steptime import StepTime
from ddpm_core.checkpoint import Model
from ddpm_core.noise import noise
from ddpm_core.sampling import sample
from tests.service.engine.conftest import CPU, Counting, Stepped

Make = Callable[..., Stepped]


class Poisoned(Counting):
    """Raises where a batch holds label 9, and returns NaN for rows of label 8."""

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        out = super().__call__(x_t, t, label)
        assert label is not None
        if (label == 9).any():
            raise RuntimeError("poison")
        out[label == 8] = float("nan")
        return out


def metric(stepped: Stepped, name: str, **labels: str) -> float:
    of_model = {"model": stepped.engine.name}
    value = stepped.engine.metrics.registry.get_sample_value(f"ddpm_{name}", of_model | labels)
    assert value is not None
    return value


# ---- steps are shared


def test_requests_of_other_samplers_steps_and_guidance_share_every_call(make_engine: Make) -> None:
    """ddpm with 20 steps and guided dpmpp_2m with 11, together: 20 network calls, not 31."""
    network = Counting()
    stepped = make_engine(network)
    network.calls.clear()
    stepped.submit("a", sampler="ddpm", steps=20)
    stepped.submit("b", sampler="dpmpp_2m", steps=11, guidance_scale=3.0)
    assert stepped.finish() == 20
    assert network.calls == [3] * 11 + [1] * 9
    assert metric(stepped, "batch_rows_sum") == 3 * 11 + 9
    assert metric(stepped, "step_seconds_count") == 20


def test_a_request_joins_between_two_steps(make_engine: Make) -> None:
    network = Counting()
    stepped = make_engine(network)
    network.calls.clear()
    stepped.submit("a", steps=6)
    stepped.engine.tick()
    stepped.engine.tick()
    stepped.submit("b", steps=3, n=2)
    stepped.finish()
    assert network.calls == [1, 1, 3, 3, 3, 1]


def test_nothing_is_copied_back_before_a_row_ends(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a tensor is copied back by is counted, whoever calls it."""
    stepped = make_engine(Counting())
    copied: list[tuple[int, ...]] = []
    for how in ("cpu", "numpy", "tolist", "item"):
        copy = getattr(Tensor, how)
        monkeypatch.setattr(Tensor, how, lambda x, *a, c=copy, **k: copied.append(tuple(x.shape)) or c(x, *a, **k))
    stepped.submit("a", steps=5, n=2)
    stepped.submit("b", steps=3)
    for _ in range(2):
        stepped.engine.tick()
    assert copied == []
    stepped.engine.tick()
    assert set(copied) == {(1, 1, 28, 28)}
    copied.clear()
    stepped.engine.tick()
    assert copied == []
    stepped.finish()
    assert set(copied) == {(2, 1, 28, 28)}


# ---- exact


HOW = [
    {"sampler": "ddpm", "steps": 7},
    {"sampler": "ddpm", "steps": 5, "guidance_scale": 3.0},
    {"sampler": "ddim", "steps": 4, "eta": 0.6},
    {"sampler": "dpmpp_2m", "steps": 6},
    {"sampler": "dpmpp_2m", "steps": 3, "guidance_scale": 0.5},
    {"sampler": "ddim", "steps": 2, "start": Start(np.full((1, 28, 28), 99, np.uint8), 500)},
]


def test_an_image_is_the_same_alone_and_among_others(make_engine: Make) -> None:
    """To the last float32 bit of x, and so to the last byte; every kind of request beside every other."""
    stepped = make_engine()
    alone = [stepped.alone(n=3, seed=10 * i, **how) for i, how in enumerate(HOW)]
    futures = []
    for i, how in enumerate(HOW):
        futures.append(stepped.submit(str(i), n=3, seed=10 * i, **how))
        stepped.engine.tick()
    stepped.finish()
    for expected, future in zip(alone, futures, strict=True):
        found = future.result(0)
        assert found.x.tobytes() == expected.x.tobytes()
        assert np.array_equal(found.images, expected.images)


def test_the_third_image_of_seven_can_be_had_alone(make_engine: Make) -> None:
    stepped = make_engine()
    for how in HOW:
        seven = stepped.alone(n=7, seed=40, labels=(3,) * 7, **how)
        third = stepped.alone(n=1, seed=42, labels=(3,), **how)
        assert third.x[0].tobytes() == seven.x[2].tobytes()
        assert third.x[0].tobytes() != seven.x[1].tobytes()


def test_the_engine_draws_what_the_library_draws(make_engine: Make, model: Model) -> None:
    """sample() and the engine share step() and the network: the same bits, not only the same picture."""
    stepped = make_engine()
    for how in HOW[:5]:
        found = stepped.alone(n=2, seed=5, **how)
        plan = model.plan(how["sampler"], how["steps"], eta=how.get("eta", 0.0))
        x = torch.stack([noise(seed, 0, (1, 28, 28)) for seed in (5, 6)])
        scale = torch.full((2,), how.get("guidance_scale", 1.0))
        labels = torch.tensor([0, 1])
        *_, last = sample(model.denoiser(model.network(CPU)), plan, x, [5, 6], labels=labels, guidance_scale=scale)
        assert last.x.numpy().tobytes() == found.x.tobytes()


def test_a_chain_from_t_0_returns_nearly_what_it_was_given(make_engine: Make) -> None:
    """abar_0 is nearly 1; from t = 999 the image does not matter any more, from 0 it is nearly all that does."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 28, 28), dtype=np.uint8)
    stepped = make_engine(lambda x, t, label: torch.zeros_like(x))  # v = 0: x_0_hat = sqrt(abar) x_t
    near = stepped.alone(steps=1, start=Start(pixels, 0)).images[0]
    assert np.abs(near.astype(int) - pixels).max() <= 8
    far = [stepped.alone(steps=1, start=Start(p, 999)).x for p in (pixels, 255 - pixels)]
    assert np.abs(far[0] - far[1]).max() < 1e-4


# ---- isolated


def test_a_raising_row_ends_its_request_and_no_other(make_engine: Make, caplog: pytest.LogCaptureFixture) -> None:
    stepped = make_engine(Poisoned())
    expected = [stepped.alone(n=2, seed=s, labels=(1, 2)).x for s in (1, 5, 9)]
    futures = [stepped.submit(str(s), n=2, seed=s, labels=(1, 2)) for s in (1, 5)]
    bad = stepped.submit("bad", n=2, labels=(3, 9))
    futures.append(stepped.submit("9", n=2, seed=9, labels=(1, 2)))
    stepped.finish()
    with pytest.raises(EngineError, match="image 1: a step failed with RuntimeError"):
        bad.result(0)
    assert [f.result(0).x.tobytes() for f in futures] == [x.tobytes() for x in expected]
    assert [r.request_id for r in caplog.records if r.levelname == "ERROR"] == ["bad"]
    assert metric(stepped, "requests_total", outcome="failed") == 1
    assert metric(stepped, "wasted_steps_total") == 1  # of its other image


def test_a_nan_row_ends_its_request_and_no_other(make_engine: Make) -> None:
    stepped = make_engine(Poisoned())
    expected = stepped.alone(n=2, seed=1, labels=(1, 2)).x
    good, bad = stepped.submit("good", n=2, seed=1, labels=(1, 2)), stepped.submit("bad", n=1, labels=(8,))
    stepped.finish()
    with pytest.raises(EngineError, match="not finite"):
        bad.result(0)
    assert good.result(0).x.tobytes() == expected.tobytes()
    assert stepped.alone(n=2, seed=1, labels=(1, 2)).x.tobytes() == expected.tobytes()  # in the slot that held NaN too


def test_a_failure_half_way_never_gives_a_wrong_image(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written a step may be tried again; after that its rows fail."""
    stepped = make_engine()
    asked = [{"n": 2, "seed": s, "sampler": "ddpm", "steps": 4} for s in (1, 5, 9)]
    expected = [stepped.alone(**fields).x.tobytes() for fields in asked]
    runner, write, begin = stepped.engine._runner, Runner._write, Runner.begin
    begins: list[int] = []

    def begin_badly(self: Runner, row: Any) -> None:
        begins.append(row.seed)
        if len(begins) == 4:
            raise MemoryError
        begin(self, row)

    monkeypatch.setattr(Runner, "begin", begin_badly)
    futures = [stepped.submit(str(i), **fields) for i, fields in enumerate(asked)]
    stepped.finish()
    assert [future.result(0).x.tobytes() for future in futures] == expected
    assert len(begins) == 7

    writes: list[int] = []

    def write_half(self: Runner, rows: Any, xs: Tensor, x_0_hats: Tensor) -> None:
        writes.append(len(rows))
        if len(writes) == 2:
            self._x[: len(xs), self._slots(rows)] = xs
            raise MemoryError
        write(self, rows, xs, x_0_hats)

    monkeypatch.setattr(Runner, "_write", write_half)
    stepped.engine.rows_limit = 4
    futures = [stepped.submit(str(i), **fields) for i, fields in enumerate(asked)]
    with torch.inference_mode():
        stepped.finish()
    found = [future.exception(0) or future.result().x.tobytes() for future in futures]
    assert sum(isinstance(answer, EngineError) for answer in found) >= 1
    assert all(isinstance(a, EngineError) or a == e for a, e in zip(found, expected, strict=True))
    assert runner is stepped.engine._runner


def test_slots_are_used_again(make_engine: Make) -> None:
    """After any end; the device's state grows with what runs at once, not with what has run."""
    stepped = make_engine(Poisoned())
    for i in range(30):
        stepped.submit(f"done {i}", n=3, labels=(1, 2, 3))
        stepped.submit(f"bad {i}", n=2, labels=(9, 8))
        stepped.submit(f"gone {i}", n=3, labels=(1, 2, 3))
        stepped.engine.tick()
        stepped.engine.cancel(f"gone {i}")
        stepped.finish()
    runner = stepped.engine._runner
    assert len(runner._free) == runner._x.shape[1] <= 16
    assert (stepped.engine.scheduler.slots, stepped.engine.scheduler.running) == (0, 0)


def test_an_engine_that_can_make_no_step_fails_and_tells_everyone(
    make_engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Counting):
        broken = False

        def __call__(self, *inputs: Any) -> Tensor:
            if self.broken:
                raise OSError("the device is gone")
            return super().__call__(*inputs)

    network = Broken()
    stepped = make_engine(network)
    futures = [stepped.submit(str(i)) for i in range(20)]
    Broken.broken = True
    died: list[BaseException] = []
    stepped.engine.on_failure = died.append
    stepped.engine.load = lambda: None  # type: ignore[method-assign]
    stepped.engine.start()
    for future in futures:
        with pytest.raises(EngineError):
            future.result(60)
    stepped.engine._thread.join(60)
    assert stepped.engine.status == "failed"
    assert [str(error) for error in died] == ["the device is gone"]
    with pytest.raises(EngineNotReady, match="failed"):
        stepped.submit("late")
    assert [r.levelname for r in caplog.records if "worker thread has died" in r.message] == ["CRITICAL"]


# ---- cancelled


def test_a_cancelled_request_makes_no_further_step(make_engine: Make) -> None:
    network = Counting()
    stepped = make_engine(network)
    future, other = stepped.submit("a", n=4, steps=50), stepped.submit("b", steps=3)
    stepped.engine.tick()
    assert metric(stepped, "slots_running") == 5
    assert stepped.engine.cancel("a")
    assert metric(stepped, "slots_running") == 1
    assert not stepped.engine.cancel("a")
    assert stepped.finish() == 2
    with pytest.raises(Cancelled):
        future.result(0)
    assert other.result(0).images.shape == (1, 1, 28, 28)
    assert metric(stepped, "wasted_steps_total") == 4
    assert metric(stepped, "requests_total", outcome="cancelled") == 1


def test_a_request_cancelled_during_its_step_is_dropped_after_it(make_engine: Make) -> None:
    class Cancelling(Counting):
        engine: Engine | None = None

        def __call__(self, *inputs: Any) -> Tensor:
            if self.engine:
                self.engine.cancel("a")
            return super().__call__(*inputs)

    network = Cancelling()
    stepped = make_engine(network)
    expected = stepped.alone(seed=7).x
    network.engine = stepped.engine
    gone, stays = stepped.submit("a", n=2, steps=1), stepped.submit("b", seed=7)
    stepped.finish()
    with pytest.raises(Cancelled):
        gone.result(0)
    assert stays.result(0).x.tobytes() == expected.tobytes()


# ---- bounded, and told when


def test_a_full_queue_refuses_before_it_accepts(make_engine: Make) -> None:
    stepped = make_engine(bounds=Bounds(10))
    stepped.submit("a", n=8, steps=1000)
    with pytest.raises(EngineBusy, match="8 of 10") as refused:
        stepped.submit("b", n=3)
    time_of_one_image = 1000 * 8 / 8 * stepped.engine.step_time.seconds(8) / 8
    assert refused.value.retry_after_s == max(1, -(-time_of_one_image // 1))
    stepped.submit("c", n=2)
    assert (metric(stepped, "slots_waiting"), metric(stepped, "slots_limit")) == (10, 10)
    with pytest.raises(DuplicateRequest):
        stepped.submit("a")


def test_a_deadline_that_cannot_be_met_is_refused_at_once(make_engine: Make) -> None:
    stepped = make_engine()
    stepped.engine.step_time = StepTime([(1, 0.001), (8, 0.004)])  # whatever else the machine does
    alone_s = 1000 * stepped.engine.step_time.seconds(1)
    with pytest.raises(DeadlineTooSoon) as refused:
        stepped.submit("a", steps=1000, deadline_s=alone_s / 2)
    assert refused.value.needed_s == pytest.approx(alone_s)
    for i in range(8):
        stepped.submit(f"before {i}", n=8, steps=900)
    with pytest.raises(DeadlineTooSoon) as refused:
        stepped.submit("a", steps=1000, n=8, deadline_s=10 * alone_s)
    assert refused.value.alone_s < 10 * alone_s < refused.value.needed_s
    assert stepped.submit("small", steps=5, deadline_s=10 * alone_s)  # it goes before the others


def test_a_slow_spell_does_not_lock_deadlines_out(make_engine: Make) -> None:
    """What is refused makes no step that could tell that the machine is fast again."""
    stepped = make_engine()
    model = stepped.engine.step_time
    for _ in range(200):
        model.observe(1, 100 * model.points[0][1])
    enough_s = 2 * 10 * model.points[0][1]
    assert 10 * model.seconds(1) > enough_s
    assert stepped.submit("a", steps=10, deadline_s=enough_s)
    with pytest.raises(DeadlineTooSoon):
        stepped.submit("b", steps=10, deadline_s=enough_s)  # not idle any more


def test_a_deadline_that_passes_ends_the_request(make_engine: Make) -> None:
    stepped = make_engine()
    late, calm = stepped.submit("late", steps=5, deadline_s=1000.0), stepped.submit("calm", steps=5)
    stepped.engine.tick()
    stepped.clock.now += 1000.0
    assert stepped.finish() == 4
    with pytest.raises(DeadlinePassed):
        late.result(0)
    assert calm.result(0)
    assert metric(stepped, "requests_total", outcome="deadline") == 1


def test_predicted_and_real_waits_are_measured(make_engine: Make) -> None:
    stepped = make_engine()
    stepped.submit("a", steps=3)
    stepped.clock.now += 0.5
    stepped.engine.tick()
    stepped.clock.now += 2.0
    stepped.finish()
    assert metric(stepped, "queue_seconds_sum") == pytest.approx(0.5)
    assert metric(stepped, "wait_seconds_sum") == pytest.approx(2.5)
    assert metric(stepped, "wait_predicted_seconds_sum") == pytest.approx(3 * stepped.engine.step_time.points[0][1])
    assert metric(stepped, "images_total") == 1


# ---- fair


def test_a_small_request_does_not_wait_for_a_large_one(make_engine: Make) -> None:
    stepped = make_engine()
    stepped.submit("large", n=64, labels=(1,) * 64, steps=10)
    for _ in range(5):
        stepped.engine.tick()
    small = stepped.submit("small", steps=10)
    for _ in range(10):
        stepped.engine.tick()
    assert small.done()
    assert metric(stepped, "slots_running") + metric(stepped, "slots_waiting") > 40


# ---- progress


def test_progress_is_told_once_a_step_with_previews_when_due(make_engine: Make) -> None:
    stepped = make_engine()
    told: list[Progress] = []
    stepped.submit("a", told.append, steps=5, n=2, previews=2)
    result = stepped.submit("b", steps=5, n=2)
    stepped.finish()
    assert [(p.step, p.steps) for p in told] == [(i, 5) for i in range(6)]
    assert [[index for index, _ in p.previews] for p in told] == [[], [], [0, 1], [], [0, 1], []]
    assert told[4].previews[0][1].shape == (1, 28, 28)
    assert told[0].eta_s > 0
    assert told[-1].eta_s == 0
    assert result.result(0)


def test_the_last_preview_is_the_image(make_engine: Make) -> None:
    """Every plan ends with x_0_hat itself."""
    stepped = make_engine()
    told: list[Progress] = []
    future = stepped.submit("a", told.append, steps=4, previews=1)
    stepped.finish()
    assert np.array_equal(told[-1].previews[0][1], future.result(0).images[0])
    assert len({p.previews[0][1].tobytes() for p in told[1:]}) == 4


def test_a_waiting_client_hears_of_its_place_now_and_then(make_engine: Make) -> None:
    stepped = make_engine(batch_rows=1)
    for i in range(3):
        stepped.submit(str(i), steps=5)
    told: list[Progress] = []
    stepped.submit("last", told.append, steps=5)
    for _ in range(15):
        stepped.clock.now += 0.3
        stepped.engine.tick()
    assert [p.queue_position for p in told if p.step == 0] == [3, 2, 1]
    stepped.finish()
    assert (told[-1].step, told[-1].queue_position) == (5, 0)


def test_a_listener_that_raises_harms_nobody(make_engine: Make) -> None:
    stepped = make_engine()

    def deaf(progress: Progress) -> None:
        raise RuntimeError("the loop is closed")

    future = stepped.submit("a", deaf)
    stepped.finish()
    assert future.result(0)


# ---- the end


def test_draining_finishes_what_was_accepted(make_engine: Make) -> None:
    stepped = make_engine()
    future = stepped.submit("a", steps=5)
    stepped.engine.drain()
    with pytest.raises(EngineNotReady, match="draining"):
        stepped.submit("b")
    stepped.finish()
    assert future.result(0)


def test_stopping_ends_what_the_drain_time_leaves(model: Model) -> None:
    """The thread ends, and nobody waits for ever."""
    gate = threading.Event()

    class Held(Counting):
        held = False

        def __call__(self, *inputs: Any) -> Tensor:
            if self.held:
                gate.wait(60)
            return super().__call__(*inputs)

    network = Held()
    engine = Engine(lambda: Runner(model, CPU, network), bounds=Bounds(8), exact=False, batch_rows=2)
    stepped = Stepped(engine, None)  # type: ignore[arg-type]
    engine.load()
    Held.held = True
    engine.load = lambda: None  # type: ignore[method-assign]
    engine.start()
    future = stepped.submit("a", steps=50)
    assert not engine.stop(0.05)
    with pytest.raises(EngineNotReady, match="draining"):
        future.result(0)
    gate.set()
    assert engine.stop(60)


def test_an_idle_engine_blocks(make_engine: Make) -> None:
    """It does not poll: with nothing to do the thread makes no tick, and wakes for the next request."""
    stepped = make_engine()
    engine, ticks = stepped.engine, []
    tick = engine.tick
    engine.tick = lambda waited_s: ticks.append(waited_s) or tick(waited_s)  # type: ignore[method-assign]
    engine.load = lambda: None  # type: ignore[method-assign]
    engine.start()
    for name in ("a", "b"):
        assert stepped.submit(name, steps=2).result(60)
    assert engine.stop(60)
    assert len(ticks) <= 6  # two steps each, and the release of the rows


@pytest.mark.parametrize(
    "error", [EngineBusy("queue_full", "no room", 3.5), DeadlineTooSoon(2.0, 1.0), EngineNotReady("failed")], ids=repr
)
def test_refusals_can_travel(error: EngineError) -> None:
    """Between processes, where engines are replicas elsewhere."""
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
