"""The probes, through the whole life of the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import images
from app.engine.admission import Bounds
from app.engine.engine import Engine
from app.engine.engines import Engines
from app.engine.replicas import Replicas
from app.engine.request import EngineNotReady, GenerateParams
from app.engine.runner import Row, Runner
from ddpm_core import __version__
from ddpm_core.checkpoint import WEIGHTS_NAME, sha256_of
from tests.service.conftest import Service, assert_problem

PROBES = ("/readyz", "/v2/health/ready")
LIVE = ("/livez", "/v2/health/live")
PARAMS = GenerateParams("one", (0,), (None,), "ddim", 1, 0.0, 1.0)


def test_health_says_what_is_served(service: Service, model_dir: Path) -> None:
    response = service.request("GET", "/health")
    assert response.status_code == 200
    of_model = {
        "status": "ok", "device": "cpu", "model": "tiny",
        "sha256": sha256_of(model_dir / "unet" / WEIGHTS_NAME),
        "engine": {
            "slots_running": 0, "slots_waiting": 0, "slots_limit": 1024, "runtime": "onnxruntime",
            "batch_rows_limit": service.engine.rows_limit, "exact": True,
            "exactness": "exact at all 32 batch sizes tried, 1 to 32 rows",
            "fingerprint": service.engine.exactness.fingerprint,
        },
        "replicas": [{
            "name": "cpu", "status": "ok", "slots_running": 0, "slots_waiting": 0, "slots_limit": 1024,
            "batch_rows_limit": service.engine.rows_limit,
        }],
    }  # fmt: skip
    assert response.json() == {**of_model, "models": [of_model], "version": __version__}
    assert all(service.request("GET", path).status_code == 200 for path in PROBES + LIVE)
    assert all(service.request("HEAD", path).status_code == 200 for path in ("/health", "/livez", "/readyz"))


def test_while_the_model_loads_it_is_alive_but_not_ready(make_service: Callable[..., Service], model_dir: Path) -> None:
    gate = threading.Event()
    service = make_service(wait=False, model=model_dir)
    # A second engine whose loading is held: the first has started already.
    held = Engine(lambda: (gate.wait(), Runner.load(str(model_dir), "cpu"))[1], bounds=Bounds(8))
    first, service.app.state.engines = service.app.state.engines, Engines([Replicas([held], held.metrics)])
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
        service.app.state.engines = first


def test_draining_refuses_new_work_and_serves_the_accepted(
    make_service: Callable[..., Service], hold: threading.Event
) -> None:
    service = make_service()
    engine = service.engine
    hold.clear()

    async def accepted_and_refused() -> list[httpx.Response]:
        accepted = [asyncio.ensure_future(service.client.post("/generate", json={"steps": 1})) for _ in range(2)]
        while engine.scheduler.slots < 2:
            await asyncio.sleep(0.01)
        engine.drain()
        refused = await service.client.post("/generate", json={"steps": 1})
        hold.set()
        return [refused, *(await asyncio.gather(*accepted))]

    refused, *accepted = service.run(accepted_and_refused())
    problem = assert_problem(refused, 503)
    assert "shutting down" in problem["detail"]
    assert engine.metrics.registry.get_sample_value("ddpm_refused_total", {"reason": "not_ready"}) == 1
    assert [response.status_code for response in accepted] == [200, 200]
    assert service.request("GET", "/health").json()["status"] == "draining"
    assert service.request("GET", "/readyz").status_code == 503
    assert service.request("GET", "/livez").status_code == 200


def test_work_that_came_while_it_stopped_is_refused(model_dir: Path) -> None:
    """Stopped while it loads: it never takes work, and its thread ends."""
    gate = threading.Event()
    engine = Engine(lambda: (gate.wait(60), Runner.load(str(model_dir), "cpu"))[1], bounds=Bounds(8))
    engine.start()
    engine.drain()
    gate.set()
    assert engine.stop(60)
    with pytest.raises(EngineNotReady):
        engine.submit(PARAMS)


def test_when_the_thread_dies_nobody_waits(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running or waiting: each has its answer, and the failure is told."""
    gate, failures = threading.Event(), list[BaseException]()
    engine = Engine(lambda: Runner.load(str(model_dir), "cpu"), bounds=Bounds(8), batch_rows=1)
    engine.on_failure = failures.append
    engine.start()
    while engine.status == "starting":
        time.sleep(0.01)

    def die(self: Runner, rows: object) -> None:
        gate.wait(60)
        raise SystemExit("the device is gone")

    monkeypatch.setattr(Runner, "advance", die)
    futures = [engine.submit(dataclasses.replace(PARAMS, request_id=str(i))) for i in range(3)]
    gate.set()
    for future in futures:
        assert isinstance(future.exception(timeout=60), EngineNotReady)
    assert engine.stop(60)
    assert engine.status == "failed"
    assert engine.scheduler.slots == 0
    assert [type(error) for error in failures] == [SystemExit]
    with pytest.raises(EngineNotReady):
        engine.submit(PARAMS)


def test_a_model_that_cannot_be_loaded_fails_the_engine(make_service: Callable[..., Service], tmp_path: Path) -> None:
    service = make_service(model=tmp_path / "none")
    assert service.request("GET", "/health").json()["status"] == "failed"
    assert service.request("GET", "/livez").status_code == 503
    assert service.generate({}).status_code == 503
    assert "no model directory" in str(service.app.state.engines.default.failure)


def test_an_error_in_one_request_is_its_own(make_service: Callable[..., Service], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    service = make_service()
    advance = Runner._step

    def fail(self: Runner, rows: list[Row]) -> None:
        if any(row.seed == 13 for row in rows):
            raise RuntimeError("secret")
        return advance(self, rows)

    monkeypatch.setattr(Runner, "_step", fail)
    response = service.generate({"seed": 13, "steps": 1}, **{"x-request-id": "thirteen"})
    assert_problem(response, 500)
    assert "secret" not in response.text
    assert service.generate({"seed": 14, "steps": 1}).status_code == 200
    assert service.request("GET", "/health").json()["engine"]["slots_running"] == 0


def test_an_encoder_that_fails_ends_one_request(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = images.encode_png

    def fail(pixels: images.Pixels, facts: Mapping[str, object], *, scale: int = 1) -> bytes:
        if facts.get("seed") == 13:
            raise OSError("secret")
        return encode(pixels, facts, scale=scale)

    monkeypatch.setattr(images, "encode_png", fail)
    response = service.generate({"seed": 13, "steps": 1})
    assert_problem(response, 500)
    assert "secret" not in response.text
    assert service.generate({"seed": 14, "steps": 1}).status_code == 200


def test_metrics_are_what_prometheus_reads(service: Service) -> None:
    assert service.generate({"n": 2, "steps": 3}).status_code == 200
    assert service.generate({"n": 65}).status_code == 422
    response = service.request("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert found["ddpm_slots_limit"] == 1024
    assert found["ddpm_slots_running"] == found["ddpm_slots_waiting"] == 0
    assert found["ddpm_batch_rows_limit"] == service.engine.rows_limit
    assert found["ddpm_step_seconds_count"] >= 3
    assert found["ddpm_images_total"] >= 2
    for name in (
        "ddpm_requests_total", "ddpm_refused_total", "ddpm_batch_rows_sum", "ddpm_padding_rows_total",
        "ddpm_queue_seconds_sum", "ddpm_wait_seconds_sum", "ddpm_wait_predicted_seconds_sum", "ddpm_wasted_steps_total",
    ):  # fmt: skip
        assert name in found
    openmetrics = service.request("GET", "/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.text.endswith("# EOF\n")
