"""What goes wrong in production, done to the real process: who is harmed, what is said, what works after it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from app.settings import Settings
from ddpm_core.checkpoint import WEIGHTS_NAME, sha256_of, to_json
from tests.service.conftest import assert_problem, encode_grey
from tests.service.process import Server, refused_start, server, until

DRAW = "POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nAccept: "
FORM = "HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=a"
LONG = b'{"n": 16, "steps": 1000, "sampler": "ddpm"}'


@pytest.fixture(scope="module")
def running(model_dir: Path) -> Iterator[Server]:
    with server(model=model_dir) as it:
        yield it


def drawn(it: Server, seed: int = 5, **fields: object) -> bytes:
    response = it.post("/generate", json={"seed": seed, "steps": 4, "sampler": "ddim", **fields})
    assert response.status_code == 200, response.text
    return response.content


# ---- clients that vanish


def half_an_upload(it: Server, path: str) -> socket.socket:
    part = b'--a\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + encode_grey()
    return it.send(f"POST {path} {FORM}", part, length=5_000_000)


def queued(it: Server) -> socket.socket:
    """Behind a request that fills every step; both are closed together."""
    ahead = it.send(DRAW + "image/png", b'{"n": 64, "steps": 1000, "sampler": "ddpm"}')
    until(lambda: it.metric("slots_running") > 0, "it never ran")
    behind = it.send(DRAW + "image/png", b'{"n": 64, "steps": 1000, "sampler": "ddpm"}')
    until(lambda: it.metric("slots_waiting") > 64, "it never waited")
    ahead.close()
    return behind


def denoising(it: Server) -> socket.socket:
    connection = it.send(DRAW + "image/png", LONG)
    until(lambda: it.metric("slots_running") > 0, "it never ran")
    return connection


def streaming(it: Server) -> socket.socket:
    connection = it.send(DRAW + "text/event-stream", LONG[:-1] + b', "previews": 1}')
    while b"event: progress" not in connection.recv(65536):
        pass
    return connection


VANISH: dict[str, Callable[[Server], socket.socket]] = {
    "mid-upload to /noise": lambda it: half_an_upload(it, "/noise"),
    "mid-upload to /denoise": lambda it: half_an_upload(it, "/denoise"),
    "mid-upload of JSON": lambda it: it.send(DRAW + "image/png", b'{"n": ', length=1000),
    "in the queue": queued,
    "mid-denoise": denoising,
    "mid-stream": streaming,
}


@pytest.mark.parametrize("how", ["by a close", "by a reset"])
@pytest.mark.parametrize("when", VANISH)
def test_a_client_that_vanishes_harms_nobody(running: Server, when: str, how: str) -> None:
    """Nothing of it is left, no error is logged, and the next client has its picture."""
    before = drawn(running)
    files = running.open_files()
    connection = VANISH[when](running)
    if how == "by a reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    running.wait_until_idle(5)
    until(lambda: running.open_files() <= files + 1, "its connection is still open")
    assert drawn(running) == before
    lines = [json.loads(line) for line in running.logged().splitlines()]
    assert [line for line in lines if line["level"] in ("ERROR", "CRITICAL")] == []


# ---- a step that fails


@pytest.fixture
def faulty(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    def make(fault: str, **settings: object) -> contextlib.AbstractContextManager[Server]:
        monkeypatch.setenv("FAULT", fault)
        return server("tests.service.faulty", model=model_dir, exact=False, **settings)

    return make


def test_out_of_memory_in_a_step_makes_the_step_smaller(
    faulty: Callable[..., contextlib.AbstractContextManager[Server]], running: Server
) -> None:
    """Everybody gets their picture, and it is the same one."""
    bodies = [{"n": 5, "seed": seed, "guidance_scale": scale, "label": 3} for seed, scale in ((1, 1), (9, 2), (30, 1))]
    expected = [drawn(running, **body) for body in bodies]
    with faulty("out-of-memory", batch_rows=16) as it, ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda body: drawn(it, **body), bodies))
        assert found == expected
        assert it.get("/livez").status_code == 200
        assert it.metric('requests_total{outcome="failed"}') == 0


def test_a_row_of_nan_ends_its_own_request_alone(
    faulty: Callable[..., contextlib.AbstractContextManager[Server]], running: Server
) -> None:
    expected = [drawn(running, seed, label=3, n=3) for seed in range(4)]
    with faulty("nan", batch_rows=16) as it, ThreadPoolExecutor(5) as pool:
        good = [pool.submit(drawn, it, seed, label=3, n=3) for seed in range(4)]
        bad = pool.submit(it.post, "/generate", json={"label": 8, "steps": 4}, headers={"x-request-id": "the-bad-one"})
        problem = assert_problem(bad.result(), 500)
        assert "not finite" in problem["detail"]
        assert [future.result() for future in good] == expected
        streamed = it.post("/generate", json={"label": 8, "steps": 2}, headers={"accept": "text/event-stream"})
        assert streamed.text.count("event: error") == 1
        assert drawn(it, 0, label=3, n=3) == expected[0]
        assert it.get("/readyz").status_code == 200
        lines = [json.loads(line) for line in it.logged().splitlines()]
        assert {line.get("request_id") for line in lines if line["level"] == "ERROR"} >= {"the-bad-one"}


def test_when_the_worker_thread_dies_everybody_is_told(
    faulty: Callable[..., contextlib.AbstractContextManager[Server]],
) -> None:
    """Those who wait at once, those who come later too; the probes say that the process must be replaced."""
    with faulty("thread-dies") as it, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(it.post, "/generate", content=LONG) for _ in range(3)]
        until(lambda: it.metric("slots_running") > 0, "they never ran")
        assert_problem(it.post("/generate", json={"label": 9}), 503)
        for answer in waiting:
            assert "must be restarted" in assert_problem(answer.result(), 503)["detail"]
        late = it.post("/generate", json={})
        assert_problem(late, 503)
        assert int(late.headers["retry-after"]) >= 1
        assert it.get("/livez").status_code == 503
        assert it.get("/readyz").status_code == 503
        assert it.get("/health").json()["status"] == "failed"
        assert it.metric("slots_running") + it.metric("slots_waiting") == 0
        assert any(json.loads(line)["level"] == "CRITICAL" for line in it.logged().splitlines())
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(15) == 1


# ---- the end of the process


def test_sigterm_under_load_loses_nothing_that_was_accepted(model_dir: Path) -> None:
    """Whoever got in gets the right picture; whoever came later gets 503 or finds the door closed, even while it sends.

    Nobody hangs, and the server has not heard of anybody who got nothing.
    """
    with server(model=model_dir) as it:
        expected = {seed: drawn(it, seed, n=2) for seed in range(4)}

        def slots_taken() -> float:
            return it.metric("slots_running") + it.metric("slots_waiting")

        async def load() -> list[tuple[int, int, bytes]]:
            """Number, status and content of each; status 0: the door was closed.

            The signal comes while the server has many; all that it has then are answered.
            """
            answers: list[tuple[int, int, bytes]] = []
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=it.url, timeout=60, limits=limits) as client:

                async def ask(i: int) -> None:
                    body = {"seed": i % 4, "n": 2, "steps": 4, "sampler": "ddim"}
                    try:
                        response = await client.post("/generate", json=body, headers={"X-Request-Id": f"number-{i}-"})
                    except (httpx.NetworkError, httpx.RemoteProtocolError):
                        answers.append((i, 0, b""))
                    else:
                        answers.append((i, response.status_code, response.content))

                tasks: list[asyncio.Task[None]] = []
                accepted = 0.0
                while accepted < 50:  # of which none has its answer yet
                    assert len(tasks) < 5000
                    tasks += [asyncio.create_task(ask(i)) for i in range(len(tasks), len(tasks) + 20)]
                    before = len(answers)
                    accepted = await asyncio.to_thread(slots_taken) / 2
                it.process.send_signal(signal.SIGTERM)
                for _ in range(100):
                    tasks.append(asyncio.create_task(ask(len(tasks))))
                    await asyncio.sleep(0.002)
                await asyncio.gather(*tasks)
                assert len(answers) == len(tasks)
                assert sum(status == 200 for _, status, _ in answers[before:]) >= accepted
            return answers

        answers = asyncio.run(load())
        assert it.process.wait(30) == 0
        assert all(content == expected[i % 4] for i, status, content in answers if status == 200)
        counts = collections.Counter(status for _, status, _ in answers)
        assert set(counts) <= {0, 200, 503}, counts
        assert counts[0] + counts[503] > 0
        logged = it.logged()
        assert "Traceback" not in logged
        assert "running task(s)" not in logged  # uvicorn's word of answers that it cut off
        assert [i for i, status, _ in answers if status > 0 and f"number-{i}-" not in logged] == []
        assert [i for i, status, _ in answers if status == 0 and f"number-{i}-" in logged] == []


def test_after_a_kill_another_process_draws_the_same(model_dir: Path) -> None:
    """Nothing is kept that a kill could spoil: the same port, the same bytes."""
    with server(model=model_dir) as it:
        before, port = drawn(it), it.url.rpartition(":")[2]
        with it.send(DRAW + "image/png", LONG) as connection:
            until(lambda: it.metric("slots_running") > 0, "it never ran")
            it.process.kill()
            it.process.wait()
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(10) == b""
    with server(model=model_dir, port=port) as it:
        assert drawn(it) == before


# ---- weights that are not what they should be


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """A model directory with a card, to be spoilt."""
    directory = tmp_path / "tiny"
    shutil.copytree(model_dir, directory)
    (directory / "card.json").write_bytes(to_json({"model": {"sha256": sha256_of(weights(directory))}}))
    return directory


def weights(directory: Path) -> Path:
    return directory / "unet" / WEIGHTS_NAME


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(1).randrange(len(content) // 2, len(content))] ^= 1
    path.write_bytes(content)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: weights(d).unlink(), "is missing"),
    "truncated": (lambda d: truncate(weights(d)), WEIGHTS_NAME),
    "one bit flipped": (lambda d: flip_a_bit(weights(d)), "card.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_weights_that_are_damaged_are_refused_at_the_start(copy: Path, name: str) -> None:
    """By the real process; tests/core/test_checkpoint.py has every other kind of damage."""
    spoil, what = SPOILT[name]
    spoil(copy)
    assert what in refused_start(model=copy).stderr.splitlines()[-1]


def test_a_pinned_service_starts_with_those_weights_alone(model_dir: Path) -> None:
    right = sha256_of(weights(model_dir))
    with server(model=model_dir, model_sha256=right[:16]) as it:
        assert it.get("/health").json()["sha256"] == right
    assert right in refused_start(model=model_dir, model_sha256="0" * 64).stderr
    with pytest.raises(ValidationError, match="MODEL_SHA256"):
        Settings(model_sha256="xyz")


def test_a_spoilt_graph_is_made_anew_or_done_without(copy: Path, running: Server) -> None:
    """It is derived from the weights: whatever it holds, the pictures are the weights'."""
    graph = copy / "unet" / "model.onnx"
    flip_a_bit(graph)
    with server(model=copy) as it:
        assert drawn(it) == drawn(running)
