"""Random arrivals, cancels, failures and deadlines on the real engine: whoever survives has the bits it has alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.engine.request import DeadlinePassed, EngineError, Start
from ddpm_core.checkpoint import Model
from tests.service.engine.conftest import CPU, Stepped

RAISES, NAN = 9, 8  # labels

requests = st.fixed_dictionaries(
    {
        "tick": st.integers(0, 12),
        "n": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "label": st.sampled_from([None, 0, 1, 1, 2, RAISES, NAN]),
        "how": st.sampled_from(
            [
                {"sampler": "ddpm", "steps": 6},
                {"sampler": "ddpm", "steps": 3, "guidance_scale": 2.0},
                {"sampler": "ddim", "steps": 4, "eta": 0.5},
                {"sampler": "dpmpp_2m", "steps": 5},
                {"sampler": "dpmpp_2m", "steps": 2, "guidance_scale": 4.0},
                {"sampler": "ddim", "steps": 2, "start": Start(np.full((1, 28, 28), 50, np.uint8), 300)},
            ]
        ),
        "ends": st.sampled_from(["well", "well", "well", "cancelled", "late"]),
        "after": st.integers(0, 8),
    }
)


class Faulty:
    """The tiny U-Net; raises where a batch holds one label, and returns NaN for another."""

    def __init__(self, model: Model) -> None:
        self.network = model.network(CPU)
        self.faults = True

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        if self.faults and (label == RAISES).any():
            raise RuntimeError("poison")
        out = self.network(x_t, t, label)
        out[label == NAN] = float("nan")
        return out


@pytest.fixture
def stepped(make_engine: Callable[..., Stepped], model: Model) -> Stepped:
    return make_engine(Faulty(model), exact=True, batch_rows=None)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(requests, min_size=1, max_size=8))
def test_whoever_survives_has_the_bits_it_has_alone(stepped: Stepped, asked: list[dict[str, Any]]) -> None:
    engine = stepped.engine
    assert engine.idle
    assert engine.exactness is not None
    assert engine.exactness.exact

    def fields(one: dict[str, Any]) -> dict[str, Any]:
        how = dict(one["how"])
        if one["label"] is None:
            how.pop("guidance_scale", None)
        return {"n": one["n"], "seed": one["seed"], "labels": (one["label"],) * one["n"], **how}

    futures: dict[int, Any] = {}
    tick = 0
    while tick <= 21 or not engine.idle:
        for i, one in enumerate(asked):
            if one["tick"] == tick:
                late = {"deadline_s": 1e6} if one["ends"] == "late" else {}
                futures[i] = stepped.submit(str(i), **fields(one), **late)
            if one["tick"] + one["after"] == tick and one["ends"] == "cancelled":
                engine.cancel(str(i))
            if one["tick"] + one["after"] == tick and one["ends"] == "late":
                stepped.clock.now += 1e6  # every late one that is still there is over
        engine.tick()
        tick += 1
        assert tick < 2000
    assert (engine.scheduler.slots, engine.scheduler.running) == (0, 0)

    alone = functools.lru_cache(maxsize=None)(lambda i: stepped.alone(**fields(asked[i])))
    for i, future in futures.items():
        error = future.exception(0)
        if asked[i]["label"] in (RAISES, NAN):
            assert isinstance(error, EngineError)
        elif error is None:
            assert future.result().x.tobytes() == alone(i).x.tobytes()
        else:
            assert asked[i]["ends"] in ("cancelled", "late")
            assert isinstance(error, DeadlinePassed) == (asked[i]["ends"] == "late")
    engine.tick()
    runner = engine._runner
    assert len(runner._free) == runner._x.shape[1]
