"""A small real model on disk, made once: random weights, the real layout, loaded by the real code."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on busy cores two spinning threads wait for each other

from pathlib import Path

import pytest

from tests.networks import save_tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional 28x28 network of ten classes with random weights, its graph, and a learned plan of 3 steps."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
