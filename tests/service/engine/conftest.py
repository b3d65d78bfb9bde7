"""Engines that tests step by hand: the real one on the tiny model, its thread not started."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine.admission import Bounds
from app.engine.engine import Engine
from app.engine.request import GenerateParams, Result
from app.engine.runner import Runner
from ddpm_core.checkpoint import Model, load_model

CPU = torch.device("cpu")


class Counting:
    """A network of one line that counts its calls and their rows; its rows are each their own."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        self.calls.append(len(x_t))
        per_row = (t.float() / 1000 + label.float() / 10)[:, None, None, None]
        return torch.tanh(x_t * 1.25 - per_row)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Stepped:
    """An engine whose steps the test makes."""

    engine: Engine
    clock: Clock

    def ask(self, request_id: str = "a", n: int = 1, seed: int = 1, **fields: Any) -> GenerateParams:
        """A request; its labels are 0, 1, 2, ... unless said otherwise."""
        given = {
            "seeds": tuple(range(seed, seed + n)), "labels": tuple(i % 10 for i in range(n)),
            "sampler": "ddim", "steps": 4, "eta": 0.0, "guidance_scale": 1.0,
        }  # fmt: skip
        return GenerateParams(request_id, **{**given, **fields})

    def submit(self, request_id: str = "a", on_progress: Any = None, **fields: Any) -> Future[Result]:
        return self.engine.submit(self.ask(request_id, **fields), on_progress)

    def finish(self) -> int:
        """Steps until nothing is left; how many."""
        for ticks in range(10_000):
            if self.engine.idle:
                self.engine.tick()  # releases the rows
                return ticks
            self.engine.tick()
        raise AssertionError("the engine does not end")

    def alone(self, **fields: Any) -> Result:
        """What a request gives with nothing beside it."""
        assert self.engine.idle
        future = self.submit("alone", **fields)
        self.finish()
        return future.result(0)


@pytest.fixture(scope="session")
def model(model_dir: Path) -> Model:
    return load_model(model_dir)


@pytest.fixture
def make_engine(model: Model) -> Callable[..., Stepped]:
    """Engines over any network; by default the real one, by default with 8 rows a step and no check at the start."""

    def make(network: Any = None, **options: Any) -> Stepped:
        clock = Clock()
        runner = Runner(model, CPU, network or model.network(CPU))
        given = {"bounds": Bounds(1024), "exact": False, "batch_rows": 8, "clock": clock, **options}
        engine = Engine(lambda: runner, **given)
        engine.metrics.watch([engine])
        engine.load()
        return Stepped(engine, clock)

    return make
