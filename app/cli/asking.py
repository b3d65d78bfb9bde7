"""What a command asks for and is answered, by a model here or at a service."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from app.cli import progress
from app.cli.errors import CommandError
from app.cli.files import Output
from app.cli.options import check_place, key_of


@dataclasses.dataclass(frozen=True)
class Question:
    """A request of /generate, /denoise or /noise."""

    path: str
    fields: Mapping[str, Any]
    media_type: str  # of the answer
    image: bytes | None = None  # of the last two


@dataclasses.dataclass(frozen=True)
class Answer:
    """Its bytes, and what it takes to have them again."""

    content: bytes
    facts: Mapping[str, object]


def carry_out(args: argparse.Namespace, question: Question, output: Output) -> int:
    """Asks, writes the answer, and says what made it. Raises CommandError."""
    check_place(args)
    with progress.bar(args.quiet, f"waiting for {args.url}" if args.url else "loading") as bar:
        if args.url:
            from app.cli.remote import Service

            fields = question.fields if args.model is None else {**question.fields, "model": args.model}
            answer = Service(args.url, key_of(args)).ask(dataclasses.replace(question, fields=fields), bar)
        else:
            from app.cli import local

            answer = local.ask(question, args.model, args.device, bar)
    made = ", ".join(f"{name} {value}" for name, value in answer.facts.items())
    try:
        where = output.write(answer.content)
    except CommandError as error:
        raise CommandError(f"{error}; it can be had again by {made}") from None
    if not args.quiet:
        print(f"{where}: {made}", file=sys.stderr)
    return 0
