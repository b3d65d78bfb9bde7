"""The real process on a real socket: `python -m app`."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.settings import Settings
from tests.service.conftest import Service, encode, pixels
from tests.service.process import Server, refused_start, server, until


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_the_service_draws_a_digit_and_ends_cleanly(model_dir: Path, by: signal.Signals) -> None:
    with server(model=model_dir) as it:
        response = it.post("/generate", json={"label": 7, "seed": 1})
        assert response.status_code == 200
        assert pixels(response.content).shape == (28, 28)
        it.process.send_signal(by)
        it.process.wait(30)
        assert it.process.returncode == 0
        assert "Traceback" not in it.logged()


def test_a_client_that_leaves_while_it_sends_is_no_error(model_dir: Path) -> None:
    """Nor is a half-sent upload a reason to stay: the drain time holds."""
    head = "POST /noise HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=a"
    with server(model=model_dir, drain_s=0.5) as it:
        it.send(head, b"--a", length=1000).close()
        time.sleep(0.2)
        assert it.get("/health").status_code == 200
        with it.send(head, b"--a", length=1000):
            time.sleep(0.2)
            it.process.send_signal(signal.SIGTERM)
            it.process.wait(15)
        assert it.process.returncode == 0
        assert "unexpected error" not in it.logged()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"model": "/nonexistent"}, "no model directory at /nonexistent"),
        ({"port": "x"}, "DDPM_PORT"),
        ({"drain_s": "inf"}, "DDPM_DRAIN_S"),
        ({"queue_slots": "3"}, "error: DDPM_QUEUE_SLOTS=3 must be at least"),
        ({"api_keys": "short-secret"}, "DDPM_API_KEYS: key 1 must be"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(settings: dict[str, str], what: str) -> None:
    said = refused_start(**settings).stderr
    assert what in said.splitlines()[-1]
    assert "short-secret" not in said


LONG = b'{"n": 64, "steps": 1000, "sampler": "ddpm"}'  # a minute and more
FORM = (
    b'--a\r\nContent-Disposition: form-data; name="t"\r\n\r\n999\r\n'
    b'--a\r\nContent-Disposition: form-data; name="n"\r\n\r\n64\r\n'
    b'--a\r\nContent-Disposition: form-data; name="sampler"\r\n\r\nddpm\r\n'
    b'--a\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n%s\r\n--a--\r\n'
    % encode(Image.new("L", (28, 28)))
)
GENERATE = "POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nAccept: "


@pytest.fixture(scope="module")
def running(model_dir: Path) -> Iterator[Server]:
    """One service for the tests that do not end it."""
    with server(model=model_dir) as it:
        yield it


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (GENERATE + "image/png", LONG),
        (GENERATE + "application/json", LONG),
        (GENERATE + "application/zip", LONG),
        (GENERATE + "text/event-stream", LONG),
        ("POST /denoise HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=a", FORM),
        ("GET /images/tiny/ddpm-1000/7/1.png HTTP/1.1", b""),
    ],
    ids=["png", "json", "zip", "events", "denoise", "images"],
)
def test_a_client_that_leaves_frees_its_slots(running: Server, head: str, body: bytes) -> None:
    """Whatever it was waiting for; seen from outside, and long before the work would have ended."""
    connection = running.send(head, body)
    until(lambda: running.metric("slots_running") > 0, "the request never ran")
    ended = running.metric("requests_total")
    connection.close()
    until(lambda: running.metric("slots_running") + running.metric("slots_waiting") == 0, "the slots are not free", 5)
    steps = running.metric("step_seconds_count")
    time.sleep(0.1)
    assert running.metric("step_seconds_count") <= steps + 1  # the one that was being made
    assert running.metric("requests_total") == ended + 1
    assert running.metric("wasted_steps_total") > 0


def test_a_client_ends_its_own_request_by_id(running: Server) -> None:
    connection = running.send(GENERATE + "image/png\r\nX-Request-Id: mine", LONG)
    until(lambda: running.metric("slots_running") > 0, "the request never ran")
    assert httpx.delete(f"{running.url}/requests/mine", timeout=60).status_code == 204
    answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 410")
    assert running.metric("slots_running") == 0
    connection.close()


def test_an_image_has_the_same_bytes_in_another_process_and_in_company(model_dir: Path, running: Server) -> None:
    """No cache could help: one process draws each image alone, the other all at once, beside sixty-four others."""
    bodies = [
        {
            "seed": 100 + i, "label": i, "steps": 5 + i, "guidance_scale": [1, 3][i % 2],
            "sampler": ["ddpm", "dpmpp_2m"][i // 2 % 2],
        }
        for i in range(8)
    ]  # fmt: skip
    alone = [running.post("/generate", json=body).content for body in bodies]
    with server(model=model_dir, batch_rows=8) as it, ThreadPoolExecutor(16) as pool:
        head = "POST /generate HTTP/1.1\r\nContent-Type: application/json"
        with it.send(head, LONG):  # it fills what a step has left
            until(lambda: it.metric("slots_running") > 0, "the company never ran")
            together = [pool.submit(it.post, "/generate", json=body) for body in bodies]
            assert [future.result().content for future in together] == alone
            rows, steps = it.metric("batch_rows_sum"), it.metric("step_seconds_count")
            assert rows / steps > 4
            assert it.metric("slots_waiting") + it.metric("slots_running") == 64  # it was there all the time
    assert len(set(alone)) == len(alone)


def test_it_answers_at_once_and_is_ready_after_its_warm_up(model_dir: Path, tmp_path: Path) -> None:
    """Without a graph the start takes seconds: meanwhile it is alive, not ready, and says so."""
    copy = tmp_path / "tiny"
    shutil.copytree(model_dir, copy)
    (copy / "unet" / "model.onnx").unlink()
    with server(model=copy, wait=False) as it:
        health = it.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        assert it.get("/livez").status_code == 200
        refused = it.post("/generate", json={})
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
        assert int(refused.headers["retry-after"]) >= 1
        it.wait_until_ready()
        assert it.post("/generate", json={}).status_code == 200
    assert (copy / "unet" / "model.onnx").is_file()


def test_a_signal_while_it_loads_ends_it_soon(model_dir: Path, tmp_path: Path) -> None:
    """Loading cannot be interrupted, but nobody has to wait for it."""
    copy = tmp_path / "tiny"
    shutil.copytree(model_dir, copy)
    (copy / "unet" / "model.onnx").unlink()
    with server(model=copy, wait=False) as it:
        assert it.get("/health").json()["status"] == "starting"
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(20) == 0


def test_a_port_in_use_ends_it_soon(model_dir: Path, running: Server) -> None:
    port = running.url.rpartition(":")[2]
    assert "address already in use" in refused_start(port=port, model=model_dir).stderr
    assert running.get("/livez").status_code == 200


def test_draining_keeps_the_door_open_until_accepted_work_is_done(model_dir: Path) -> None:
    """New work gets 503 on a new connection, probes answer, what was accepted is served, and the exit code is 0."""
    with server(model=model_dir) as it, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(it.post, "/generate", json={"n": 64, "steps": 120})
        until(lambda: it.metric("slots_running") > 0, "the request never ran")
        it.process.send_signal(signal.SIGTERM)
        until(lambda: it.get("/readyz").status_code == 503, "it does not drain", 5)
        refused = it.post("/generate", json={})
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["detail"]
        assert it.get("/livez").status_code == 200
        assert not accepted.done()
        assert accepted.result().status_code == 200
        assert it.process.wait(30) == 0


def test_when_the_drain_time_is_up_whoever_waits_is_told(model_dir: Path) -> None:
    with server(model=model_dir, drain_s=0.5) as it, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(it.post, "/generate", content=LONG)
        until(lambda: it.metric("slots_running") > 0, "the request never ran")
        it.process.send_signal(signal.SIGTERM)
        assert accepted.result().status_code == 503
        assert it.process.wait(15) == 0


def test_a_second_signal_ends_it_at_once(model_dir: Path) -> None:
    with server(model=model_dir) as it, it.send(GENERATE + "image/png", LONG):
        until(lambda: it.metric("slots_running") > 0, "the request never ran")
        it.process.send_signal(signal.SIGTERM)
        it.process.send_signal(signal.SIGTERM)  # the same signal, as some supervisors send it
        time.sleep(1.2)
        assert it.process.poll() is None
        it.process.send_signal(signal.SIGTERM)
        it.process.wait(5)


def test_every_line_of_the_log_is_json_and_has_the_request_id(model_dir: Path) -> None:
    with server(model=model_dir) as it:
        it.post("/generate", json={"steps": 1}, headers={"x-request-id": "look-for-me"})
        it.process.send_signal(signal.SIGTERM)
        it.process.wait(15)
        lines = [json.loads(line) for line in it.logged().splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    of_request = [line["message"] for line in lines if line.get("request_id") == "look-for-me"]
    assert of_request[0].endswith('"POST /generate HTTP/1.1" 200')


def test_more_workers_are_refused_with_the_reason(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    assert "one process serves all of its devices" in refused_start(model=model_dir).stderr


def test_a_worker_of_another_server_is_refused_too(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `uvicorn --workers` starts them: processes of one parent."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    service = Service(Settings(model=str(model_dir), device="cpu"))
    with pytest.raises(RuntimeError, match="one process serves all of its devices"):
        service.start()
    service.run(service.client.aclose())
    service.loop.close()
