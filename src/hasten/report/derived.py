"""Numbers that follow from the runs: mean times with intervals, parts of a run, median curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import cast

from scipy import stats

from hasten.report.schema import SPANS, Arm, ReportData, Run, headline_seconds

PARTS = (*SPANS, "other")
"""The parts of a bar in "where the time went", in drawing order; they sum to the wall time of the run."""

DRAWN_POINTS = 2400
"""Evaluations drawn at most, over all runs, so that the page stays small; medians are of the drawn ones."""


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` runs with its 95% interval; ``low`` and ``high`` are None for a single run."""

    mean: float
    low: float | None
    high: float | None
    n: int


def finished(arm: Arm) -> list[Run]:
    """Return the runs that did not fail."""
    return [run for run in arm["runs"] if run["failure"] is None]


def mean_time(arm: Arm) -> Estimate | None:
    """Return the mean headline time of the finished runs in seconds, with a t interval on its logarithm."""
    values = [headline_seconds(run) for run in finished(arm)]
    if not values:
        return None
    mean, n = fmean(values), len(values)
    if n < 2 or min(values) <= 0:
        return Estimate(mean, None, None, n)
    logs = [math.log(value) for value in values]
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(logs) / math.sqrt(n)
    return Estimate(mean, mean * math.exp(-half), mean * math.exp(half), n)


def parts(run: Run) -> dict[str, float]:
    """Return the seconds of each part of one run, in the order of ``PARTS``.

    Their sum is the wall time of the run, ``seconds["total"]``: "other" takes unknown names and the rest.
    Where the named parts alone exceed the total, see ``excess``, other is 0.
    """
    known = {name: run["spans"].get(name, 0.0) for name in SPANS}
    return {**known, "other": max(run["seconds"]["total"] - sum(known.values()), 0.0)}


def excess(run: Run) -> float:
    """Return by how many seconds the parts of a run exceed its wall time; above 0 means a clock is wrong."""
    return max(sum(run["spans"].values()) - run["seconds"]["total"], 0.0)


def mean_parts(arm: Arm) -> dict[str, float]:
    """Return the mean seconds of each part over the finished runs; empty without any."""
    runs = [parts(run) for run in finished(arm)]
    return {name: fmean(run[name] for run in runs) for name in PARTS} if runs else {}


def only_trains_less(arm: Arm) -> bool:
    """Return whether an arm is not shown to beat the baseline trained for less, down to its own accuracy."""
    curve = arm["vs_curve"]
    if curve is None or curve["ratio"] is None:
        return False
    return (curve["ratio"] if curve["lo"] is None else curve["lo"]) <= 1.0


def average(arm: Arm, key: str) -> float | None:
    """Return the mean of a number of the runs ("macs", "peak_rss_mb", ...), None where a run lacks it."""
    values = [cast(dict[str, float | None], run)[key] for run in finished(arm)]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def stride(data: ReportData) -> int:
    """Return s so that drawing every s-th evaluation stays below ``DRAWN_POINTS``."""
    points = sum(len(run["curve"]) for arm in data["arms"] for run in arm["runs"])
    return max(1, math.ceil(points / DRAWN_POINTS))


def thinned(curve: list[list[float]], step: int) -> list[list[float]]:
    """Return every ``step``-th row of a curve counted from the end, so that the last one stays."""
    return curve[::-1][::step][::-1]


def median_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """Return the row-wise median of curves with the same cadence; past the shortest, of those that go on.

    A median over fewer than half of the runs would jump, so it ends there.
    """
    rows = []
    for i in range(max((len(curve) for curve in curves), default=0)):
        here = [curve[i] for curve in curves if i < len(curve)]
        if 2 * len(here) < len(curves):
            break
        rows.append([median(row[k] for row in here) for k in range(3)])
    return rows


def frontier(data: ReportData) -> list[tuple[float, float]]:
    """Return (mean seconds, mean accuracy) of the shortened baselines and the strong one, by time.

    Points above and left of the line through them are better than training the strong baseline less.
    """
    found = []
    for arm in data["arms"]:
        time = mean_time(arm)
        if arm["kind"] in ("control", "strong") and time is not None and arm["accuracy"]["mean"] is not None:
            found.append((time.mean, arm["accuracy"]["mean"]))
    return sorted(found) if len(found) > 1 else []
