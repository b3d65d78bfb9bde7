"""Where MNIST lies, for the tests that need real digits of it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent


def mnist_root() -> Path | None:
    """A folder that holds MNIST, or None: DDPM_TEST_DATA_ROOT, data/, or shared/data beside the checkout."""
    candidates = [os.environ.get("DDPM_TEST_DATA_ROOT"), ROOT / "data", ROOT.parent / "shared" / "data"]
    found = (Path(c) for c in candidates if c and (Path(c) / "MNIST" / "raw" / "t10k-images-idx3-ubyte").is_file())
    return next(found, None)
