"""Time-accuracy curves: monotone, never extended, 1.0 for a mere shortening, and intervals that hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import SettingsError
from hasten.measure.curve import TimeCurve, isotonic, pooled_spread, slopes, sooner, time_to

BUDGETS = np.array([2.0, 3.0, 4.5, 7.0, 10.0])
EXACT = (0.0, 0.0)


def law(budget: np.ndarray) -> np.ndarray:
    return 0.95 - 0.25 * np.exp(-budget / 4.0)


def curve(
    seeds: int = 4, faster: float = 1.0, shorter: float = 1.0, noise: float = 0.0, seed: int = 0
) -> TimeCurve:
    """An arm whose epochs take 3 s / faster, at ``shorter`` times the budgets."""
    rng = np.random.default_rng(seed)
    budgets = BUDGETS * shorter
    shape = (len(budgets), seeds)
    accuracies = law(budgets)[:, None] + noise * rng.standard_normal(shape)
    return TimeCurve(
        budgets, 3.0 / faster * budgets[:, None] * np.exp(noise * rng.standard_normal(shape)), accuracies
    )


def test_the_curve_goes_through_its_points_and_is_monotone_and_close_to_the_law_between() -> None:
    c = curve()
    assert np.allclose(c.accuracy(c.place), law(BUDGETS))
    assert (np.diff(c.heights) >= 0).all()
    assert np.abs(c.heights - law(np.exp(c.grid))).max() < 0.004
    for target in np.linspace(c.heights[0], c.heights[-1], 40):
        found = time_to(c, float(target), EXACT)
        truth = -4.0 * math.log((0.95 - target) / 0.25) * 3.0
        assert found.value == pytest.approx(truth, rel=0.03)


def test_it_is_never_extended() -> None:
    c = curve()
    assert time_to(c, float(c.heights[-1]) + 1e-6, EXACT).value is None
    assert c.find(float(c.heights[-1]) + 1e-6) == math.inf
    assert time_to(c, float(c.heights[0]) - 1e-6, EXACT).value is None
    assert c.find(float(c.heights[0]) - 1e-6) == -math.inf


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 1.0), st.floats(0.5, 3.0), st.floats(0.25, 0.95))
def test_a_speed_is_found_and_a_shortening_is_one(shorter: float, faster: float, where: float) -> None:
    base, arm = curve(), curve(faster=faster, shorter=shorter)
    low, high = max(base.heights[0], arm.heights[0]), min(base.heights[-1], arm.heights[-1])
    target = float(low + where * (high - low))
    found = sooner(base, arm, target, EXACT)
    assert found.value == pytest.approx(faster, rel=0.06)


def test_an_arm_that_never_gets_there_bounds_the_ratio_from_one_side_only() -> None:
    good, poor = curve(noise=0.001), curve(noise=0.001, seed=1)
    poor = TimeCurve(poor.budgets, poor.seconds, poor.accuracies - 0.05)
    pooled = pooled_spread([good, poor])
    target = float(good.heights[-1]) - 0.01
    baseline_misses = sooner(poor, good, target, pooled)
    assert baseline_misses.value is None
    assert baseline_misses.high == math.inf
    assert 1.0 < baseline_misses.low < 2.0  # it needs more than its 30 s, the other one about 22
    arm_misses = sooner(good, poor, target, pooled)
    assert (arm_misses.value, arm_misses.low) == (None, 0.0)
    assert arm_misses.high < 1.0


def test_an_arm_above_the_target_at_its_smallest_budget_is_at_least_that_much_sooner() -> None:
    base, arm = curve(noise=0.001), curve(noise=0.001, seed=1)
    better = TimeCurve(arm.budgets, arm.seconds, arm.accuracies + 0.15)
    target = float(base.heights[-1]) - 0.02
    found = sooner(base, better, target, pooled_spread([base, better]))
    assert found.value is None
    assert found.high == math.inf
    assert found.low > 2.0


def test_one_seed_gives_a_value_and_no_interval() -> None:
    found = sooner(curve(seeds=1), curve(seeds=1, faster=2.0), 0.9, EXACT)
    assert found.value == pytest.approx(2.0)
    assert (found.low, found.high) == (0.0, math.inf)


def test_times_left_out_are_filled_from_the_same_block_and_not_from_others() -> None:
    c = curve(seeds=3)
    seconds = c.seconds.copy()
    seconds[:, 1] *= 2.0
    seconds[2, 1] = np.nan
    times = np.exp(TimeCurve(c.budgets, seconds, c.accuracies).log_seconds(c.place))
    assert times[2] == pytest.approx([13.5, 27.0, 13.5], rel=1e-6)
    seconds[:, 1] = np.nan
    assert np.isnan(TimeCurve(c.budgets, seconds, c.accuracies).log_seconds(c.place)[:, 1]).all()


def test_without_two_blocks_of_paired_times_there_is_no_interval() -> None:
    base, arm = curve(noise=0.001), curve(noise=0.001, faster=2.0, seed=1)
    seconds = arm.seconds.copy()
    seconds[:, 1:] = np.nan
    found = sooner(base, TimeCurve(arm.budgets, seconds, arm.accuracies), 0.92, pooled_spread([base, arm]))
    assert found.value == pytest.approx(2.0, rel=0.05)
    assert (found.low, found.high) == (0.0, math.inf)


def test_noise_common_to_a_block_cancels_in_the_ratio() -> None:
    base, arm = curve(noise=1e-4), curve(noise=1e-4, faster=1.2, seed=1)
    drift = np.exp(np.array([0.3, -0.2, 0.4, 0.0]))
    pooled = pooled_spread([base, arm])
    still = sooner(base, arm, 0.9, pooled)
    moved = sooner(TimeCurve(base.budgets, base.seconds * drift, base.accuracies),
                   TimeCurve(arm.budgets, arm.seconds * drift, arm.accuracies), 0.9, pooled)  # fmt: skip
    assert (moved.value, moved.low, moved.high) == pytest.approx((still.value, still.low, still.high))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=7), st.integers(0, 9))
def test_a_cubic_with_these_slopes_stays_monotone(values: list[float], seed: int) -> None:
    from scipy.interpolate import CubicHermiteSpline

    x = np.cumsum(np.random.default_rng(seed).uniform(0.1, 2.0, len(values)))
    y = isotonic(values, np.ones(len(values)))
    dense = CubicHermiteSpline(x, y, slopes(x, y))(np.linspace(x[0], x[-1], 400))
    assert (np.diff(dense) >= -1e-9).all()


def test_isotonic_pools_neighbours_by_weight() -> None:
    assert isotonic([1.0, 3.0, 2.0], [1, 1, 3]).tolist() == pytest.approx([1.0, 2.25, 2.25])


def test_bad_input_is_refused() -> None:
    c = curve()
    for budgets, seconds, accuracies in (
        (c.budgets[::-1], c.seconds, c.accuracies),
        (c.budgets, c.seconds[:2], c.accuracies),
        (c.budgets, -c.seconds, c.accuracies),
        (c.budgets, c.seconds, np.full_like(c.accuracies, np.nan)),
    ):
        with pytest.raises(SettingsError):
            TimeCurve(budgets, seconds, accuracies)


def test_an_interval_much_narrower_than_the_grid_is_not_lost_in_it() -> None:
    base, arm = curve(noise=1e-5), curve(noise=1e-5, faster=1.1, seed=1)
    found = sooner(base, arm, 0.9, pooled_spread([base, arm]))
    assert found.value is not None
    assert found.low < found.value < found.high
    assert found.high / found.low < 1.001
