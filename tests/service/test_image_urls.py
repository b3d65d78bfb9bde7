"""GET /images/...: pictures that are pure functions of their URL."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import httpx
import pytest

from app.engine.runner import Runner
from app.routes.image_urls import Sharing
from tests.service.conftest import Service, assert_problem


def url(service: Service, rest: str = "dpmpp_2m-3/7/5.png", pinned: bool = True) -> str:
    info = service.app.state.engines.default.info
    return f"/images/{info.id if pinned else info.name}/{rest}"


def test_the_picture_is_the_one_that_generate_draws(service: Service) -> None:
    for rest, body in {
        "dpmpp_2m-3/7/5.png": {"sampler": "dpmpp_2m", "label": 7},
        "ddim-3/none/5.png?eta=0.5": {"sampler": "ddim", "eta": 0.5},
        "ddpm-3/7/5.png?guidance_scale=2.5&scale=3": {
            "sampler": "ddpm", "label": 7, "guidance_scale": 2.5, "scale": 3,
        },
    }.items():  # fmt: skip
        response = service.request("GET", url(service, rest))
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "image/png"
        assert response.content == service.generate({**body, "steps": 3, "seed": 5}).content


def test_what_never_changes_says_so_and_what_may_is_asked_again(service: Service) -> None:
    pinned, named = (service.request("GET", url(service, pinned=p)) for p in (True, False))
    assert "immutable" in pinned.headers["cache-control"]
    assert named.headers["cache-control"] == "no-cache"
    etag = pinned.headers["etag"]
    assert etag == named.headers["etag"]
    assert etag.startswith('"')
    for sent in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        again = service.request("GET", url(service), headers={"if-none-match": sent})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert service.request("GET", url(service), headers={"if-none-match": '"other"'}).status_code == 200
    two = [("if-none-match", '"other"'), ("if-none-match", etag)]
    assert service.request("GET", url(service), headers=two).status_code == 304
    assert service.request("HEAD", url(service)).headers["etag"] == etag
    assert service.request("GET", url(service, "dpmpp_2m-3/7/6.png")).headers["etag"] != etag


def test_a_negative_zero_is_zero(service: Service) -> None:
    plus, minus = (service.request("GET", url(service, f"ddim-3/7/5.png?eta={eta}")) for eta in ("0", "-0.0"))
    assert plus.content == minus.content


def test_a_failure_is_found_in_the_log_by_the_clients_id(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Runner, rows: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Runner, "_step", fail)
    monkeypatch.setattr(Runner, "probe", lambda self: None)
    response = service.request("GET", url(service, "ddim-3/7/77.png"), headers={"x-request-id": "mine"})
    assert assert_problem(response, 500)["instance"] == "/requests/mine"
    known_as = [r.args[0] for r in caplog.records if "the engine knew it as" in r.msg and r.args]
    assert known_as == [r.request_id for r in caplog.records if "a step of image" in r.msg]


def test_whoever_comes_while_the_last_waiter_leaves_starts_anew(service: Service) -> None:
    """The computation that is being cancelled is not theirs, and its end does not hide theirs from others."""
    sharing = Sharing()
    made: list[int] = []

    async def make() -> bytes:
        made.append(len(made))
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            raise
        return b"%d" % made[-1]

    async def run() -> list[bytes]:
        first = asyncio.create_task(sharing.get("key", make))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0)
        second = asyncio.create_task(sharing.get("key", make))
        await asyncio.sleep(0.02)
        third = asyncio.create_task(sharing.get("key", make))
        return [await second, await third]

    assert service.run(run()) == [b"1", b"1"]
    assert made == [0, 1]
    assert not sharing._in_flight


def test_an_engine_that_is_not_exact_promises_nothing(make_service: Callable[..., Service]) -> None:
    service = make_service(exact=False)
    assert service.request("GET", url(service)).headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    ("rest", "status", "field"),
    [
        ("euler-3/7/5.png", 422, "sampler"),
        ("balanced-3/7/5.png", 422, "sampler"),
        ("ddim-0/7/5.png", 422, "steps"),
        ("ddim-1001/7/5.png", 422, "steps"),
        ("ddim-x/7/5.png", 422, "steps"),
        ("ddim-3/10/5.png", 422, "label"),
        ("ddim-3/7/-5.png", 422, "seed"),
        ("ddim-3/7/9007199254740992.png", 422, "seed"),
        ("ddim-3/7/5_0.png", 422, "seed"),
        ("ddim-3.0/7/5.png", 422, "steps"),
        ("ddim-3/7/5.png?scale=17", 422, "scale"),
        ("ddim-3/7/5.png?n=2", 422, "n"),
        ("ddim-3/7/5.png?eta=1&eta=0", 422, "eta"),
        ("ddim-3/none/5.png?guidance_scale=2", 422, "guidance_scale"),
        ("ddim-3/7/5.jpg", 404, None),
        ("ddim-3/7", 404, None),
    ],
)
def test_a_wrong_url_is_a_problem(service: Service, rest: str, status: int, field: str | None) -> None:
    assert_problem(service.request("GET", url(service, rest)), status, field)


def test_another_model_is_404_and_names_the_one_that_is_served(service: Service) -> None:
    for model in ("other", "tiny@000000000000"):
        problem = assert_problem(service.request("GET", f"/images/{model}/ddim-3/7/5.png"), 404)
        assert service.app.state.engines.default.info.id in problem["detail"]


def test_identical_pictures_in_flight_are_one_computation(
    make_service: Callable[..., Service], hold: threading.Event
) -> None:
    """Which goes on while one of its waiters is there, and ends with the last."""
    service = make_service()
    engine = service.engine
    hold.clear()

    async def waiters() -> list[httpx.Response]:
        def get(rest: str) -> asyncio.Task[httpx.Response]:
            return asyncio.ensure_future(service.client.get(url(service, rest)))

        same = [get("ddim-3/7/5.png") for _ in range(5)]
        other = get("ddim-3/7/6.png")
        while engine.scheduler.slots < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert engine.scheduler.slots == 2
        same[0].cancel()
        other.cancel()
        while engine.scheduler.slots > 1:
            await asyncio.sleep(0.01)
        hold.set()
        return await asyncio.gather(*same[1:])

    answers = service.run(waiters())
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.content for answer in answers}) == 1
    found = engine.metrics.registry.get_sample_value("ddpm_images_total", {"model": "tiny"})
    assert found == 1
    assert service.request("GET", url(service, "ddim-3/7/6.png")).status_code == 200
