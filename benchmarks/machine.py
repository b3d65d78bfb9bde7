"""What every benchmark prints: tables that people and markdown read, and one line of JSON with the machine's facts."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = Path("weights/mnist")  # seen from ROOT, where every benchmark and every server that it starts works
NOISE = 0.2  # cores that others may use before a benchmark warns
LIBRARIES = (
    "torch", "onnxruntime", "numpy", "fastapi", "starlette", "uvicorn", "uvloop", "h11", "httpx",
    "diffusers", "denoising-diffusion-pytorch", "litserve",
)  # fmt: skip


def version(library: str) -> str | None:
    """None: it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, object]:
    """What a figure depends on beside the code."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := version(name))},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores others use, asked before a measurement: threads that wait for each other lose much to little."""
    before = cpu_s()
    time.sleep(seconds)
    busy = (cpu_s() - before) / seconds
    if busy > NOISE:
        print(f"warning: others use {busy:.1f} cores, so these figures will be off", file=sys.stderr)
    return round(busy, 2)


def cpu_s() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _first_line("stat").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_s_of(pid: int) -> float:
    """Those of one process."""
    user, system = _first_line(f"{pid}/stat").rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _first_line(name: str) -> str:
    return Path("/proc", name).read_text().splitlines()[0]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table; floats get three digits that count, None and NaN a dash."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def print_json(benchmark: str, **figures: object) -> None:
    """The last line: everything, for programs."""
    print(json.dumps({"benchmark": benchmark, **figures, "machine": facts()}))
