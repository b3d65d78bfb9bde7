"""The probes, through the whole life of the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from app.engine.engine import Engine
from app.engine.request import EngineNotReady, GenerateParams
from app.engine.runner import Runner
from ddpm_core import __version__
from ddpm_core.checkpoint import WEIGHTS_NAME, sha256_of
from tests.service.conftest import Service, assert_problem

PROBES = ("/readyz", "/v2/health/ready")
LIVE = ("/livez", "/v2/health/live")
PARAMS = GenerateParams("one", (0,), (None,), "ddim", 1, 0.0, 1.0)


def test_health_says_what_is_served(service: Service, model_dir: Path) -> None:
    response = service.request("GET", "/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok", "device": "cpu", "model": "tiny",
        "sha256": sha256_of(model_dir / "unet" / WEIGHTS_NAME),
        "engine": {"slots": 0, "slots_limit": 1024}, "version": __version__,
    }  # fmt: skip
    assert all(service.request("GET", path).status_code == 200 for path in PROBES + LIVE)


def test_while_the_model_loads_it_is_alive_but_not_ready(make_service: Callable[..., Service], model_dir: Path) -> None:
    gate = threading.Event()
    service = make_service(wait=False, model=model_dir)
    # A second engine whose loading is held: the first has started already.
    held = Engine(lambda: (gate.wait(), Runner(model_dir, "cpu"))[1], queue_slots=8)
    first, service.app.state.engine = service.app.state.engine, held
    held.start()
    try:
        assert service.request("GET", "/health").status_code == 503
        assert service.request("GET", "/health").json()["status"] == "starting"
        assert service.request("GET", "/readyz").status_code == 503
        assert service.request("GET", "/livez").status_code == 200
        response = service.generate({})
        assert_problem(response, 503)
        assert int(response.headers["retry-after"]) >= 1
    finally:
        gate.set()
        assert held.stop(30)
        service.app.state.engine = first


def test_draining_refuses_new_work_and_serves_the_accepted(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, gate, generate = make_service(), threading.Event(), Runner.generate

    def hold(self: Runner, params: GenerateParams) -> NDArray[np.uint8]:
        gate.wait(60)
        return generate(self, params)

    monkeypatch.setattr(Runner, "generate", hold)
    engine: Engine = service.app.state.engine

    async def accepted_and_refused() -> list[httpx.Response]:
        accepted = [asyncio.ensure_future(service.client.post("/generate", json={"steps": 1})) for _ in range(2)]
        while engine.slots() < 2:
            await asyncio.sleep(0.01)
        engine.drain()
        refused = await service.client.post("/generate", json={"steps": 1})
        gate.set()
        return [refused, *(await asyncio.gather(*accepted))]

    refused, *accepted = service.run(accepted_and_refused())
    problem = assert_problem(refused, 503)
    assert "shutting down" in problem["detail"]
    assert [response.status_code for response in accepted] == [200, 200]
    assert service.request("GET", "/health").json()["status"] == "draining"
    assert service.request("GET", "/readyz").status_code == 503
    assert service.request("GET", "/livez").status_code == 200


def test_work_that_came_while_it_stopped_is_refused(model_dir: Path) -> None:
    """Stopped while it loads: it never takes work, and its thread ends."""
    gate = threading.Event()
    engine = Engine(lambda: (gate.wait(60), Runner(model_dir, "cpu"))[1], queue_slots=8)
    engine.start()
    engine.drain()
    gate.set()
    assert engine.stop(60)
    with pytest.raises(EngineNotReady):
        engine.submit(PARAMS)


def test_when_the_thread_dies_nobody_waits(model_dir: Path) -> None:
    """One running, one cancelled, one waiting: each has its answer, and the failure is told."""
    gate, failures = threading.Event(), list[BaseException]()

    class Dying(Runner):
        def warm_up(self) -> None:
            pass

        def generate(self, params: GenerateParams) -> NDArray[np.uint8]:
            gate.wait(60)
            raise SystemExit("the device is gone")

    engine = Engine(lambda: Dying(model_dir, "cpu"), queue_slots=8)
    engine.on_failure = failures.append
    engine.start()
    while engine.status == "starting":
        time.sleep(0.01)
    futures = [engine.submit(dataclasses.replace(PARAMS, request_id=str(i))) for i in range(3)]
    assert futures[1].cancel()
    gate.set()
    for future in (futures[0], futures[2]):
        assert isinstance(future.exception(timeout=60), EngineNotReady)
    assert engine.stop(60)
    assert engine.status == "failed"
    assert engine.slots() == 0
    assert [type(error) for error in failures] == [SystemExit]
    with pytest.raises(EngineNotReady):
        engine.submit(PARAMS)


def test_a_model_that_cannot_be_loaded_fails_the_engine(make_service: Callable[..., Service], tmp_path: Path) -> None:
    service = make_service(model=tmp_path / "none")
    assert service.request("GET", "/health").json()["status"] == "failed"
    assert service.request("GET", "/livez").status_code == 503
    assert service.generate({}).status_code == 503
    assert "no model directory" in str(service.app.state.engine.failure)


def test_an_error_in_one_request_is_its_own(make_service: Callable[..., Service], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    service = make_service()
    generate = Runner.generate

    def fail(self: Runner, params):  # type: ignore[no-untyped-def]
        if params.seeds[0] == 13:
            raise RuntimeError("secret")
        return generate(self, params)

    monkeypatch.setattr(Runner, "generate", fail)
    response = service.generate({"seed": 13, "steps": 1})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert "secret" not in response.text
    assert service.generate({"seed": 14, "steps": 1}).status_code == 200
    assert service.request("GET", "/health").json()["engine"]["slots"] == 0
