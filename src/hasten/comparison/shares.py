"""Which budgets an arm is trained at: a first cheap pass of one seed tells, then the shares bracket the target."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hasten.measure.curve import isotonic

GRID = tuple(2.0 ** (-k / 2) for k in range(8))
"""Shares of the full schedule that may be run: 1, 0.71, 0.5, ... 0.09."""

FIRST = (1.0, 0.5, 0.25)
"""Shares of the first pass."""

ROOM = 0.01
"""Accuracy by which the first pass's target lies below what the weakest arm reached in its one run (our choice)."""


def sets_target(tops: Mapping[str, float], lowest: Mapping[str, float], reference: str) -> dict[str, bool]:
    """Return for each arm whether it has a say in the target.

    tops, lowest: mean accuracy at the largest and smallest budget. An arm whose full budget ends below what the
    reference arm reaches with its smallest would pull the target to where no time can be read: it is left out.
    """
    return {name: name == reference or top >= lowest[reference] for name, top in tops.items()}


def crossing(shares: list[float], accuracies: list[float], target: float) -> float:
    """Return the share at which an arm's few points reach ``target``; 1 if they do not, continued below the smallest.

    Linear in the logarithm of the share, after making the points rise.
    """
    order = np.argsort(shares)
    x, y = np.log(np.array(shares)[order]), isotonic(np.array(accuracies)[order], np.ones(len(shares)))
    if target > y[-1]:
        return 1.0
    if target >= y[0]:
        right = int(np.argmax(y >= target))
        if right == 0:
            return float(np.exp(x[0]))
        return float(
            np.exp(
                x[right - 1] + (x[right] - x[right - 1]) * (target - y[right - 1]) / (y[right] - y[right - 1])
            )
        )
    slope = max((y[1] - y[0]) / (x[1] - x[0]), 1e-6) if len(x) > 1 else 1e-6
    return float(np.exp(max(x[0] - (y[0] - target) / slope, math.log(GRID[-1]))))


def around(share: float) -> tuple[float, ...]:
    """Return the shares to run for an arm that reaches the target at ``share``: two around it, one below, and all of it."""
    below = [g for g in GRID if g < share * (1 - 1e-9)]
    above = [g for g in GRID if g >= share * (1 - 1e-9)]
    chosen = {1.0, *above[-1:], *below[:2]}
    if len(chosen) < 3:
        chosen |= set(sorted(GRID)[:2])
    return tuple(sorted(chosen))


def placed(
    first: Mapping[str, Mapping[float, float]], reference: str, target: float | None
) -> dict[str, tuple[float, ...]]:
    """Return each arm's shares from a first pass: its accuracy by share, one run each.

    target: an accuracy set beforehand, or None for the highest that all arms reach.
    """
    tops = {name: points[max(points)] for name, points in first.items()}
    if target is None:
        say = sets_target(tops, {name: points[min(points)] for name, points in first.items()}, reference)
        target = min(top for name, top in tops.items() if say[name]) - ROOM
    return {
        name: around(crossing(list(points), list(points.values()), target)) for name, points in first.items()
    }
