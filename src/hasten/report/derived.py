"""Numbers that follow from the runs of the full budget: the parts of their time, and means over seeds."""

from __future__ import annotations

from statistics import fmean
from typing import cast

from hasten.report.schema import SPANS, Arm, ReportData, Run

PARTS = (*SPANS, "other")
"""The parts of a bar in "where the time went", in drawing order; they sum to the wall time of the run."""


def full_runs(arm: Arm) -> list[Run]:
    """Return the runs of the largest budget that did not fail."""
    return [run for run in arm["points"][-1]["runs"] if run["failure"] is None] if arm["points"] else []


def all_runs(data: ReportData) -> list[Run]:
    """Return every run of every arm at every budget."""
    return [run for arm in data["arms"] for point in arm["points"] for run in point["runs"]]


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
    """Return the mean seconds of each part over the full budget's runs; empty without any."""
    runs = [parts(run) for run in full_runs(arm)]
    return {name: fmean(run[name] for run in runs) for name in PARTS} if runs else {}


def average(arm: Arm, key: str) -> float | None:
    """Return the full budget's mean of a number of the runs ("macs", "peak_rss_mb"), None where a run lacks it."""
    values = [cast(dict[str, float | None], run)[key] for run in full_runs(arm)]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
