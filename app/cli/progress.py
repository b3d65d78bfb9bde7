"""How far a command is: one bar on stderr, in the style of the trainings', where somebody looks at it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """A bar, or none."""

    def __init__(self, shown: Any = None) -> None:
        self._bar = shown

    @property
    def shown(self) -> bool:
        return self._bar is not None

    def say(self, doing: str) -> None:
        """What is done now."""
        if self._bar is not None:
            self._bar.set_description_str(doing)

    def at(self, step: int, steps: int, queue_position: int, eta_s: float) -> None:
        """How far the images are."""
        if self._bar is not None:
            before = f"{queue_position} before it  " if queue_position else ""
            self._bar.set_description_str(f"step {step:,} of {steps:,}  {before}{eta_s:.1f} s left", False)
            self._bar.n = step / steps
            self._bar.refresh()


@contextmanager
def bar(quiet: bool, doing: str) -> Iterator[Bar]:
    """A bar until the end of the block; none where stderr is no terminal, or quiet."""
    if quiet or not sys.stderr.isatty():
        yield Bar()
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with (
        logging_redirect_tqdm(),  # above the bar, not through it
        tqdm(total=1.0, desc=doing, bar_format="{percentage:3.0f}% |{bar:20}| {desc}", leave=False) as shown,
    ):
        yield Bar(shown)
