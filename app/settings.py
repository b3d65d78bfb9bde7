"""What belongs to a deployment: read once from the environment, DDPM_<NAME>."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Every setting, with its unit in its name where it has one. README.md lists them; a test holds it to that."""

    model_config = SettingsConfigDict(env_prefix="DDPM_", frozen=True, protected_namespaces=())

    model: Path = Field(Path("weights/mnist"), description="Model directory to serve.")
    device: str = Field("auto", description="auto (CUDA where there is one, else the CPU), cpu, cuda, cuda:1, ...")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    max_images: int = Field(64, ge=1, le=4096, description="Images one request may ask for.")
    queue_slots: int = Field(1024, ge=1, description="Images that may wait or run before requests get 429.")
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
        description="Pixels of an uploaded image, times the number of t if it keeps its size.",
    )
    drain_s: float = Field(60.0, ge=0, le=86_400, description="Seconds that accepted work has to finish after SIGTERM.")

    @model_validator(mode="after")
    def _queue_takes_a_request(self) -> Settings:
        if self.queue_slots < self.max_images:
            raise ValueError(f"DDPM_QUEUE_SLOTS={self.queue_slots} must be at least DDPM_MAX_IMAGES={self.max_images}")
        return self
