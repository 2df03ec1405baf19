"""The shortened-baseline control: how long plain training needs for the accuracy a method reached.

A method that only equals "train less" must come out as 1.0x. So its time is compared with the baseline's own
time/accuracy curve, measured at several budgets (each with its learning rate fully decayed), read at the
method's accuracy. The curve is never extended beyond what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import SettingsError
from hasten.keyed import key64
from hasten.measure.verdict import Verdict, ratio_text, verdict_of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CurvePoint:
    """The baseline at one budget: seconds and accuracy of each seed, in the same order.

    ``budget`` is the share of the full schedule (e.g. 0.65).
    """

    budget: float
    seconds: tuple[float, ...]
    accuracies: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds or len(self.seconds) != len(self.accuracies):
            raise SettingsError(
                f"budget {self.budget}: need one time and one accuracy per seed, "
                f"got {len(self.seconds)} and {len(self.accuracies)}."
            )
        if not all(map(math.isfinite, (*self.seconds, *self.accuracies))) or min(self.seconds) <= 0:
            raise SettingsError(f"budget {self.budget}: times must be above 0 s and all values finite.")


@dataclass(frozen=True)
class CurveTime:
    """Baseline seconds at an accuracy, with a bootstrap interval; None and a ``reason`` where not known."""

    accuracy: float
    seconds: float | None
    low: float | None
    high: float | None
    reason: str


@dataclass(frozen=True)
class CurveSpeedup:
    """Baseline's time at the method's accuracy over the method's; None and a ``reason`` outside the curve."""

    ratio: float | None
    low: float | None
    high: float | None
    accuracy: float
    method_seconds: float
    baseline_seconds: float | None
    reason: str

    @property
    def verdict(self) -> Verdict:
        """The claim the interval allows; without an interval nothing is shown."""
        return "not shown" if self.low is None or self.high is None else verdict_of(self.low, self.high)

    def text(self) -> str:
        """Return e.g. ``1.12x [1.05, 1.20]: faster``, or the reason why there is no figure."""
        if self.ratio is None:
            return f"no figure: {self.reason}"
        if self.low is None or self.high is None:
            return f"{self.ratio:.2f}x [no interval: {self.reason}]: not shown"
        return ratio_text(self.ratio, self.low, self.high)


def isotonic(values: ArrayLike, weights: ArrayLike) -> Floats:
    """Return the non-decreasing sequence nearest in weighted squares (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value, weight in zip(np.asarray(values, float), np.asarray(weights, float), strict=True):
        pools.append([float(value), float(weight), 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            value_, weight_, count = pools.pop()
            total = pools[-1][1] + weight_
            pools[-1] = [
                (pools[-1][0] * pools[-1][1] + value_ * weight_) / total,
                total,
                pools[-1][2] + count,
            ]
    return np.concatenate([np.full(int(count), value) for value, _, count in pools])


def time_at_accuracy(
    points: Sequence[CurvePoint],
    accuracy: float,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> CurveTime:
    """Return the seconds plain training needs for ``accuracy``, read off the measured curve.

    Mean accuracies are made non-decreasing in time (isotonic) and the time is interpolated by a monotone
    cubic (PCHIP). On a plateau the earliest time counts, in the baseline's favour. The interval resamples
    seeds inside each budget and takes percentiles widened for few seeds (expanded percentile bootstrap,
    Hesterberg 2015, with the smallest number of seeds: our choice). With 4 seeds or fewer it is in effect the
    whole range of the resamples. Resamples whose curve does not span the accuracy push the end they fell out
    of to 0 or infinity.

    Raises:
        SettingsError: fewer than two budgets are given.
    """
    _check(points)
    value, reason = _read([(np.array(p.seconds), np.array(p.accuracies)) for p in points], accuracy)
    if not math.isfinite(value) or value == 0.0:
        return CurveTime(accuracy, None, None, None, reason)
    thin = _one_seed(points)
    if thin:
        return CurveTime(accuracy, value, None, None, thin)
    rng = np.random.Generator(np.random.Philox(key64(seed, "curve", resamples)))
    draws = [_read(_resample(points, rng), accuracy)[0] for _ in range(resamples)]
    low, high = _ends(draws, confidence, min(len(point.seconds) for point in points))
    return CurveTime(accuracy, value, low, high, "")


def speedup_against_curve(
    points: Sequence[CurvePoint],
    seconds: ArrayLike,
    accuracies: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> CurveSpeedup:
    """Return the method's speedup over the baseline *of equal accuracy*.

    ``seconds`` and ``accuracies`` hold the method's runs, shape (seeds,), same units as in ``points``. The
    bootstrap resamples the method's seeds and each budget's seeds.

    Raises:
        SettingsError: fewer than two budgets, or the method's lists are empty or differ in length.
    """
    _check(points)
    method = CurvePoint(1.0, tuple(map(float, np.ravel(seconds))), tuple(map(float, np.ravel(accuracies))))
    took, accuracy = float(np.mean(method.seconds)), float(np.mean(method.accuracies))
    value, reason = _read([(np.array(p.seconds), np.array(p.accuracies)) for p in points], accuracy)
    if not math.isfinite(value) or value == 0.0:
        return CurveSpeedup(None, None, None, accuracy, took, None, reason)
    thin = _one_seed([*points, method])
    if thin:
        return CurveSpeedup(value / took, None, None, accuracy, took, value, thin)
    rng = np.random.Generator(np.random.Philox(key64(seed, "curve speedup", resamples)))
    draws = []
    for _ in range(resamples):
        (mine,) = _resample([method], rng)
        base = _read(_resample(points, rng), float(mine[1].mean()))[0]
        draws.append(base / float(mine[0].mean()))
    low, high = _ends(draws, confidence, min(len(point.seconds) for point in (*points, method)))
    return CurveSpeedup(value / took, low, high, accuracy, took, value, "")


def _check(points: Sequence[CurvePoint]) -> None:
    if len(points) < 2:
        raise SettingsError(f"a time/accuracy curve needs at least 2 budgets, got {len(points)}.")


def _one_seed(points: Sequence[CurvePoint]) -> str:
    thin = [point for point in points if len(point.seconds) < 2]
    return "one seed only at " + ", ".join(f"budget {point.budget:g}" for point in thin) if thin else ""


def _resample(points: Sequence[CurvePoint], rng: np.random.Generator) -> list[tuple[Floats, Floats]]:
    drawn = []
    for point in points:
        pick = rng.integers(0, len(point.seconds), size=len(point.seconds))
        drawn.append((np.array(point.seconds)[pick], np.array(point.accuracies)[pick]))
    return drawn


def _read(points: Sequence[tuple[Floats, Floats]], accuracy: float) -> tuple[float, str]:
    """Return seconds at ``accuracy``; 0 if the shortest run is better, infinity if the longest is worse."""
    from scipy.interpolate import PchipInterpolator

    rows = sorted((float(s.mean()), float(a.mean()), len(s)) for s, a in points)
    times = np.array([row[0] for row in rows])
    levels = isotonic([row[1] for row in rows], [row[2] for row in rows])
    if accuracy < levels[0]:
        return (
            0.0,
            f"accuracy {accuracy:g} is below the shortest baseline's {levels[0]:g}: run a shorter baseline",
        )
    if accuracy > levels[-1]:
        return (
            math.inf,
            f"accuracy {accuracy:g} is above the longest baseline's {levels[-1]:g}: run a longer baseline",
        )
    rising = np.concatenate([[True], np.diff(levels) > 1e-12 * max(1.0, float(np.abs(levels).max()))])
    levels, times = levels[rising], times[rising]
    if len(levels) == 1 or accuracy >= levels[-1]:
        return float(times[-1]), ""
    return float(PchipInterpolator(levels, times)(accuracy)), ""


def _ends(draws: Sequence[float], confidence: float, seeds: int) -> tuple[float, float]:
    """Return the expanded percentiles of values that may include 0 and infinity, so without interpolating."""
    from scipy.special import ndtr, stdtrit

    wide = math.sqrt(seeds / (seeds - 1)) * float(stdtrit(seeds - 1, (1 + confidence) / 2))
    tail = float(ndtr(-wide))
    ordered, last = sorted(draws), len(draws) - 1
    return ordered[math.floor(tail * last)], ordered[math.ceil((1 - tail) * last)]
