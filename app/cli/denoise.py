"""`ddpm denoise`: an image noised to t, and the reverse chain from there."""

from __future__ import annotations

import argparse

from app.cli import files, options
from app.cli.asking import Question, carry_out

EPILOG = """\
The image is fitted to the model, noised to t, and drawn anew from there: the larger t, the less is left of it.

  ddpm denoise seven.png 7 --t 600 -n 4 --scale 4 -o sevens.png
  ddpm generate 7 -o - | ddpm denoise - 1 --t 500 -o one.png"""


def build_parser() -> options.Parser:
    p = options.Parser("ddpm denoise", "Noise an image to t and draw it anew from there (SDEdit).", EPILOG)
    p.add_argument("image", metavar="IMAGE", help="PNG, JPEG, WebP, GIF or BMP; - is stdin")
    p.add_argument("--t", type=int, required=True, help="where the chain starts, 0 .. T-1 (T is 1000 for most models)")
    options.add_drawing(p)
    options.add_place(p)
    return p


def run(args: argparse.Namespace) -> int:
    output = files.Output.of(args.out, files.MOVING if args.frames else files.STILL)
    fields = {**options.fields_of(args), "t": args.t}
    return carry_out(args, Question("/denoise", fields, output.media_type, files.read(args.image)), output)
