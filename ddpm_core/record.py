"""training.json of a model directory: how its weights came about, and what is known of them by that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpm_core.checkpoint import Model, read_json

RECORD_NAME = "training.json"
MOST_NAME = 100  # characters of a class's name


def training_record(directory: Path) -> dict[str, Any]:
    """How the weights in a model directory came about; nothing where that is not recorded.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / RECORD_NAME
    return read_json(path) if path.is_file() else {}


def origin(directory: Path, model: Model) -> dict[str, Any]:
    """A model as the record of another names it that came from it."""
    return {"sha256": model.sha256, "training": training_record(directory)}


def class_names(directory: Path, model: Model) -> tuple[str, ...]:
    """The names of a model's labels, by the data that it or what it came from was trained on; () where none are known.

    Raises:
        CheckpointError: the file is damaged.
    """
    names = _find(training_record(directory))
    if not isinstance(names, list) or len(names) != model.num_classes:
        return ()
    return tuple(str(name)[:MOST_NAME].encode("utf-8", "replace").decode() for name in names)


def _find(record: Any) -> Any:
    """The first class_names anywhere in a record."""
    if isinstance(record, dict) and "class_names" in record:
        return record["class_names"]
    parts = record.values() if isinstance(record, dict) else record if isinstance(record, list) else ()
    return next((found for part in parts if (found := _find(part)) is not None), None)
