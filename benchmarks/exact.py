"""The price of exactness, and what the network's two runtimes cost.

What: a step of 1, 4 and 64 rows with the calls padded as the engine's self-check finds necessary on this machine,
against the same step unpadded; the seconds of the self-check; and the network call alone as the engine makes it (ONNX
Runtime on a CPU, a recording on a GPU) against plain torch. That is checked and priced too, for the machines and models
that have nothing else; on a GPU also what the engine does without, convolutions in TF32.
How: one process, no HTTP; the two sides take turns (A B, B A, ...), a call of each that is not timed goes before those
that are, so that no side meets the other's spinning threads; medians. Where nothing is padded both sides are the same,
and their ratio is the measure's own noise.
On what: weights/mnist, DDIM steps through the engine's Runner, on the device that `auto` chooses.

    python benchmarks/exact.py [--quick]

Two minutes on two cores, half of one with --quick.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from app.engine.request import GenerateParams
from app.engine.runner import Runner
from app.engine.selfcheck import MOST_ROWS, PINNED_ROWS, find_exactness
from benchmarks.machine import MODEL, ROOT, busy_cores, print_json, table
from benchmarks.turns import Side, in_turns, rounds_within
from ddpm_core.cuda_graph import CudaGraphNetwork
from ddpm_core.network import Network, OnnxNetwork, TorchNetwork

STEP_ROWS = (1, 4, 64)
CALL_ROWS = (1, 4, 16, 64)
TIMED = 4  # calls of a side in a round
POOL_ROWS = (1, 2, 4, 8)
NAMES = {OnnxNetwork: "ONNX Runtime", CudaGraphNetwork: "recorded", TorchNetwork: "torch"}
FEWEST, MOST = 5, 60  # rounds; between them as many as the time allows


def medians_of(sides: Sequence[Side], seconds: float) -> list[float]:
    """Median seconds of each side's call."""
    took = in_turns(sides, rounds_within(seconds, FEWEST, MOST), TIMED)
    return [statistics.median(itertools.chain(*of_side)) for of_side in took]


def step_in_turns(
    runner: Runner, count: int, a: Callable[[], object], b: Callable[[], object], seconds: float
) -> list[float]:
    """Median seconds of a step of so many rows after a() and after b()."""
    steps = runner.info.num_train_steps  # so long a chain never ends here, and all its steps cost the same
    rows = [runner.row(GenerateParams("time", (0,), (None,), "ddim", steps, 0.0, 1.0), 0) for _ in range(count)]

    def step() -> None:
        for row in rows:
            row.done %= steps - 1
        for error in runner.advance(rows).values():
            raise error

    def after(setting: Callable[[], object]) -> Side:
        return Side(step, lambda: (setting(), step()))

    medians = medians_of([after(a), after(b)], seconds)
    for row in rows:
        runner.release(row)
    return medians


def threads_price(runner: Runner, count: int, threads: int, seconds: float) -> dict[str, Any]:
    """Steps of so many rows with one torch thread beside ONNX Runtime's, as the engine has it, and with all."""
    one, all_of_them = step_in_turns(
        runner, count, lambda: torch.set_num_threads(1), lambda: torch.set_num_threads(threads), seconds
    )
    torch.set_num_threads(1)
    return {"rows": count, "one_ms": round(one * 1000, 3), "all_ms": round(all_of_them * 1000, 3),
            "ratio": round(all_of_them / one, 3)}  # fmt: skip


def step_price(runner: Runner, count: int, multiple: int, seconds: float) -> dict[str, Any]:
    """Steps of so many rows, padded to a multiple and not."""
    padded, unpadded = step_in_turns(
        runner, count, lambda: runner.pad_to(multiple), lambda: runner.pad_to(1), seconds
    )  # fmt: skip
    runner.pad_to(multiple)
    padding = runner.padding(count)
    return {
        "rows": count, "padded_by": padding, "padded_ms": round(padded * 1000, 3),
        "unpadded_ms": round(unpadded * 1000, 3), "ratio": round(padded / unpadded, 4),
    }  # fmt: skip


def priced(name: str, runner: Runner, seconds: float) -> dict[str, Any]:
    """The self-check as the engine makes it, and what it leads to."""
    kind = "cpu" if runner.device.type == "cpu" else "accelerator"
    start = time.perf_counter()
    found = find_exactness(runner, MOST_ROWS[kind], PINNED_ROWS[kind])
    took = time.perf_counter() - start
    return {
        "network": name, "exact": found.exact, "rows_multiple": found.rows_multiple,
        "checked_rows": found.checked_rows, "how": found.how, "self_check_s": round(took, 2),
        "steps": [step_price(runner, count, found.rows_multiple, seconds) for count in STEP_ROWS],
    }  # fmt: skip


def calls(runner: Runner, seconds: float) -> list[dict[str, Any]]:
    """ms a row of the network call alone: as the engine makes it, and by plain torch."""
    model, device = runner.model, runner.device
    networks = [runner.network, TorchNetwork(model.net, device)]
    classes, found = runner.info.num_classes, []
    for count in CALL_ROWS:
        x_t, t = torch.randn(count, *runner.info.image_shape, device=device), torch.linspace(1, 900, count)
        label = torch.arange(count, device=device) % classes if classes else None
        network_calls = [functools.partial(called, network, x_t, t.to(device), label) for network in networks]
        sides = [Side(call, before=call) for call in network_calls]
        ours, plain = (1000 * s / count for s in medians_of(sides, seconds))
        found.append(
            {
                "rows": count, "ours_ms_per_row": round(ours, 4), "torch_ms_per_row": round(plain, 4),
                "ratio": round(plain / ours, 3),
            }
        )  # fmt: skip
    return found


def called(network: Network, *inputs: Tensor | None) -> None:
    """One call, to its end."""
    network(*inputs)  # type: ignore[arg-type]
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    seconds = 1.0 if parser.parse_args().quick else 8.0

    busy, threads = busy_cores(), torch.get_num_threads()
    runner = Runner.load(str(ROOT / MODEL), "auto")  # leaves torch one thread where it is not the network
    ours = NAMES[type(runner.network)]
    checked, pools, network_calls = [priced(ours, runner, seconds)], [], []
    if ours == "ONNX Runtime":
        pools = [threads_price(runner, count, threads, seconds) for count in POOL_ROWS]
    torch.set_num_threads(threads)
    if ours != "torch":
        network_calls = calls(runner, seconds)
        plain = Runner(runner.model, runner.device, TorchNetwork(runner.model.net, runner.device))
        checked.append(priced("torch", plain, seconds))
    if ours == "recorded":
        torch.backends.cudnn.allow_tf32 = True
        in_tf32 = Runner(runner.model, runner.device, runner.model.network(runner.device))
        checked.append(priced("recorded, TF32", in_tf32, seconds))

    header = ["network", "found", "self-check s", "rows", "padded by", "padded ms", "unpadded ms", "ratio"]
    print(table(header, [
        [of["network"], of["how"], of["self_check_s"], *step.values()] for of in checked for step in of["steps"]
    ]))  # fmt: skip
    if network_calls:
        print()
        print(table(["rows of a call", f"{ours}, ms a row", "torch, ms a row", f"torch / {ours}"],
                    [list(call.values()) for call in network_calls]))  # fmt: skip
    if pools:
        print()
        print(table(["rows of a step", "one torch thread, ms", f"{threads} torch threads, ms", "ratio"],
                    [list(pool.values()) for pool in pools]))  # fmt: skip
    print_json(
        "exact",
        torch_threads=pools,
        threads=threads,
        busy_cores_before=busy,
        exactness=checked,
        network_calls=network_calls,
    )


if __name__ == "__main__":
    main()
