"""The bodies of the Open Inference Protocol (V2, REST), which other servers and clients define."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.schemas import Sampling
from ddpm_core.noise import MAX_SEED


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ServerMetadata(_Body):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(_Body):
    name: str
    datatype: str
    shape: list[int] = Field(description="-1: any.")


class ModelMetadata(_Body):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InputTensor(_Body):
    name: Literal["seed", "label"]
    shape: Annotated[list[int], Field(min_length=1, max_length=1, description="[n]")]
    datatype: Literal["INT64"]
    parameters: dict[str, Any] | None = None
    data: Annotated[
        list[Annotated[int, Field(strict=True, ge=-1, le=MAX_SEED)]],
        Field(min_length=1, description="A number for each image; label -1: no label."),
    ]


class OutputRequest(_Body):
    name: Literal["images"]
    parameters: dict[str, Any] | None = None


class InferenceRequest(_Body):
    """Images by their seeds, which need not follow one another, and labels."""

    id: Annotated[str | None, Field(max_length=200)] = None
    parameters: Annotated[Sampling | None, Field(description="As in /generate.")] = None
    inputs: Annotated[
        list[InputTensor], Field(min_length=1, max_length=2, description="seed, and label where there are labels.")
    ]
    outputs: list[OutputRequest] | None = None


class OutputTensor(_Body):
    name: str
    shape: list[int] = Field(description="[n, C, H, W]")
    datatype: str
    data: list[int] = Field(description="Row by row, 0 .. 255.")


class InferenceResponse(_Body):
    model_name: str
    model_version: str
    id: str
    outputs: list[OutputTensor]
