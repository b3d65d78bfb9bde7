"""/v1, asked by the openai package itself over a socket."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from app import prompts
from app.engine.request import ModelInfo
from app.errors import Invalid
from tests.service.conftest import Service, assert_problem, pixels
from tests.service.process import Server, server

KEY = "openai-0123456789abcdef"


@pytest.fixture(scope="module")
def it(model_dir: Path) -> Iterator[Server]:
    with server(model=model_dir, api_keys=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(it: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{it.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def drawn(it: Server, body: dict[str, object]) -> bytes:
    return it.post("/generate", json=body, headers={"x-api-key": KEY}).content


def png(image: object) -> bytes:
    return base64.b64decode(image.b64_json)  # type: ignore[attr-defined]


def test_a_prompt_draws_what_generate_draws(it: Server, client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a handwritten seven", n=2, size="56x56", model="tiny", extra_body={"seed": 5, "steps": 4}
    )
    assert answer.created > 1.7e9
    assert (answer.size, answer.output_format) == ("56x56", "png")
    assert answer.data is not None
    for i, image in enumerate(answer.data):
        assert png(image) == drawn(it, {"label": 7, "seed": 5 + i, "steps": 4, "scale": 2})
        assert image.revised_prompt == "7"
        assert image.url is None


def test_a_url_is_the_picture_s_own(it: Server, client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="3", response_format="url", size="84x84",
        extra_body={"seed": 9, "sampler": "ddim", "steps": 3, "eta": 0.5, "guidance_scale": 2},
    )  # fmt: skip
    assert answer.data is not None
    assert answer.data[0].url is not None
    assert answer.data[0].url.startswith(f"{it.url}/images/tiny@")
    linked = httpx.get(answer.data[0].url, headers={"x-api-key": KEY})
    wanted = {"label": 3, "seed": 9, "sampler": "ddim", "steps": 3, "eta": 0.5, "guidance_scale": 2, "scale": 3}
    assert linked.content == drawn(it, wanted)
    assert "immutable" in linked.headers["cache-control"]


@pytest.mark.parametrize("partial_images", [0, 1, 3])
def test_partial_images_come_before_the_last(it: Server, client: openai.OpenAI, partial_images: int) -> None:
    events = list(
        client.images.generate(
            prompt="three", stream=True, partial_images=partial_images,
            extra_body={"seed": 1, "steps": 8, "sampler": "ddim"},
        )
    )  # fmt: skip
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * partial_images
    assert [event.partial_image_index for event in partial] == list(range(partial_images))  # type: ignore[union-attr]
    assert last.type == "image_generation.completed"
    assert png(last) == drawn(it, {"label": 3, "seed": 1, "steps": 8, "sampler": "ddim"})
    assert last.usage.total_tokens == 0
    shown = [pixels(png(event)) for event in events]
    apart = [float(np.abs(picture.astype(float) - shown[-1]).mean()) for picture in shown]
    assert apart == sorted(apart, reverse=True)  # nearer and nearer
    assert len(set(apart)) == len(apart)


def test_models(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [(model.id, model.object, model.owned_by) for model in listed] == [("tiny", "model", "ddpm-service")]
    assert client.models.retrieve("tiny") == listed[0]
    with pytest.raises(openai.NotFoundError, match="tiny@"):
        client.models.retrieve("dall-e-3")


def test_errors_are_the_package_s_own(it: Server, client: openai.OpenAI) -> None:
    """Each is a problem too."""
    with pytest.raises(openai.UnprocessableEntityError) as unclear:
        client.images.generate(prompt="a cat")
    assert (unclear.value.type, unclear.value.code, unclear.value.param) == (
        "invalid_request_error",
        "invalid",
        "prompt",
    )
    assert "zero .. nine" in unclear.value.message
    assert unclear.value.response.headers["content-type"] == "application/problem+json"
    with pytest.raises(openai.NotFoundError, match="model dall-e-3 is not served here") as missing:
        client.images.generate(prompt="7", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="28x28, 56x56"):
        client.images.generate(prompt="7", size="1024x1024")
    with pytest.raises(openai.UnprocessableEntityError, match="28x28, 56x56"):
        client.images.generate(prompt="7", size="large")  # type: ignore[call-overload]
    with pytest.raises(openai.UnprocessableEntityError, match="quality"):
        client.images.generate(prompt="7", quality="hd")
    with (
        openai.OpenAI(base_url=f"{it.url}/v1", api_key="wrong", max_retries=0) as wrong,
        pytest.raises(openai.AuthenticationError, match="not known here"),
    ):
        wrong.images.generate(prompt="7")


def test_an_error_on_the_way_is_raised_by_the_package(client: openai.OpenAI, it: Server) -> None:
    stream = client.images.generate(
        prompt="7", stream=True, extra_body={"sampler": "ddpm", "steps": 900}, extra_headers={"x-request-id": "mine"}
    )
    assert httpx.delete(f"{it.url}/requests/mine", headers={"x-api-key": KEY}).status_code == 204
    with pytest.raises(openai.APIError, match="ended by DELETE"):
        list(stream)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "7", "n": 65}, "n"),
        ({"prompt": "7", "n": 2, "stream": True}, "n"),
        ({"prompt": "7", "partial_images": 1}, "partial_images"),
        ({"prompt": "7", "partial_images": 4, "stream": True}, "partial_images"),
        ({"prompt": "7", "stream": True, "response_format": "url"}, "response_format"),
        ({"prompt": "7", "size": "56x28"}, "size"),
        ({"prompt": "7", "size": "huge"}, "size"),
        ({"prompt": "7", "steps": 0}, "steps"),
        ({"prompt": "7", "style": "vivid"}, "style"),
        ({"prompt": "any", "guidance_scale": 2}, "guidance_scale"),
    ],
)
def test_what_cannot_be_is_422_and_named(service: Service, body: object, field: str) -> None:
    problem = assert_problem(service.request("POST", "/v1/images/generations", json=body), 422, field)
    assert problem["error"]["message"] == problem["detail"]
    assert problem["error"]["param"].split(".")[0] == field


# Prompts

INFO = ModelInfo("m", "0" * 64, "cpu", (1, 28, 28), 1000, 10, np.ones(1000), "torch")
PETS = ModelInfo(
    "pets", "0" * 64, "cpu", (3, 32, 32), 1000, 3, np.ones(1000), "torch", unlabelled=False,
    class_names=("cat", "guinea_pig", "dog"),
)  # fmt: skip
FACES = ModelInfo("faces", "0" * 64, "cpu", (3, 256, 256), 1000, 0, np.ones(1000), "torch")


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("7", 7), ("seven", 7), ("Seven", 7), ("a handwritten seven", 7), ("the digit 0, please!", 0), ("sevens", 7),
        ("draw a 3.", 3), ("seven (7)", 7), ("any", None), ("surprise me", None), ("a random digit", None),
    ],
)  # fmt: skip
def test_prompts_that_are_understood(prompt: str, label: int | None) -> None:
    assert prompts.label_of(prompt, INFO) == label


@pytest.mark.parametrize("prompt", ["", "a cat", "77", "10", "3 or 4", "seventy", "seven, eight", "-", "\u0667x"])
def test_prompts_that_are_not_say_what_is(prompt: str) -> None:
    with pytest.raises(Invalid, match=r'0 \.\. 9 or words \(zero \.\. nine\), and "any"'):
        prompts.label_of(prompt, INFO)


def test_a_name_within_another_name_is_not_meant() -> None:
    shirts = dataclasses.replace(PETS, class_names=("T-shirt/top", "Shirt", "hot dog"))
    assert prompts.label_of("a T-shirt/top", shirts) == 0
    assert prompts.label_of("one shirt", shirts) == 1
    assert prompts.label_of("2 hot dogs", shirts) == 2


def test_prompts_of_other_models() -> None:
    assert prompts.label_of("a Guinea Pig in the grass", PETS) == 1
    assert prompts.label_of("two", PETS) == 2
    assert prompts.label_of("cats", PETS) == 0
    with pytest.raises(Invalid, match=r"names \(cat, guinea_pig, dog\), as in"):
        prompts.label_of("any", PETS)
    assert prompts.label_of("any face", FACES) is None
    with pytest.raises(Invalid, match='unconditional and understands "any" alone'):
        prompts.label_of("7", FACES)
