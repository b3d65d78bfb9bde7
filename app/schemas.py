"""The bodies of requests and responses. Unknown fields are refused, types are strict, limits stand in OpenAPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from app.errors import Invalid
from ddpm_core.noise import MAX_SEED

MOST_SCALE = 16
Label = Annotated[int, Field(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Sampling(_Body):
    """How a chain is run."""

    sampler: Annotated[
        Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "ipndm", "unipc", "learned", "fast", "balanced", "reference"],
        Field(
            description="A sampler, or a preset: fast, balanced, reference. learned: where the model has such plans."
        ),
    ] = "balanced"
    steps: Annotated[int | None, Field(ge=1, description="Network calls per image; absent: the sampler's own.")] = None
    eta: Annotated[float, Field(ge=0, le=1, description="ddim only: 0 is deterministic, 1 is DDPM.")] = 0.0
    guidance_scale: Annotated[
        float, Field(ge=0, le=20, description="Classifier-free guidance; 1 is off, else a label is needed.")
    ] = 1.0
    deadline_ms: Annotated[
        int | None,
        Field(
            ge=1,
            le=86_400_000,
            description="At once 422 if no idle service could meet it, 429 if this one cannot now; 504 if it passes; "
            "absent: no deadline.",
        ),
    ] = None


class GenerateRequest(Sampling):
    """POST /generate. Every field is optional."""

    n: Annotated[int, Field(ge=1, description="How many images; image i uses seed + i.")] = 1
    label: Annotated[
        Annotated[
            Annotated[Label, Tag("one")] | Annotated[list[Label | None], Tag("list")],
            Discriminator(lambda value: "list" if isinstance(value, list) else "one"),
        ]
        | None,
        Field(description="What to draw: one label for all, or a list of n with nulls for unconditional ones."),
    ] = None
    model: Annotated[
        str | None, Field(max_length=200, description="Its name or id, of those at /capabilities; absent: the first.")
    ] = None
    seed: Annotated[
        int | None, Field(ge=0, le=MAX_SEED, description="0 .. 2^53 - n; absent: random, and returned.")
    ] = None
    scale: Annotated[int, Field(ge=1, le=MOST_SCALE, description="Nearest-neighbour enlargement.")] = 1
    response_format: Annotated[
        Literal["png", "b64_json", "apng", "webp", "npz"] | None,
        Field(description="Decides against Accept. With frames: apng (png is the same), webp, npz."),
    ] = None
    previews: Annotated[
        int | None,
        Field(
            ge=1, description="With Accept: text/event-stream, every how many steps x_0_hat is shown; absent: never."
        ),
    ] = None

    frames: Annotated[
        int | None,
        Field(
            ge=2,
            description="The chain in so many moments, the first and the last among them, at most steps + 1: an "
            "animated PNG or WebP of x, or an .npz of x and x_0_hat; absent: the images alone.",
        ),
    ] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> GenerateRequest:
        if isinstance(self.label, list) and len(self.label) != self.n:
            raise ValueError(f"label: {len(self.label)} labels for n = {self.n} images; the list must have n entries")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta: {self.eta} is for sampler ddim alone; leave it out for {self.sampler}")
        labels = self.label if isinstance(self.label, list) else [self.label]
        if self.guidance_scale != 1 and all(label is None for label in labels):
            raise ValueError("guidance_scale: needs a label; set one, or leave guidance_scale at 1")
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed: image i uses seed + i, so for n = {self.n} the largest is {MAX_SEED - self.n + 1}")
        return self


class DenoiseRequest(GenerateRequest):
    """The text fields of POST /denoise: those of /generate, and where the chain starts."""

    t: Annotated[int, Field(ge=0, description="0 .. T-1: the image is noised to t, and the chain starts there.")]

    @field_validator("label", mode="before")
    @classmethod
    def _label_of_text(cls, value: Any) -> Any:
        """A form knows text only: "7", or "4,null,2"."""
        if not isinstance(value, str):
            return value
        labels = [None if part.strip() == "null" else part.strip() for part in value.split(",")]
        return labels if len(labels) > 1 else labels[0]


class NoiseRequest(_Body):
    """The text fields of POST /noise."""

    t: Annotated[str, Field(pattern=r"^\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*$", description="0 .. T-1, or several: 0,250,999")]
    model: Annotated[
        str | None, Field(max_length=200, description="Whose schedule noises; absent: that of the first.")
    ] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Absent: random, and returned.")] = None
    fit: Literal["none", "model"] = "none"
    response_format: Literal["png", "b64_json", "npz"] | None = None


class ProblemBody(BaseModel):
    """RFC 9457 problem+json, the body of every error."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[dict[str, Any]] | None = None
    error: Any = Field(None, description="Under /v1 and /v2: the same as the clients of those protocols read it.")


class RequestState(_Body):
    """How far a request is."""

    id: str
    state: Literal["queued", "running", "completed", "failed", "cancelled"]
    model: str
    step: int | None = Field(description="0 .. steps; of several images the mean, rounded down.")
    steps: int
    queue_position: int = Field(description="Requests that go before this one; 0 once it has begun.")
    eta_s: float = Field(description="Seconds left.")
    created: int | None = Field(None, description="Unix time in seconds, of an asynchronous request.")
    expires: int | None = Field(None, description="Until when its result is kept, unless others need the room.")
    result: str | None = Field(None, description="Where its result is.")
    problem: ProblemBody | None = Field(None, description="Why there is none.")


class GeneratedImage(_Body):
    b64_json: str = Field(description="The PNG, base64.")
    seed: int
    label: int | None


class VerifyRequest(_Body):
    """The text fields of POST /verify: none."""


class VerifyResponse(_Body):
    verdict: Literal["reproduced", "different", "cannot_tell"] = Field(
        description="Whether the picture's pixels are those that this server draws from what its text chunk says."
    )
    detail: str = Field(description="The same for people, or why it cannot be told.")
    version: str = Field(description="Of this service: another one may draw other pixels.")
    facts: list[dict[str, Any]] | None = Field(None, description="What the picture says, image by image.")
    different_pixels: int | None = None
    largest_difference: int | None = Field(None, description="Of any colour, 0 .. 255.")


class GenerateResponse(_Body):
    created: int = Field(description="Unix time in seconds.")
    model: str
    sampler: str
    steps: int
    images: list[GeneratedImage]


class Preview(_Body):
    index: int
    b64_json: str = Field(description="The PNG of x_0_hat, base64.")


class ProgressEvent(_Body):
    """The data of a `progress` event."""

    step: int = Field(description="0 .. steps; of several images the mean, rounded down.")
    steps: int
    queue_position: int = Field(description="Requests that go before this one; 0 once it has begun.")
    eta_s: float
    previews: list[Preview]


class NoisedImage(_Body):
    b64_json: str = Field(description="The PNG of x_t clamped to [-1, 1], base64.")
    seed: int
    t: int
    alpha_bar: float
    snr: float


class NoiseResponse(_Body):
    created: int = Field(description="Unix time in seconds.")
    model: str
    images: list[NoisedImage]


Body = TypeVar("Body", bound=BaseModel)
BRANCHES = ("one", "list")  # of the union that a label is


def parse(body: bytes, schema: type[Body]) -> Body:
    """JSON -> a checked body; an empty body is {}. Raises Invalid with one entry for each wrong field."""
    try:
        return schema.model_validate_json(body.strip() or b"{}")
    except ValidationError as error:
        errors = [_describe(e, schema) for e in error.errors(include_url=False, include_context=False)]
        raise Invalid.fields(errors) from None


def parse_fields(fields: Mapping[str, object], schema: type[Body]) -> Body:
    """Text fields of a form or a URL -> checked values. Raises Invalid with one entry for each wrong field."""
    try:
        return schema.model_validate(fields, strict=False)
    except ValidationError as error:
        errors = [_describe(e, schema) for e in error.errors(include_url=False, include_context=False)]
        raise Invalid.fields(errors) from None


def _describe(error: Any, schema: type[BaseModel]) -> dict[str, str]:
    """One pydantic error as {field, detail}; a union's branches are left out of the field's name."""
    unknown = error["type"] == "extra_forbidden"
    path = [str(part) for part in error["loc"] if unknown or part not in BRANCHES]
    message: str = error["msg"]
    if unknown:
        known = ", ".join(_at(schema, error["loc"][:-1]).model_fields)
        message = f"unknown field; known: {known}" if known else "unknown field; there is none to give here"
    elif error["type"] == "string_pattern_mismatch" and path == ["t"]:
        message = "must be one timestep or several, comma-separated: 0,250,999"
    elif error["type"] == "json_invalid":
        path, message = ["body"], message.replace("Invalid JSON", "not valid JSON")
    elif error["type"] == "value_error":
        name, _, message = message.removeprefix("Value error, ").partition(": ")
        path = [name]
    return {"field": ".".join(path) or "body", "detail": message}


def _at(schema: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The body within a body that a path leads to."""
    for part in path:
        if isinstance(part, str):
            schema = _body_in(schema.model_fields[part].annotation) or schema
    return schema


def _body_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _body_in(part))), None)
