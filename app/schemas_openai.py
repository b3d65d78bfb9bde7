"""The bodies of OpenAI's Images and Models, which other servers and clients define."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.schemas import Sampling
from ddpm_core.noise import MAX_SEED


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ImagesRequest(Sampling):
    """What there is to choose; `sampler` to `seed` are ours, which the openai package takes in `extra_body`."""

    seed: Annotated[
        int | None, Field(ge=0, le=MAX_SEED, description="Image i uses seed + i; absent: random, and returned.")
    ] = None

    prompt: Annotated[str, Field(max_length=1000, description='What to draw: "7", "seven", "a handwritten seven".')]
    model: Annotated[str | None, Field(max_length=200, description="Of those at /v1/models; absent: the first.")] = None
    n: Annotated[int | None, Field(ge=1, description="Absent: 1.")] = None
    size: Annotated[
        str | None,
        Field(
            max_length=20,
            description='"auto", the model\'s own, or a multiple of it: 28x28, 56x56, ... 448x448.',
        ),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="b64_json where absent. A url is that of GET /images/..., and of these weights."),
    ] = None
    stream: Annotated[bool | None, Field(description="Events, of one image.")] = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=3, description="With stream: how many pictures on the way.")
    ] = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    quality: Literal["auto", "standard"] | None = None
    user: Annotated[str | None, Field(max_length=200, description="Taken, and not used.")] = None


class OpenAIImage(_Body):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str
    seed: int


class ImagesResponse(_Body):
    created: int
    data: list[OpenAIImage]
    background: str = "opaque"
    output_format: str = "png"
    size: str


class TokenDetails(_Body):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(_Body):
    """Nothing is counted in tokens here."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class _Event(_Body):
    b64_json: str
    created_at: int
    size: str
    background: str = "opaque"
    output_format: str = "png"
    quality: str = "auto"


class PartialImage(_Event):
    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedImage(_Event):
    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage = Usage()


class OpenAIModel(_Body):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds, of the start of the service.")
    owned_by: str = "ddpm-service"


class OpenAIModels(_Body):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]
