"""The command `ddpm`: draws, noises and describes, here or at a service, and starts every other command line.

Only what a command needs is imported: help, and a command that asks a service, load no torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from app.cli.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_UNREAD, CommandError
from app.cli.options import Parser
from ddpm_core import __version__

COMMANDS = {
    "generate": "draw images",
    "noise": "noise an image: the forward process",
    "denoise": "noise an image to t and draw it anew from there",
    "info": "what a model is, or what a service serves",
    "serve": "serve models over HTTP",
}
"""Ours: a module of this package each, with build_parser() and run()."""

OFFLINE = {
    "train": "train a model",
    "evaluate": "measure a model and write its card",
    "sweep": "measure FID against network calls",
    "distill": "distill a model into one of few network calls",
    "fit-plans": "fit few-step samplers to a model",
    "average": "average the weights of two models",
    "classifier": "train the classifier that FID is measured with",
}
"""Command lines of ddpm_core: the same as `python -m ddpm_core.<name>`, with their own help and exit codes."""

EXAMPLES = """\
examples:
  ddpm generate 7 -o seven.png                       a seven, drawn here by weights/mnist
  ddpm generate 0 1 2 -n 4 --seed 1 --scale 4        four of each, as a grid in out.png
  ddpm generate 7 --frames 6 -o chain.webp           the chain from noise to image, animated
  ddpm generate 7 --url http://127.0.0.1:8000        the same seven, drawn by a service
  ddpm noise seven.png --t 0,250,999 -o strip.png    x_t at three timesteps
  ddpm denoise seven.png 3 --t 600 -o three.png      what else the noised seven could be
  ddpm serve --model weights/mnist --port 8000       the service itself

`ddpm COMMAND --help` says what each of them takes; README.md has more."""


def build_parser() -> Parser:
    """Of what stands before a command."""
    width = max(map(len, (*COMMANDS, *OFFLINE)))
    listed = [f"  {name:{width}}  {what}" for name, what in (*COMMANDS.items(), *OFFLINE.items())]
    epilog = "\n".join(["commands:", *listed, "", EXAMPLES])
    parser = Parser("ddpm", "Images from noise, by a denoising diffusion model.", epilog)
    parser.usage = "ddpm COMMAND ...\n       ddpm --help | --version"
    parser.add_argument("--version", action="version", version=f"ddpm {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Carries a command line out, that of the process where none is given. Returns the exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # whether somebody reads it is found out here
    except CommandError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return EXIT_UNREAD
    return code


def _run(words: list[str]) -> int:
    name, rest = words[0] if words else "--help", words[1:]
    try:
        if name in OFFLINE:
            code: int = importlib.import_module(f"ddpm_core.{name.replace('-', '_')}").main(rest, f"ddpm {name}")
            return code
        if name in COMMANDS:
            command = importlib.import_module(f"app.cli.{name}")
            code = command.run(command.build_parser().parse_intermixed_args(rest))
            return code
        if not name.startswith("-"):
            meant = difflib.get_close_matches(name, (*COMMANDS, *OFFLINE), 1)
            hint = f"did you mean {meant[0]}?" if meant else "ddpm --help lists them"
            raise CommandError(f"there is no command {name}: {hint}")
        build_parser().parse_args(words or ["--help"])
        raise CommandError(f"{name} stands before a command, which is missing: ddpm --help lists them")
    except SystemExit as end:  # argparse's: of --help, --version and what it cannot read
        return end.code if isinstance(end.code, int) else 0
