"""Averages the weights of two models, one trained on from the other: `python -m ddpm_core.average --help`.

Between them lies what lies between their trainings (a guidance scale, say), to be set without another training
(Wortsman et al. 2022, arXiv 2203.05482).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ddpm_core import checkpoint, record
from ddpm_core.parallel import one_process

PROG = "python -m ddpm_core.average"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n")[0])
    p.add_argument("models", type=Path, nargs=2, metavar="DIR", help="model directories of one network and schedule")
    p.add_argument("--share", type=float, required=True, help="of the second one, 0 .. 1; the first one has the rest")
    p.add_argument("--out", type=Path, required=True, help="model directory to write")
    return p


def run(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where it cannot."""
    if not 0 <= args.share <= 1:
        raise ValueError(f"--share {args.share} must be 0 .. 1")
    if (args.out / "unet").exists() or (args.out / "model_index.json").exists():
        raise FileExistsError(f"{args.out} already holds a model: name another --out")
    first, second = (checkpoint.load_model(path) for path in args.models)
    if first.config != second.config or first.scheduler != second.scheduler:
        raise ValueError(f"{args.models[0]} and {args.models[1]} are not of one network and schedule")
    theirs = second.net.state_dict()
    weights = {name: torch.lerp(ours, theirs[name], args.share) for name, ours in first.net.state_dict().items()}
    shares = (1 - args.share, args.share)
    parts = [
        {"share": share, **record.origin(path, model)}
        for path, model, share in zip(args.models, (first, second), shares, strict=True)
    ]
    checkpoint.save_model(args.out, weights, first.config, first.scheduler)
    checkpoint.write_atomically(args.out / record.RECORD_NAME, checkpoint.to_json({"average_of": parts}))


@one_process
def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    args = build_parser(prog).parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
