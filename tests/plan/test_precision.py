"""Formulas of narrow formats and precision schedules."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hasten.errors import SettingsError
from hasten.plan import (
    amdahl,
    break_even_epochs,
    bytes_per_element,
    rate_of_bits,
    schedule_seconds,
    schedule_speedup,
    solver_seconds,
)


def test_rates_of_bits() -> None:
    assert rate_of_bits(3e11, 32) == rate_of_bits(3e11, 32, 2) == 3e11
    assert [rate_of_bits(1.0, b) for b in (16, 8, 4)] == [2, 4, 8], "lanes: as many more as narrower"
    assert [rate_of_bits(1.0, b, 2) for b in (16, 8, 4)] == [4, 16, 64], (
        "multipliers: by the product of widths"
    )
    assert rate_of_bits(1.0, 12, 0) == 1
    assert [bytes_per_element(b) for b in (32, 16, 12, 1)] == [4, 2, 1.5, 0.125]


def test_a_schedule_is_the_sum_of_its_phases() -> None:
    assert schedule_seconds([(70, 3.0), (30, 5.0)]) == 360
    assert schedule_seconds([]) == 0
    for low, ratio in ((0.0, 0.5), (0.7, 0.6), (1.0, 0.25), (0.4, 1.3)):
        whole = schedule_seconds([(100, 5.0)])
        mixed = schedule_seconds([(100 * low, 5.0 * ratio), (100 * (1 - low), 5.0)])
        assert abs(schedule_speedup(low, ratio) - whole / mixed) < 1e-12


def test_at_break_even_both_schedules_take_the_same_time() -> None:
    for low, slow, fast in ((70, 5.0, 3.0), (10, 2.0, 1.9), (10, 2.0, 2.5)):
        extra = break_even_epochs(low, fast, slow)
        without = schedule_seconds([(low + 30, slow)])
        # a negative number of extra epochs is what a slower format must save
        assert abs(low * fast + (30 + extra) * slow - without) < 1e-9
        assert (extra > 0) == (fast < slow)


def test_the_ceiling_of_a_step() -> None:
    assert abs(amdahl(0.75, 1.7) - 1.4468) < 1e-4
    assert amdahl(0.0, 9.0) == 1.0
    assert abs(amdahl(1.0, 9.0) - 9.0) < 1e-9


def test_a_solver_gains_the_ratio_of_rates_as_it_grows() -> None:
    gains = [solver_seconds(n, 3, None, 1e9) / solver_seconds(n, 3, 2e9, 1e9) for n in (10, 100, 10_000)]
    assert gains[0] < 1 < gains[1] < gains[2] < 2
    assert gains[2] > 1.99


@pytest.mark.parametrize(
    "call",
    [lambda: rate_of_bits(0.0, 8), lambda: rate_of_bits(1.0, 0), lambda: rate_of_bits(1.0, 8, -1.0),
     lambda: bytes_per_element(0), lambda: schedule_seconds([(-1, 2.0)]), lambda: schedule_speedup(1.1, 0.5),
     lambda: schedule_speedup(0.5, 0.0), lambda: break_even_epochs(1, 0.0, 1.0), lambda: amdahl(-0.1, 2.0),
     lambda: amdahl(0.5, float("inf")), lambda: solver_seconds(0, 1, None, 1.0)],
)  # fmt: skip
def test_numbers_without_meaning_are_refused(call: Callable[[], float]) -> None:
    with pytest.raises(SettingsError):
        call()
