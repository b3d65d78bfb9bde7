"""The service with a fault in it, as a process: `python -m tests.service.faulty`, the fault named by FAULT.

out-of-memory    a step of more than two network rows does not fit
nan              images of label 8 become NaN
thread-dies      a step of label 9 ends the worker thread
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from app.__main__ import main
from app.engine.runner import Row, Runner

step = Runner._step


def small(self: Runner, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    if sum(row.network_rows for row in rows) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
    return step(self, rows)


@torch.inference_mode()
def spoilt(self: Runner, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    x, x_0_hat = step(self, rows)
    bad = torch.tensor([row.label == 8 for row in rows])
    x[:, bad] = float("nan")
    return x, x_0_hat


def dying(self: Runner, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    if any(row.label == 9 for row in rows):
        raise SystemExit("the device is gone")
    return step(self, rows)


if __name__ == "__main__":
    faults = {"out-of-memory": small, "nan": spoilt, "thread-dies": dying}
    Runner._step = faults[os.environ["FAULT"]]  # type: ignore[method-assign]
    sys.exit(main())
