"""An arm's time-accuracy curve as it is drawn: the very curve from which its time to the target is read."""

from __future__ import annotations

import math
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
    left_out = {block["block"] for block in data["dropped"]}
    found = (_trace(i, arm, left_out) for i, arm in enumerate(data["arms"]))
    return [trace for trace in found if trace is not None]


def _trace(index: int, arm: Arm, left_out: set[int]) -> Trace | None:
    known = [
        (p, p["seconds"], p["accuracy"]) for p in arm["points"] if p["seconds"] and p["accuracy"] is not None
    ]
    if not known:
        return None
    curve = time_curve(arm, left_out)
    line = [(seconds, accuracy) for _, seconds, accuracy in known]
    if curve is not None and len(curve.budgets) > 1:
        pieces = [
            np.linspace(a, b, STEPS, endpoint=False)
            for a, b in zip(curve.place, curve.place[1:], strict=False)
        ]
        places = np.concatenate([*pieces, curve.place[-1:]])
        drawn = zip(curve.mean_seconds(places).tolist(), curve.accuracy(places).tolist(), strict=True)
        line = [(seconds, accuracy) for seconds, accuracy in drawn if math.isfinite(seconds)]
    return Trace(index, arm, line, known)


def time_curve(arm: Arm, left_out: set[int]) -> TimeCurve | None:
    """Return the arm's curve from its runs, the times of blocks ``left_out`` unknown; None without a timed run.

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
                if run["block"] not in left_out and time > 0:
                    seconds[row, column] = time
    if np.isnan(seconds).all():
        return None
    return TimeCurve(np.array([point["share"] for point in points]), seconds, accuracies)


def _counts(run: Run) -> bool:
    return run["failure"] is None and run["accuracy"] is not None
