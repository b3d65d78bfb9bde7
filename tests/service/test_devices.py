"""Several devices under one app: here two engines on the CPU, which share nothing but the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from app.engine.engine import Engine
from app.engine.runner import Row, Runner
from app.engine.steptime import StepTime
from app.settings import Settings
from ddpm_core.network import devices_of
from tests.service.conftest import Service, assert_problem

BODY = {"label": 3, "seed": 5, "steps": 4}


@pytest.fixture(scope="module")
def running(model_dir: Path) -> Iterator[Service]:
    """One model, two engines."""
    service = Service(Settings(model=str(model_dir), device="cpu,cpu", queue_slots=64, max_images=32))
    service.start()
    yield service
    service.stop()


@pytest.fixture
def pair(running: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The same, equally fast whatever else this machine does."""
    monkeypatch.setattr(StepTime, "observe", lambda *_: None)
    for engine in engines_of(running):
        engine.step_time, engine.rows_limit = StepTime([(1, 0.001), (8, 0.004)]), 8
    return running


@pytest.fixture
def slow(pair: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Engines that make no step until it is set."""
    go, advance = threading.Event(), Runner.advance

    def held(self: Runner, rows: list[Row]) -> object:
        go.wait(60)
        return advance(self, rows)

    monkeypatch.setattr(Runner, "advance", held)
    yield go
    go.set()


def engines_of(service: Service) -> list[Engine]:
    found: list[Engine] = service.app.state.engines.default.engines
    return found


def refused(service: Service, reason: str) -> float:
    found: float = service.app.state.metrics.registry.get_sample_value("ddpm_refused_total", {"reason": reason})
    return found


async def entered(service: Service, requests: int) -> None:
    while sum(engine.scheduler.slots > 0 for engine in engines_of(service)) < requests:
        await asyncio.sleep(0.01)


def ask(service: Service, request_id: str, **fields: object) -> asyncio.Future[httpx.Response]:
    body, headers = {**BODY, **fields}, {"x-request-id": request_id}
    return asyncio.ensure_future(service.client.post("/generate", json=body, headers=headers))


def test_an_image_has_the_same_bytes_whichever_device_draws_it(
    service: Service, pair: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_by: list[Engine] = []
    submit = Engine.submit

    def noted(self: Engine, *args: Any) -> Any:
        drawn_by.append(self)
        return submit(self, *args)

    monkeypatch.setattr(Engine, "submit", noted)
    alone = service.generate(BODY).content
    for chosen in engines_of(pair):
        monkeypatch.setattr(Engine, "expect", lambda self, _, chosen=chosen: 0.0 if self is chosen else 1.0)
        assert pair.generate(BODY).content == alone
    assert drawn_by == [service.engine, *engines_of(pair)]


def test_a_request_goes_where_it_ends_first(pair: Service, slow: threading.Event) -> None:
    async def one_after_the_other() -> list[int]:
        large = ask(pair, "large", n=32)
        await entered(pair, 1)
        small = [ask(pair, f"small-{i}") for i in range(3)]
        while sum(engine.scheduler.slots for engine in engines_of(pair)) < 35:
            await asyncio.sleep(0.01)
        found = sorted(engine.scheduler.slots for engine in engines_of(pair))
        slow.set()
        assert {response.status_code for response in await asyncio.gather(large, *small)} == {200}
        return found

    assert pair.run(one_after_the_other()) == [3, 32]


@pytest.mark.parametrize("steps", [4, 150])
def test_equal_requests_are_shared_evenly(pair: Service, slow: threading.Event, steps: int) -> None:
    """A plan of many steps is made on the way, and all know by then what the others have chosen."""

    async def eight() -> list[int]:
        asked = [ask(pair, f"r{i}", n=8, sampler="ddpm", steps=steps) for i in range(8)]
        while sum(engine.scheduler.slots for engine in engines_of(pair)) < 64:
            await asyncio.sleep(0.01)
        found = [engine.scheduler.slots for engine in engines_of(pair)]
        slow.set()
        await asyncio.gather(*asked)
        return found

    assert pair.run(eight()) == [32, 32]


@pytest.mark.parametrize("steps", [4, 150])
def test_it_is_full_when_every_device_is(pair: Service, slow: threading.Event, steps: int) -> None:
    """Each has its own slots, and a refusal counts once."""

    async def fill() -> list[int]:
        asked = [ask(pair, f"r{i}", n=32, sampler="ddpm", steps=steps) for i in range(4)]
        while sum(engine.scheduler.slots for engine in engines_of(pair)) < 128:
            await asyncio.sleep(0.01)
        refused = await ask(pair, "late")
        slow.set()
        return [refused.status_code, *(response.status_code for response in await asyncio.gather(*asked))]

    before = refused(pair, "queue_full")
    assert pair.run(fill()) == [429, 200, 200, 200, 200]
    registry = pair.app.state.metrics.registry
    assert refused(pair, "queue_full") == before + 1
    assert registry.get_sample_value("ddpm_slots_limit", {"model": "tiny"}) == 128


def test_an_id_is_of_all_devices(pair: Service, slow: threading.Event) -> None:
    async def same_id() -> tuple[int, str, int, int]:
        first = ask(pair, "mine", n=2)
        await entered(pair, 1)
        again = await ask(pair, "mine")
        state = (await pair.client.get("/requests/mine")).json()["id"]
        ended = await pair.client.delete("/requests/mine")
        slow.set()
        return again.status_code, state, ended.status_code, (await first).status_code

    before = refused(pair, "duplicate_id")
    assert pair.run(same_id()) == (409, "mine", 204, 410)
    assert pair.app.state.engines.idle
    assert refused(pair, "duplicate_id") == before + 1


@pytest.fixture
def planning(pair: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A plan of many steps takes a while: here until it is set."""
    go, make_plan = threading.Event(), Engine.make_plan

    def held(self: Engine, params: Any) -> None:
        go.wait(60)
        make_plan(self, params)

    monkeypatch.setattr(Engine, "make_plan", held)
    yield go
    go.set()


async def planned(service: Service, request_id: str) -> None:
    while not service.app.state.engines.holds(f"/{request_id}"):
        await asyncio.sleep(0.01)


def test_an_id_is_held_while_its_plan_is_made(pair: Service, planning: threading.Event) -> None:
    async def twice() -> list[int]:
        first = ask(pair, "mine", sampler="ddim", steps=500)
        await planned(pair, "mine")
        second = (await ask(pair, "mine")).status_code
        state = (await pair.client.get("/requests/mine")).json()
        assert (state["state"], state["steps"]) == ("queued", 500)
        planning.set()
        return [second, (await first).status_code]

    assert pair.run(twice()) == [409, 200]
    assert not pair.app.state.engines.holds("/mine")


def test_a_request_can_be_ended_while_its_plan_is_made(pair: Service, planning: threading.Event) -> None:
    async def end() -> list[int]:
        first = ask(pair, "mine", sampler="ddim", steps=500)
        await planned(pair, "mine")
        ended = (await pair.client.delete("/requests/mine")).status_code
        again = ask(pair, "mine", sampler="ddim", steps=400)  # the id is free
        await planned(pair, "mine")
        planning.set()
        return [ended, (await first).status_code, (await again).status_code]

    assert pair.run(end()) == [204, 410, 200]
    assert pair.app.state.engines.idle


def test_health_shows_each_and_says_what_holds_of_all(pair: Service, service: Service) -> None:
    health = pair.request("GET", "/health").json()
    assert [replica["name"] for replica in health["replicas"]] == ["cpu", "cpu"]
    assert health["engine"]["slots_limit"] == 128
    assert health["engine"]["exact"] is True
    assert health["engine"]["fingerprint"] == service.request("GET", "/health").json()["engine"]["fingerprint"]


def test_devices_that_draw_different_bits_are_not_exact(pair: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    second = engines_of(pair)[1]
    assert second.exactness is not None
    other = type(second.exactness)(True, 4, second.exactness.checked_rows, "0123456789ab")
    monkeypatch.setattr(second, "exactness", other)
    engine = pair.request("GET", "/health").json()["engine"]
    assert (engine["exact"], engine["fingerprint"]) == (False, None)
    assert "same hardware" in engine["exactness"]


def test_a_device_that_has_failed_is_a_service_that_has(pair: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_of(pair)[1], "status", "failed")
    assert pair.request("GET", "/livez").status_code == 503
    assert_problem(pair.generate(BODY), 503)
    assert [r["status"] for r in pair.request("GET", "/health").json()["replicas"]] == ["ok", "failed"]


@pytest.mark.parametrize("device", ["", "cuda:0,cuda:0", "cpu,", "all,cpu", "auto,cuda:1", "cuda,cuda:0"])
def test_devices_that_cannot_be_meant_are_refused(device: str) -> None:
    with pytest.raises(ValidationError, match=r"named 2 times|must be auto"):
        Settings(device=device)


def test_devices_are_named_one_by_one_or_all_at_once() -> None:
    assert devices_of("cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    assert devices_of("auto") == ["auto"]
    assert devices_of("all")
