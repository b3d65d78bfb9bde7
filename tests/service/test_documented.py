"""Every status that the description promises can be provoked and is as described; random requests find no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import images
from app.routes import capabilities, health, metrics, oip, openai, requests
from tests.networks import save_tiny
from tests.service.conftest import Service, assert_problem, encode_grey
from tests.service.fuzz import T, fuzz

KEY = {"x-api-key": "0123456789abcdef"}
DRAWING = {"generate": "/generate", "denoise": "/denoise"}
OTHERS = {
    "image": ("GET", "/images/tiny/ddim-2/7/1.png"),
    "noise": ("POST", "/noise"),
    "cancel": ("DELETE", "/requests/nobody"),
    "request_state": ("GET", "/requests/nobody"),
    "result": ("GET", "/requests/nobody/result"),
    "health": ("GET", "/health"),
    "metrics": ("GET", "/metrics"),
    "live": ("GET", "/livez"),
    "ready": ("GET", "/readyz"),
    "capabilities": ("GET", "/capabilities"),
    "server_metadata": ("GET", "/v2"),
    "openai_models": ("GET", "/v1/models"),
    "openai_model": ("GET", "/v1/models/tiny"),
    "model_metadata": ("GET", "/v2/models/tiny"),
    "model_ready": ("GET", "/v2/models/tiny/ready"),
}
POSTED = {  # as JSON
    "generate": "/generate",
    "infer": "/v2/models/tiny/infer",
    "images_generations": "/v1/images/generations",
}


class Provoking:
    """A service, and ways to bring it to every answer it has."""

    def __init__(self, make: Callable[..., Service], hold: threading.Event, patch: pytest.MonkeyPatch) -> None:
        self.service = make(api_keys=KEY["x-api-key"], metrics_key=True, request_s=0.2, queue_slots=4, max_images=4)
        self.hold, self.patch = hold, patch
        self.drawn = b""
        self.engine = self.service.engine

    async def ask(self, operation: str, more: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """A good request, but for what is said."""
        headers = {**KEY, **(more or {})}
        client = self.service.client
        if operation == "generate":
            return await client.post("/generate", json={"steps": 2, **fields}, headers=headers)
        if operation == "images_generations":
            return await client.post(POSTED[operation], json={"prompt": "7", "steps": 2, **fields}, headers=headers)
        if operation == "infer":
            seed = {"name": "seed", "shape": [1], "datatype": "INT64", "data": [1]}
            body = {"inputs": [seed], "parameters": {"steps": 2, **fields}}
            return await client.post(POSTED[operation], json=body, headers=headers)
        if operation == "verify":
            drawn = fields.pop("image_content", None) or await self.picture()
            return await client.post("/verify", files={"image": ("x", drawn)}, headers=headers)
        if operation in ("denoise", "noise"):
            data = (
                {"t": "9"} | ({"steps": "2"} if operation == "denoise" else {}) | {k: str(v) for k, v in fields.items()}
            )
            files = {"image": ("x", data.pop("image_content", None) or encode_grey())}
            return await client.post(f"/{operation}", files=files, data=data, headers=headers)
        method, path = OTHERS[operation]
        return await client.request(method, path, headers=headers)

    async def picture(self) -> bytes:
        """One that the service drew."""
        if not self.drawn:
            self.drawn = (await self.ask("generate", {"accept": "image/png"})).content
        return self.drawn

    async def ok(self, operation: str) -> httpx.Response:
        return await self.ask(operation)

    async def unauthorized(self, operation: str) -> httpx.Response:
        return await self.ask(operation, {"x-api-key": "wrong"})

    async def invalid(self, operation: str) -> httpx.Response:
        return await self.ask(operation, {"x-request-id": "not an id"})

    async def not_acceptable(self, operation: str) -> httpx.Response:
        return await self.ask(operation, {"accept": "text/html"})

    async def broken(self, operation: str) -> httpx.Response:
        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("secret")

        with self.patch.context() as patch:
            patch.setattr(images, "encode_png", fail)
            patch.setattr(images.Upload, "facts", fail)
            patch.setattr(health, "_of_model", fail)
            patch.setattr(capabilities, "of_model", fail)
            for metadata in ("OutputTensor", "ServerMetadata", "TensorMetadata"):
                patch.setattr(oip, metadata, fail)
            patch.setattr(oip, "Response", fail)
            patch.setattr(openai, "OpenAIModel", fail)
            patch.setattr(metrics, "choose_encoder", fail)
            patch.setattr(requests, "flow_of", fail)
            patch.setattr(health, "Response", fail)
            response = await self.ask(operation)
        assert "secret" not in response.text
        return response

    async def unavailable(self, operation: str) -> httpx.Response:
        was, self.engine.status = self.engine.status, "failed"
        try:
            return await self.ask(operation)
        finally:
            self.engine.status = was

    async def waiting(self, first: Coroutine[Any, Any, httpx.Response], slots: int) -> asyncio.Task[httpx.Response]:
        """A request that is in the engine and makes no step."""
        self.hold.clear()
        task = asyncio.create_task(first)
        while self.engine.scheduler.slots < slots:
            await asyncio.sleep(0.01)
        return task

    async def queue_full(self, operation: str) -> httpx.Response:
        task = await self.waiting(self.ask("generate", n=4), 4)
        refused = await self.ask(operation)
        assert int(refused.headers["retry-after"]) >= 1
        self.hold.set()
        await task
        return refused

    async def accepted(self, operation: str) -> httpx.Response:
        response = await self.ask(operation, {"prefer": "respond-async"})
        await self.ended(response)
        return response

    async def ended(self, accepted: httpx.Response) -> None:
        """An asynchronous request is no longer served."""
        location = accepted.headers["location"]
        while (await self.service.client.get(location, headers=KEY)).json()["state"] in ("queued", "running"):
            await asyncio.sleep(0.01)

    async def kept(self, operation: str) -> httpx.Response:
        await self.ended(await self.ask("generate", {"prefer": "respond-async", "x-request-id": "nobody"}))
        response = await self.ask(operation)
        await self.service.client.delete("/requests/nobody", headers=KEY)
        return response

    async def not_done(self, operation: str) -> httpx.Response:
        self.hold.clear()
        await self.ask("generate", {"prefer": "respond-async", "x-request-id": "nobody"})
        response = await self.ask(operation)
        self.hold.set()
        for _ in range(2):  # the request, then its result
            await self.service.client.delete("/requests/nobody", headers=KEY)
        return response

    async def kept_cancelled(self, operation: str) -> httpx.Response:
        self.hold.clear()
        await self.ask("generate", {"prefer": "respond-async", "x-request-id": "nobody"})
        await self.service.client.delete("/requests/nobody", headers=KEY)
        self.hold.set()
        response = await self.ask(operation)
        await self.service.client.delete("/requests/nobody", headers=KEY)
        return response

    async def kept_too_large(self, operation: str) -> httpx.Response:
        with self.patch.context() as patch:
            patch.setattr(self.service.app.state.jobs, "_most_bytes", 10)
            return await self.kept(operation)

    async def kept_by_the_dead(self, operation: str) -> httpx.Response:
        """Its engine has failed: nothing can be asked of it any more."""
        self.hold.clear()
        asked = await self.ask("generate", {"prefer": "respond-async", "x-request-id": "nobody"})
        self.engine._fail(RuntimeError("dead"))
        self.hold.set()
        await self.ended(asked)
        return await self.ask(operation)

    async def kept_too_late(self, operation: str) -> httpx.Response:
        self.hold.clear()
        asked = await self.ask("generate", {"prefer": "respond-async", "x-request-id": "nobody"}, deadline_ms=1000)
        await asyncio.sleep(1.1)
        self.hold.set()
        await self.ended(asked)
        response = await self.ask(operation)
        await self.service.client.delete("/requests/nobody", headers=KEY)
        return response

    async def uploads_full(self, operation: str) -> httpx.Response:
        with self.patch.context() as patch:
            patch.setattr(self.service.app.state.uploads.slots, "limit", 0)
            return await self.ask(operation)

    async def in_flight(self, operation: str) -> httpx.Response:
        task = await self.waiting(self.ask(operation, {"x-request-id": "same"}), 1)
        refused = await self.ask(operation, {"x-request-id": "same"})
        self.hold.set()
        await task
        return refused

    async def cancelled(self, operation: str) -> httpx.Response:
        task = await self.waiting(self.ask(operation, {"x-request-id": "mine"}), 1)
        assert (await self.service.client.delete("/requests/mine", headers=KEY)).status_code == 204
        self.hold.set()
        return await task

    async def cancels(self, operation: str) -> httpx.Response:
        task = await self.waiting(self.ask("generate", {"x-request-id": "mine"}), 1)
        response = await self.service.client.delete("/requests/mine", headers=KEY)
        self.hold.set()
        await task
        return response

    async def deadline_passed(self, operation: str) -> httpx.Response:
        task = await self.waiting(self.ask(operation, deadline_ms=1000), 1)
        await asyncio.sleep(1.1)
        self.hold.set()
        return await task

    async def not_modified(self, operation: str) -> httpx.Response:
        first = await self.ask(operation)
        return await self.ask(operation, {"if-none-match": first.headers["etag"]})

    async def not_found(self, operation: str) -> httpx.Response:
        if operation in ("cancel", "request_state", "result"):
            return await self.ask(operation)
        if operation in ("generate", "denoise", "noise", "images_generations"):
            return await self.ask(operation, model="another")
        if operation == "infer":
            return await self.service.client.post("/v2/models/another/infer", headers=KEY)
        if operation in ("model_metadata", "model_ready", "openai_model"):
            return await self.service.client.get(OTHERS[operation][1].replace("tiny", "another"), headers=KEY)
        return await self.service.client.get("/images/another/ddim-2/7/1.png", headers=KEY)

    async def too_large(self, operation: str) -> httpx.Response:
        if operation in POSTED:
            return await self.service.client.post(POSTED[operation], content=b" " * 20_000, headers=KEY)
        return await self.ask(operation, image_content=b"x" * 11 * 2**20)

    async def another_type(self, operation: str) -> httpx.Response:
        return await self.service.client.post(
            POSTED.get(operation, f"/{operation}"),
            content=b"a=1",
            headers={**KEY, "content-type": "application/x-www-form-urlencoded"},
        )

    async def too_slow(self, operation: str) -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"{" if operation in POSTED else b"--a\r\n"
            await asyncio.sleep(5)

        kind = "application/json" if operation in POSTED else "multipart/form-data; boundary=a"
        path = POSTED.get(operation, f"/{operation}")
        return await self.service.client.post(path, content=body(), headers={**KEY, "content-type": kind})


How = Callable[[Provoking, str], Coroutine[Any, Any, httpx.Response]]
P = Provoking
ALWAYS: dict[int, How] = {200: P.ok, 401: P.unauthorized, 422: P.invalid, 500: P.broken}
DRAWN: dict[int, How] = {
    **ALWAYS, 404: P.not_found, 406: P.not_acceptable, 408: P.too_slow, 409: P.in_flight, 410: P.cancelled,
    413: P.too_large, 415: P.another_type, 429: P.queue_full, 503: P.unavailable, 504: P.deadline_passed,
}  # fmt: skip
HOW: dict[str, dict[int, How]] = {
    "generate": {**DRAWN, 202: P.accepted},
    "denoise": {**DRAWN, 202: P.accepted},
    "request_state": {**ALWAYS, 200: P.kept, 404: P.not_found},
    "result": {
        **ALWAYS, 200: P.kept, 404: P.not_found, 409: P.not_done, 410: P.kept_cancelled,
        413: P.kept_too_large, 504: P.kept_too_late, 503: P.kept_by_the_dead,
    },
    "image": {**ALWAYS, 304: P.not_modified, 404: P.not_found, 429: P.queue_full, 503: P.unavailable},
    "noise": {
        **ALWAYS, 404: P.not_found, 406: P.not_acceptable, 408: P.too_slow, 413: P.too_large,
        415: P.another_type, 429: P.uploads_full, 503: P.unavailable,
    },
    "images_generations": {status: how for status, how in DRAWN.items() if status != 406},
    "openai_models": {**ALWAYS, 503: P.unavailable},
    "openai_model": {**ALWAYS, 404: P.not_found, 503: P.unavailable},
    "infer": {status: how for status, how in DRAWN.items() if status != 406},
    "capabilities": {**ALWAYS, 503: P.unavailable},
    "server_metadata": ALWAYS,
    "model_metadata": {**ALWAYS, 404: P.not_found, 503: P.unavailable},
    "model_ready": {**ALWAYS, 404: P.not_found, 503: P.unavailable},
    "verify": {
        **ALWAYS, 408: P.too_slow, 409: P.in_flight, 410: P.cancelled, 413: P.too_large, 415: P.another_type,
        429: P.uploads_full, 503: P.unavailable,
    },
    "cancel": {204: P.cancels, 401: P.unauthorized, 404: P.not_found, 422: P.invalid, 500: P.broken},
    "health": {**ALWAYS, 503: P.unavailable},
    "metrics": ALWAYS,
    "live": {**{k: v for k, v in ALWAYS.items() if k != 401}, 503: P.unavailable},
    "ready": {**{k: v for k, v in ALWAYS.items() if k != 401}, 503: P.unavailable},
}  # fmt: skip


@pytest.fixture
def provoking(
    make_service: Callable[..., Service], hold: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> Provoking:
    return Provoking(make_service, hold, monkeypatch)


def described(service: Service) -> dict[str, dict[int, dict[str, Any]]]:
    """The responses of every operation, by its id and status."""
    paths = service.app.openapi()["paths"].values()
    return {o["operationId"]: {int(s): r for s, r in o["responses"].items()} for path in paths for o in path.values()}


def test_every_status_is_known_how_to_provoke(provoking: Provoking) -> None:
    assert {name: set(of) for name, of in described(provoking.service).items()} == {
        name: set(of) for name, of in HOW.items()
    }


@pytest.mark.parametrize("operation", HOW)
def test_every_status_is_as_described(provoking: Provoking, operation: str) -> None:
    """Media type, a problem's parts, and the headers that a client counts on."""
    told = described(provoking.service)[operation]
    for status, provoke in HOW[operation].items():
        response = provoking.service.run(provoke(provoking, operation))
        assert response.status_code == status, f"{operation} {status}: {response.text}"
        kinds = told[status].get("content", {})
        if kinds and response.content:
            assert response.headers["content-type"].partition(";")[0] in kinds
        if "application/problem+json" in kinds and response.headers["content-type"] == "application/problem+json":
            assert_problem(response, status)
        if status in (429, 503) and operation in (
            "generate",
            "denoise",
            "image",
            "noise",
            "infer",
            "images_generations",
        ):
            assert int(response.headers["retry-after"]) >= 1
        for name in told[status].get("headers", {}):
            assert name in response.headers
    assert provoking.engine.scheduler.slots == 0


def test_random_requests_find_nothing_undescribed(tmp_path: Path) -> None:
    """Some hundred of them; `python -m tests.service.fuzz` tries many thousand."""
    cases, _ = fuzz(save_tiny(tmp_path / "tiny", num_train_timesteps=T), examples=10, seed=1)
    assert cases >= 500
