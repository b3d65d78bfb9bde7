"""Prefer: respond-async, and /requests/{id}."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.conftest import Service, assert_problem, encode_grey
from tests.service.process import server, until

BODY = {"label": 3, "seed": 5, "steps": 4, "sampler": "ddim"}
ASYNC = {"prefer": "respond-async"}


def start(service: Service, body: object = BODY, **headers: str) -> httpx.Response:
    return service.generate(body, **ASYNC, **headers)


def state(service: Service, request_id: str) -> dict[str, Any]:
    response = service.request("GET", f"/requests/{request_id}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def ended(service: Service, request_id: str) -> dict[str, Any]:
    async def wait() -> None:
        while (await service.client.get(f"/requests/{request_id}")).json()["state"] in ("queued", "running"):
            await asyncio.sleep(0.01)

    service.run(asyncio.wait_for(wait(), 60))
    return state(service, request_id)


@pytest.mark.parametrize("accept", ["image/png", "application/json", "application/zip"])
def test_the_result_is_what_the_request_would_have_answered(service: Service, accept: str) -> None:
    accepted = start(service, accept=accept)
    assert accepted.status_code == 202
    assert accepted.headers["preference-applied"] == "respond-async"
    assert int(accepted.headers["retry-after"]) >= 1
    location = accepted.headers["location"]
    assert location == f"/requests/{accepted.headers['x-request-id']}"
    assert accepted.json()["state"] in ("queued", "running")
    done = ended(service, accepted.headers["x-request-id"])
    assert (done["state"], done["step"], done["steps"]) == ("completed", 4, 4)
    assert done["expires"] > done["created"] > 1.7e9
    result, direct = service.request("GET", done["result"]), service.generate(BODY, accept=accept)
    assert result.headers["content-type"] == accept
    assert (result.headers["x-seed"], result.headers["x-model"]) == ("5", direct.headers["x-model"])
    assert set(result.headers) == set(direct.headers)
    if accept != "application/json":  # which has its own time
        assert result.content == direct.content
    assert service.request("GET", done["result"]).content == result.content  # as often as one likes


def test_denoise_and_frames_may_be_asynchronous_too(service: Service) -> None:
    fields = {"t": "400", "steps": "3", "frames": "4", "seed": "1", "response_format": "npz"}
    asked = service.request("POST", "/denoise", files={"image": ("x", encode_grey())}, data=fields, headers=ASYNC)
    assert asked.status_code == 202
    done = ended(service, asked.headers["x-request-id"])
    direct = service.request("POST", "/denoise", files={"image": ("x", encode_grey())}, data=fields)
    assert service.request("GET", done["result"]).content == direct.content
    assert service.app.state.frames.taken == 0


def test_what_is_refused_is_refused_at_once(make_service: Callable[..., Service]) -> None:
    service = make_service(queue_slots=4, max_images=4)
    assert_problem(start(service, {"steps": 0}), 422, "steps")
    assert_problem(start(service, {**BODY, "deadline_ms": 1, "sampler": "ddpm", "steps": 900}), 422, "deadline_ms")
    assert_problem(start(service, {"model": "none"}), 404)
    assert service.app.state.jobs.settled


def held(service: Service, hold: threading.Event, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs work while no step is made."""
    hold.clear()
    try:
        service.run(asyncio.wait_for(work(), 60))
    finally:
        hold.set()


def test_its_state_says_how_far_it_is_and_delete_ends_it(service: Service, hold: threading.Event) -> None:
    engine = service.engine

    async def work() -> None:
        ask = service.client
        first = await ask.post("/generate", json={**BODY, "n": 64}, headers=ASYNC)
        while (await ask.get(first.headers["location"])).json()["state"] != "running":
            await asyncio.sleep(0.01)
        second = await ask.post("/generate", json={**BODY, "n": 64}, headers={**ASYNC, "x-request-id": "second"})
        one, two = first.json()["id"], second.json()["id"]
        assert two == "second"
        running, queued = [(await ask.get(f"/requests/{i}")).json() for i in (one, two)]
        assert (running["state"], running["queue_position"], running["steps"]) == ("running", 0, 4)
        assert (queued["state"], queued["queue_position"]) == ("queued", 1)
        assert queued["eta_s"] > 0
        assert queued["result"] is None
        early = await ask.get(f"/requests/{two}/result")
        assert int(early.headers["retry-after"]) >= 1
        assert_problem(early, 409)
        again = await ask.post("/generate", json=BODY, headers={**ASYNC, "x-request-id": "second"})
        assert_problem(again, 409)
        for i in (one, two):
            assert (await ask.delete(f"/requests/{i}")).status_code == 204
        assert engine.idle
        for i in (one, two):
            cancelled = (await ask.get(f"/requests/{i}")).json()
            assert cancelled["state"] == "cancelled"
            assert cancelled["problem"]["status"] == 410
            assert_problem(await ask.get(f"/requests/{i}/result"), 410)

    held(service, hold, work)


def test_a_request_that_is_waited_for_has_a_state_too(service: Service, hold: threading.Event) -> None:
    async def work() -> None:
        asked = asyncio.ensure_future(service.client.post("/generate", json=BODY, headers={"x-request-id": "sync"}))
        while service.app.state.engines.idle:
            await asyncio.sleep(0.01)
        found = (await service.client.get("/requests/sync")).json()
        assert (found["id"], found["steps"], found["result"]) == ("sync", 4, None)
        hold.set()
        assert (await asked).status_code == 200
        assert_problem(await service.client.get("/requests/sync"), 404)

    held(service, hold, work)


def test_a_deleted_result_is_gone_and_its_id_free(service: Service) -> None:
    first = start(service, **{"x-request-id": "again"})
    ended(service, "again")
    assert_problem(start(service, **{"x-request-id": "again"}), 409)
    assert service.request("DELETE", "/requests/again").status_code == 204
    for response in (
        service.request("GET", "/requests/again"),
        service.request("GET", "/requests/again/result"),
        service.request("DELETE", "/requests/again"),
    ):
        assert_problem(response, 404)
    assert start(service, **{"x-request-id": "again"}).status_code == first.status_code
    ended(service, "again")


def test_wait_answers_directly_where_that_is_soon_enough(service: Service, hold: threading.Event) -> None:
    direct = service.generate(BODY, prefer="respond-async, wait=30")
    assert direct.status_code == 200
    assert direct.content == service.generate(BODY).content
    assert_problem(service.request("GET", f"/requests/{direct.headers['x-request-id']}"), 404)

    async def work() -> None:
        late = await service.client.post("/generate", json=BODY, headers={"prefer": "respond-async, wait=1"})
        assert late.status_code == 202
        await service.client.delete(late.headers["location"])

    held(service, hold, work)


@pytest.mark.parametrize("prefer", ["return=minimal", "handling=lenient, wait=5", "respond-asynchronously", ", ;=", ""])
def test_other_preferences_are_left_alone(service: Service, prefer: str) -> None:
    assert service.generate(BODY, prefer=prefer).status_code == 200


def test_a_failed_one_says_why(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from app import answers

    def fail(*args: object) -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setitem(answers.STILL, answers.PNG, fail)
    failed = ended(service, start(service).headers["x-request-id"])
    assert (failed["state"], failed["result"], failed["problem"]["status"]) == ("failed", None, 500)
    assert "secret" not in str(failed)
    assert_problem(service.request("GET", f"/requests/{failed['id']}/result"), 500)


# Bounds


def test_results_are_bounded_in_number_and_the_oldest_make_room(make_service: Callable[..., Service]) -> None:
    service = make_service(jobs=2)
    ids = []
    for seed in range(4):
        ids.append(start(service, {**BODY, "seed": seed}).headers["x-request-id"])
        ended(service, ids[-1])
    for i in ids[2:]:
        assert state(service, i)["state"] == "completed"
    for i in ids[:2]:
        assert_problem(service.request("GET", f"/requests/{i}"), 404)


def test_results_are_bounded_in_bytes(make_service: Callable[..., Service]) -> None:
    body = {**BODY, "frames": 5, "response_format": "npz"}
    service = make_service(job_bytes=100_000)
    size = len(service.generate(body).content)
    assert 30_000 < size < 50_000
    ids = []
    for seed in range(4):
        ids.append(start(service, {**body, "seed": seed}).headers["x-request-id"])
        ended(service, ids[-1])
    found = [service.request("GET", f"/requests/{i}").status_code for i in ids]
    assert found == [404] * (4 - 100_000 // size) + [200] * (100_000 // size)
    metrics = service.request("GET", "/metrics").text
    assert f"ddpm_jobs {float(100_000 // size)}" in metrics
    large = ended(service, start(service, {**body, "n": 4}).headers["x-request-id"])
    assert large["state"] == "failed"
    assert "over the limit of 100,000" in large["problem"]["detail"]


def test_results_are_bounded_in_time(make_service: Callable[..., Service]) -> None:
    service = make_service(job_s=0.5)
    request_id = start(service).headers["x-request-id"]
    ended(service, request_id)
    service.run(asyncio.sleep(0.8))
    assert not service.app.state.jobs._by_key  # forgotten without anybody asking


def test_what_has_left_is_not_kept_alive(make_service: Callable[..., Service]) -> None:
    """Neither those that made room nor those that were deleted wait in memory for their time to be up."""
    service = make_service(jobs=1)
    seen = []
    for seed in range(3):
        ended(service, start(service, {**BODY, "seed": seed}).headers["x-request-id"])
        (kept,) = service.app.state.jobs._by_key.values()
        seen.append(weakref.ref(kept))
        del kept
    service.request("DELETE", f"/requests/{seen[-1]().params.request_id}")  # type: ignore[union-attr]
    service.run(asyncio.sleep(0.05))
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


def test_those_that_have_not_ended_are_bounded_too(
    make_service: Callable[..., Service], hold: threading.Event
) -> None:  # fmt: skip
    service = make_service(jobs=2)

    async def work() -> None:
        asked = [await service.client.post("/generate", json=BODY, headers=ASYNC) for _ in range(3)]
        assert [response.status_code for response in asked] == [202, 202, 429]
        assert "2 of 2 asynchronous requests have not ended" in assert_problem(asked[2], 429)["detail"]
        hold.set()

    held(service, hold, work)


def test_of_several_keys_each_has_a_bound_of_its_own(
    make_service: Callable[..., Service], hold: threading.Event
) -> None:
    alice, bob = ({"x-api-key": f"{name}-0123456789abcdef"} for name in ("alice", "bob"))
    service = make_service(jobs=2, api_keys=f"{alice['x-api-key']},{bob['x-api-key']}")

    async def work() -> None:
        body = {"n": 64, "steps": 900, "sampler": "ddpm"}
        asked = [await service.client.post("/generate", json=body, headers={**ASYNC, **alice}) for _ in range(2)]
        assert [response.status_code for response in asked] == [202, 429]
        assert "1 of 1 asynchronous requests of this API key" in assert_problem(asked[1], 429)["detail"]
        assert int(asked[1].headers["retry-after"]) > 1  # as long as hers needs
        assert (await service.client.post("/generate", json=BODY, headers={**ASYNC, **bob})).status_code == 202
        await service.client.delete(asked[0].headers["location"], headers=alice)
        hold.set()

    held(service, hold, work)


def test_state_and_result_can_be_asked_for_by_head(make_service: Callable[..., Service]) -> None:
    service = make_service()
    location = start(service).headers["location"]
    assert service.request("HEAD", location).status_code == 200
    assert service.request("HEAD", f"{location}-not").status_code == 404
    ended(service, location.rpartition("/")[2])
    assert service.request("HEAD", f"{location}/result").headers["content-type"] == "image/png"
    assert not service.app.state.jobs.settled  # nobody has fetched it
    assert service.request("GET", f"{location}/result").status_code == 200
    assert service.app.state.jobs.settled


def test_a_kept_id_is_nobody_else_s(service: Service) -> None:
    start(service, **{"x-request-id": "mine"})
    ended(service, "mine")
    assert_problem(service.generate(BODY, **{"x-request-id": "mine"}), 409)
    service.request("DELETE", "/requests/mine")
    assert service.generate(BODY, **{"x-request-id": "mine"}).status_code == 200


def test_no_key_sees_or_pushes_out_another_s(make_service: Callable[..., Service]) -> None:
    alice, bob = ({"x-api-key": f"{name}-0123456789abcdef"} for name in ("alice", "bob"))
    service = make_service(jobs=4, api_keys=f"{alice['x-api-key']},{bob['x-api-key']}")

    def ask(key: dict[str, str], i: str) -> int:
        return service.generate(BODY, **ASYNC, **key, **{"x-request-id": i}).status_code

    def look(key: dict[str, str], i: str) -> int:
        return service.request("GET", f"/requests/{i}/result", headers=key).status_code

    assert ask(bob, "mine") == 202
    assert look(alice, "mine") == 404
    assert ask(alice, "mine") == 202  # her own

    async def wait() -> None:
        while not all(kept.ended for kept in service.app.state.jobs._by_key.values()):
            await asyncio.sleep(0.01)

    for i in range(8):
        service.run(asyncio.wait_for(wait(), 60))
        assert ask(alice, f"a{i}") == 202
    service.run(asyncio.wait_for(wait(), 60))
    assert look(bob, "mine") == 200
    assert look(alice, "mine") == 404
    assert look(alice, "a7") == 200
    assert service.request("DELETE", "/requests/mine", headers=alice).status_code == 404


def test_the_drain_waits_for_results_to_be_fetched(model_dir: Path) -> None:
    """A client that was promised a result gets it, though it asks when all work is done."""
    with server(model=model_dir, drain_s=60) as it:
        accepted = it.post("/generate", json={**BODY, "steps": 40}, headers=ASYNC)
        assert accepted.status_code == 202
        it.process.send_signal(signal.SIGTERM)
        it.wait_until_idle()
        time.sleep(0.5)
        assert it.process.poll() is None
        until(lambda: it.get(accepted.headers["location"]).json()["state"] == "completed", "it never ended")
        assert it.get(f"{accepted.headers['location']}/result").content.startswith(b"\x89PNG")
        assert it.process.wait(10) == 0
