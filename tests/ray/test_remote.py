"""What becomes of a request whose replica refuses, dies or is not there, by replicas that say what a test lets them."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="make test-ray installs it")

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from app.engine.request import (
    Cancelled,
    DeadlinePassed,
    DeadlineTooSoon,
    DuplicateRequest,
    EngineBusy,
    EngineError,
    EngineNotReady,
    GenerateParams,
    Progress,
    ReplicaState,
    Result,
)
from app.metrics import Metrics
from deploy.ray import flight, remote, service
from deploy.ray.autoscaling import ByWaiting
from deploy.ray.engine import Accepted, Described, Message, Refused
from deploy.ray.remote import RemoteReplicas
from deploy.ray.router import FewestImages
from deploy.ray.service import Scale, build

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

PARAMS = GenerateParams("one", (0,), (None,), "ddim", 5, 0.0, 1.0)
RESULT = Result(np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 1, 2, 2), np.uint8), 0.0, 0.0)
TAKEN = Accepted()
BUSY = EngineBusy("queue_full", "64 of 64 image slots are taken", 3.5)
FULL = {name: Refused(name, BUSY) for name in "abc"}
GONE = DeploymentUnavailableError.__new__(DeploymentUnavailableError)

Script = Sequence[Message | BaseException | float]
"""What a replica says, how long it takes, and the error of Ray's that comes instead of more."""


class Response(DeploymentResponseGenerator[Any]):
    """One sending's answer; as Ray Serve's, it raises its error again when it is cancelled."""

    def __init__(self, script: Script) -> None:
        self.left, self.error, self.cancels = list(script), None, 0

    async def __anext__(self) -> Any:
        while self.left:
            message = self.left.pop(0)
            if isinstance(message, float):
                await asyncio.sleep(message)
            elif isinstance(message, BaseException) and not isinstance(message, EngineError):
                self.error = message
                raise message
            else:
                return message
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancels += 1
        if self.error is not None:
            raise self.error


class Handle:
    """Of a deployment: each sending gets the next script, the last one for ever."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.scripts, self.sent = scripts, list[GenerateParams]()
        self.avoided, self.responses = list[tuple[str, ...]](), list[Response]()

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, params: GenerateParams, watched: bool, *, avoid: tuple[str, ...]) -> Response:
        response = Response(self.scripts[min(len(self.sent), len(self.scripts) - 1)])
        self.sent.append(params)
        self.avoided.append(avoid)
        self.responses.append(response)
        return response


class Scripted(RemoteReplicas):
    """A model of so many replicas that follow scripts."""

    def __init__(self, *scripts: Script, replicas: int = 2) -> None:
        self.handle = Handle(scripts)
        super().__init__("tiny", self.handle, Metrics())  # type: ignore[arg-type]
        self._status, self._described = "ok", [None] * replicas  # type: ignore[list-item]

    def drawn(self, params: GenerateParams = PARAMS, told: list[Progress] | None = None) -> Result:
        """The answer, or its error."""

        async def ask() -> Result:
            future = await self.submit(params, None if told is None else told.append)
            return await asyncio.wrap_future(future)

        async def to_the_end() -> Result:
            try:
                return await ask()
            finally:
                while not self.idle:
                    await asyncio.sleep(0.001)

        return asyncio.run(asyncio.wait_for(to_the_end(), 30))

    def refused(self, reason: str) -> float:
        found = self._metrics.registry.get_sample_value("ddpm_refused_total", {"reason": reason})
        assert found is not None
        return found


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "PAUSE_S", 0.0001)
    monkeypatch.setattr(flight, "LONGEST_PAUSE_S", 0.002)


def steps(*of: int) -> list[Progress]:
    return [Progress(step, 5, 0, 0.0) for step in of]


def test_what_a_replica_took_with_it_is_drawn_by_another() -> None:
    replicas, told = (
        Scripted([TAKEN, steps(0, 1, 2)], [TAKEN, steps(0, 1), steps(2, 3, 4, 5), RESULT]),
        list[Progress](),
    )
    assert replicas.drawn(told=told) is RESULT
    assert [progress.step for progress in told] == [0, 1, 2, 3, 4, 5], "it does not go back"


def test_a_preview_of_an_image_that_was_behind_is_not_lost() -> None:
    shown = dataclasses.replace(steps(1)[0], previews=((1, np.zeros((1, 2, 2), np.uint8)),))
    replicas, told = (
        Scripted([TAKEN, steps(0, 1, 2)], [TAKEN, steps(0), [shown], steps(2, 3), RESULT]),
        list[Progress](),
    )
    assert replicas.drawn(told=told) is RESULT
    assert [(progress.step, len(progress.previews)) for progress in told] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize("death", [(), (ActorDiedError(),), (EngineNotReady("failed"),), (asyncio.CancelledError(),)])
def test_one_that_is_lost_again_and_again_is_given_up(death: Script) -> None:
    """It may be what kills them: it must not have all of them."""
    replicas = Scripted([TAKEN, steps(1), *death])
    with pytest.raises(EngineError, match="3 replicas were lost"):
        replicas.drawn()
    assert len(replicas.handle.sent) == flight.MOST_LOST


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("no", None), GONE, asyncio.CancelledError()])
def test_replicas_that_were_gone_before_they_took_it_do_not_count(error: BaseException) -> None:
    replicas = Scripted(*[[error]] * 10, [TAKEN, RESULT])
    assert replicas.drawn() is RESULT
    assert all(response.cancels == 1 for response in replicas.handle.responses[:-1]), "it might work on"


def test_where_nobody_comes_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "PATIENCE_S", 0.05)
    gone = Scripted([GONE])
    with pytest.raises(EngineNotReady):
        gone.drawn()
    silent = Scripted([60.0])
    with pytest.raises(EngineNotReady):
        silent.drawn()
    assert silent.handle.responses[0].cancels == 1
    assert (gone.refused("not_ready"), silent.refused("not_ready")) == (1, 1)


def test_one_that_hangs_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "PATIENCE_S", 0.05)
    assert Scripted([TAKEN, steps(1), 60.0], [TAKEN, RESULT]).drawn() is RESULT


def test_while_no_replica_is_up_only_so_many_wait() -> None:
    replicas = Scripted([BackPressureError(num_queued_requests=9, max_queued_requests=8)])
    with pytest.raises(EngineBusy, match="no replica is up"):
        replicas.drawn()
    assert (len(replicas.handle.sent), replicas.refused("queue_full")) == (1, 1)


def test_a_full_replica_is_not_the_last_word() -> None:
    one = Scripted([FULL["a"]], [TAKEN, RESULT])
    assert one.drawn() is RESULT
    assert (one.handle.avoided, one.refused("queue_full")) == ([(), ("a",)], 0)
    everywhere = Scripted([FULL["a"]], [FULL["b"]])
    with pytest.raises(EngineBusy, match="64 of 64") as refused:
        everywhere.drawn()
    assert (refused.value.retry_after_s, len(everywhere.handle.sent), everywhere.refused("queue_full")) == (4, 2, 1)


def test_of_refusals_the_one_that_ends_first_is_told() -> None:
    late = Refused("b", EngineBusy("queue_long", "it would wait", 60.0))
    with pytest.raises(EngineBusy, match="64 of 64"):
        Scripted([late], [FULL["a"]]).drawn()


def test_fewer_replicas_than_were_known_are_not_asked_for_ever() -> None:
    with pytest.raises(EngineBusy):
        Scripted([FULL["a"]], replicas=9).drawn()


def test_what_was_accepted_waits_for_room() -> None:
    """Its client has a status already: it is not refused any more."""
    replicas = Scripted([TAKEN], *[[FULL["a"]], [FULL["b"]]] * 20, [TAKEN, RESULT])
    assert replicas.drawn() is RESULT


@pytest.mark.parametrize("error", [ValueError("steps=7 must be 5"), EngineError("image 0: not finite")])
def test_an_answer_is_an_answer(error: Exception) -> None:
    replicas = Scripted([Refused("a", error)] if isinstance(error, ValueError) else [TAKEN, error])
    with pytest.raises(type(error), match=str(error)[:8]):
        replicas.drawn()
    assert len(replicas.handle.sent) == 1


def test_a_bug_is_an_error_of_ours() -> None:
    with pytest.raises(EngineError, match="RayTaskError"):
        Scripted([TAKEN, RayTaskError("draw", "traceback", KeyError("secret"))]).drawn()


def test_the_deadline_is_of_the_client_not_of_each_replica() -> None:
    replicas = Scripted([TAKEN, 0.3], [TAKEN, RESULT])
    assert replicas.drawn(dataclasses.replace(PARAMS, deadline_s=20.0)) is RESULT
    first, second = (params.deadline_s for params in replicas.handle.sent)
    assert first is not None
    assert second is not None
    assert second <= first - 0.3


@pytest.mark.parametrize("script", [[60.0], [TAKEN, 60.0], [TAKEN]])
def test_a_deadline_passes_wherever_the_request_is(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "MOST_LOST", 10**9)
    replicas = Scripted(script)
    with pytest.raises(DeadlinePassed):
        replicas.drawn(dataclasses.replace(PARAMS, deadline_s=0.1))


def test_a_deadline_that_passes_between_refusals_is_one_of_them() -> None:
    too_soon = Refused("a", DeadlineTooSoon(2.0, 1.0))
    replicas = Scripted([too_soon], [60.0], replicas=3)
    with pytest.raises(DeadlineTooSoon):
        replicas.drawn(dataclasses.replace(PARAMS, deadline_s=1e-9))


def test_each_sending_has_a_key_of_its_own() -> None:
    """A replica may still have one that nobody reads any more."""
    replicas = Scripted([TAKEN], [TAKEN, RESULT])
    replicas.drawn()
    keys = [params.request_id for params in replicas.handle.sent]
    assert len(set(keys)) == 2
    assert all(key.startswith("one~") for key in keys)


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

    replicas = Scripted([TAKEN, 60.0])
    assert isinstance(asyncio.run(ask(replicas)), Cancelled)
    assert replicas.handle.responses[0].cancels == 1


def test_a_client_that_leaves_before_it_is_accepted_ends_it() -> None:
    async def leave(replicas: Scripted) -> None:
        asking = asyncio.create_task(replicas.submit(PARAMS))
        while not replicas.handle.sent:
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while not replicas.idle:
            await asyncio.sleep(0.001)

    replicas = Scripted([60.0])
    asyncio.run(leave(replicas))
    assert replicas.handle.responses[0].cancels == 1


def test_what_ray_serve_ends_with_a_client_s_request_is_not_in_it() -> None:
    """It notes, in the request's context, which calls belong to it."""
    of_request = contextvars.ContextVar("of_request", default="none")
    seen: list[str] = []

    class Noted(Handle):
        def remote(self, params: GenerateParams, watched: bool, *, avoid: tuple[str, ...]) -> Response:
            seen.append(of_request.get())
            return super().remote(params, watched, avoid=avoid)

    async def ask() -> None:
        replicas = Scripted()
        replicas._draw = Noted([[TAKEN, RESULT]])  # type: ignore[assignment]
        of_request.set("mine")
        await asyncio.wrap_future(await replicas.submit(PARAMS))

    asyncio.run(ask())
    assert seen == ["none"]


@pytest.mark.parametrize(("timeout_s", "in_time"), [(30.0, True), (0.0, False)])
def test_a_service_that_ends_waits_for_what_it_has_accepted(timeout_s: float, in_time: bool) -> None:
    async def ask(replicas: Scripted) -> BaseException | None:
        replicas._loop = asyncio.get_running_loop()
        future = await replicas.submit(PARAMS)
        assert await asyncio.to_thread(replicas.stop, timeout_s) is in_time
        with pytest.raises(EngineNotReady):
            await replicas.submit(dataclasses.replace(PARAMS, request_id="two"))
        while not replicas.idle:
            await asyncio.sleep(0.001)
        return future.exception()

    ended = asyncio.run(ask(Scripted([TAKEN, 0.3 if in_time else 60.0, RESULT])))
    assert ended is None if in_time else isinstance(ended, EngineNotReady)


class Looked(Scripted):
    """Whose replicas describe themselves as a test lets them."""

    def __init__(self, *looks: list[Described] | Exception) -> None:
        super().__init__()
        self._status, self._described, self.looks = "starting", [], list(looks)

    async def _look(self) -> None:
        self.handle.broadcast = lambda _: self  # type: ignore[attr-defined]
        await super()._look()

    async def results_async(self, **_: Any) -> list[Any]:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(found, Exception):
            raise found
        return found


def described(name: str) -> Described:
    return Described("info", ReplicaState(name, "ok", 0, 0, 8, 4, None), [])  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [GONE, TimeoutError(), RuntimeError("anything")])
def test_replicas_that_are_gone_are_not_shown_for_ever(last: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DESCRIBE_S", 0.001)
    monkeypatch.setattr(remote, "SOON_S", 0.001)

    async def watch(replicas: Looked) -> None:
        replicas.start()
        assert replicas.status == "starting"
        while replicas.status == "starting":
            await asyncio.sleep(0.001)
        assert [state.name for state in replicas.states] == ["a", "b"]
        while replicas.states:
            await asyncio.sleep(0.001)
        assert replicas.info == "info", "what is served is known"
        assert replicas._watching is not None
        assert not replicas._watching.done()
        replicas._watching.cancel()

    both = [described("a"), described("b")]
    asyncio.run(asyncio.wait_for(watch(Looked([], both, last)), 30))


# Whom a request goes to


@dataclasses.dataclass(frozen=True)
class Id:
    unique_id: str


@dataclasses.dataclass(frozen=True)
class Replica:
    replica_id: Id


@dataclasses.dataclass
class Pending:
    """As Ray Serve hands requests to a router."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    metadata: Any

    @classmethod
    def of(cls, key: str, images: int, *avoid: str) -> Pending:
        params = dataclasses.replace(PARAMS, seeds=tuple(range(images)))
        metadata = type("Metadata", (), {"call_method": "draw", "internal_request_id": key})
        return cls((params, False), {"avoid": avoid}, metadata)


class Choice:
    """A router over replicas a and b."""

    def __init__(self) -> None:
        self.router = FewestImages.__new__(FewestImages)
        self.router.initialize_state()

    def of(self, pending: Pending | None, taken: bool = True) -> str:
        """The name of the first choice."""
        replicas: Any = [Replica(Id(name)) for name in "ab"]
        ranks = asyncio.run(self.router.choose_replicas(replicas, pending))  # type: ignore[arg-type]
        assert sorted(rank[0].replica_id.unique_id for rank in ranks) == ["a", "b"]
        first: Any = ranks[0][0].replica_id
        if taken:
            self.router.on_request_routed(pending, first, None)  # type: ignore[arg-type]
        return str(first.unique_id)

    def ended(self, key: str, name: str) -> None:
        self.router.on_request_completed(Id(name), key)  # type: ignore[arg-type]


def test_the_replica_with_the_fewest_images_is_chosen() -> None:
    """Not that with the fewest requests."""
    choice = Choice()
    assert choice.of(Pending.of("large", 8)) == "a"
    assert [choice.of(Pending.of(f"small {i}", 1)) for i in range(8)] == ["b"] * 8
    choice.ended("large", "a")
    assert choice.of(Pending.of("next", 1)) == "a"


def test_requests_on_their_way_count_and_those_that_never_arrive_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice()
    assert choice.of(Pending.of("one", 4), taken=False) == "a"
    assert choice.of(Pending.of("two", 2), taken=False) == "b"
    assert choice.of(Pending.of("three", 1), taken=False) == "b"
    now = time.monotonic() + 10
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert choice.of(Pending.of("later", 1)) == "a"


def test_those_that_have_refused_come_last() -> None:
    choice = Choice()
    choice.of(Pending.of("large", 8, "a"))
    assert choice.of(Pending.of("small", 1, "a")) == "b"
    assert choice.of(Pending.of("small", 1, "a", "b")) == "a"


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


@pytest.mark.parametrize(
    ("device", "gpus", "found"),
    [
        ("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cpu", 0, "cpu"), ("cuda", 0.5, "cuda"),
        ("all", 1, None), ("cuda:0,cuda:1", 1, None), ("cuda:1", 1, None), ("cpu", 1, None), ("cuda", 0, None),
    ],
)  # fmt: skip
def test_a_replica_has_the_one_device_that_ray_gives_it(
    device: str, gpus: float, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray does not hide GPUs from an actor that asks for none."""
    monkeypatch.setenv("DDPM_DEVICE", device)
    if found is None:
        with pytest.raises(ValueError, match="DDPM_DEVICE"):
            build(Scale(gpus=gpus))
    else:
        assert service._device(device, gpus) == found
        build(Scale(gpus=gpus))
