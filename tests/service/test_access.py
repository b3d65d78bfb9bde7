"""API keys, what is told to browsers, and what is told to nobody."""

from __future__ import annotations

import asyncio
import hmac
import importlib
import pkgutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import SecretStr, ValidationError

import app.routes
from app.settings import Settings
from tests.service.conftest import Service, assert_problem, encode_grey
from tests.service.process import Server, server, until

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
KEYS = f"{ALICE}, {BOB}"
OPEN = {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
PAGE = {"/", "/web/main.js"}  # it asks for a key itself
WATCHING = {"/health", "/metrics"}
DOCS = {"/docs", "/openapi.json"}

PARAMETERS = {
    "model": "tiny", "version": "1", "sampler": "ddim", "steps": 1, "label": 1, "seed": 1, "request_id": "x",
    "name": "main.js",
}  # fmt: skip


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def routes() -> list[tuple[str, str]]:
    """Method and path of everything there is, in the description or not, parameters filled in."""
    modules = [
        importlib.import_module(f"app.routes.{found.name}") for found in pkgutil.iter_modules(app.routes.__path__)
    ]
    routers = {
        id(value): value for module in modules for value in vars(module).values() if isinstance(value, APIRouter)
    }
    return sorted(
        (method, route.path.format(**PARAMETERS))
        for router in routers.values()
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    )


def test_without_a_key_nothing_but_probes_answers(make_service: Callable[..., Service]) -> None:
    service = make_service(api_keys=KEYS, metrics_key=True)
    assert len(routes()) >= 18
    for method, path in routes():
        for headers in ({}, bearer("wrong-0123456789abcdef"), {"x-api-key": ALICE[:-1]}, {"authorization": ALICE}):
            response = service.request(method, path, headers=headers)
            if path in OPEN | PAGE | DOCS:
                assert response.status_code == 200
            else:
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert method == "HEAD" or "key" in assert_problem(response, 401)["detail"]
    refused = service.engine.metrics.registry.get_sample_value("ddpm_refused_total", {"reason": "unauthorized"})
    assert refused == 4 * sum(path not in OPEN | PAGE | DOCS for _, path in routes())


@pytest.mark.parametrize("headers", [bearer(ALICE), {"authorization": f"bearer {BOB}"}, {"x-api-key": BOB}])
def test_with_a_key_everything_does(make_service: Callable[..., Service], headers: dict[str, str]) -> None:
    service = make_service(api_keys=KEYS, metrics_key=True)
    for method, path in routes():
        assert service.request(method, path, headers=headers).status_code not in (401, 405)
    assert service.generate({"steps": 1}, **headers).status_code == 200


def test_metrics_and_health_need_no_key_unless_it_is_said(make_service: Callable[..., Service]) -> None:
    service = make_service(api_keys=KEYS)
    assert {service.request("GET", path).status_code for path in OPEN | WATCHING} == {200}
    assert_problem(service.generate({}), 401)
    schema = service.app.openapi()
    assert schema["paths"]["/generate"]["post"]["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
    assert "security" not in schema["paths"]["/livez"]["get"]


def test_without_keys_everybody_is_served(service: Service) -> None:
    assert service.generate({"steps": 1}, **bearer("anything")).status_code == 200
    assert "security" not in service.app.openapi()["paths"]["/generate"]["post"]


def test_keys_are_compared_in_constant_time_and_all_of_them(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their digests, of one length, whether or not one before has fitted."""
    service = make_service(api_keys=KEYS)
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    for key, status in ((ALICE, 200), (BOB, 200), ("x", 401)):
        compared.clear()
        assert service.generate({"steps": 1}, **bearer(key)).status_code == status
        assert len(compared) == 2
        assert {len(side) for pair in compared for side in pair} == {64}


def test_a_body_is_not_read_before_the_key_is_known(make_service: Callable[..., Service]) -> None:
    service = make_service(api_keys=KEYS)
    read: list[int] = []

    async def body():  # type: ignore[no-untyped-def]
        read.append(1)
        yield b"x" * 2**20

    assert_problem(service.request("POST", "/noise", content=body()), 401)
    assert read == []


def test_each_key_has_slots_of_its_own(make_service: Callable[..., Service], hold: threading.Event) -> None:
    service = make_service(api_keys=KEYS, key_slots=4, max_images=4)
    engine = service.engine
    hold.clear()

    async def ask_all() -> list[int]:
        async def ask(key: str, n: int) -> int:
            response = await service.client.post("/generate", json={"n": n, "steps": 1}, headers=bearer(key))
            if response.status_code == 429:
                assert "4 image slots of this API key" in assert_problem(response, 429)["detail"]
                assert int(response.headers["retry-after"]) >= 1
            return response.status_code

        first = [asyncio.ensure_future(ask(ALICE, 2)) for _ in range(2)]
        while engine.scheduler.slots < 4:
            await asyncio.sleep(0.01)
        refused = await ask(ALICE, 1)
        other = asyncio.ensure_future(ask(BOB, 4))
        while engine.scheduler.slots < 8:
            await asyncio.sleep(0.01)
        hold.set()
        return [refused, await other, *(await asyncio.gather(*first))]

    assert service.run(ask_all()) == [429, 200, 200, 200]
    assert engine.metrics.registry.get_sample_value("ddpm_refused_total", {"reason": "key_full"}) == 1


def test_a_key_meets_no_request_of_another(make_service: Callable[..., Service], hold: threading.Event) -> None:
    """Neither by ending it nor by taking its id."""
    service = make_service(api_keys=KEYS)
    engine = service.engine
    hold.clear()

    async def both() -> tuple[int, int, int, int, int]:
        def ask(key: str) -> asyncio.Future[int]:
            headers = {**bearer(key), "x-request-id": "same"}
            return asyncio.ensure_future(service.client.post("/generate", json={"steps": 1}, headers=headers))

        of_alice, of_bob = ask(ALICE), ask(BOB)
        while engine.scheduler.slots < 2:
            await asyncio.sleep(0.01)
        stranger = await service.client.delete("/requests/same", headers=bearer("wrong-0123456789abcdef"))
        ended = await service.client.delete("/requests/same", headers=bearer(BOB))
        again = await service.client.delete("/requests/same", headers=bearer(BOB))
        hold.set()
        return (
            stranger.status_code,
            ended.status_code,
            again.status_code,
            *(answer.status_code for answer in (await of_alice, await of_bob)),
        )

    assert service.run(both()) == (401, 204, 404, 200, 410)


@pytest.mark.parametrize("keys", ["short", f"{ALICE},short", "with space 0123456789", "sch\u00f6n-0123456789abcdef"])
def test_a_bad_key_is_refused_and_not_shown(keys: str) -> None:
    with pytest.raises(ValidationError, match="DDPM_API_KEYS: key") as refused:
        Settings(api_keys=SecretStr(keys))
    messages = [error["msg"] for error in refused.value.errors(include_url=False)]  # what python -m app prints
    assert all(key.strip() not in message for key in keys.split(",") for message in messages)


def test_settings_that_would_leave_open_what_they_close_are_refused() -> None:
    for wrong, what in (
        ({"api_keys": SecretStr(" , ")}, "has no key in it"),
        ({"metrics_key": True}, "DDPM_API_KEYS is not"),
        ({"key_slots": 64}, "DDPM_API_KEYS is not"),
        ({"cors_origins": "https://a.example/"}, "without a path"),
        ({"api_keys": SecretStr(KEYS), "queue_slots": 3}, "DDPM_QUEUE_SLOTS=3"),
    ):
        with pytest.raises(ValidationError, match=what) as refused:
            Settings(**wrong)
        assert ALICE not in str(refused.value)


# ---- browsers


def test_no_other_page_may_call_by_default(service: Service) -> None:
    for method, headers in (
        ("POST", {"origin": "https://evil.example"}),
        ("OPTIONS", {"origin": "https://evil.example", "access-control-request-method": "POST"}),
    ):
        response = service.request(method, "/generate", headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_named_origins_may_and_their_preflight_needs_no_key(make_service: Callable[..., Service]) -> None:
    service = make_service(cors_origins="https://a.example, https://b.example", api_keys=KEYS)
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://a.example", True), ("https://b.example", True), ("https://evil.example", False)):
        preflight = service.request("OPTIONS", "/generate", headers={"origin": origin, **asked})
        answer = service.generate({"steps": 1}, origin=origin, **bearer(ALICE))
        refused = service.generate({"steps": 1}, origin=origin)
        for response in (preflight, answer, refused):
            assert (response.headers.get("access-control-allow-origin") == origin) is allowed
            assert "origin" in response.headers["vary"].lower()
            assert "access-control-allow-credentials" not in response.headers
        assert (answer.status_code, refused.status_code) == (200, 401)
        if allowed:
            assert preflight.status_code == 200
        else:
            assert "DDPM_CORS_ORIGINS" in assert_problem(preflight, 400)["detail"]


def test_every_answer_has_the_headers_that_browsers_heed(service: Service) -> None:
    for response in (
        service.generate({"steps": 1}),
        service.generate({"n": 0}),
        service.request("GET", "/nowhere"),
        service.request("GET", "/health"),
        service.noise(encode_grey(), t=1),
        service.request("GET", "/images/tiny/ddim-1/1/1.png"),
        service.generate({"steps": 1}, accept="text/event-stream"),
        service.request("GET", "/health", headers={"x-request-id": "\x7f"}),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert response.headers["referrer-policy"] == "no-referrer"


def test_the_docs_page_can_be_turned_off(service: Service, make_service: Callable[..., Service]) -> None:
    assert service.request("GET", "/docs").status_code == 200
    assert "cdn.jsdelivr.net" in service.request("GET", "/docs").headers["content-security-policy"]
    closed = make_service(docs=False)
    for path in (*DOCS, "/redoc"):
        assert "docs" not in assert_problem(closed.request("GET", path), 404)["detail"].replace(path, "")
    assert closed.generate({"steps": 1}).status_code == 200


# ---- secrets


@pytest.fixture(scope="module")
def locked(model_dir: Path):  # type: ignore[no-untyped-def]
    with server(model=model_dir, api_keys=KEYS) as it:
        yield it


def test_no_key_is_in_the_log_or_in_any_answer(locked: Server) -> None:
    """Not the right ones, nor what somebody sent by mistake."""
    said = [
        locked.post("/generate", json={"steps": 1}, headers=bearer(ALICE)),
        locked.post("/generate", json={"n": -1}, headers=bearer(BOB)),
        locked.post("/generate", headers=bearer("mistaken-0123456789")),
        locked.post("/generate", headers={"x-api-key": "mistaken-0123456789"}),
        locked.get("/health"),
        locked.get("/metrics"),
        locked.get("/openapi.json"),
        locked.get("/nowhere", headers=bearer(ALICE)),
    ]
    assert [answer.status_code for answer in said] == [200, 422, 401, 401, 200, 200, 200, 404]
    until(lambda: "nowhere" in locked.logged(), "the log is late")
    for text in [locked.logged(), *(answer.text + str(answer.headers) for answer in said)]:
        assert not any(key in text for key in (ALICE, BOB, "mistaken"))


def test_the_server_does_not_say_what_it_is_made_of(locked: Server) -> None:
    assert "server" not in locked.get("/health").headers


def test_many_wrong_keys_harm_nobody(locked: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        wrong = [pool.submit(locked.post, "/generate", headers=bearer(f"wrong-{i:016}")) for i in range(100)]
        assert locked.post("/generate", json={"steps": 1}, headers=bearer(ALICE)).status_code == 200
        assert {answer.result().status_code for answer in wrong} == {401}
