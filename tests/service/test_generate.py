"""POST /generate: what it draws, what it says of it, and what it refuses."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import zipfile
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from PIL import Image

from app.engine.job import OnProgress
from app.engine.request import GenerateParams
from app.engine.steptime import StepTime
from ddpm_core.checkpoint import load_model
from ddpm_core.data import to_uint8
from ddpm_core.noise import MAX_SEED
from ddpm_core.sampling import draw_noise, sample
from tests.service.conftest import Service, assert_problem, pixels


def test_an_empty_body_draws_one_png(service: Service) -> None:
    response = service.request("POST", "/generate")
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert pixels(response.content).shape == (28, 28)
    assert int(response.headers["x-seed"]) >= 0


def test_the_image_is_the_one_that_the_library_draws(service: Service, model_dir) -> None:
    import torch

    model = load_model(model_dir)
    x = draw_noise([5], 0, torch.empty(0, 1, 28, 28))
    plan = model.plan("ddim", 4, eta=0.5)
    *_, last = sample(model.denoiser(model.network(torch.device("cpu"))), plan, x, [5], labels=torch.tensor([3]))
    response = service.generate({"seed": 5, "label": 3, "sampler": "ddim", "steps": 4, "eta": 0.5})
    assert np.array_equal(pixels(response.content), to_uint8(last.x)[0, 0].numpy())


def test_the_same_request_gives_the_same_bytes(service: Service) -> None:
    body = {"seed": 1, "label": 3, "sampler": "ddpm", "steps": 5}
    first, second = service.generate(body), service.generate(body)
    assert first.content == second.content
    other = service.generate({**body, "seed": 2})
    assert other.content != first.content


def test_a_random_seed_is_returned_and_reproduces_the_image(service: Service) -> None:
    first = service.generate({"steps": 3})
    again = service.generate({"steps": 3, "seed": int(first.headers["x-seed"])})
    assert again.content == first.content


def test_json_holds_every_image_with_its_seed_and_label(service: Service) -> None:
    body = {"n": 3, "seed": 7, "label": [1, None, 2], "steps": 2, "guidance_scale": 2.5}
    answer = service.generate(body, accept="application/json").json()
    assert [image["seed"] for image in answer["images"]] == [7, 8, 9]
    assert [image["label"] for image in answer["images"]] == [1, None, 2]
    assert (answer["sampler"], answer["steps"]) == ("dpmpp_2m", 2)
    for image in answer["images"]:
        assert pixels(base64.b64decode(image["b64_json"])).shape == (28, 28)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"guidance_scale": 2.5},
        {"sampler": "ddpm"},
        {"sampler": "ddim", "eta": 0.5},
        {"sampler": "ipndm", "steps": 6},
        {"sampler": "learned", "steps": 3},
    ],
)
def test_image_i_of_a_set_can_be_had_alone_to_the_last_byte(service: Service, how: dict[str, object]) -> None:
    body = {"label": 6, "steps": 4, **how}
    many = service.generate({**body, "n": 7, "seed": 10}, accept="application/json").json()
    for i in range(7):
        alone = service.generate({**body, "seed": 10 + i})
        assert alone.content == base64.b64decode(many["images"][i]["b64_json"])


def test_several_images_make_one_grid(service: Service) -> None:
    response = service.generate({"n": 5, "seed": 1, "label": 2, "steps": 2})
    sheet = pixels(response.content)
    assert sheet.shape == (2 * 28 + 2, 3 * 28 + 4)
    assert np.array_equal(sheet[:28, :28], pixels(service.generate({"seed": 1, "label": 2, "steps": 2}).content))
    facts = json.loads(Image.open(io.BytesIO(response.content)).info["ddpm"])["images"]
    assert [(f["seed"], f["label"]) for f in facts] == [(s, 2) for s in range(1, 6)]


def test_scale_enlarges_by_nearest_neighbour(service: Service) -> None:
    body = {"seed": 1, "steps": 2}
    small, large = (pixels(service.generate({**body, "scale": s}).content) for s in (1, 3))
    assert np.array_equal(large, small.repeat(3, 0).repeat(3, 1))


def test_the_text_chunk_says_what_determines_the_pixels(service: Service) -> None:
    response = service.generate({"seed": 4, "label": 9, "sampler": "ddim", "steps": 3, "eta": 0.25})
    facts = json.loads(Image.open(io.BytesIO(response.content)).info["ddpm"])
    health = service.request("GET", "/health").json()
    assert facts == {
        "version": health["version"], "model": "tiny", "sha256": health["sha256"], "sampler": "ddim", "steps": 3,
        "eta": 0.25, "guidance_scale": 1.0, "label": 9, "seed": 4,
    }  # fmt: skip


def test_an_image_without_a_label_is_described_without_guidance(service: Service) -> None:
    """It has none, whatever its neighbours have, and can be had again alone with what its chunk says."""
    body = {"n": 2, "seed": 4, "label": [1, None], "steps": 2, "guidance_scale": 2.5}
    images = service.generate(body, accept="application/json").json()["images"]
    facts = [json.loads(Image.open(io.BytesIO(base64.b64decode(i["b64_json"]))).info["ddpm"]) for i in images]
    assert [f["guidance_scale"] for f in facts] == [2.5, 1.0]
    for fact in facts:
        again = {k: fact[k] for k in ("sampler", "steps", "eta", "guidance_scale", "label", "seed")}
        assert service.generate(again).status_code == 200


def test_headers_say_who_drew_what_and_how_long_it_took(service: Service) -> None:
    response = service.request("POST", "/generate", json={"steps": 1}, headers={"x-request-id": "a.b-c_1"})
    assert response.headers["x-request-id"] == "a.b-c_1"
    assert response.headers["x-model"].startswith("tiny@")
    assert (response.headers["x-sampler"], response.headers["x-steps"]) == ("dpmpp_2m", "1")  # what balanced stands for
    assert response.headers["vary"] == "Accept, Prefer"
    assert [part.split(";")[0] for part in response.headers["server-timing"].split(", ")] == [
        "queue", "denoise", "encode",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("accept", "response_format", "content_type"),
    [
        ("*/*", None, "image/png"),
        ("image/*", None, "image/png"),
        ("Image/PNG", None, "image/png"),
        ("", None, "image/png"),
        ("application/json, garbage", None, "application/json"),
        ("text/html,*/*;q=0.8", None, "image/png"),
        ("application/json", None, "application/json"),
        ("image/png;q=0.4, application/json;q=0.5", None, "application/json"),
        ("image/png;q=0, */*", None, "application/json"),
        ("image/png", "b64_json", "application/json"),
        ("application/json", "png", "image/png"),
    ],
)
def test_accept_and_response_format_choose_the_media_type(
    service: Service, accept: str, response_format: str | None, content_type: str
) -> None:
    body = {"steps": 1} if response_format is None else {"steps": 1, "response_format": response_format}
    assert service.generate(body, accept=accept).headers["content-type"] == content_type


@pytest.mark.parametrize("accept", ["text/html", "image/png;q=0", "garbage", "image/webp"])
def test_another_accept_is_406(service: Service, accept: str) -> None:
    problem = assert_problem(service.generate({"steps": 1}, accept=accept), 406)
    assert "image/png" in problem["detail"]


def test_two_accept_headers_are_read_as_one(service: Service) -> None:
    headers = [("accept", "text/html"), ("accept", "application/json")]
    response = service.request("POST", "/generate", json={"steps": 1}, headers=headers)
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"n": True}, "n"),
        ({"n": "3"}, "n"),
        ({"n": 1.5}, "n"),
        ({"label": 10}, "label"),
        ({"label": -1}, "label"),
        ({"n": 2, "label": [1]}, "label"),
        ({"n": 2, "label": [1, 10]}, "label"),
        ({"label": "seven"}, "label"),
        ({"sampler": "euler"}, "sampler"),
        ({"sampler": "learned", "steps": 4}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"eta": 0.5}, "eta"),
        ({"sampler": "ddim", "eta": 1.5}, "eta"),
        ({"guidance_scale": 2}, "guidance_scale"),
        ({"guidance_scale": -1, "label": 1}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"seed": MAX_SEED, "n": 2}, "seed"),
        ({"scale": 17}, "scale"),
        ({"response_format": "jpeg"}, "response_format"),
        ({"prompt": "seven"}, "prompt"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"previews": 2}, "previews"),
        ({"cheese": 2}, "cheese"),
        ({"model": 7}, "model"),
    ],
)
def test_a_bad_field_is_422_and_named(service: Service, body: dict[str, object], field: str) -> None:
    assert_problem(service.generate(body), 422, field)


def test_a_wrong_label_is_named_once_and_in_its_place(service: Service) -> None:
    assert [e["field"] for e in service.generate({"label": -1}).json()["errors"]] == ["label"]
    assert [e["field"] for e in service.generate({"n": 2, "label": [1, -1]}).json()["errors"]] == ["label.1"]
    many = service.generate({"n": 64, "label": ["x"] * 1000})
    assert many.status_code == 422
    assert len(many.content) < 5000


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"null", b'{"eta": NaN}', b'{"guidance_scale": Infinity}', b"\xff\xfe", b'{"n": 1e999}']
)
def test_broken_json_is_422(service: Service, content: bytes) -> None:
    response = service.request("POST", "/generate", content=content, headers={"content-type": "application/json"})
    assert assert_problem(response, 422)["errors"]


def test_a_form_is_415_and_shows_the_right_curl(service: Service) -> None:
    problem = assert_problem(service.request("POST", "/generate", data={"label": "7"}), 415)
    assert "curl -H 'Content-Type: application/json'" in problem["detail"]


def test_a_huge_body_is_413_even_without_content_length(service: Service) -> None:
    async def stream():  # type: ignore[no-untyped-def]
        for _ in range(40):
            yield b" " * 1024

    headers = {"content-type": "application/json"}
    assert_problem(service.request("POST", "/generate", content=b" " * 20_000, headers=headers), 413)
    assert_problem(service.request("POST", "/generate", content=stream(), headers=headers), 413)


def test_a_bad_request_id_is_422(service: Service) -> None:
    for bad in ("", "a b", "x" * 65, "é".encode("latin-1")):
        response = service.request("POST", "/generate", json={}, headers={"x-request-id": bad})
        assert_problem(response, 422)


def test_what_was_refused_cost_nothing(service: Service) -> None:
    """No refused request ever reached the engine."""
    engine = service.engine
    seen: list[GenerateParams] = []
    submit = engine.submit

    def watch(params: GenerateParams, on_progress: OnProgress | None = None):  # type: ignore[no-untyped-def]
        seen.append(params)
        return submit(params, on_progress)

    engine.submit = watch  # type: ignore[method-assign]
    try:
        for body in ({"n": 65}, {"label": 10}, {"x": 1}, {"steps": 2000}):
            assert service.generate(body).status_code == 422
        assert not seen
        assert service.generate({"steps": 1}).status_code == 200
        assert len(seen) == 1
    finally:
        engine.submit = submit  # type: ignore[method-assign]


def test_a_full_queue_is_429_and_an_id_in_flight_409(
    make_service: Callable[..., Service], hold: threading.Event
) -> None:
    """While three of four slots are held: two images more are too many, one is served, and so is all afterwards."""
    service = make_service(queue_slots=4, max_images=4)
    engine = service.engine
    hold.clear()

    def ask(n: int, request_id: str):  # type: ignore[no-untyped-def]
        return service.client.post("/generate", json={"n": n, "steps": 1}, headers={"x-request-id": request_id})

    async def all_at_once() -> list[httpx.Response]:
        first = asyncio.ensure_future(ask(3, "first"))
        while not engine.scheduler.slots:
            await asyncio.sleep(0.01)
        refused = [await ask(2, "second"), await ask(1, "first")]
        last = asyncio.ensure_future(ask(1, "third"))
        while engine.scheduler.slots < 4:
            await asyncio.sleep(0.01)
        hold.set()
        return [*refused, await first, await last]

    full, twice, first, third = service.run(all_at_once())
    assert_problem(full, 429)
    assert int(full.headers["retry-after"]) >= 1
    assert_problem(twice, 409)
    assert (first.status_code, third.status_code) == (200, 200)
    assert engine.scheduler.slots == 0


def test_a_deadline_that_can_never_be_met_is_422_at_once(service: Service) -> None:
    """And says how long the request would take."""
    response = service.generate({"steps": 1000, "n": 64, "deadline_ms": 1})
    problem = assert_problem(response, 422, "deadline_ms")
    assert "allow more" in problem["detail"]
    assert "retry-after" not in response.headers
    assert service.generate({"steps": 2, "deadline_ms": 60_000}).status_code == 200


def test_a_deadline_that_cannot_be_met_now_is_429_at_once(
    make_service: Callable[..., Service], hold: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service()
    engine = service.engine
    engine.step_time, engine.rows_limit = StepTime([(1, 0.001), (8, 0.004)]), 8
    monkeypatch.setattr(StepTime, "observe", lambda *_: None)  # how busy this machine is now is of no account
    hold.clear()

    async def too_many() -> httpx.Response:
        before = asyncio.ensure_future(service.client.post("/generate", json={"n": 64, "steps": 100}))
        while not engine.scheduler.slots:
            await asyncio.sleep(0.01)
        response = await service.client.post("/generate", json={"n": 64, "steps": 200, "deadline_ms": 7500})
        before.cancel()
        while engine.scheduler.slots:
            await asyncio.sleep(0.01)
        return response

    response = service.run(too_many())
    problem = assert_problem(response, 429)
    assert problem["type"] == "urn:ddpm:problem:deadline-too-soon"
    assert "try again later" in problem["detail"]
    assert int(response.headers["retry-after"]) >= 1
    assert engine.metrics.registry.get_sample_value("ddpm_refused_total", {"reason": "deadline"}) == 1


def test_a_deadline_that_passes_is_504(
    make_service: Callable[..., Service], hold: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service()
    engine = service.engine
    now = [1000.0]
    monkeypatch.setattr(engine, "_clock", lambda: now[0])
    hold.clear()

    async def late() -> httpx.Response:
        waiting = asyncio.ensure_future(service.client.post("/generate", json={"steps": 5, "deadline_ms": 60_000}))
        while not engine.scheduler.slots:
            await asyncio.sleep(0.01)
        now[0] += 60.0
        hold.set()
        return await waiting

    assert_problem(service.run(late()), 504)


def test_a_request_can_be_ended_by_its_id(make_service: Callable[..., Service], hold: threading.Event) -> None:
    service = make_service()
    engine = service.engine
    hold.clear()

    async def end_it() -> list[httpx.Response]:
        waiting = asyncio.ensure_future(service.client.post("/generate", json={}, headers={"x-request-id": "mine"}))
        while not engine.scheduler.slots:
            await asyncio.sleep(0.01)
        wrong = await service.client.delete("/requests/yours")
        ended = await service.client.delete("/requests/mine")
        return [wrong, ended, await waiting, await service.client.delete("/requests/mine")]

    wrong, ended, waiting, again = service.run(end_it())
    assert_problem(wrong, 404)
    assert (ended.status_code, ended.content) == (204, b"")
    assert_problem(waiting, 410)
    assert_problem(again, 404)
    assert engine.scheduler.slots == 0


def test_a_zip_holds_one_png_an_image(service: Service) -> None:
    body = {"n": 3, "seed": 7, "label": [1, None, 2], "steps": 2}
    response = service.generate(body, accept="application/zip")
    assert response.headers["content-type"] == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(response.content))
    assert archive.testzip() is None
    assert archive.namelist() == ["0000-seed-7.png", "0001-seed-8.png", "0002-seed-9.png"]
    images = service.generate(body, accept="application/json").json()["images"]
    assert [archive.read(n) for n in archive.namelist()] == [base64.b64decode(image["b64_json"]) for image in images]
    assert service.generate(body, accept="application/zip").content == response.content


def test_an_unknown_path_and_method_are_problems(service: Service) -> None:
    assert_problem(service.request("GET", "/nowhere"), 404)
    response = service.request("GET", "/generate")
    assert_problem(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_bug_is_a_problem_that_the_log_has_by_its_id(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(params: GenerateParams, on_progress: OnProgress | None = None) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(service.engine, "submit", fail)
    response = service.generate({"steps": 1}, **{"x-request-id": "my-id"})
    assert_problem(response, 500)
    assert response.headers["x-request-id"] == "my-id"
    assert "secret" not in response.text
    assert any("my-id" in record.getMessage() for record in caplog.records)
