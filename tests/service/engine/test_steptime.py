"""How long a step takes: between, beyond and after the measured points."""

from __future__ import annotations

import pytest

from app.engine.steptime import StepTime, sizes

POINTS = [(1, 0.003), (2, 0.004), (4, 0.007), (8, 0.012), (16, 0.0235), (32, 0.047)]


def test_it_goes_through_the_points_and_is_straight_between_and_beyond() -> None:
    model = StepTime(POINTS)
    for rows, seconds in POINTS:
        assert model.seconds(rows) == pytest.approx(seconds)
    assert model.seconds(6) == pytest.approx((0.007 + 0.012) / 2)
    assert model.seconds(64) == pytest.approx(0.094)
    assert StepTime([(4, 0.01)]).seconds(1) == 0.01  # padded to 4, or never measured


def test_the_batch_is_the_smallest_in_which_an_image_is_nearly_cheapest() -> None:
    assert StepTime(POINTS).enough_rows() == 8
    assert StepTime([(1, 0.1), (2, 0.2), (4, 0.4)]).enough_rows() == 1  # a machine that one image fills
    assert StepTime([(1, 0.1), (2, 0.1), (4, 0.1)]).enough_rows() == 4  # one that is never full


def test_a_slower_machine_is_noticed_and_a_faster_one_too() -> None:
    model = StepTime(POINTS)
    for _ in range(100):
        model.observe(4, 0.014)
    assert model.finish_s(10, 10, 1, 8) == pytest.approx(0.06, rel=0.02)
    assert model.finish_s(10, 10, 1, 8, lately=False) == pytest.approx(0.03)
    assert model.seconds(8) == pytest.approx(0.024, rel=0.02)
    for _ in range(200):
        model.observe(8, 0.006)
    assert model.seconds(4) == pytest.approx(0.0035, rel=0.02)


def test_one_frozen_step_says_little_about_the_next() -> None:
    model = StepTime(POINTS)
    model.observe(1, 60.0)
    assert model.seconds(1) < 1.2 * 0.003


def test_the_end_of_a_request_is_bound_by_work_or_by_its_longest_chain() -> None:
    model = StepTime(POINTS)
    assert model.finish_s(10, 10, 1, 8) == pytest.approx(0.03)  # one image alone: ten steps of one row
    assert model.finish_s(640, 10, 64, 8) == pytest.approx(80 * 0.012)
    assert model.finish_s(100, 100, 9, 8) == pytest.approx(100 * 0.012)  # one chain beside eight short ones


def test_sizes_double_up_to_the_most() -> None:
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(12) == [1, 2, 4, 8, 12]
    assert sizes(1) == [1]
