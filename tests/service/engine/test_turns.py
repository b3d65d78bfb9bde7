"""Who has the device when several want it."""

from __future__ import annotations

import itertools
import threading
import time

from app.engine.turns import Turns


def test_whoever_asks_again_waits_behind_those_that_wait() -> None:
    """Two that ask again at once alternate, strictly."""
    turns, had, barrier = Turns(), [], threading.Barrier(2)

    def worker(name: str) -> None:
        barrier.wait()
        for _ in range(500):
            with turns:
                had.append(name)
                while not (len(had) > 900 or turns._waiting):
                    pass  # until the other one has asked too

    threads = [threading.Thread(target=worker, args=(name,), daemon=True) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(had) == 1000
    assert all(before != after for before, after in itertools.pairwise(had[:900]))


def test_one_at_a_time_and_an_error_gives_the_turn_back() -> None:
    turns, inside, most = Turns(), [0], [0]

    def worker() -> None:
        for _ in range(200):
            try:
                with turns:
                    inside[0] += 1
                    time.sleep(0)  # others may run now
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
                    raise KeyError
            except KeyError:
                pass

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert most == [1]
