"""The shortened-baseline control: monotone inside the measured range, and silent outside it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from hasten.errors import SettingsError
from hasten.measure.curve import CurvePoint, isotonic, speedup_against_curve, time_at_accuracy

BUDGETS = (0.5, 0.65, 0.8, 1.0)


def accuracy_after(seconds: float) -> float:
    """A saturating learning curve, in points."""
    return 95.0 - 20.0 * math.exp(-seconds / 30.0)


def seconds_for(accuracy: float) -> float:
    return -30.0 * math.log((95.0 - accuracy) / 20.0)


def baseline(seeds: int = 5, noise: float = 0.05, seed: int = 0, full: float = 100.0) -> list[CurvePoint]:
    rng = np.random.default_rng(seed)
    points = []
    for budget in BUDGETS:
        seconds = full * budget * rng.lognormal(0, 0.01 if noise else 0.0, seeds)
        accuracies = accuracy_after(full * budget) + rng.normal(0, noise, seeds) if noise else None
        clean = np.full(seeds, accuracy_after(full * budget))
        points.append(CurvePoint(budget, tuple(seconds), tuple(clean if accuracies is None else accuracies)))
    return points


def test_it_passes_through_the_points_and_stays_monotone_between() -> None:
    points = baseline(noise=0.0)
    for point in points:
        assert time_at_accuracy(points, point.accuracies[0], resamples=5).seconds == pytest.approx(
            point.seconds[0], rel=1e-6
        )
    levels = np.linspace(points[0].accuracies[0], points[-1].accuracies[0], 200)
    times = [time_at_accuracy(points, float(level), resamples=2).seconds for level in levels]
    assert all(later >= earlier for earlier, later in pairwise(times))
    assert times[100] == pytest.approx(seconds_for(float(levels[100])), rel=0.03)


def test_it_refuses_to_go_beyond_what_was_measured() -> None:
    points = baseline(noise=0.0)
    below = time_at_accuracy(points, points[0].accuracies[0] - 0.01)
    above = time_at_accuracy(points, points[-1].accuracies[0] + 0.01)
    assert below.seconds is None
    assert "below the shortest" in below.reason
    assert above.seconds is None
    assert "above the longest" in above.reason
    speed = speedup_against_curve(points, [10.0, 10.0], [99.0, 99.0])
    assert speed.ratio is None
    assert speed.verdict == "not shown"
    assert speed.text().startswith("no figure: accuracy 99")


def test_noise_that_bends_the_curve_back_is_pooled_and_the_earliest_time_counts() -> None:
    points = [
        CurvePoint(0.5, (50.0, 50.0), (92.0, 92.0)),
        CurvePoint(0.8, (80.0, 80.0), (94.2, 94.2)),
        CurvePoint(1.0, (100.0, 100.0), (94.0, 94.0)),
    ]
    assert time_at_accuracy(points, 94.1).seconds == pytest.approx(80.0)
    shuffled = [points[2], points[0], points[1]]
    assert time_at_accuracy(shuffled, 93.0).seconds == time_at_accuracy(points, 93.0).seconds


def test_isotonic_is_the_least_squares_fit() -> None:
    rng = np.random.default_rng(1)
    assert isotonic([1, 3, 2, 2, 5], [1, 1, 1, 1, 1]) == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 5])
    for _ in range(50):
        y, w = rng.normal(0, 1, 6), rng.uniform(0.5, 2, 6)
        fit = isotonic(y, w)
        assert (np.diff(fit) >= 0).all()
        cost = (w * (y - fit) ** 2).sum()
        for _ in range(50):
            other = np.sort(fit + rng.normal(0, 0.3, 6))
            assert (w * (y - other) ** 2).sum() >= cost - 1e-12


def test_training_less_is_one_fold() -> None:
    """A "method" that is only a shorter schedule must come out as 1.0x, and be claimed in at most 1 of 20."""
    rng = np.random.default_rng(2)
    ratios, claims = [], 0
    for seed in range(60):
        seconds = 70.0 * rng.lognormal(0, 0.01, 5)
        accuracies = accuracy_after(70.0) + rng.normal(0, 0.05, 5)
        result = speedup_against_curve(baseline(seed=seed), seconds, accuracies, resamples=150)
        assert result.ratio is not None
        ratios.append(result.ratio)
        claims += result.verdict == "faster"
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.02)
    assert claims / 60 <= 0.05


def test_a_real_gain_is_shown() -> None:
    accuracies = accuracy_after(80.0) + np.array([0.02, -0.02, 0.0, 0.01, -0.01])
    result = speedup_against_curve(baseline(), [40.0, 40.2, 39.8, 40.1, 39.9], accuracies)
    assert result.verdict == "faster"
    assert result.ratio == pytest.approx(2.0, rel=0.1)
    assert result.baseline_seconds == pytest.approx(80.0, rel=0.1)


def test_an_end_that_falls_off_the_curve_widens_the_interval() -> None:
    points = baseline(noise=0.3)
    edge = float(np.mean(points[-1].accuracies)) - 0.01
    result = time_at_accuracy(points, edge)
    assert result.seconds is not None
    assert result.high == math.inf


def test_one_seed_gives_a_figure_without_an_interval() -> None:
    points = [CurvePoint(b, (100 * b,), (accuracy_after(100 * b),)) for b in BUDGETS]
    result = speedup_against_curve(points, [40.0], [accuracy_after(70.0)])
    assert result.ratio == pytest.approx(70 / 40, rel=0.02)
    assert result.low is None
    assert result.verdict == "not shown"
    assert "one seed only" in result.text()


def test_bad_points_are_refused() -> None:
    with pytest.raises(SettingsError, match="2 budgets"):
        time_at_accuracy(baseline()[:1], 94.0)
    with pytest.raises(SettingsError, match="one time and one accuracy"):
        CurvePoint(1.0, (1.0, 2.0), (94.0,))
