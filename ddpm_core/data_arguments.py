"""The options by which the command lines (train, evaluate, classifier) name a data set."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_core import data

DEFAULTS: dict[str, Any] = {"data": "mnist", "data_root": Path("data"), "image_size": None, "image_channels": None}


def add_data_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds the options, without the defaults above: train has to know which ones were given."""
    parser.add_argument(
        "--data", choices=sorted(data.DATASETS), help="folder: your own images, those in --data-root (default: mnist)"
    )
    parser.add_argument("--data-root", type=Path, help="torchvision's root, or a folder of images (default: data)")
    parser.add_argument("--download", action="store_true", default=False, help="fetch the data set where it is missing")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="resize and crop to a square (default: as is)")
    parser.add_argument(
        "--image-channels", type=int, choices=(1, 3), help="grey or RGB (default: the data set's; a folder's: 3)"
    )


def options_of(given: Mapping[str, Any]) -> data.Options:
    """What a command line says of the images' shape. Raises ValueError on a size that cannot be."""
    return data.Options(given["image_size"], given["image_channels"])


def load(given: Mapping[str, Any], *, train: bool) -> data.ImageSet:
    """The part of the data set that a command line names; raises what data.load raises."""
    return data.load(
        given["data"], given["data_root"], train=train, download=given["download"], options=options_of(given)
    )


def classifier_of(given: Mapping[str, Any], path: Path | None, option: str) -> Path:
    """Where the feature space of a data set lies: as given, else in weights/<data>-classifier.

    Raises:
        ValueError: the data set is a folder and no path is given; every folder would have the same one.
    """
    if path is None and given["data"] == "folder":
        raise ValueError(f"name the folder of these images' feature space with {option}")
    return path or Path("weights") / f"{given['data']}-classifier"


def words(given: Mapping[str, Any]) -> list[str]:
    """The command line that names the same data set, less where it lies."""
    shape = {"--image-size": given["image_size"], "--image-channels": given["image_channels"]}
    return ["--data", given["data"]] + [word for k, v in shape.items() if v is not None for word in (k, str(v))]
