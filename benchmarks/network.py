"""The rate of one network call, beside that of a matrix product.

What: GFLOP/s of a call of 1, 4, 16 and 64 rows by ONNX Runtime and by torch, and their share of the rate of a float32
product of two 2048 x 2048 matrices, by torch or by ONNX Runtime: whichever is faster here (torch's library leaves the
wide vectors of some processors alone). FLOPs are counted by torch.utils.flop_counter in torch's network, a
multiplication and an addition each for one; those of norms and activations are not counted, their time is.
How: one process; the four take turns, calls of each for 30 ms that are not timed go before those that are; medians of
rounds, shares within a round, and in brackets the least and the most of the rounds.
On what: weights/mnist on the CPU, with as many threads as torch has by itself.

    python benchmarks/network.py [--quick]

A minute on two cores, a few seconds with --quick (one call of each at 1 and 16 rows).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import onnx
import torch

from benchmarks.machine import MODEL, ROOT, busy_cores, print_json, table
from benchmarks.turns import Side, Spread, in_turns, medians, ratio, rounds_within
from ddpm_core.checkpoint import Model, load_model
from ddpm_core.network import OnnxNetwork, TorchNetwork, cpu_session, flops

ROWS, QUICK_ROWS = (1, 4, 16, 64), (1, 16)
SIZE = 2048
PRODUCT_GFLOP = 2 * SIZE**3 / 1e9
SECONDS, TIMED = 12.0, 4  # of a number of rows, and calls of a side in a round
SETTLE_S = 0.03  # before the timed calls of a turn
FEWEST, MOST = 3, 40  # rounds; between them as many as the time allows
GOAL = {1: 0.6, 16: 0.75, 64: 0.75}  # share of the product's rate, by rows

CPU = torch.device("cpu")


def products() -> tuple[Callable[[], object], Callable[[], object]]:
    """The product of two matrices by torch, and by ONNX Runtime with the options of our network."""
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    names = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [SIZE, SIZE]) for name in "abc"}
    node = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = onnx.helper.make_graph([node], "product", [names["a"], names["b"]], [names["c"]])
    session = cpu_session(onnx.helper.make_model(graph, ir_version=10).SerializeToString())
    return functools.partial(torch.mm, a, b), functools.partial(session.run, None, {"a": a.numpy(), "b": b.numpy()})


def settle(call: Callable[[], object]) -> None:
    """Calls until the threads of the side before have stopped spinning."""
    until = time.perf_counter() + SETTLE_S
    while time.perf_counter() < until:
        call()


def rates(model: Model, rows: int, rounds: Iterable[int], timed: int) -> dict[str, Any]:
    """GFLOP/s and shares at one number of rows."""
    x_t, t = torch.randn(rows, *model.config.image_shape), torch.linspace(1, 900, rows)
    label = None if model.null_label is None else torch.arange(rows) % model.config.num_classes
    graph, eager = model.network(CPU), TorchNetwork(model.net, CPU)
    if not isinstance(graph, OnnxNetwork):
        raise SystemExit("ONNX Runtime does not run this network: there is nothing to compare")
    calls = [functools.partial(network, x_t, t, label) for network in (graph, eager)]
    sides = [Side(call, before=functools.partial(settle, call)) for call in (*calls, *products())]
    *networks, by_torch, by_onnx = in_turns(sides, rounds, timed)
    product = min(by_torch, by_onnx, key=lambda took: statistics.median(medians(took)))
    each = rows * flops(model.net) / 1e9
    found: dict[str, Any] = {"rows": rows, "gflop": round(each, 4), "rounds": len(product)}
    found["product_gflops"] = Spread.of(PRODUCT_GFLOP / s for s in medians(product))
    for name, took in zip(("onnxruntime", "torch"), networks, strict=True):
        slower = ratio(product, took)
        found |= {
            f"{name}_ms_per_row": Spread.of(1000 * s / rows for s in medians(took)),
            f"{name}_gflops": Spread.of(each / s for s in medians(took)),
            f"{name}_share": slower.times(each / PRODUCT_GFLOP),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shows that everything runs; its figures mean little")
    quick = parser.parse_args().quick

    busy, model = busy_cores(), load_model(ROOT / MODEL)
    if quick:
        found = [rates(model, rows, range(1), 1) for rows in QUICK_ROWS]
    else:
        found = [rates(model, rows, rounds_within(SECONDS, FEWEST, MOST), TIMED) for rows in ROWS]
    header = [
        "rows of a call", "matrix product, GFLOP/s", "ONNX Runtime, GFLOP/s", "share of the product",
        "torch, GFLOP/s", "share of the product",
    ]  # fmt: skip
    columns = ("rows", "product_gflops", "onnxruntime_gflops", "onnxruntime_share", "torch_gflops", "torch_share")
    print(table(header, [[of[column] for column in columns] for of in found]))
    goals = {}
    for of in found:
        if goal := GOAL.get(of["rows"]):
            share = of["onnxruntime_share"].median
            goals[of["rows"]] = {"goal": goal, "share": round(share, 3), "met": share >= goal}
            print(f"share at {of['rows']} rows: {share:.0%}, goal {goal:.0%}")
    print_json(
        "network", busy_cores_before=busy, threads=torch.get_num_threads(),
        calls=[{k: v.json(4) if isinstance(v, Spread) else v for k, v in of.items()} for of in found], goals=goals,
    )  # fmt: skip


if __name__ == "__main__":
    main()
