"""The real process on a real socket: `python -m app`."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.settings import Settings
from tests.service.conftest import Service, encode, pixels


@contextmanager
def server(**settings: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running service and its URL; any free port."""
    env = {
        **os.environ,
        "DDPM_PORT": "0",
        "DDPM_DEVICE": "cpu",
        **{f"DDPM_{k.upper()}": str(v) for k, v in settings.items()},
    }
    process = subprocess.Popen([sys.executable, "-m", "app"], env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            if match := re.search(r"running on (http://\S+)", line):
                url = match[1]
                break
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def metric(url: str, name: str) -> float:
    """The sum of a metric's samples."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"ddpm_{name}(\{{.*\}})? ", line))


def until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def send(url: str, head: str, body: bytes = b"") -> socket.socket:
    """Sends a request on a connection of its own and reads nothing."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(f"{head}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
        assert time.monotonic() < deadline, "the service did not become ready in a minute"
        time.sleep(0.1)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_the_service_draws_a_digit_and_ends_cleanly(model_dir: Path, by: signal.Signals) -> None:
    with server(model=model_dir) as (process, url):
        wait_until_ready(url)
        response = httpx.post(f"{url}/generate", json={"label": 7, "seed": 1}, timeout=60)
        assert response.status_code == 200
        assert pixels(response.content).shape == (28, 28)
        process.send_signal(by)
        process.wait(30)
        assert process.returncode == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_a_client_that_leaves_while_it_sends_is_no_error(model_dir: Path) -> None:
    """Nor is a half-sent upload a reason to stay: the drain time holds."""
    with server(model=model_dir, drain_s=0.5) as (process, url):
        wait_until_ready(url)
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /noise HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=a\r\n"
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(head + b"Content-Length: 1000\r\n\r\n--a")
            time.sleep(0.2)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        with socket.create_connection((host, int(port))) as staying:
            staying.sendall(head + b"Content-Length: 1000\r\n\r\n--a")
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            process.wait(15)
        assert process.returncode == 0
        assert process.stderr is not None
        assert "unexpected error" not in process.stderr.read()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"model": "/nonexistent"}, "no model directory at /nonexistent"),
        ({"port": "x"}, "DDPM_PORT"),
        ({"drain_s": "inf"}, "DDPM_DRAIN_S"),
        ({"queue_slots": "3"}, "DDPM_QUEUE_SLOTS=3 must be at least"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(settings: dict[str, str], what: str) -> None:
    env = {**os.environ, "DDPM_PORT": "0", **{f"DDPM_{k.upper()}": v for k, v in settings.items()}}
    done = subprocess.run([sys.executable, "-m", "app"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert what in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


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
def running(model_dir: Path) -> Iterator[str]:
    """One service for the tests that do not end it."""
    with server(model=model_dir) as (_, url):
        wait_until_ready(url)
        yield url


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
def test_a_client_that_leaves_frees_its_slots(running: str, head: str, body: bytes) -> None:
    """Whatever it was waiting for; seen from outside, and long before the work would have ended."""
    connection = send(running, head, body)
    until(lambda: metric(running, "slots_running") > 0, "the request never ran")
    ended = metric(running, "requests_total")
    connection.close()
    until(lambda: metric(running, "slots_running") + metric(running, "slots_waiting") == 0, "the slots are not free", 5)
    steps = metric(running, "step_seconds_count")
    time.sleep(0.1)
    assert metric(running, "step_seconds_count") <= steps + 1  # the one that was being made
    assert metric(running, "requests_total") == ended + 1
    assert metric(running, "wasted_steps_total") > 0


def test_a_client_ends_its_own_request_by_id(running: str) -> None:
    connection = send(running, GENERATE + "image/png\r\nX-Request-Id: mine", LONG)
    until(lambda: metric(running, "slots_running") > 0, "the request never ran")
    assert httpx.delete(f"{running}/requests/mine", timeout=60).status_code == 204
    answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 410")
    assert metric(running, "slots_running") == 0
    connection.close()


def test_an_image_has_the_same_bytes_in_another_process_and_in_company(model_dir: Path, running: str) -> None:
    """No cache could help: one process draws each image alone, the other draws all of them at once among others."""
    bodies = [
        {
            "seed": 100 + i, "label": i, "steps": 5 + i, "guidance_scale": [1, 3][i % 2],
            "sampler": ["ddpm", "dpmpp_2m"][i // 2 % 2],
        }
        for i in range(8)
    ]  # fmt: skip
    alone = [httpx.post(f"{running}/generate", json=body, timeout=60).content for body in bodies]
    with server(model=model_dir) as (_, url), ThreadPoolExecutor(16) as pool:
        wait_until_ready(url)
        company = [pool.submit(httpx.post, f"{url}/generate", json={"n": 9, "seed": s}, timeout=60) for s in range(4)]
        together = [pool.submit(httpx.post, f"{url}/generate", json=body, timeout=60) for body in bodies]
        assert [future.result().content for future in together] == alone
        assert all(future.result().status_code == 200 for future in company)
        rows, steps = metric(url, "batch_rows_sum"), metric(url, "step_seconds_count")
        assert rows / steps > 2  # they did share their batches
    assert len(set(alone)) == len(alone)


def test_it_answers_at_once_and_is_ready_after_its_warm_up(model_dir: Path, tmp_path: Path) -> None:
    """Without a graph the start takes seconds: meanwhile it is alive, not ready, and says so."""
    copy = tmp_path / "tiny"
    shutil.copytree(model_dir, copy)
    (copy / "unet" / "model.onnx").unlink()
    with server(model=copy) as (_, url):
        health = httpx.get(f"{url}/health", timeout=60)
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        assert httpx.get(f"{url}/livez", timeout=60).status_code == 200
        refused = httpx.post(f"{url}/generate", json={}, timeout=60)
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
        assert int(refused.headers["retry-after"]) >= 1
        wait_until_ready(url)
        assert httpx.post(f"{url}/generate", json={}, timeout=60).status_code == 200
    assert (copy / "unet" / "model.onnx").is_file()


def test_a_signal_while_it_loads_ends_it_soon(model_dir: Path, tmp_path: Path) -> None:
    """Loading cannot be interrupted, but nobody has to wait for it."""
    copy = tmp_path / "tiny"
    shutil.copytree(model_dir, copy)
    (copy / "unet" / "model.onnx").unlink()
    with server(model=copy) as (process, url):
        assert httpx.get(f"{url}/health", timeout=60).json()["status"] == "starting"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_port_in_use_ends_it_soon(model_dir: Path, running: str) -> None:
    env = {**os.environ, "DDPM_PORT": running.rpartition(":")[2], "DDPM_MODEL": str(model_dir), "DDPM_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-m", "app"], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert "address already in use" in done.stderr


def test_draining_keeps_the_door_open_until_accepted_work_is_done(model_dir: Path) -> None:
    """New work gets 503 on a new connection, probes answer, what was accepted is served, and the exit code is 0."""
    with server(model=model_dir) as (process, url), ThreadPoolExecutor(1) as pool:
        wait_until_ready(url)
        accepted = pool.submit(httpx.post, f"{url}/generate", json={"n": 64, "steps": 250}, timeout=60)
        until(lambda: metric(url, "slots_running") > 0, "the request never ran")
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/readyz", timeout=60).status_code == 503, "it does not drain", 5)
        refused = httpx.post(f"{url}/generate", json={}, timeout=60)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["detail"]
        assert httpx.get(f"{url}/livez", timeout=60).status_code == 200
        assert not accepted.done()
        assert accepted.result().status_code == 200
        assert process.wait(30) == 0


def test_when_the_drain_time_is_up_whoever_waits_is_told(model_dir: Path) -> None:
    with server(model=model_dir, drain_s=0.5) as (process, url), ThreadPoolExecutor(1) as pool:
        wait_until_ready(url)
        accepted = pool.submit(httpx.post, f"{url}/generate", content=LONG, timeout=60)
        until(lambda: metric(url, "slots_running") > 0, "the request never ran")
        process.send_signal(signal.SIGTERM)
        assert accepted.result().status_code == 503
        assert process.wait(15) == 0


def test_a_second_signal_ends_it_at_once(model_dir: Path) -> None:
    with server(model=model_dir) as (process, url):
        wait_until_ready(url)
        with send(url, GENERATE + "image/png", LONG):
            until(lambda: metric(url, "slots_running") > 0, "the request never ran")
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # the same signal, as some supervisors send it
            time.sleep(1.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            process.wait(5)


def test_every_line_of_the_log_is_json_and_has_the_request_id(model_dir: Path) -> None:
    with server(model=model_dir) as (process, url):
        wait_until_ready(url)
        httpx.post(f"{url}/generate", json={"steps": 1}, headers={"x-request-id": "look-for-me"}, timeout=60)
        process.send_signal(signal.SIGTERM)
        process.wait(15)
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    of_request = [line["message"] for line in lines if line.get("request_id") == "look-for-me"]
    assert of_request[0].endswith('"POST /generate HTTP/1.1" 200')


def test_more_workers_are_refused_with_the_reason(model_dir: Path) -> None:
    env = {**os.environ, "DDPM_PORT": "0", "DDPM_MODEL": str(model_dir), "WEB_CONCURRENCY": "2"}
    done = subprocess.run([sys.executable, "-m", "app"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "one process serves one device" in done.stderr


def test_a_worker_of_another_server_is_refused_too(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `uvicorn --workers` starts them: processes of one parent."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    service = Service(Settings(model=model_dir, device="cpu"))
    with pytest.raises(RuntimeError, match="one process serves one device"):
        service.start()
    service.run(service.client.aclose())
    service.loop.close()
