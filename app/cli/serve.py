"""`ddpm serve`: the same as `python -m app`, its commonest settings as options."""

from __future__ import annotations

import argparse
import os

from app.cli.options import Parser

EPILOG = """\
Every other setting is an environment variable, DDPM_*, as README.md lists them. SIGTERM or Ctrl-C drains: what was
accepted is finished, then the exit code is 0; a second one ends it at once.

  ddpm serve
  ddpm serve --model weights/mnist weights/mnist-2 --port 9000
  ddpm serve --model google/ddpm-cifar10-32 --device cuda"""


def build_parser() -> Parser:
    p = Parser("ddpm serve", "Serve models over HTTP. Options override the environment.", EPILOG)
    p.add_argument(
        "--model", metavar="M", nargs="+",
        help="model directories, or owner/name[@revision] of the Hugging Face hub; requests mean the first "
        "(default: DDPM_MODEL or DDPM_MODELS, else weights/mnist)",
    )  # fmt: skip
    p.add_argument("--host", help="address to listen on (default: DDPM_HOST, else 127.0.0.1)")
    p.add_argument("--port", type=int, help="0: any free one (default: DDPM_PORT, else 8000)")
    p.add_argument("--device", metavar="D", help="auto, cpu, cuda, cuda:1, ... (default: DDPM_DEVICE, else auto)")
    return p


def run(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("host", "port", "device")}
    os.environ.update({f"DDPM_{name.upper()}": str(value) for name, value in options.items() if value is not None})
    if args.model:
        for name in ("DDPM_MODEL", "DDPM_MODELS"):
            os.environ.pop(name, None)
        os.environ["DDPM_MODEL" if len(args.model) == 1 else "DDPM_MODELS"] = ",".join(args.model)
    from app.__main__ import end, main

    end(main())
