"""Progress as an event stream."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable

import pytest

from app.routes import events
from tests.service.conftest import Service, assert_problem, pixels

SSE = {"accept": "text/event-stream"}


def parse(text: str) -> list[tuple[str, dict[str, object]]]:
    """(event, data) of every event; comments are left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_every_step_is_told_and_then_the_images(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.engine, "rows_limit", 8)  # both images in each step, whatever the start has measured
    body = {"n": 2, "seed": 3, "label": 4, "steps": 5, "previews": 2, "scale": 2}
    response = service.generate(body, **SSE)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-seed"] == "3"
    *progress, (last, completed) = parse(response.text)
    assert [name for name, _ in progress] == ["progress"] * 6
    assert [(data["step"], data["steps"]) for _, data in progress] == [(i, 5) for i in range(6)]
    assert all(data["queue_position"] == 0 and data["eta_s"] >= 0 for _, data in progress)
    assert [[p["index"] for p in data["previews"]] for _, data in progress] == [[], [], [0, 1], [], [0, 1], []]
    assert pixels(base64.b64decode(progress[2][1]["previews"][1]["b64_json"])).shape == (56, 56)
    assert last == "completed"
    again = service.generate({k: v for k, v in body.items() if k != "previews"}, accept="application/json").json()
    assert completed["images"] == again["images"]


def test_an_error_on_the_way_is_an_event(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.engine.runner import Runner

    advance = Runner._step

    def fail(self: Runner, rows):  # type: ignore[no-untyped-def]
        if rows[0].seed == 13 and rows[0].done == 2:
            raise RuntimeError("secret")
        return advance(self, rows)

    monkeypatch.setattr(Runner, "_step", fail)
    response = service.generate({"seed": 13, "steps": 5}, **SSE, **{"x-request-id": "thirteen"})
    *progress, (name, problem) = parse(response.text)
    assert name == "error"
    assert (problem["status"], problem["instance"]) == (500, "/requests/thirteen")
    assert "secret" not in response.text
    assert [data["step"] for _, data in progress][-1] == 2


def test_a_refusal_is_a_problem_and_no_stream(service: Service) -> None:
    assert_problem(service.generate({"label": 10}, **SSE), 422, "label")
    assert_problem(service.generate({"steps": 1000, "deadline_ms": 1, "n": 64}, **SSE), 422, "deadline_ms")


def test_an_idle_stream_is_kept_alive(
    make_service: Callable[..., Service], hold: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.01)
    service = make_service()
    hold.clear()
    seen: list[str] = []

    async def read() -> None:
        """httpx's in-process transport gives the body at its end, so the app is called as a server calls it."""

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b'{"steps": 1}'}

        async def send(message: dict[str, object]) -> None:
            seen.append(bytes(message.get("body", b"")).decode())
            if sum("ping" in part for part in seen) == 3:
                hold.set()

        await service.app(
            {
                "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
                "method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b"",
                "headers": [(b"accept", b"text/event-stream"), (b"content-type", b"application/json")],
                "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
            },
            received(receive), send,
        )  # fmt: skip

    service.run(read())
    text = "".join(seen)
    assert text.count(": ping\n\n") >= 3
    assert parse(text)[-1][0] == "completed"


def received(first):  # type: ignore[no-untyped-def]
    """A client that sends one message and then stays."""
    import asyncio

    sent = False

    async def receive():  # type: ignore[no-untyped-def]
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return await first()

    return receive


def test_an_encoder_that_fails_is_an_event_too(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> bytes:
        raise OSError("secret")

    monkeypatch.setattr("app.images.encode_png", fail)
    name, problem = parse(service.generate({"steps": 1}, **SSE).text)[-1]
    assert (name, problem["status"]) == ("error", 500)


def test_what_a_slow_reader_is_behind_is_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is dropped; the newest and the end always come."""
    monkeypatch.setattr(events, "BACKLOG_BYTES", 0)
    *progress, (last, _) = parse(service.generate({"steps": 300}, **SSE).text)
    assert last == "completed"
    assert progress[-1][1]["step"] == 300
