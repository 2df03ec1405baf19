"""An arm's time-accuracy curve as it is drawn: the very curve from which its time to the target is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.measure.curve import TimeCurve
from hasten.report.schema import Arm, Point, ReportData, Run, headline_seconds

STEPS = 16
"""Straight pieces drawn between two budgets."""


@dataclass(frozen=True)
class Trace:
    """What is drawn of one arm, as (seconds, accuracy): the curve, and its points with their runs."""

    index: int
    arm: Arm
    line: list[tuple[float, float]]
    points: list[tuple[Point, float, float]]


def traces(data: ReportData) -> list[Trace]:
    """Return the arms that finished a run, in their order."""
    found = (_trace(i, arm) for i, arm in enumerate(data["arms"]))
    return [trace for trace in found if trace is not None]


def _trace(index: int, arm: Arm) -> Trace | None:
    known = [
        (p, p["seconds"], p["accuracy"]) for p in arm["points"] if p["seconds"] and p["accuracy"] is not None
    ]
    if not known:
        return None
    curve = time_curve(arm)
    line = [(seconds, accuracy) for _, seconds, accuracy in known]
    if curve is not None:
        # the marks stand where the curve has them: at the times of undisturbed runs
        there = dict(zip(curve.budgets.tolist(), curve.mean_seconds(curve.place).tolist(), strict=True))
        known = [(p, there.get(p["share"], seconds), accuracy) for p, seconds, accuracy in known]
        pairs = zip(curve.place, curve.place[1:], strict=False)
        places = np.concatenate(
            [*(np.linspace(a, b, STEPS, endpoint=False) for a, b in pairs), curve.place[-1:]]
        )
        line = list(zip(curve.mean_seconds(places).tolist(), curve.accuracy(places).tolist(), strict=True))
    return Trace(index, arm, line, known)


def time_curve(arm: Arm) -> TimeCurve | None:
    """Return the arm's curve from its runs, times of disturbed ones left out; None without a timed run.

    Budgets at which no run finished are no points of it.
    """
    points = [point for point in arm["points"] if any(_counts(run) for run in point["runs"])]
    blocks = sorted({run["block"] for point in points for run in point["runs"]})
    shape = len(points), len(blocks)
    seconds, accuracies = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, point in enumerate(points):
        for run in point["runs"]:
            if _counts(run):
                column = blocks.index(run["block"])
                accuracies[row, column] = run["accuracy"]
                time = headline_seconds(run)
                if not run["disturbed"] and time > 0:
                    seconds[row, column] = time
    if np.isnan(seconds).all():
        return None
    return TimeCurve(np.array([point["share"] for point in points]), seconds, accuracies)


def _counts(run: Run) -> bool:
    return run["failure"] is None and run["accuracy"] is not None
