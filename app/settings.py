"""What belongs to a deployment: read once from the environment, DDPM_<NAME>."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ddpm_core.hub import name_of

MIN_KEY = 16  # characters of an API key


class Settings(BaseSettings):
    """Every setting, with its unit in its name where it has one. README.md lists them; a test holds it to that."""

    model_config = SettingsConfigDict(
        env_prefix="DDPM_", frozen=True, protected_namespaces=(), hide_input_in_errors=True
    )

    model: str = Field(
        "weights/mnist",
        min_length=1,
        description="Model to serve: a directory, or owner/name[@revision] of the Hugging Face hub.",
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Several models instead, comma-separated; requests name one, or mean the first."
    )
    model_sha256: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Start only with these weights: their sha256, or its first 12 digits or more; one a model."
    )
    device: str = Field(
        "auto",
        description="auto (CUDA where there is one, else the CPU), cpu, cuda, cuda:1, ...; several, comma-separated, "
        "or all.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    max_images: int = Field(64, ge=1, le=4096, description="Images one request may ask for.")
    queue_slots: int = Field(
        1024, ge=1, description="Images of one model on one device that may wait or run before requests get 429."
    )
    queue_s: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="Seconds until its first step that a request may expect when it comes; beyond, 429; unset: any.",
    )
    key_slots: int | None = Field(
        None, ge=1, description="Images of one API key that may wait or run; unset: with several keys, half of all."
    )
    batch_rows: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Network rows of one step; unset: as many as the measured step time recommends.",
    )
    exact: bool = Field(
        True, description="Make an image's bytes independent of what shares its batches; false spares what that costs."
    )
    max_body_bytes: int = Field(10 * 2**20, ge=1024, description="Size of an uploaded form.")
    max_json_bytes: int = Field(16 * 2**10, ge=256, description="Size of a JSON body.")
    max_image_pixels: int = Field(
        16_000_000,
        ge=1,
        le=Image.MAX_IMAGE_PIXELS,
        description="Pixels of an uploaded image, times the number of t if it keeps its size, and of a drawn answer.",
    )
    upload_slots: int = Field(
        64, ge=1, description="Uploaded images that may wait or be worked on before requests get 429."
    )
    upload_pixels: int = Field(
        32_000_000, ge=1, description="Pixels of uploaded images that may be worked on before requests get 429."
    )
    upload_bytes: int = Field(
        128 * 2**20, ge=1024, description="Bytes of uploaded forms held at once before requests get 429."
    )
    frame_bytes: int = Field(
        128 * 2**20,
        ge=1024,
        description="Bytes of kept moments of chains (frames) held at once before requests get 429.",
    )
    jobs: int = Field(
        256,
        ge=1,
        description="Asynchronous requests at once before they get 429, and results kept; older ones make room.",
    )
    job_bytes: int = Field(
        256 * 2**20, ge=1024, description="Bytes of kept results of asynchronous requests; older ones make room."
    )
    job_s: float = Field(
        600.0, gt=0, le=86_400, description="Seconds that the result of an asynchronous request is kept."
    )
    max_connections: int = Field(2048, ge=1, description="Connections at once; further ones get 503 and are closed.")
    max_header_bytes: int = Field(16 * 2**10, ge=1024, description="Size of a request's head.")
    request_s: float = Field(
        60.0, gt=0, le=86_400, description="Seconds that the head of a request, and then its body, may take to arrive."
    )
    stall_s: float = Field(
        30.0, gt=0, le=86_400, description="Seconds without reading after which a client is taken to have left."
    )
    api_keys: SecretStr = Field(
        SecretStr(""), description="Keys that clients must send, comma-separated; empty: everybody is served."
    )
    metrics_key: bool = Field(False, description="Whether /health and /metrics want a key too; probes never do.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may call from a browser, comma-separated, or *; empty: none."
    )
    docs: bool = Field(True, description="Whether /docs and /openapi.json are there.")
    page: bool = Field(True, description="Whether the page at / is there.")
    drain_s: float = Field(60.0, ge=0, le=86_400, description="Seconds that accepted work has to finish after SIGTERM.")

    @property
    def keys(self) -> tuple[str, ...]:
        """The API keys."""
        return tuple(key.strip() for key in self.api_keys.get_secret_value().split(",") if key.strip())

    @field_validator("cors_origins", "models", "model_sha256", mode="before")
    @classmethod
    def _list_of_text(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @property
    def served(self) -> tuple[str, ...]:
        """Every model to serve; the first is the default.

        Where none is named the directory is meant alone: a start in another folder must not fetch somebody's
        weights/mnist from the hub.
        """
        named = "model" in self.model_fields_set
        return self.models or (self.model if named else str(Path(self.model).absolute()),)

    @property
    def frame_bytes_of_key(self) -> int:
        """Bytes of moments of chains that one key may hold; of several keys none takes all."""
        return self.frame_bytes // 2 if len(self.keys) > 1 else self.frame_bytes

    @field_validator("device")
    @classmethod
    def _devices_are_named_once(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if not all(names) or (len(names) > 1 and {"all", "auto", "cuda"} & set(names)):
            raise ValueError(f"{value!r} must be auto, all, one device, or devices such as cuda:0,cuda:1")
        if twice := [name for name in names if name != "cpu" and names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is named {len(twice)} times: one engine fills a device")
        return value

    @model_validator(mode="after")
    def _models_are_told_apart(self) -> Settings:
        if self.models and "model" in self.model_fields_set:
            raise ValueError("DDPM_MODEL and DDPM_MODELS are both set: set one of them")
        names = [name_of(model) for model in self.served]
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
                raise ValueError(
                    f"the model {name!r} must be called by letters, digits, . _ - alone, for URLs and headers: rename "
                    "its directory"
                )
            if names.count(name) > 1:
                raise ValueError(f"DDPM_MODELS: {names.count(name)} models are called {name}: rename a directory")
        if self.model_sha256 and len(self.model_sha256) != len(names):
            raise ValueError(
                f"DDPM_MODEL_SHA256 has {len(self.model_sha256)} entries for {len(names)} models: give one a model"
            )
        for pin in self.model_sha256:
            if not re.fullmatch("[0-9a-f]{12,64}", pin):
                raise ValueError(
                    f"DDPM_MODEL_SHA256: {pin!r} must be the first 12 .. 64 digits of a sha256, lower case"
                )
        return self

    @property
    def slots_of_key(self) -> int | None:
        """Images that one key may have waiting or running; of several keys none may fill the queue alone."""
        return self.key_slots or (max(self.queue_slots // 2, self.max_images) if len(self.keys) > 1 else None)

    @model_validator(mode="after")
    def _keys_are_keys(self) -> Settings:
        if not self.keys:
            if self.api_keys.get_secret_value():
                raise ValueError("DDPM_API_KEYS has no key in it: leave it out to serve everybody")
            for name in ("metrics_key", "key_slots"):
                if getattr(self, name):
                    raise ValueError(f"DDPM_{name.upper()} is set, and DDPM_API_KEYS is not: set both or none")
        for i, key in enumerate(self.keys, 1):
            if len(key) < MIN_KEY or not (key.isascii() and key.isprintable()) or " " in key:
                raise ValueError(
                    f"DDPM_API_KEYS: key {i} must be {MIN_KEY} visible ASCII characters or more, without a space: "
                    "`openssl rand -hex 32` makes one"
                )
        return self

    @model_validator(mode="after")
    def _origins_are_origins(self) -> Settings:
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    f"DDPM_CORS_ORIGINS: {origin!r} must be like https://example.org, without a path, or *"
                )
        return self

    @model_validator(mode="after")
    def _bounds_take_a_request(self) -> Settings:
        for small, large in (
            ("max_images", "queue_slots"),
            ("max_images", "key_slots"),
            ("max_image_pixels", "upload_pixels"),
            ("max_body_bytes", "upload_bytes"),
        ):
            least, value = getattr(self, small), getattr(self, large)
            if value is not None and value < least:
                raise ValueError(f"DDPM_{large.upper()}={value} must be at least DDPM_{small.upper()}={least}")
        return self


def wrong(error: ValidationError) -> list[str]:
    """What is wrong with settings, a line each."""
    return [
        "".join(f"DDPM_{field}: ".upper() for field in e["loc"]) + e["msg"].removeprefix("Value error, ")
        for e in error.errors(include_url=False)
    ]
