"""Who has the device: engines that share it take turns."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock that is given to whoever has waited longest.

    `threading.Lock` promises no order: an engine that releases it and asks again at once may have it again at once,
    and another one's requests wait as long as it has any (docs/log.md has figures).
    """

    def __init__(self) -> None:
        self._lock, self._held = threading.Lock(), False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()  # it stays held: nobody else can come between
            else:
                self._held = False
