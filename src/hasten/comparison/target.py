"""The accuracy to reach: set beforehand, or the highest that all arms are shown to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hasten.comparison.shares import sets_target
from hasten.measure.curve import TimeCurve, pooled_spread

RULE = "an arm reaches it where its curve through the mean accuracies of its budgets does"

ROOM = 0.99
"""Confidence of the bounds that set the target (our choice): so high that no arm's time lies at the very end of its curve."""


@dataclass(frozen=True)
class Goal:
    """accuracy: the target. chosen: how, in words. say: for each arm whether it had a say in it."""

    accuracy: float
    chosen: str
    say: dict[str, bool]


def given(accuracy: float, curves: Mapping[str, TimeCurve]) -> Goal:
    """Return a target that was set beforehand."""
    return Goal(accuracy, "set beforehand", dict.fromkeys(curves, True))


def highest(
    curves: Mapping[str, TimeCurve], validation: Mapping[str, TimeCurve] | None, reference: str, title: str
) -> Goal:
    """Return the highest accuracy that all arms are shown to reach.

    That is the least of their lower 99% bounds at the full budget, so that each has room to be read below its end. Where every run was also judged on validation
    images, those choose: the budget at which the reference arm reaches that accuracy there is looked up, and the target
    is what the reference arm has at that budget on the test images.
    """
    judged = validation or curves
    say = sets_target(
        {n: float(c.levels[-1]) for n, c in judged.items()},
        {n: float(c.levels[0]) for n, c in judged.items()},
        reference,
    )
    pooled = pooled_spread(list(judged.values()))
    least = min(lower_bound(judged[name], pooled) for name in judged if say[name])
    words = "the highest accuracy that all arms are shown to reach (lower 99% bound of the mean at the full budget)"
    if validation is None:
        return Goal(_tidy(least, curves[reference]), words, say)
    place = validation[reference].find(least)
    if place == -math.inf:
        place = float(curves[reference].place[0])
    accuracy = float(curves[reference].accuracy(min(place, float(curves[reference].place[-1]))))
    share = math.exp(place) / float(curves[reference].budgets[-1])
    words = f"{words}, chosen on the validation images: what {title} reaches on the test images with {share:.0%} of its epochs"
    return Goal(_tidy(accuracy, curves[reference]), words, say)


def lower_bound(curve: TimeCurve, pooled: tuple[float, float], confidence: float = ROOM) -> float:
    """Return the lower bound of a curve's mean accuracy at its full budget; the mean itself with one seed."""
    from scipy.special import stdtrit

    if float(curve.counts[-1]) < 2:
        return float(curve.levels[-1])
    error, freedom = curve.error(curve.place[-1:], pooled)
    return float(curve.levels[-1] - stdtrit(max(float(freedom[0]), 1.0), (1 + confidence) / 2) * error[0])


def _tidy(accuracy: float, curve: TimeCurve) -> float:
    """Return ``accuracy`` cut to a hundredth of a point, as it is printed, unless that leaves the reference's curve."""
    cut = float(np.floor(accuracy * 1e4) / 1e4)
    return cut if cut >= float(curve.levels[0]) else accuracy
