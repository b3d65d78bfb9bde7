"""Several processes at one work, as torchrun starts them: which one this is, and what they tell each other.

All that is random is a function of a seed, so every rank draws what the whole batch needs and computes its share of it.
What ranks tell each other goes over gloo, from CPU to CPU: it notices at once when a process dies. Gradients on GPUs go
over nccl. A process alone joins nothing, and pays nothing.

Rank 0 speaks and writes files for all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed, nn

from ddpm_core.network import pick_device

T = TypeVar("T")
P = ParamSpec("P")

PATIENCE = datetime.timedelta(hours=2)  # with a rank that downloads or saves; one that dies is noticed at once
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)  # what a command line ends with in one line


class Told(ValueError):
    """What went wrong on one rank or more, raised on every one."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those at one work."""

    rank: int = 0  # 0 .. world - 1
    world: int = 1  # how many there are, on all hosts
    local: int = 0  # which of its host's, and which of its host's GPUs it has
    local_world: int = 1  # how many there are on this host

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Ranks:
        """By the variables that torchrun sets; without them this process is alone. Raises ValueError on a wrong one."""
        if "WORLD_SIZE" not in environment:
            return ONE
        return cls(
            int(environment.get("RANK", 0)), int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1)),
        )  # fmt: skip

    @property
    def launcher(self) -> str:
        """What starts `-m MODULE` again in as many processes."""
        if self.world == 1:
            return "python"
        return f"torchrun --nproc-per-node {self.local_world}" + (" ..." if self.local_world < self.world else "")

    def share(self, batch_size: int) -> slice:
        """The rows of a batch that this rank computes. Raises ValueError where they cannot be shared out evenly."""
        rows, over = divmod(batch_size, self.world)
        if over:
            fitting = [n * self.world for n in (rows, rows + 1) if n]
            raise ValueError(
                f"batch_size={batch_size} is that of all {self.world} processes together and must be a multiple of "
                f"{self.world}, such as {' or '.join(map(str, fitting))}"
            )
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def device(self, name: str) -> torch.device:
        """A device by name, as pick_device has it; "auto" and "cuda" are the GPU of this rank.

        Raises:
            ValueError: no such device on this machine, or one that several ranks would have to share.
        """
        if self.world > 1:
            if name not in ("auto", "cpu", "cuda"):
                raise ValueError(f"device {name!r} is one, and each of {self.world} processes has its own: auto or cpu")
            gpus = torch.cuda.device_count() if name != "cpu" else 0
            if 0 < gpus <= self.local:
                raise ValueError(f"this host has {gpus} GPUs and more processes: start one a GPU, or take cpu")
        return pick_device(name)

    def data_parallel(self, net: nn.Module) -> nn.Module:
        """A network whose gradients are the mean over all ranks, its weights those of rank 0. Every rank calls this."""
        if self.world == 1:
            return net
        return nn.parallel.DistributedDataParallel(net)

    def sum(self, *values: float) -> list[float]:
        """The sums over all ranks, the same to the last bit on every one."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def of_first(self, value: float) -> float:
        """Rank 0's number."""
        return self.sum(0.0 if self.rank else value)[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found

    def in_order(self, rows: Tensor, batch_size: int) -> Tensor:
        """The rows of batches that the ranks computed in turn, in the order of the batches, on every rank."""
        parts = self.gather(rows)
        starts = range(0, len(parts[0]), batch_size)
        return torch.cat([part[start : start + batch_size] for start in starts for part in parts]) if starts else rows

    def agree(self, work: Callable[[], T]) -> T:
        """What this rank's work returns, once every rank has done its own without one of the EXPECTED errors.

        Raises:
            Told: a rank has not, by the error's text. Of one process: the error itself.
        """
        if self.world == 1:
            return work()
        done: list[T] = []
        error = ""
        try:
            done.append(work())
        except EXPECTED as caught:
            error = one_line(caught)
        errors = self.gather(error)
        if any(errors):
            raise Told(_summary(errors))
        return done[0]

    def hosts_first(self, work: Callable[[], T]) -> T:
        """As agree, one rank of every host before its others: they find what that one has fetched."""
        early = self.agree(lambda: [work()] if self.local == 0 else [])
        return self.agree(lambda: early or [work()])[0]

    def same(self, value: Callable[[], object]) -> None:
        """Raises Told where what decides on the ranks' work is not the same on all."""
        values = self.gather(value()) if self.world > 1 else []
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise Told(
                f"{_names(others)} would do other work than rank 0: command, data and the files of the "
                "run or the model must be the same for all"
            )

    def settle(self) -> None:
        """Waits for the others: torchrun ends them all when one has ended with an error."""
        with contextlib.suppress(RuntimeError):  # whoever is gone is not waited for
            self.gather(None)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Only rank 0 is heard meanwhile; a traceback comes later, and is."""
        with contextlib.ExitStack() as stack:
            if self.rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def parse(self, parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
        """A command line; SystemExit where it is refused, which rank 0 tells."""
        try:
            return parser.parse_args(argv)
        except SystemExit:
            self.settle()
            raise

    def refuse(self, error: Exception) -> int:
        """Says in one line, once, why a command ends, and returns its exit code.

        Raises:
            Exception: the error, where it is none of the EXPECTED ones, or one of another rank that nobody was told.
        """
        if self.lost(error):
            print("error: another of the processes has ended, and this one with it", file=sys.stderr)
            return 1
        if not isinstance(error, EXPECTED) or (self.rank and not isinstance(error, Told)):
            raise error
        print(f"error: {one_line(error)}", file=sys.stderr)
        if isinstance(error, Told):
            self.settle()
        return 2

    def lost(self, error: Exception) -> bool:
        """Whether an error means that another rank is gone. gloo's has no type of its own."""
        gone = isinstance(error, distributed.DistError) or "by peer" in str(error)
        return self.world > 1 and isinstance(error, RuntimeError) and gone


ONE = Ranks()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _names(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _summary(errors: Sequence[str]) -> str:
    """One line of every rank's error, "" where it has none: what all say is said once, and else by whom."""
    if len(set(errors)) == 1:
        return errors[0]
    ranks_of = defaultdict[str, list[int]](list)
    for rank, error in enumerate(errors):
        if error:
            ranks_of[error].append(rank)
    return "; ".join(f"{_names(ranks)} of {len(errors)}: {error}" for error, ranks in ranks_of.items())


def _join(ranks: Ranks) -> None:
    """Raises SystemExit where the others cannot be reached."""
    backend = "gloo"
    if torch.cuda.is_available() and ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)  # what "cuda" means from here on
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        others = f"WORLD_SIZE={ranks.world}, but the other processes cannot be reached"
        raise SystemExit(f"error: {others} ({one_line(error)}): start them with torchrun") from error


def _end(code: int) -> NoReturn:
    """Ends this process at once. On Python's own way out a thread of gloo, which DistributedDataParallel leaves behind
    (torch 2.15), now and then aborts it, and torchrun takes that for a failure.
    """
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def joined(main: Callable[Concatenate[Ranks, P], int]) -> Callable[P, int]:
    """The main() of a command that all processes carry out together, rank 0 of which alone is heard.

    It is given their Ranks, ONE of a process alone; with others it ends the process, with its exit code.
    """

    @functools.wraps(main)
    def together(*args: P.args, **kwargs: P.kwargs) -> int:
        ranks = Ranks.of(os.environ)
        if ranks.world == 1:
            return main(ranks, *args, **kwargs)
        _join(ranks)
        try:
            with ranks.quiet():
                code = main(ranks, *args, **kwargs)
        except SystemExit as error:  # argparse's
            code = int(error.code or 0)
        _end(code)

    return together


def one_process(main: Callable[P, int]) -> Callable[P, int]:
    """The main() of a command that several processes would only do several times, into the same files."""

    @functools.wraps(main)
    def alone(*args: P.args, **kwargs: P.kwargs) -> int:
        ranks = Ranks.of(os.environ)
        if ranks.world == 1:
            return main(*args, **kwargs)
        if ranks.rank == 0:  # the others end well, or torchrun might end this one before it has spoken
            print(f"error: this works in one process, not in {ranks.world}: start it with python", file=sys.stderr)
        return 2 if ranks.rank == 0 else 0

    return alone
