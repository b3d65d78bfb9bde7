"""A disk that is full from some moment on, for real processes."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import ddpm_core


def run_until_it_is_full(module: str, arguments: list[str], out: Path) -> str:
    """Runs `python -m module`; after its first checkpoint no file may become half as long as the state.

    Returns:
        The line of its error. Checked are that there is no other, no traceback and no temporary file, and that the
        exit code is 1.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments, "--save-every", "0.001s"],
        cwd=Path(ddpm_core.__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not (out / "samples.png").exists() and process.poll() is None:
            time.sleep(0.01)
        most = (out / "state.safetensors").stat().st_size // 2
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert stderr.count("error") == 1
    assert not list(out.rglob("*.tmp"))
    *_, line = stderr.splitlines()
    return line
