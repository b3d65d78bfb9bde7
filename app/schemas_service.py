"""The bodies of what the service says of itself: what may be asked for, and how it is."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["ok", "starting", "draining", "failed"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class SamplerCapabilities(_Body):
    name: str = Field(description="What `sampler` may be.")
    preset: bool
    sampler: str = Field(description="What it stands for.")
    steps: int = Field(description="Where `steps` is absent.")
    steps_allowed: list[int] | None = Field(description="null: 1 .. num_train_steps.")


class ModelCapabilities(_Body):
    name: str
    id: str = Field(description="name@first 12 of the weights' sha256; either is a `model`.")
    sha256: str
    image_shape: list[int] = Field(description="[C, H, W]")
    num_train_steps: int = Field(description="T: t is 0 .. T-1.")
    num_classes: int = Field(description="Labels are 0 .. num_classes - 1; 0: it takes none.")
    class_names: list[str] = Field(description="Of the labels; empty: they are called by their numbers.")
    unlabelled: bool = Field(description="Whether `label` may be null.")
    guidance: bool = Field(description="Whether `guidance_scale` may be other than 1.")
    denoise: bool = Field(description="Whether /denoise takes it.")
    samplers: list[SamplerCapabilities]


class Limits(_Body):
    n: int = Field(description="Images of one request.")
    scale: int
    image_pixels: int = Field(description="Of an uploaded image, and of all images of an answer.")
    json_bytes: int
    body_bytes: int
    queue_slots: int = Field(description="Images of one model that may wait or run.")


class Capabilities(_Body):
    version: str
    models: list[ModelCapabilities] = Field(description="The first is what a request means that names none.")
    limits: Limits


class EngineHealth(_Body):
    slots_running: int = Field(description="Images that have begun.")
    slots_waiting: int = Field(description="Images that have not begun.")
    slots_limit: int
    batch_rows_limit: int | None = Field(description="Network rows of a full step; a guided image has two.")
    runtime: str | None = Field(description="What runs the network: torch or onnxruntime.")
    exact: bool | None = Field(description="Whether an image's bytes are its own, by the check at start-up.")
    exactness: str | None = Field(description="The same in words.")
    fingerprint: str | None = Field(
        description="Of the bits that were drawn then: where it is the same, so are the bytes of every image."
    )


class ReplicaHealth(_Body):
    name: str = Field(description="The device, or what its cluster calls it.")
    status: Status
    slots_running: int
    slots_waiting: int
    slots_limit: int
    batch_rows_limit: int | None


class ModelHealth(_Body):
    status: Status
    device: str | None
    model: str
    sha256: str | None
    engine: EngineHealth = Field(description="Of all its replicas together.")
    replicas: list[ReplicaHealth] = Field(description="An engine each, a device or a process each.")


class Health(ModelHealth):
    """Of the first model, but for `status`: that is the worst of all."""

    models: list[ModelHealth]
    version: str
