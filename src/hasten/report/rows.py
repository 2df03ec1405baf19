"""The rows of the page's tables: arms, parts of time, work and single runs."""

from __future__ import annotations

from typing import Any

from hasten.report.bars import parts_shown
from hasten.report.derived import average, mean_parts
from hasten.report.outcome import Answer, time_answer, tone, versus_answer
from hasten.report.schema import Arm, Difference, ReportData
from hasten.report.words import (
    DASH,
    called,
    count,
    listed,
    pairs,
    percent,
    points,
    seconds,
    shortened,
    visible,
)

RUNS_SHOWN = 200
"""Runs listed on the page at most; report.json has all."""


def arm_row(data: ReportData, arm: Arm, colour: str) -> dict[str, Any]:
    """Return the variables of an arm's row in the table."""
    accuracy, full = arm["accuracy"], arm["points"][-1] if arm["points"] else None
    return {
        "label": visible(arm["label"]),
        "methods": listed([shortened(called(text), 90) for text in arm["methods"]], 6),
        "kind": arm["kind"],
        "colour": colour,
        "claim": arm["name"] == data["verdict"]["claim"],
        "time": time_answer(arm["time"], arm),
        "plain": versus_answer(arm["vs_plain"], arm["kind"] == "baseline"),
        "strong": versus_answer(arm["vs_strong"], arm["kind"] == "strong"),
        "accuracy": Answer(
            percent(accuracy["mean"], 2),
            f"± {100 * accuracy['sd']:.2f}" if accuracy["sd"] is not None else "",
        ),
        "difference": _difference(accuracy["vs_strong"]),
        "loss": accuracy["vs_strong"] is not None and accuracy["vs_strong"]["noninferior"] is False,
        "seconds": seconds(arm["seconds"]),
        "epochs": f"{full['epochs']:.3g} epochs" if full else "",
        "aside": "" if arm["sets_target"] else "too far below the rest to have a say in the target",
    }


def tones(row: dict[str, Any]) -> dict[str, str]:
    """Return the style class of each outcome word of a row; a baseline is measured by, not judged."""
    keys = ("time", "plain", "strong")
    return {key: "open" if row["kind"] == "baseline" else tone(row[key].word) for key in keys}


def _difference(diff: Difference | None) -> list[str]:
    """Return the accuracy less strong's in points: "−0.19 [−0.40, +0.02] to strong", "no loss"."""
    if diff is None:
        return []
    span = (
        f" [{points(diff['lo'])}, {points(diff['hi'])}]"
        if diff["lo"] is not None and diff["hi"] is not None
        else ""
    )
    said = {True: "no loss", False: "loss not ruled out", None: ""}[diff["noninferior"]]
    return [f"{points(diff['diff'])}{span} to strong", *([said] if said else [])]


def time_rows(data: ReportData) -> list[dict[str, Any]]:
    """Return the seconds of each part of the full budget's runs."""
    shown, rows = parts_shown(data), []
    for arm in data["arms"]:
        mean = mean_parts(arm)
        if mean:
            cells = [f"{mean[part]:.2f}" for part in shown]
            rows.append({"label": visible(arm["label"]), "cells": cells, "sum": f"{sum(mean.values()):.2f}"})
    return rows


def work_row(arm: Arm) -> dict[str, Any]:
    """Return samples, work, memory and processor time of an arm at the full budget."""
    saved = arm["work_reduction"]
    names = ("samples_forward", "samples_backward", "macs", "peak_rss_mb", "cpu_seconds")
    forward, backward, macs, peak, cpu = (average(arm, name) for name in names)
    return {
        "label": visible(arm["label"]),
        "cells": [
            DASH if saved is None else percent(saved),
            DASH if forward is None else f"{forward:,.0f}",
            DASH if backward is None else f"{backward:,.0f}",
            count(macs),
            DASH if peak is None else f"{peak:,.0f} MB",
            seconds(cpu),
        ],
        "settings": ", ".join(f"{key} {value}" for key, value in pairs(arm["settings"])) or DASH,
    }


def run_rows(data: ReportData) -> list[list[str]]:
    """Return one row for each of the first ``RUNS_SHOWN`` runs."""
    rows = []
    for arm in data["arms"]:
        for point in arm["points"]:
            for run in point["runs"]:
                clock = run["seconds"]
                cells = [
                    clock["train"],
                    clock["method"],
                    clock["final"],
                    clock["eval"],
                    clock["compile"],
                    clock["setup"],
                ]
                accuracy = "failed" if run["failure"] is not None else percent(run["accuracy"], 2)
                numbers = [f"{value:.2f}" for value in (*cells, clock["total"])]
                state = ", ".join(
                    [*(visible(why) for why in run["disturbed"]), *(["resumed"] if run["resumed"] else [])]
                )
                start = [visible(arm["label"]), f"{point['epochs']:.3g}", str(run["seed"]), str(run["block"])]
                rows.append([*start, accuracy, *numbers, state or "clean"])
    return rows[:RUNS_SHOWN]
