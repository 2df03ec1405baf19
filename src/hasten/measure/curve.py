"""The time-accuracy curve of one way of training, and how much sooner another gets to the same accuracy.

Every arm is trained at several budgets, each a whole run with its schedule fully decayed. Mean accuracies, made
monotone, are interpolated between the budgets and never extended beyond them; the time to an accuracy is read off that
curve. A method that is nothing but shorter training lies on the baseline's own curve, so it comes out at 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import SettingsError

Floats = NDArray[np.float64]

GRID = 121
"""Budgets at which a curve is looked at for its interval, evenly spaced in their logarithm."""

FINE = 20
"""More of them on each side of the time to the target."""


@dataclass(frozen=True, eq=False)
class TimeCurve:
    """An arm at K budgets, n seeds each.

    budgets: epochs or anything proportional to them, (K,), rising. seconds: (K, n), NaN where a time is left out or the
    run failed. accuracies: (K, n), NaN where the run failed. Column i of every arm's arrays is the same block. Raises
    SettingsError for other shapes, a time that is not above 0, and a budget at which no run finished.
    """

    budgets: Floats
    seconds: Floats
    accuracies: Floats

    def __post_init__(self) -> None:
        for name in ("budgets", "seconds", "accuracies"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        shape = (*self.budgets.shape, self.seconds.shape[-1] if self.seconds.ndim else 0)
        if (
            self.budgets.ndim != 1
            or self.seconds.shape != shape
            or self.accuracies.shape != shape
            or 0 in shape
        ):
            raise SettingsError(
                f"a curve needs budgets (K,), seconds and accuracies (K, n); got {self.budgets.shape}, "
                f"{self.seconds.shape}, {self.accuracies.shape}."
            )
        if not (self.budgets > 0).all() or not (np.diff(self.budgets) > 0).all():
            raise SettingsError(f"budgets must be above 0 and rise, got {self.budgets.tolist()}.")
        if (self.seconds <= 0).any() or np.isinf(self.seconds).any() or np.isinf(self.accuracies).any():
            raise SettingsError("times must be above 0 s and all values finite.")
        if np.isnan(self.accuracies).all(1).any():
            raise SettingsError("at one budget no run finished, so it is no point of a curve.")

    @cached_property
    def place(self) -> Floats:
        """Logarithms of the budgets, (K,)."""
        return np.log(self.budgets)

    @cached_property
    def means(self) -> Floats:
        """Mean accuracy at each budget, (K,)."""
        return np.asarray(np.nanmean(self.accuracies, axis=1))

    @cached_property
    def levels(self) -> Floats:
        """Mean accuracies made non-decreasing in the budget, weighted by the number of runs, (K,)."""
        return np.asarray(isotonic(self.means, self.counts), np.float64)

    @cached_property
    def counts(self) -> Floats:
        """Finished runs at each budget, (K,)."""
        return np.asarray((~np.isnan(self.accuracies)).sum(1), np.float64)

    @cached_property
    def grid(self) -> Floats:
        """Log budgets from the smallest to the largest; one where there is only one budget."""
        if len(self.place) == 1:
            return self.place
        return np.unique(np.concatenate([np.linspace(self.place[0], self.place[-1], GRID), self.place]))

    @cached_property
    def heights(self) -> Floats:
        """The curve on the grid: a monotone cubic through the levels."""
        from scipy.interpolate import CubicHermiteSpline

        if len(self.place) == 1:
            return self.levels
        return np.asarray(
            CubicHermiteSpline(self.place, self.levels, slopes(self.place, self.levels))(self.grid)
        )

    def accuracy(self, place: ArrayLike) -> Floats:
        """Return the curve at log budgets, those outside brought to the nearest end."""
        return np.asarray(np.interp(np.asarray(place, np.float64), self.grid, self.heights))

    def log_seconds(self, place: ArrayLike) -> Floats:
        """Return each block's log time at log budgets (m,), (m, n): linear between the budgets that block timed.

        Beyond those it follows the nearest with time proportional to the budget. NaN for a block without any time.
        """
        at = np.atleast_1d(np.asarray(place, np.float64))
        out = np.full((len(at), self.seconds.shape[1]), np.nan)
        for block, column in enumerate(np.log(self.seconds).T):
            known = ~np.isnan(column)
            if known.any():
                x, y = self.place[known], column[known]
                out[:, block] = np.interp(at, x, y) + np.minimum(at - x[0], 0) + np.maximum(at - x[-1], 0)
        return out

    def mean_seconds(self, place: ArrayLike) -> Floats:
        """Return the geometric mean over blocks of the time at log budgets (m,), (m,)."""
        times = self.log_seconds(place)
        return np.asarray(np.exp(times[:, ~np.isnan(times[0])].mean(axis=1)))

    def find(self, accuracy: float) -> float:
        """Return the first log budget at which the curve reaches ``accuracy``; -inf below the smallest, inf if never."""
        if accuracy > self.heights[-1]:
            return math.inf
        if accuracy < self.heights[0]:
            return -math.inf
        right = int(np.argmax(self.heights >= accuracy))
        if right == 0:
            return float(self.grid[0])
        (x0, x1), (y0, y1) = self.grid[right - 1 : right + 1], self.heights[right - 1 : right + 1]
        return float(x0 + (x1 - x0) * (accuracy - y0) / (y1 - y0))

    def error(self, place: ArrayLike, pooled: tuple[float, float]) -> tuple[Floats, Floats]:
        """Return (standard error of the curve, its degrees of freedom) at log budgets (m,), each (m,).

        From the spread over seeds at the two budgets around. With few seeds that spread is itself a guess, so it is
        drawn towards ``pooled`` = (variance, weight in degrees of freedom), what all arms' budgets show.
        """
        own = self.counts - 1
        spread = np.where(own > 0, np.nanvar(self.accuracies, axis=1) * self.counts / np.maximum(own, 1), 0.0)
        variance, weight = pooled
        freedom = own + weight
        moderated = np.divide(
            own * spread + weight * variance, freedom, out=np.zeros_like(own), where=freedom > 0
        )
        at = np.atleast_1d(np.asarray(place, np.float64))
        if len(self.place) == 1:
            right = np.zeros(len(at), np.int64)
            share = np.ones(len(at))
        else:
            right = np.clip(np.searchsorted(self.place, at), 1, len(self.place) - 1)
            share = np.clip((at - self.place[right - 1]) / (self.place[right] - self.place[right - 1]), 0, 1)
        parts = np.stack(
            [
                (1 - share) ** 2 * (moderated / self.counts)[right - 1],
                share**2 * (moderated / self.counts)[right],
            ]
        )
        total = parts.sum(0)
        squares = parts**2 / np.maximum(np.stack([freedom[right - 1], freedom[right]]), 1e-9)
        return np.sqrt(total), np.divide(
            total**2, squares.sum(0), out=np.ones_like(total), where=squares.sum(0) > 0
        )


def slopes(x: Floats, y: Floats) -> Floats:
    """Return the derivative of rising values ``y`` at ``x``, (K,): three-point formulas, limited so that a cubic stays monotone.

    (Fritsch and Carlson 1980.) PCHIP's harmonic means would flatten the curve in front of a plateau, where it is read.
    """
    if len(x) < 3:
        return np.gradient(y, x)
    secant = np.diff(y) / np.diff(x)
    limit = 3 * np.minimum(np.concatenate([secant[:1], secant]), np.concatenate([secant, secant[-1:]]))
    return np.asarray(np.clip(np.gradient(y, x, edge_order=2), 0, limit))


def isotonic(values: ArrayLike, weights: ArrayLike) -> Floats:
    """Return the non-decreasing sequence nearest in weighted squares."""
    from scipy.optimize import isotonic_regression

    return np.asarray(isotonic_regression(np.asarray(values, float), weights=np.asarray(weights, float)).x)


@dataclass(frozen=True)
class Span:
    """A value with its interval. ``value`` is None where the mean curves do not tell it; ``low`` may be 0 and ``high`` infinite where the
    runs do not bound that side.
    """

    value: float | None
    low: float
    high: float


BORROWED = 4.0
"""Degrees of freedom that the spread of all arms lends to each budget's own (our choice; see `TimeCurve.error`)."""


def pooled_spread(curves: Sequence[TimeCurve]) -> tuple[float, float]:
    """Return the variance of accuracies over seeds, pooled over all budgets, and the weight it gets in each of them."""
    squares = sum(float(np.nansum(np.nanvar(c.accuracies, axis=1) * c.counts)) for c in curves)
    freedom = sum(float((c.counts - 1).sum()) for c in curves)
    return (squares / freedom, min(BORROWED, freedom)) if freedom > 0 else (0.0, 0.0)


def time_to(curve: TimeCurve, accuracy: float, pooled: tuple[float, float], confidence: float = 0.95) -> Span:
    """Return the seconds at which ``curve`` reaches ``accuracy``; no value where it ends below or begins above."""
    place = curve.find(accuracy)
    value = float(curve.mean_seconds(place)[0]) if math.isfinite(place) else None
    if _one_seed(curve):
        return Span(value, 0.0, math.inf)
    return _interval(
        value, [_Side(curve, accuracy, pooled, 1.0)], curve.log_seconds(_held(curve, place))[0], confidence
    )


def sooner(
    baseline: TimeCurve,
    arm: TimeCurve,
    accuracy: float,
    pooled: tuple[float, float],
    confidence: float = 0.95,
) -> Span:
    """Return how much sooner ``arm`` reaches ``accuracy``: the baseline's time over the arm's, above 1 is sooner.

    The interval holds every ratio that the runs do not contradict: for two times to be right, each curve's accuracy
    there must be the target up to its error over seeds, and their ratio may differ by the spread of the blocks' paired
    times; the squares of these deviations together stay below the squared t quantile. Where a curve may end below the
    accuracy, or begin above it, that end is open (0 or infinity). Without a value where a mean curve does not reach
    the accuracy or begins above it; the interval still tells what is known.
    """
    places = [baseline.find(accuracy), arm.find(accuracy)]
    at = [_held(curve, place) for curve, place in zip((baseline, arm), places, strict=True)]
    paired = baseline.log_seconds(at[0])[0] - arm.log_seconds(at[1])[0]
    if np.isnan(paired).all():
        return Span(None, 0.0, math.inf)
    value = float(np.exp(np.nanmean(paired))) if all(map(math.isfinite, places)) else None
    if _one_seed(baseline) or _one_seed(arm):
        return Span(value, 0.0, math.inf)
    sides = [_Side(baseline, accuracy, pooled, 1.0), _Side(arm, accuracy, pooled, -1.0)]
    return _interval(value, sides, paired, confidence)


def _held(curve: TimeCurve, place: float) -> float:
    return min(max(place, float(curve.place[0])), float(curve.place[-1]))


def _one_seed(curve: TimeCurve) -> bool:
    return float(curve.counts.min()) < 2


class _Side:
    """One curve's say in a log time: what each log budget costs, in squared standard errors of accuracy."""

    def __init__(self, curve: TimeCurve, accuracy: float, pooled: tuple[float, float], sign: float) -> None:
        at = _held(curve, curve.find(accuracy))
        x = curve.grid[(curve.grid >= at - 0.1) & (curve.grid <= at + 0.1)]
        y = curve.accuracy(x)
        slope = max(float(y[-1] - y[0]) / float(x[-1] - x[0]), 1e-9) if len(x) > 1 else 1e-9
        # no spread at all among the seeds: then only the mean curve itself decides
        own, freedom = (float(v[0]) for v in curve.error(at, pooled))
        self.variance, self.freedom = (max(own, 1e-12) / slope) ** 2, freedom
        # finer where the time is, so that an interval narrower than the grid is not lost in it
        reach = min(8 * math.sqrt(self.variance), 0.2)
        near = np.clip(at + reach * np.linspace(-1, 1, 2 * FINE + 1), curve.grid[0], curve.grid[-1])
        grid = np.unique(np.concatenate([curve.grid, near]))
        error = np.maximum(curve.error(grid, pooled)[0], 1e-12)
        off = (curve.accuracy(grid) - accuracy) / error
        times = curve.log_seconds(grid)
        time = times[:, ~np.isnan(times[0])].mean(axis=1)
        # beyond the last budget lie all longer times, before the first all shorter ones
        cost = np.concatenate([[max(0.0, -off[0])], off, [max(0.0, off[-1])]]) ** 2
        self.low = np.concatenate([[-math.inf], time, [time[-1]]]) * sign
        self.high = np.concatenate([[time[0]], time, [math.inf]]) * sign
        if sign < 0:
            self.low, self.high = self.high, self.low
        self.cost = cost


def _interval(value: float | None, sides: Sequence[_Side], paired: Floats, confidence: float) -> Span:
    from scipy.special import stdtrit

    known = paired[~np.isnan(paired)]
    clock = float(known.var(ddof=1)) / len(known) if len(known) > 1 else math.inf
    parts = [(side.variance, side.freedom) for side in sides]
    if math.isfinite(clock):
        parts.append((clock, len(known) - 1.0))
    total = sum(v for v, _ in parts)
    freedom = total**2 / sum(v**2 / f for v, f in parts) if total > 0 else 1e9
    limit = float(stdtrit(max(freedom, 1.0), (1 + confidence) / 2)) ** 2
    cost, low, high = np.zeros(1), np.zeros(1), np.zeros(1)
    for side in sides:
        near = side.cost <= limit  # what is too far off on its own need not be paired with anything
        cost = np.add.outer(cost, side.cost[near]).ravel()
        low, high = np.add.outer(low, side.low[near]).ravel(), np.add.outer(high, side.high[near]).ravel()
    allowed = cost <= limit
    if not allowed.any() or not math.isfinite(clock):
        return Span(value, 0.0, math.inf)
    room = np.sqrt(clock * (limit - cost[allowed]))
    ends = float(np.exp((low[allowed] - room).min())), float(np.exp((high[allowed] + room).max()))
    if value is not None:
        ends = min(ends[0], value), max(ends[1], value)
    return Span(value, *ends)
