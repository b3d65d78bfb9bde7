"""`ddpm generate`: images from pure noise."""

from __future__ import annotations

import argparse

from app.cli import files, options
from app.cli.asking import Question, carry_out

EPILOG = """\
Image i has seed + i. The same seed, label, sampler and steps give the same bytes here and at a service of the same
model, alone or with others. Here nothing bounds -n but patience and memory; a service has its limits.

  ddpm generate 7 -o seven.png
  ddpm generate 0 1 2 3 -n 4 --guidance-scale 1.5 --scale 4 -o grid.png
  ddpm generate -n 100 -o digits/
  ddpm generate 7 --sampler ddim --steps 40 --frames 41 -o chain.apng"""


def build_parser() -> options.Parser:
    p = options.Parser("ddpm generate", "Draw images.", EPILOG)
    options.add_drawing(p)
    options.add_place(p)
    return p


def run(args: argparse.Namespace) -> int:
    output = files.Output.of(args.out, files.MOVING if args.frames else files.STILL)
    return carry_out(args, Question("/generate", options.fields_of(args), output.media_type), output)
