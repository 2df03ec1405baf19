"""Turning report data into the words and rows that the page's template only has to lay out."""

from __future__ import annotations

from typing import Any

from hasten.report.bars import NAMES, parts_shown
from hasten.report.derived import all_runs
from hasten.report.effects import counted, effects
from hasten.report.honesty import facts, honesty
from hasten.report.rows import RUNS_SHOWN, arm_row, run_rows, time_rows, tones, work_row
from hasten.report.schema import Arm, ReportData
from hasten.report.svg import series
from hasten.report.terms import terms
from hasten.report.words import DASH, block, count, goal, plain, points, scalar, seconds, visible

_TEXT_SHOWN = 20_000
_FAILURES_IN_FULL = 4


def view(data: ReportData) -> dict[str, Any]:
    """Return the variables of the template; every value is text, a number or a list of such."""
    arms, colours = data["arms"], series(data["arms"])
    rows = [arm_row(data, arm, colours[arm["name"]]) for arm in arms]
    words = {row[key].word for row in rows for key in ("time", "plain", "strong")}
    runs = all_runs(data)
    return {
        "title": visible(data["title"]),
        "created": visible(data["created"]).replace("T", " ").replace("Z", " UTC").replace("+00:00", " UTC"),
        "workload": _workload(data),
        "sentence": visible(data["verdict"]["sentence"]),
        "target": goal(data["target"]["accuracy"]),
        "has_strong": any(arm["kind"] == "strong" for arm in arms),
        "has_plain": any(arm["kind"] == "baseline" for arm in arms),
        "arms": [{**row, "tones": tones(row)} for row in rows],
        "terms": terms(data, words),
        "parts": [{"name": NAMES[part], "key": part} for part in parts_shown(data)],
        "times": time_rows(data),
        "work": [work_row(arm) for arm in arms],
        "runs": run_rows(data),
        "runs_hidden": max(len(runs) - RUNS_SHOWN, 0),
        "plan": _plan(data),
        "predicted": _predicted(data),
        "effects": effects(arms),
        "witness": [(visible(arm["label"]), counted(arm)) for arm in arms if arm["witness"]],
        "honesty": honesty(data),
        "facts": facts(data),
        "command": visible(data["repeat"]["command"]),
        "config": _cut(data["repeat"]["config_toml"]),
        "network": _network(data),
        "failures": _failures(data),
    }


def _workload(data: ReportData) -> str:
    s = data["settings"]
    samples = f"{s['train']:,} training and {s['test']:,} test samples"
    macs = f", {count(s['macs'])} MACs a sample" if s["macs"] is not None else ""
    return (
        f"{visible(s['model'])} ({s['params']:,} parameters{macs}) on {visible(s['dataset'])}, {samples}, "
        f"batch {s['batch']}, up to {s['epochs']:g} epochs, {s['threads']} threads"
    )


def _plan(data: ReportData) -> list[tuple[str, str]]:
    """Return what the comparison was going to take and what it took, as rows of text."""
    plan = data["plan"]
    if plan is None:
        return []
    rows = [("predicted", seconds(plan["predicted"])), ("taken", seconds(plan["taken"]))]
    if plan["reused"]:
        rows[1] = ("taken", f"{seconds(plan['taken'])}, which says nothing: some runs were there already")
    elif plan["predicted"] > 0:
        rows.append(("off by", f"{points(plan['taken'] / plan['predicted'] - 1, 0)}%"))
    if plan["limit"] is not None:
        rows.append(("limit", seconds(plan["limit"])))
    rows.append(
        (
            "runs",
            f"{plan['reused']} of {plan['runs']} taken from an earlier call"
            if plan["reused"]
            else f"{plan['runs']}, all made now",
        )
    )
    return [
        *rows,
        *(
            ("to fit" if plan["limit"] is not None else "changed", plain(change))
            for change in plan["changes"]
        ),
    ]


def _network(data: ReportData) -> tuple[str, str] | None:
    """Return (whose network was kept, in which folder)."""
    if data["network"] is None:
        return None
    arm: Arm | None = next((arm for arm in data["arms"] if arm["name"] == data["verdict"]["claim"]), None)
    return (visible(arm["label"]) if arm else "the best arm"), visible(data["network"])


def _predicted(data: ReportData) -> list[dict[str, str]]:
    labels = {arm["name"]: visible(arm["label"]) for arm in data["arms"]}
    return [
        {
            "label": labels.get(p["arm"], visible(p["arm"])),
            "quantity": visible(p["quantity"]),
            "predicted": f"{p['predicted']:.4g} {visible(p['unit'])}",
            "measured": f"{p['measured']:.4g} {visible(p['unit'])}",
            "error": DASH if p["measured"] == 0 else f"{points(p['predicted'] / p['measured'] - 1, 0)}%",
        }
        for p in data.get("predicted", [])
    ]


def _failures(data: ReportData) -> list[dict[str, str]]:
    """Return the failures, the first few in full: a hundred equal tracebacks only make a page heavy."""
    labels = {arm["name"]: visible(arm["label"]) for arm in data["arms"]}
    return [
        {
            "arm": labels.get(failure["arm"], visible(failure["arm"])),
            "seed": f"seed {scalar(failure['seed'])}"
            if failure["seed"] is not None
            else "before its first run",
            "text": _cut(failure["text"], _TEXT_SHOWN if i < _FAILURES_IN_FULL else 1000),
        }
        for i, failure in enumerate(data["failures"])
    ]


def _cut(text: str, limit: int = _TEXT_SHOWN) -> str:
    """Return a text of several lines for a ``pre``; of a very long one, its beginning and its end."""
    if len(text) <= limit:
        return block(text)
    half = limit // 2
    gap_ = f"[{len(text) - 2 * half:,} characters left out; report.json has them]"
    return block(f"{text[:half]}\n\n{gap_}\n\n{text[-half:]}")
