"""What becomes of a request whose replica refuses, dies or is not there, by replicas that say what a test lets them."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="make test-ray installs it")

from app.engine.request import (
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    EngineBusy,
    EngineError,
    EngineNotReady,
    GenerateParams,
    Progress,
    Result,
)
from app.metrics import Metrics
from deploy.ray import remote, service
from deploy.ray.autoscaling import ByWaiting
from deploy.ray.engine import Message
from deploy.ray.remote import RemoteReplicas
from deploy.ray.service import Scale, build

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

PARAMS = GenerateParams("one", (0,), (None,), "ddim", 5, 0.0, 1.0)
RESULT = Result(np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 1, 2, 2), np.uint8), 0.0, 0.0)
BUSY = EngineBusy("queue_full", "64 of 64 image slots are taken", 3.5)


class Handle:
    """Of a deployment that nobody asks."""

    def options(self, **_: Any) -> Handle:
        return self


class Scripted(RemoteReplicas):
    """Each sending gets the next script, the last one for ever; a script that ends without an answer is a death."""

    def __init__(self, *scripts: Sequence[Message | float], replicas: int = 2) -> None:
        super().__init__("tiny", Handle(), Metrics())  # type: ignore[arg-type]
        self.scripts, self.sent, self.ended = scripts, list[GenerateParams](), 0
        self._status, self._described = "ok", [None] * replicas  # type: ignore[list-item]

    async def _messages(self, params: GenerateParams, watched: bool) -> AsyncGenerator[Message]:
        script = self.scripts[min(len(self.sent), len(self.scripts) - 1)]
        self.sent.append(params)
        try:
            for message in script:
                if isinstance(message, float):
                    await asyncio.sleep(message)
                else:
                    yield message
        finally:
            self.ended += 1

    def drawn(self, params: GenerateParams = PARAMS, told: list[Progress] | None = None) -> Result:
        """The answer, or its error."""

        async def ask() -> Result:
            return await asyncio.wrap_future(await self.submit(params, None if told is None else told.append))

        return asyncio.run(ask())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)


def steps(*of: int) -> list[Progress]:
    return [Progress(step, 5, 0, 0.0) for step in of]


def test_what_a_replica_took_with_it_is_drawn_by_another() -> None:
    replicas, told = Scripted([None, steps(0, 1, 2)], [None, steps(0, 1), steps(2, 3, 4, 5), RESULT]), list[Progress]()
    assert replicas.drawn(told=told) is RESULT
    assert [progress.step for progress in told] == [0, 1, 2, 3, 4, 5], "it does not go back"
    assert replicas.idle


def test_one_that_is_lost_again_and_again_is_given_up() -> None:
    """It may be what kills them: it must not have all of them."""
    replicas = Scripted([None, steps(1)])
    with pytest.raises(EngineError, match="3 replicas were lost"):
        replicas.drawn()
    assert len(replicas.sent) == remote.MOST_LOST
    assert replicas.idle


def test_replicas_that_were_gone_before_they_took_it_do_not_count() -> None:
    replicas = Scripted(*[[]] * 10, [None, RESULT])
    assert replicas.drawn() is RESULT


def test_where_nobody_comes_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.05)
    replicas = Scripted([])
    with pytest.raises(EngineNotReady):
        replicas.drawn()
    assert replicas.idle


def test_a_full_replica_is_not_the_last_word() -> None:
    assert Scripted([BUSY], [None, RESULT]).drawn() is RESULT
    everywhere = Scripted([BUSY])
    with pytest.raises(EngineBusy, match="64 of 64") as refused:
        everywhere.drawn()
    assert (refused.value.retry_after_s, len(everywhere.sent)) == (4, 2), "as many tries as replicas"


def test_what_was_accepted_waits_for_room() -> None:
    """Its client has a status already: it is not refused any more."""
    replicas = Scripted([None], *[[BUSY]] * 20, [DuplicateRequest("one")], [None, RESULT])
    assert replicas.drawn() is RESULT


@pytest.mark.parametrize("error", [ValueError("steps=7 must be 5"), EngineError("image 0: not finite")])
def test_an_answer_is_an_answer(error: Exception) -> None:
    replicas = Scripted([error])
    with pytest.raises(type(error), match=str(error)[:8]):
        replicas.drawn()
    accepted = Scripted([None, error])
    with pytest.raises(type(error)):
        accepted.drawn()
    assert (len(replicas.sent), len(accepted.sent)) == (1, 1)


def test_the_deadline_is_of_the_client_not_of_each_replica() -> None:
    replicas = Scripted([None, 0.2], [None, 0.2])
    with pytest.raises(DeadlinePassed):
        replicas.drawn(dataclasses.replace(PARAMS, deadline_s=0.3))
    first, second = (params.deadline_s for params in replicas.sent)
    assert first is not None
    assert second is not None
    assert second < 0.11 < 0.29 < first


def test_whoever_cancels_ends_it_where_it_is() -> None:
    async def ask(replicas: Scripted) -> BaseException | None:
        future = await replicas.submit(PARAMS)
        with pytest.raises(DuplicateRequest):
            await replicas.submit(PARAMS)
        assert replicas.holds("/one")
        assert replicas.cancel("one")
        assert not replicas.cancel("one")
        while not replicas.idle:
            await asyncio.sleep(0.001)
        return future.exception()

    replicas = Scripted([None, 60.0])
    assert isinstance(asyncio.run(ask(replicas)), Cancelled)
    assert replicas.ended == 1


def test_a_client_that_leaves_before_it_is_accepted_ends_it() -> None:
    async def leave(replicas: Scripted) -> None:
        asking = asyncio.create_task(replicas.submit(PARAMS))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while not replicas.idle:
            await asyncio.sleep(0.001)

    replicas = Scripted([60.0])
    asyncio.run(leave(replicas))
    assert replicas.ended == 1


def test_a_service_that_ends_tells_who_is_left() -> None:
    async def ask(replicas: Scripted) -> BaseException | None:
        replicas._loop = asyncio.get_running_loop()
        future = await replicas.submit(PARAMS)
        assert replicas.stop(0)
        with pytest.raises(EngineNotReady):
            await replicas.submit(dataclasses.replace(PARAMS, request_id="two"))
        while not replicas.idle:
            await asyncio.sleep(0.001)
        return future.exception()

    assert isinstance(asyncio.run(ask(Scripted([None, 60.0]))), EngineNotReady)


@dataclasses.dataclass
class Context:
    """What Ray Serve tells a policy."""

    aggregated_metrics: dict[str, dict[str, float]] | None
    target_num_replicas: int = 3


@pytest.mark.parametrize(
    ("slots", "wanted"), [((0.0, 0.0), 0.0), ((16.0, 16.0), 1.0), ((40.0, 24.0), 2.0), ((320.0, 320.0), 20.0)]
)
def test_replicas_are_as_many_as_the_images_want(slots: tuple[float, float], wanted: float) -> None:
    found = {"slots": dict(zip("ab", slots, strict=True)), "rows": {"a": 16.0, "b": 8.0}}
    assert ByWaiting(waiting=1.0)(Context(found)) == (wanted, {})  # type: ignore[arg-type]


def test_without_figures_nothing_changes() -> None:
    for nothing in (None, {}, {"slots": {}, "rows": {}}):
        assert ByWaiting(waiting=1.0)(Context(nothing)) == (3, {})  # type: ignore[arg-type]


def test_ray_serve_sees_what_arguments_there_are() -> None:
    """It makes a model of a command line's words where the parameter is annotated with one, not with its name."""
    assert inspect.signature(build).parameters["scale"].annotation is Scale
    readme = (Path(service.__file__).parent / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in Scale.model_fields)


@pytest.mark.parametrize("device", ["all", "cuda:0,cuda:1"])
def test_a_replica_has_one_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_DEVICE", device)
    with pytest.raises(ValueError, match="one device"):
        build(Scale())
