"""Where a model directory has its parts: today's layout of diffusers, the flat one of 2022, and what lies between."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

COMPONENTS = ("unet", "scheduler", "noise_scheduler")  # of a pipeline that we run; the last by its name of June 2022


def unet_folder(directory: Path) -> Path:
    """Where the network lies: in unet/, or beside all else."""
    return unet if (unet := directory / "unet").exists() else directory


def scheduler_file(directory: Path) -> Path:
    """Where the scheduler's config lies; today's place where there is none."""
    paths = [directory / folder / "scheduler_config.json" for folder in ("scheduler", "noise_scheduler", "")]
    return next(filter(os.path.exists, paths), paths[0])


def check_components(index: Mapping[str, object]) -> None:
    """Raises ValueError where a pipeline has parts between its network and its images, as latent ones do.

    Args:
        index: a model_index.json. Components are lists there, what else it holds is settings of the pipeline.
    """
    for part, what in index.items():
        if isinstance(what, list) and not part.startswith("_") and part not in COMPONENTS and what != [None, None]:
            raise ValueError(
                f"component {part!r} is not supported: only a U-Net in the space of its images is; "
                f"supported: {', '.join(COMPONENTS)}"
            )
