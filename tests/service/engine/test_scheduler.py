"""The policy alone: integers in, integers out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.scheduler import PATIENCE, Scheduler


def step(scheduler: Scheduler, rows: int) -> list[tuple[str, int]]:
    """One step and what it held. Ended requests leave."""
    batch = scheduler.next(rows)
    for image in batch:
        scheduler.advance(image)
    for request_id in {image[0] for image in batch}:
        if scheduler.left(request_id)[1] == 0:
            scheduler.remove(request_id)
    return batch


def run(scheduler: Scheduler, rows: int, ticks: int = 10_000) -> list[list[tuple[str, int]]]:
    """Steps until nothing is left."""
    history = []
    for _ in range(ticks):
        if not (batch := step(scheduler, rows)):
            return history
        history.append(batch)
    raise AssertionError("requests are left")


def ended(history: list[list[tuple[str, int]]], request_id: str) -> int:
    """The step that was a request's last, counted from 1."""
    return max(i for i, batch in enumerate(history, 1) if any(image[0] == request_id for image in batch))


def test_requests_of_any_length_share_every_step() -> None:
    """20 steps of one row and 11 of two, together: 20 batches, not 31."""
    scheduler = Scheduler()
    scheduler.add("ddpm", "", [(1, 20)])
    scheduler.add("guided", "", [(2, 11)])
    history = run(scheduler, rows=8)
    assert len(history) == 20
    assert [len(batch) for batch in history] == [2] * 11 + [1] * 9


def test_a_batch_holds_as_many_rows_as_fit_and_a_guided_image_costs_two() -> None:
    scheduler = Scheduler()
    scheduler.add("guided", "", [(2, 1)] * 3)
    scheduler.add("plain", "", [(1, 50)] * 2)
    assert [len(b) for b in [scheduler.next(5)]] == [3]  # two guided ones and one plain one
    scheduler = Scheduler()
    scheduler.add("guided", "", [(2, 1)])
    assert scheduler.next(1) == [("guided", 0)]  # one image at least, however few rows there are


def test_a_small_request_overtakes_a_large_one_that_came_before() -> None:
    scheduler = Scheduler()
    scheduler.add("large", "", [(1, 10)] * 64)
    for _ in range(3):
        step(scheduler, 8)
    scheduler.add("small", "", [(1, 10)])
    history = run(scheduler, rows=8)
    assert ended(history, "small") == 10  # as if it were alone
    assert (64 * 10 - 24 + 10) // 8 <= len(history) <= (64 * 10 - 24 + 10) // 8 + 10


def test_a_large_request_goes_on_under_any_stream_of_small_ones() -> None:
    """Small ones alone could fill every batch, for ever."""
    scheduler = Scheduler()
    scheduler.add("large", "", [(1, 10)] * 64)
    ticks, rows, small = 0, 4, 0
    while "large" in list(scheduler.line()):
        while scheduler.slots < 64 + 8:
            scheduler.add(f"small {small}", "", [(1, 10)])
            small += 1
        step(scheduler, rows)
        ticks += 1
        assert ticks * rows <= 640 * PATIENCE + 100
    assert ticks * rows >= 640 * PATIENCE // 2  # and the small ones had the most


def test_flows_share_rows_evenly_whatever_they_ask_for() -> None:
    """One key's 64 requests do not hold back another key's one, nor does what a flow did not use count later."""
    scheduler = Scheduler()
    for i in range(64):
        scheduler.add(f"a{i}", "a", [(1, 10)])
    for _ in range(5):
        step(scheduler, 4)
    scheduler.add("b", "b", [(1, 20)] * 8)
    rows = {"a": 0, "b": 0}
    for _ in range(20):
        for request_id, _ in step(scheduler, 4):
            rows[request_id[0]] += 1
    assert abs(rows["a"] - rows["b"]) <= 20 * 4 // PATIENCE + 2


def test_the_shorter_rest_goes_first_and_equals_in_their_order() -> None:
    scheduler = Scheduler()
    for request_id, steps in (("long", 9), ("first", 5), ("second", 5)):
        scheduler.add(request_id, "", [(1, steps)])
    assert scheduler.line() == {"first": (0, 5), "second": (1, 10), "long": (2, 19)}
    assert scheduler.next(2) == [("first", 0), ("second", 0)]


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_a_guided_request_that_is_the_oldest_does_not_starve_either(rows: int) -> None:
    """Its two rows may not fit into what its turn leaves of a step: then it begins the next one."""
    scheduler = Scheduler()
    scheduler.add("guided", "", [(2, 50)])
    for ticks in range(1, 2000):
        while scheduler.slots < 100:
            scheduler.add(f"{ticks}-{scheduler.slots}", "", [(1, 3)])
        step(scheduler, rows)
        if "guided" not in scheduler.line():
            break
    assert ticks * max(rows, 2) <= 50 * 2 * PATIENCE + 2 * rows * PATIENCE


def test_the_last_steps_of_a_large_request_are_full_too() -> None:
    """One image more than a step holds costs an eighth more, not twice as much."""
    scheduler = Scheduler()
    scheduler.add("a", "", [(1, 10)] * 9)
    assert len(run(scheduler, rows=8)) == 12
    scheduler.add("b", "", [(1, 10)] * 64)
    assert len(run(scheduler, rows=8)) == 80


def test_a_large_request_begins_no_more_images_than_two_steps_hold() -> None:
    scheduler = Scheduler()
    scheduler.add("a", "", [(1, 10)] * 64)
    for _ in range(9):
        step(scheduler, 8)
        assert scheduler.running <= 16


def test_slots_are_counted_until_their_last_step_or_until_their_request_leaves() -> None:
    scheduler = Scheduler()
    scheduler.add("a", "", [(1, 2), (1, 1)])
    scheduler.add("b", "", [(1, 1)] * 3)
    assert (scheduler.slots, scheduler.running) == (5, 0)
    assert [scheduler.advance(("a", i)) for i in (0, 1)] == [False, True]
    assert (scheduler.slots, scheduler.running) == (4, 1)
    scheduler.remove("a")
    assert (scheduler.slots, scheduler.running) == (3, 0)
    scheduler.remove("b")
    assert (scheduler.slots, scheduler.running, scheduler.next(8)) == (0, 0, [])


def test_predictions_count_what_goes_before() -> None:
    scheduler = Scheduler()
    scheduler.add("large", "", [(1, 10)] * 64)
    work, longest, rows = scheduler.left_of_new("", [(2, 10)])
    assert (longest, rows) == (10, 66)
    assert 20 <= work <= 20 * PATIENCE // (PATIENCE - 1) + 1  # it goes before the large one, nearly
    work, _, _ = scheduler.left_of_new("", [(1, 10)] * 100)
    assert work == 640 + 1000  # and this after it
    work, _, _ = scheduler.left_of_new("another key", [(1, 10)] * 100)
    assert work == 640 + 1000
    work, _, _ = scheduler.left_of_new("another key", [(1, 10)])
    assert 20 <= work <= 24  # half of the machine is its own
    assert scheduler.ahead_of_new("", [(2, 10)]) == scheduler.ahead_of_new("another key", [(1, 10)] * 100) == 0
    assert scheduler.ahead_of_new("", [(1, 10)] * 100) == 640


def test_the_wait_for_room_counts_the_work_before_it() -> None:
    scheduler = Scheduler()
    scheduler.add("small", "", [(1, 10)])
    scheduler.add("large", "", [(1, 10)] * 64)
    assert scheduler.work_until_free(1) == 10
    assert scheduler.work_until_free(1 + 32) == 10 + 320
    assert scheduler.work_until_free(65) == 650


def test_what_is_predicted_for_a_new_request_is_what_is_left_of_it_once_it_is_in() -> None:
    scheduler = Scheduler()
    scheduler.add("a", "", [(1, 7)] * 3)
    scheduler.add("b", "k", [(2, 5)])
    images = [(1, 9), (2, 4)]
    predicted = scheduler.left_of_new("", images)
    scheduler.add("c", "", images)
    assert scheduler.left("c") == predicted


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),  # the step at which it arrives
            st.sampled_from(["", "k", "l"]),
            st.lists(st.tuples(st.integers(1, 2), st.integers(1, 12)), min_size=1, max_size=9),
            st.one_of(st.none(), st.integers(0, 20)),  # how many steps later it is cancelled
        ),
        max_size=12,
    ),
    st.integers(1, 9),
)
def test_every_image_makes_its_steps_and_no_more(
    requests: list[tuple[int, str, list[tuple[int, int]], int | None]], rows: int
) -> None:
    scheduler, tick = Scheduler(), 0
    alive: dict[str, list[list[int]]] = {}
    done: set[str] = set()
    while tick < 31 or alive:
        for i, (arrival, flow, images, cancel) in enumerate(requests):
            name = str(i)
            if arrival == tick:
                scheduler.add(name, flow, images)
                alive[name] = [[cost, steps] for cost, steps in images]
            if name in alive and cancel is not None and tick == arrival + cancel:
                scheduler.remove(name)
                del alive[name]
        batch = scheduler.next(rows)
        assert len(set(batch)) == len(batch)
        cost = sum(alive[name][index][0] for name, index in batch)
        assert cost <= rows or len(batch) == 1
        rest = [
            c for name, images in alive.items() for k, (c, left) in enumerate(images) if left and (name, k) not in batch
        ]
        assert not rest or min(rest) > rows - cost  # no row is idle that could be used
        for name, index in batch:
            alive[name][index][1] -= 1
            assert alive[name][index][1] >= 0
            assert scheduler.advance((name, index)) == (alive[name][index][1] == 0)
        assert scheduler.slots == sum(left > 0 for images in alive.values() for _, left in images)
        for name in [name for name, images in alive.items() if not any(left for _, left in images)]:
            scheduler.remove(name)
            del alive[name]
            done.add(name)
        tick += 1
        assert tick < 5000
    assert done | {str(i) for i, (*_, cancel) in enumerate(requests) if cancel is not None} >= {
        str(i) for i in range(len(requests))
    }


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_no_row_is_wasted_while_there_is_work(rows: int) -> None:
    scheduler = Scheduler()
    scheduler.add("a", "", [(1, 5)] * 7)
    scheduler.add("b", "k", [(1, 3)] * 5)
    history = run(scheduler, rows)
    assert sum(len(batch) for batch in history) == 50
    assert all(len(batch) == rows for batch in history[: 50 // rows // 2])
