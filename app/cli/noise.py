"""`ddpm noise`: the forward process on an image."""

from __future__ import annotations

import argparse

from app.cli import files, options
from app.cli.asking import Question, carry_out

EPILOG = """\
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, by the model's schedule, of one eps for every t. As .npz: x_t and eps.

  ddpm noise seven.png --t 0,250,999 -o strip.png
  ddpm noise seven.png --t 500 --fit model -o x_t.npz"""


def build_parser() -> options.Parser:
    p = options.Parser("ddpm noise", "Noise an image.", EPILOG)
    p.add_argument("image", metavar="IMAGE", help="PNG, JPEG, WebP, GIF or BMP; - is stdin")
    p.add_argument("--t", required=True, help="0 .. T-1, or several, which make a strip: 0,250,999")
    p.add_argument("--seed", type=int, help="of the noise (default: random, and told)")
    p.add_argument(
        "--fit", choices=("none", "model"), default="none",
        help="model: in the model's shape and colours; none: in its own (default)",
    )  # fmt: skip
    options.add_output(p, ".png, .npz or .json")
    options.add_place(p, device=False)
    return p


def run(args: argparse.Namespace) -> int:
    output = files.Output.of(args.out, files.NOISED)
    fields = {"t": args.t, "fit": args.fit, **({} if args.seed is None else {"seed": args.seed})}
    return carry_out(args, Question("/noise", fields, output.media_type, files.read(args.image)), output)
