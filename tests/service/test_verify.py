"""POST /verify: a picture of ours is told from one that was changed, and from what nobody can tell."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.networks import save_tiny
from tests.service.conftest import Service, assert_problem, encode, encode_grey

BODY = {"label": 3, "seed": 5, "steps": 3, "sampler": "ddim"}


def ask(service: Service, content: bytes) -> httpx.Response:
    return service.request("POST", "/verify", files={"image": ("x", content)})


def verdict(service: Service, content: bytes) -> dict[str, Any]:
    response = ask(service, content)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def rewritten(content: bytes, change: Callable[[dict[str, Any]], object] = lambda facts: None, **pixels: int) -> bytes:
    """The picture with other facts, or with a pixel changed."""
    picture = Image.open(io.BytesIO(content))
    facts = json.loads(picture.text["ddpm"])  # type: ignore[attr-defined]
    change(facts)
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("ddpm", json.dumps(facts))
    array = np.array(picture)
    array.flat[0] = (int(array.flat[0]) + pixels.get("by", 0)) % 256
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", pnginfo=chunk, compress_level=1)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        {**BODY, "scale": 3},
        {**BODY, "n": 5, "label": [1, None, 2, None, 3], "scale": 2, "guidance_scale": 2.5},
        {"seed": 2**53 - 1, "sampler": "ddpm", "steps": 4},
        {"seed": 1, "sampler": "learned"},
        {"seed": 1, "sampler": "ddim", "steps": 4, "eta": 0.5},
        {**BODY, "frames": 4},
        {**BODY, "n": 2, "frames": 3, "scale": 2},
    ],
    ids=str,
)
def test_what_the_service_drew_is_reproduced(service: Service, body: dict[str, object]) -> None:
    content = service.generate(body).content
    found = verdict(service, content)
    assert found["verdict"] == "reproduced", found
    assert (found["different_pixels"], found["largest_difference"]) == (0, 0)
    assert found["facts"][0]["seed"] == body["seed"]
    assert service.app.state.frames.taken == 0


def test_the_pixels_count_and_not_the_file(service: Service) -> None:
    """Packed anew by another program it is the same picture."""
    content = service.generate(BODY).content
    again = rewritten(content)
    assert again != content
    assert verdict(service, again)["verdict"] == "reproduced"


@pytest.mark.parametrize("by", [1, 255, 100])
def test_one_changed_pixel_is_noticed(service: Service, by: int) -> None:
    found = verdict(service, rewritten(service.generate(BODY).content, by=by))
    assert (found["verdict"], found["different_pixels"]) == ("different", 1)
    assert found["largest_difference"] in (by, 256 - by)


@pytest.mark.parametrize("change", [{"seed": 6}, {"label": 4}, {"label": None}, {"steps": 4}, {"sampler": "ddpm"}])
def test_facts_of_another_picture_are_noticed(service: Service, change: dict[str, object]) -> None:
    found = verdict(service, rewritten(service.generate(BODY).content, lambda facts: facts.update(change)))
    assert found["verdict"] == "different"
    assert found["different_pixels"] > 0


def cut(content: bytes) -> bytes:
    picture = Image.open(io.BytesIO(content))
    buffer = io.BytesIO()
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("ddpm", picture.text["ddpm"])  # type: ignore[attr-defined]
    picture.crop((0, 0, 27, 28)).save(buffer, "PNG", pnginfo=chunk)
    return buffer.getvalue()


def enlarged(content: bytes, scale: int) -> bytes:
    picture = Image.open(io.BytesIO(content))
    buffer = io.BytesIO()
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("ddpm", picture.text["ddpm"])  # type: ignore[attr-defined]
    picture.resize((28 * scale, 28 * scale), Image.Resampling.NEAREST).save(buffer, "PNG", pnginfo=chunk)
    return buffer.getvalue()


def test_what_nobody_can_tell_is_said_with_its_reason(service: Service) -> None:
    content = service.generate(BODY).content
    denoised = service.request("POST", "/denoise", files={"image": ("x", encode_grey())}, data={"t": "9", "steps": "2"})
    for changed, reason in (
        (rewritten(content, lambda facts: facts.update(sha256="0" * 64)), "not served here; served: tiny@"),
        (cut(content), "no multiple of 28 x 28"),
        (denoised.content, "from somebody's image"),
        (service.noise(encode_grey(), t=9).content, "somebody's, noised"),
        (
            rewritten(
                service.generate({"seed": 1, "sampler": "learned"}).content,
                lambda facts: facts.update(plan_sha256="0" * 64),
            ),
            "learned plan that is not here",
        ),
        (
            rewritten(service.generate({**BODY, "n": 2}).content, lambda facts: facts["images"][0].update(steps=4)),
            "not of one request",
        ),
        (rewritten(content, lambda facts: facts.update(frames=[0, 3])), "1 frames, not 2"),
        (enlarged(content, 17), "up to 16 times"),
    ):
        found = verdict(service, changed)
        assert (found["verdict"], found["facts"]) == ("cannot_tell", None)
        assert reason in found["detail"], found


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1}, {"seed": 2**53}, {"seed": "5"}, {"steps": 0}, {"steps": 1001}, {"label": 10}, {"label": "3"},
        {"sampler": "cheese"}, {"sampler": "balanced", "steps": None}, {"sha256": "x"}, {"eta": 2}, {"eta": 0.5},
        {"guidance_scale": 21}, {"frames": [0, 0]}, {"frames": [4]}, {"frames": ["0"]}, {"frames": 3}, {"images": 3},
        {"images": []}, {"images": [[]]},
    ],
    ids=str,
)  # fmt: skip
def test_facts_that_cannot_be_are_422(service: Service, change: dict[str, object]) -> None:
    content = service.generate({**BODY, "sampler": "dpmpp_2m"}).content
    assert_problem(ask(service, rewritten(content, lambda facts: facts.update(change))), 422)


def test_pictures_that_say_nothing_are_422(service: Service) -> None:
    for content in (encode_grey(), encode(Image.new("L", (28, 28)), "JPEG"), b"x", b""):
        assert_problem(ask(service, content), 422, "image")
    jpeg = assert_problem(ask(service, encode(Image.new("L", (28, 28)), "JPEG")), 422)
    assert "not an image of a supported format (PNG)" in jpeg["detail"]
    other = service.request("POST", "/verify", files={"image": ("x", encode_grey())}, data={"t": "1"})
    assert "there is none to give here" in assert_problem(other, 422, "t")["detail"]
    assert "no text chunk" in assert_problem(ask(service, encode_grey()), 422)["detail"]


def test_facts_ask_for_no_more_than_a_request_may(make_service: Callable[..., Service]) -> None:
    service = make_service(max_images=4, queue_slots=8, frame_bytes=20_000)
    content = service.generate({**BODY, "n": 4}).content
    many = rewritten(content, lambda facts: facts.update(images=facts["images"] * 2))
    assert_problem(ask(service, many), 422, "n")
    animated = service.generate({**BODY, "frames": 2}).content
    assert verdict(service, animated)["verdict"] == "reproduced"
    assert_problem(ask(service, rewritten(animated, lambda facts: facts.update(frames=[0, 1, 2, 3]))), 422, "image")


def test_facts_that_nobody_checked_are_not_vouched_for(service: Service) -> None:
    """The answer names what was really drawn."""
    lies = {"model": "somebody-elses", "author": "Mallory", "version": "9", "guidance_scale": 7.5, "x": "\ud800"}
    content = service.generate({"seed": 5, "steps": 3, "sampler": "ddim"}).content
    found = verdict(service, rewritten(content, lambda facts: facts.update(lies)))
    assert found["verdict"] == "reproduced"
    (facts,) = found["facts"]
    assert (facts["model"], facts["guidance_scale"], facts["version"]) == ("tiny", 1.0, found["version"])
    assert not {"author", "x"} & facts.keys()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images":' * 5_000, "{}", "null", "7", '{"images": {}}', "\x00"])
def test_any_text_chunk_has_an_answer(service: Service, text: str) -> None:
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("ddpm", text)
    buffer = io.BytesIO()
    Image.new("L", (28, 28)).save(buffer, "PNG", pnginfo=chunk)
    assert_problem(ask(service, buffer.getvalue()), 422, "image")


def test_a_small_file_that_claims_much_costs_little(service: Service) -> None:
    """A still picture says that it is an animation of many large frames: none of them is made."""
    content = service.generate({**BODY, "scale": 16, "steps": 900}).content
    many = rewritten(content, lambda facts: facts.update(frames=list(range(901))))
    found = verdict(service, many)
    assert (found["verdict"], "1 frames, not" in found["detail"]) == ("cannot_tell", True)


def test_frames_count_before_they_are_decoded(make_service: Callable[..., Service]) -> None:
    service = make_service(max_image_pixels=100_000)
    frames = [Image.new("L", (224, 224), grey) for grey in (0, 1, 2, 3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    assert "of 4 frames" in assert_problem(ask(service, buffer.getvalue()), 422, "image")["detail"]


def test_one_place_for_uploads_is_enough(make_service: Callable[..., Service]) -> None:
    service = make_service(upload_slots=1)
    assert verdict(service, service.generate(BODY).content)["verdict"] == "reproduced"
    assert service.app.state.uploads.slots.taken == service.app.state.uploads.pixels.taken == 0


def test_any_of_several_models_is_found(make_service: Callable[..., Service], model_dir: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", num_train_timesteps=500)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-4:] = b"\0\0\0\0"
    weights.write_bytes(spoilt)
    two = make_service(models=(str(model_dir), str(other)))
    content = two.generate({**BODY, "model": "other"}).content
    assert verdict(two, content)["verdict"] == "reproduced"
    assert verdict(make_service(), content)["verdict"] == "cannot_tell"
