"""The record of a model directory: what is known of weights by how they came about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm_core import record
from ddpm_core.checkpoint import CheckpointError
from tests.networks import eight

MODEL = eight()  # of ten classes
NAMES = [f"class {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("training", "names"),
    [
        ({"data_facts": {"class_names": NAMES}}, tuple(NAMES)),
        ({"average_of": [{"share": 1, "training": {"data_facts": {"class_names": NAMES}}}]}, tuple(NAMES)),
        ({"started_from": {"training": {"data_facts": {"class_names": NAMES}}}}, tuple(NAMES)),
        ({"data_facts": {"images": 3}}, ()),
        ({"data_facts": {"class_names": NAMES[:3]}}, ()),  # of other data
        ({"data_facts": {"class_names": 7}}, ()),
        ({"data_facts": {"class_names": ["\ud800", *NAMES[1:]]}}, ("?", *NAMES[1:])),
        ({}, ()),
    ],
)
def test_class_names_are_found_wherever_the_data_stand(tmp_path: Path, training: Any, names: tuple[str, ...]) -> None:
    (tmp_path / record.RECORD_NAME).write_text(json.dumps(training))
    assert record.class_names(tmp_path, MODEL) == names


def test_a_record_that_is_missing_is_empty_and_a_damaged_one_named(tmp_path: Path) -> None:
    assert record.training_record(tmp_path) == {}
    assert record.class_names(tmp_path, MODEL) == ()

    for damaged in ("{", "[" * 100_000):
        (tmp_path / record.RECORD_NAME).write_text(damaged)
        with pytest.raises(CheckpointError, match=r"training\.json is not JSON"):
            record.class_names(tmp_path, MODEL)
