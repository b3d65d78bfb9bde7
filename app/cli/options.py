"""What several commands take: where to ask, what to draw, where it goes."""

from __future__ import annotations

import argparse
import os
from typing import Any, NoReturn

from app.cli.errors import EXIT_ERROR, CommandError

MOST_IMAGES = 100_000  # of one command; beyond, -n is a slip of the hand
FIELDS = ("seed", "sampler", "steps", "eta", "guidance_scale", "scale", "frames")


class Parser(argparse.ArgumentParser):
    """argparse's, with a text as it stands under its options, and errors of one line."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog, description=description, epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"error: {message}; {self.prog} --help says what there is\n")


def label(text: str) -> int | None:
    """A label, or null for none."""
    if text == "null":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no label: labels are numbers, or null for none") from None


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_IMAGES:
        raise argparse.ArgumentTypeError(f"{text} must be 1 .. {MOST_IMAGES:,}")
    return int(text)


def add_place(p: argparse.ArgumentParser, *, device: bool = True) -> None:
    """Options of where the model is: here, or at a service."""
    where = p.add_argument_group("where")
    where.add_argument(
        "--model", metavar="M",
        help="a model directory, or owner/name[@revision] of the Hugging Face hub (default: DDPM_MODEL, else "
        "weights/mnist); with --url one of its models (default: its first)",
    )  # fmt: skip
    if device:
        where.add_argument("--device", metavar="D", help="auto, cpu, cuda, ... (default: DDPM_DEVICE, else auto)")
    else:
        p.set_defaults(device=None)
    add_service(where)
    p.add_argument("-q", "--quiet", action="store_true", help="say nothing on stderr but what is wrong")


def add_service(p: argparse._ActionsContainer) -> None:
    """Options of a service to ask."""
    p.add_argument("--url", metavar="URL", help="ask the service there, as http://127.0.0.1:8000")
    p.add_argument(
        "--api-key", metavar="KEY", help="of the service (better: DDPM_API_KEY, which no list of processes shows)"
    )


def add_output(p: argparse.ArgumentParser, forms: str) -> None:
    """Where the answer goes."""
    p.add_argument(
        "-o", "--out", metavar="OUT", default="out.png",
        help=f"{forms}; - is a PNG on stdout; a file that is there is replaced (default: %(default)s)",
    )  # fmt: skip


def add_drawing(p: argparse.ArgumentParser) -> None:
    """Options of what is drawn: the fields of /generate."""
    what = p.add_argument_group("what is drawn")
    what.add_argument(
        "labels", metavar="LABEL", nargs="*", type=label, help="what to draw, or null; several: each of them"
    )
    what.add_argument("-n", type=_count, default=1, help="how many, of every LABEL (default: 1)")
    what.add_argument("--seed", type=int, help="of the first image, the next has the next (default: random, and told)")
    what.add_argument(
        "--sampler", metavar="S",
        help="fast, balanced (default), reference, ddpm, ddim, dpmpp_2m, dpmpp_3m, ipndm, unipc, learned",
    )  # fmt: skip
    what.add_argument("--steps", type=int, help="network calls an image (default: the sampler's own)")
    what.add_argument("--eta", type=float, help="of ddim: 0 is deterministic (default), 1 is DDPM")
    what.add_argument("--guidance-scale", type=float, metavar="G", help="1 is off (default); else a LABEL is needed")
    what.add_argument("--scale", type=int, help="enlarge so many times, 1 .. 16 (default: 1)")
    what.add_argument("--frames", type=int, metavar="K", help="the chain itself in so many moments, steps + 1 at most")
    add_output(
        p, ".png (of several images a grid), .zip, .json, or a folder for one PNG an image; with --frames .png or "
        ".apng, .webp, .npz",
    )  # fmt: skip


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """What is drawn, as fields of /generate: those that were given."""
    fields: dict[str, Any] = {"n": args.n * max(1, len(args.labels))}
    if len(args.labels) == 1:
        fields["label"] = args.labels[0]
    elif args.labels:
        fields["label"] = [one for one in args.labels for _ in range(args.n)]
    return {**fields, **{name: value for name in FIELDS if (value := getattr(args, name)) is not None}}


def check_place(args: argparse.Namespace) -> None:
    """Raises CommandError where options of here and of a service are mixed."""
    if args.url and args.device:
        raise CommandError("--device is of a model that is loaded here: leave it out with --url")
    if args.api_key and not args.url:
        raise CommandError("--api-key is of a service: name that with --url")


def key_of(args: argparse.Namespace) -> str | None:
    """The API key for a service."""
    return args.api_key or os.environ.get("DDPM_API_KEY") or None
