"""What `ddpm info` tells of a model that is read here: its configs, its network, its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.capabilities import of_model
from app.cli.errors import CommandError
from app.cli.local import place, told
from app.engine.runner import info_of, read
from ddpm_core import card
from ddpm_core.checkpoint import CARD_NAME, read_json
from ddpm_core.hub import locate
from ddpm_core.network import flops

OF_CARD = ("sampling", "metrics", "floor")


def describe(model: str | None) -> tuple[dict[str, Any], str]:
    """A model as JSON, and the table of its figures, empty where there are none. Raises CommandError."""
    with told():
        _, reference, pin = place(model)
        found = read(reference, pin)
        directory = locate(reference)
        figures = _figures(directory)
        facts = {
            **of_model(info_of(found, "cpu", "torch")).model_dump(),
            "parameters": sum(p.numel() for p in found.net.parameters()),
            "gflop_per_call": flops(found.net) / 1e9,
            "prediction_type": found.scheduler.prediction_type,
            "beta_schedule": found.scheduler.beta_schedule,
            "card": {name: figures[name] for name in OF_CARD} if figures else None,
        }
        return facts, card.results_table(figures) if figures else ""


def _figures(directory: Path) -> dict[str, Any]:
    """What was measured of it."""
    path = directory / CARD_NAME
    if not path.is_file():
        return {}
    figures = read_json(path)
    try:
        card.results_table(figures)
    except (KeyError, TypeError) as error:
        raise CommandError(f"{path} is of another version ({error!r}): measure with `ddpm evaluate --card`") from None
    return figures
