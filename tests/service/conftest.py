"""The real application with the real engine behind httpx, in this process."""

from __future__ import annotations

import asyncio
import functools
import io
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.engine.engine import Engine
from app.engine.runner import Row, Runner
from app.main import create_app
from app.settings import Settings


class Service:
    """A blocking client of an app whose lifespan is running."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self.loop = asyncio.new_event_loop()
        self.lifespan = self.app.router.lifespan_context(self.app)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://test"
        )

    @property
    def engine(self) -> Engine:
        """The engine of the first model on the first device."""
        first: Engine = self.app.state.engines.default.engines[0]
        return first

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def start(self, *, wait: bool = True) -> None:
        self.run(self.lifespan.__aenter__())
        while wait and self.app.state.engines.status == "starting":
            self.run(asyncio.sleep(0.01))

    def stop(self) -> None:
        self.run(self.client.aclose())
        self.run(self.lifespan.__aexit__(None, None, None))
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.run(self.client.request(method, path, **options))

    def generate(self, body: object = None, **headers: str) -> httpx.Response:
        return self.request("POST", "/generate", json={} if body is None else body, headers=headers)

    def noise(self, image: bytes, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        data = {k: str(v) for k, v in fields.items()}
        return self.request("POST", "/noise", files={"image": ("upload", image)}, data=data, headers=headers)


@pytest.fixture(scope="session")
def service(model_dir: Path) -> Iterator[Service]:
    """The app on the tiny model, ready."""
    running = Service(Settings(model=str(model_dir), device="cpu"))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def make_service(model_dir: Path) -> Iterator[Callable[..., Service]]:
    """Apps of other settings, stopped at the end."""
    made: list[Service] = []

    def make(*, wait: bool = True, **settings: Any) -> Service:
        given = settings if "models" in settings else {"model": model_dir, **settings}
        running = Service(
            Settings(**{"device": "cpu", **{k: str(v) if isinstance(v, Path) else v for k, v in given.items()}})
        )
        made.append(running)
        running.start(wait=wait)
        return running

    yield make
    for running in made:
        running.stop()


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While this is cleared no engine makes a step; it is set at first, so that engines can start."""
    gate, advance = threading.Event(), Runner.advance
    gate.set()

    def held(self: Runner, rows: Sequence[Row]) -> dict[Row, Exception]:
        gate.wait(60)
        return advance(self, rows)

    monkeypatch.setattr(Runner, "advance", held)
    yield gate
    gate.set()


def assert_problem(response: httpx.Response, status: int, field: str | None = None) -> dict[str, Any]:
    """The answer is a whole problem of this status, and errors[] names the field."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:ddpm:problem:")
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"] == f"/requests/{response.headers['x-request-id']}"
    if field is not None:
        assert field in [error["field"].split(".")[0] for error in problem["errors"]]
    return problem


def pixels(png: bytes) -> np.ndarray:
    """A PNG as an array."""
    return np.asarray(Image.open(io.BytesIO(png)))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def encode_grey() -> bytes:
    """A small PNG."""
    return encode(Image.new("L", (8, 8), 128))
