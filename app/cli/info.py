"""`ddpm info`: what a model is, or what a service serves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from app.cli.errors import CommandError
from app.cli.options import Parser, add_service, check_place, key_of

EPILOG = """\
  ddpm info weights/mnist
  ddpm info --url http://127.0.0.1:8000 --json"""


def build_parser() -> Parser:
    p = Parser("ddpm info", "What a model is, or what a service serves.", EPILOG)
    p.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="a model directory, or owner/name[@revision] of the Hugging Face hub (default: DDPM_MODEL, else "
        "weights/mnist)",
    )  # fmt: skip
    add_service(p)
    p.set_defaults(device=None)
    p.add_argument("--json", action="store_true", help="one JSON object, for programs")
    return p


def run(args: argparse.Namespace) -> int:
    check_place(args)
    if args.url and args.model:
        raise CommandError("a MODEL is one here, --url is a service: leave one of them out")
    facts, text = _of_service(args) if args.url else _of_model(args.model)
    print(json.dumps(facts, indent=2) if args.json else text)
    return 0


def _of_model(model: str | None) -> tuple[dict[str, Any], str]:
    """Of one that is read here, as JSON and as text."""
    from app.cli import described

    facts, figures = described.describe(model)
    lines = {
        "weights": f"sha256 {facts['sha256']}, {facts['parameters']:,} parameters, "
        f"{facts['gflop_per_call']:.2f} GFLOP a call of one image",
        "network": f"predicts {facts['prediction_type']}",
        "schedule": f"{facts['beta_schedule']}, T = {facts['num_train_steps']:,}",
        **_lines(facts),
    }
    return facts, f"{_text(facts['id'], lines)}\n\n{figures or 'no card.json: not measured yet'}"


def _of_service(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Of all models of a service, as JSON and as text."""
    from app.cli.remote import Service

    service = Service(args.url, key_of(args))
    health = service.get("/health", also=503)
    try:
        if health["status"] != "ok":
            raise CommandError(f"{service.url} is {health['status']}: try again later")
        capabilities = service.get("/capabilities")
        state = {one["model"]: one for one in health["models"]}
        parts = [
            f"{service.url}: version {health['version']}, images of a request: {capabilities['limits']['n']} at most"
        ]
        for model in capabilities["models"]:
            engine = state[model["name"]]["engine"]
            lines = {
                "weights": f"sha256 {model['sha256']}",
                "schedule": f"T = {model['num_train_steps']:,}",
                **_lines(model),
                "runs": f"by {engine['runtime']} on {state[model['name']]['device']}, {engine['exactness']}",
                "images": f"{engine['slots_running']} running, {engine['slots_waiting']} waiting, "
                f"{engine['slots_limit']} at most",
            }
            parts.append(_text(model["id"], lines))
    except (KeyError, TypeError):
        raise CommandError(f"{service.url} does not describe itself as a service of this project does") from None
    return {"health": health, "capabilities": capabilities}, "\n\n".join(parts)


def _lines(model: Mapping[str, Any]) -> dict[str, str]:
    """What a model here and one of a service have in common."""
    classes, names = model["num_classes"], model["class_names"]
    labels = ", ".join(f"{i}: {name}" for i, name in enumerate(names)) or f"0 .. {classes - 1}"
    samplers = [one for one in model["samplers"] if not one["preset"]]
    presets = [one for one in model["samplers"] if one["preset"]]
    return {
        "shape": "{} x {} x {} (C, H, W)".format(*model["image_shape"]),
        "labels": f"{labels}{', or null' if model['unlabelled'] else ''}" if classes else "none: it is unconditional",
        "guidance": "yes" if model["guidance"] else "no",
        "samplers": ", ".join(_sampler(one) for one in samplers),
        "presets": ", ".join(f"{one['name']} = {one['sampler']} {one['steps']}" for one in presets),
    }


def _sampler(one: Mapping[str, Any]) -> str:
    """Its name, and its steps: those it has by itself, or the only ones there are."""
    return f"{one['name']} {' or '.join(map(str, one['steps_allowed'] or [one['steps']]))}"


def _text(head: str, lines: Mapping[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join([head, *(f"  {name:{width}}  {what}" for name, what in lines.items())])
