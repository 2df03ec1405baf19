"""Turning report data into the words and rows that the page's template only has to lay out."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hasten.report.bars import NAMES, parts_shown
from hasten.report.curves import lines
from hasten.report.derived import average, excess, finished, frontier, mean_parts, mean_time, parts
from hasten.report.forest import against, state
from hasten.report.schema import Arm, MethodEffect, Ratio, ReportData
from hasten.report.svg import series
from hasten.report.terminal import outcome
from hasten.report.words import (
    DASH,
    bare_seconds,
    block,
    bracket,
    count,
    listed,
    pairs,
    percent,
    points,
    scalar,
    seconds,
    shortened,
    times,
    visible,
)

_RUNS_SHOWN = 200
_TEXT_SHOWN = 20_000
_FAILURES_IN_FULL = 4
_LAYERS_SHOWN = 24
_REASONS_SHOWN = 12


def view(data: ReportData) -> dict[str, Any]:
    """Return the variables of the template; every value is text, a number or a list of such."""
    colours = series(data["arms"])
    main = [arm for arm in data["arms"] if arm["kind"] != "control"]
    controls = [arm for arm in data["arms"] if arm["kind"] == "control"]
    return {
        "title": visible(data["title"]),
        "created": visible(data["created"]).replace("T", " ").replace("Z", " UTC").replace("+00:00", " UTC"),
        "workload": _workload(data),
        "sentence": visible(data["verdict"]["sentence"]),
        "figures": _figures(data),
        "target": percent(data["target"]["accuracy"]),
        "rule": visible(data["target"]["rule"]),
        "has_strong": against(data) == "vs_strong",
        "main": [_row(data, arm, colours) for arm in main],
        "controls": [_row(data, arm, colours) for arm in controls],
        "keys": _keys(data, colours),
        "parts": [{"name": NAMES[part], "key": part} for part in parts_shown(data)],
        "times": _times(data),
        "work": [_work(arm) for arm in data["arms"]],
        "runs": _runs(data),
        "runs_hidden": max(sum(len(arm["runs"]) for arm in data["arms"]) - _RUNS_SHOWN, 0),
        "predicted": _predicted(data),
        "effects": _effects(main),
        "witness": [(visible(arm["label"]), pairs_of_counts(arm)) for arm in main if arm["witness"]],
        "honesty": _honesty(data),
        "facts": _facts(data),
        "command": visible(data["repeat"]["command"]),
        "config": _cut(data["repeat"]["config_toml"]),
        "failures": _failures(data),
        "losses": any(
            diff and diff["noninferior"] is False for diff in (a["accuracy"]["vs_strong"] for a in main)
        ),
        "many": max((len(arm["runs"]) for arm in data["arms"]), default=0),
    }


def plotted(data: ReportData) -> dict[str, Any]:
    """Return what the page's script needs: the drawn curves, the "train less" line and the target."""
    arms = [
        {
            "index": line.arm,
            "label": line.label,
            "seeds": [{"seed": seed, "curve": _round(curve)} for seed, curve in line.seeds],
            "median": _round(line.median),
        }
        for line in lines(data)
    ]
    return {"arms": arms, "less": frontier(data), "target": data["target"]["accuracy"]}


def _round(curve: list[list[float]]) -> list[list[float]]:
    return [[round(row[0], 3), round(row[1], 1), round(row[2], 5)] for row in curve]


def _cut(text: str, limit: int = _TEXT_SHOWN) -> str:
    """Return a text of several lines for a ``pre``; of a very long one, its beginning and its end."""
    if len(text) <= limit:
        return block(text)
    half = limit // 2
    gap = f"[{len(text) - 2 * half:,} characters left out; report.json has them]"
    return block(f"{text[:half]}\n\n{gap}\n\n{text[-half:]}")


def _failures(data: ReportData) -> list[dict[str, str]]:
    """Return the failures, the first few in full: a hundred equal tracebacks only make a page heavy."""
    return [
        {
            "arm": visible(failure["arm"]),
            "seed": scalar(failure["seed"]),
            "text": _cut(failure["text"], _TEXT_SHOWN if i < _FAILURES_IN_FULL else 1000),
        }
        for i, failure in enumerate(data["failures"])
    ]


def _workload(data: ReportData) -> str:
    s = data["settings"]
    how = f"batch {s['batch']:,}, {s['epochs']:g} epochs, {s['threads']} threads"
    samples = f"{s['train']:,} training and {s['test']:,} test samples"
    model = f"{visible(s['model'])} ({count(s['params'])} parameters)"
    return f"{model} on {visible(s['dataset'])}, {samples}, {how}"


def _figures(data: ReportData) -> list[tuple[str, str, str]]:
    """Return (what, value, small print) of the figures under the verdict, those of the claim."""
    arm = next((arm for arm in data["arms"] if arm["name"] == data["verdict"]["claim"]), None)
    if arm is None:
        return []
    found = []
    strong, plain, curve = arm["vs_strong"], arm["vs_plain"], arm["vs_curve"]
    for name, ratio in (("against the strong baseline", strong), ("against plain PyTorch", plain)):
        if ratio is not None and ratio["ratio"] is not None:
            found.append((name, times(ratio["ratio"]), _interval(ratio)))
    if curve is not None and curve["ratio"] is not None:
        found.append(("at equal accuracy", times(curve["ratio"]), _interval(curve)))
    elif arm["accuracy"]["vs_strong"] is not None:
        said = " ".join(_difference(arm))
        found.append(("accuracy", percent(arm["accuracy"]["mean"]), f"{said} points against strong"))
    time = mean_time(arm)
    if time is not None:
        small = (
            "" if time.low is None or time.high is None else f"[{seconds(time.low)}, {seconds(time.high)}]"
        )
        found.append(
            ("time of a run", seconds(time.mean), f"{small} mean of {time.n}" if small else "one run")
        )
    return found


def _interval(ratio: Ratio) -> str:
    return (
        f"95% interval {bracket(ratio['lo'], ratio['hi'])}"
        if ratio["lo"] is not None
        else ratio["reason"] or "one run, no interval"
    )


def _difference(arm: Arm) -> tuple[str, str]:
    """Return the accuracy difference to the strong baseline in points, and its interval."""
    diff = arm["accuracy"]["vs_strong"]
    if diff is None:
        return "", ""
    span = (
        f"[{points(diff['lo'])}, {points(diff['hi'])}]"
        if diff["lo"] is not None and diff["hi"] is not None
        else "one run"
    )
    return points(diff["diff"]), span


def _row(data: ReportData, arm: Arm, colours: dict[str, str]) -> dict[str, Any]:
    time, reached, accuracy = mean_time(arm), arm["reached"], arm["accuracy"]
    deciding = arm["vs_strong"] if against(data) == "vs_strong" else arm["vs_plain"]
    judged = deciding is not None and arm["kind"] in ("method", "stack", "control")
    words = outcome(arm, deciding) if deciding is not None and judged else ""
    verdict, _, note = words.partition(": ")
    curve, bound = arm["vs_curve"], reached["mean_bound"]
    said = "yes, " if reached["yes"] else "no, " if bound is not None else ""
    return {
        "label": visible(arm["label"]),
        "methods": listed([shortened(text, 90) for text in arm["methods"]], 6),
        "kind": arm["kind"],
        "colour": colours[arm["name"]],
        "claim": arm["name"] == data["verdict"]["claim"],
        "time": seconds(time.mean) if time else "no run finished",
        "time_span": f"[{bare_seconds(time.low)}, {bare_seconds(time.high)}]"
        if time and time.low is not None and time.high is not None
        else "one run"
        if time
        else "",
        "accuracy": percent(accuracy["mean"], 2),
        "spread": f"± {100 * accuracy['sd']:.2f}" if accuracy["sd"] is not None else "",
        "difference": _difference(arm),
        "loss": accuracy["vs_strong"] is not None and accuracy["vs_strong"]["noninferior"] is False,
        "reached": f"{said}{reached['k']} of {reached['n']}",
        "bound": "no bound" if bound is None else f"bound {percent(bound, 2)}",
        "plain": _cell(arm["vs_plain"], arm["kind"] == "baseline"),
        "strong": _cell(arm["vs_strong"], arm["kind"] == "strong"),
        "curve": _cell(curve, False),
        "verdict": "misses" if verdict.startswith("misses") else verdict,
        "note": visible(note)
        if not verdict.startswith("misses")
        else "the target" + (f": {note}" if note else ""),
        "state": state(arm, deciding),
    }


def _cell(ratio: Ratio | None, itself: bool) -> tuple[str, str]:
    if ratio is None:
        return ("1.00×", "") if itself else (DASH, "")
    if ratio["ratio"] is None:
        return DASH, visible(ratio["reason"] or "")
    return times(ratio["ratio"]), bracket(ratio["lo"], ratio["hi"]) or (
        "no interval" if ratio["reason"] else "one run"
    )


def _keys(data: ReportData, colours: dict[str, str]) -> list[dict[str, str]]:
    """Return the legend of the curves; the shortened baselines share one entry."""
    drawn = lines(data)
    keys = [
        {"label": line.label, "colour": colours[line.name], "arms": str(line.arm)}
        for line in drawn
        if line.kind != "control"
    ]
    rest = [str(line.arm) for line in drawn if line.kind == "control"]
    if rest:
        keys.append({"label": "strong baseline, trained less", "colour": "", "arms": " ".join(rest)})
    return keys


def _times(data: ReportData) -> list[dict[str, Any]]:
    shown, rows = parts_shown(data), []
    for arm in data["arms"]:
        mean = mean_parts(arm)
        if mean:
            cells = [f"{mean[part]:.2f}" for part in shown]
            rows.append({"label": visible(arm["label"]), "cells": cells, "sum": f"{sum(mean.values()):.2f}"})
    return rows


def _work(arm: Arm) -> dict[str, Any]:
    step, saved = _cell(arm["step_ratio"], False), arm["work_reduction"]
    names = ("samples_forward", "samples_backward", "macs", "peak_rss_mb", "cpu_seconds")
    forward, backward, macs, peak, cpu = (average(arm, name) for name in names)
    return {
        "label": visible(arm["label"]),
        "step": step,
        "saved": DASH if saved is None else percent(saved),
        "cells": [
            DASH if forward is None else f"{forward:,.0f}",
            DASH if backward is None else f"{backward:,.0f}",
            count(macs),
            DASH if peak is None else f"{peak:,.0f} MB",
            seconds(cpu),
        ],
        "settings": ", ".join(f"{key} {value}" for key, value in pairs(arm["settings"])) or DASH,
    }


def _runs(data: ReportData) -> list[list[str]]:
    rows = []
    for arm in data["arms"]:
        for run in arm["runs"]:
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
            rows.append([visible(arm["label"]), str(run["seed"]), str(run["block"]), accuracy, *numbers])
    return rows[:_RUNS_SHOWN]


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


def pairs_of_counts(arm: Arm) -> str:
    """Return the witnesses of an arm as words: "layers frozen 9, samples not back-propagated 147,600"."""
    return ", ".join(f"{visible(name)} {count(value)}" for name, value in arm["witness"].items())


def _effects(arms: list[Arm]) -> list[dict[str, Any]]:
    """Return the effects: one entry for all arms in which a method did the same, layers grouped by reason."""
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        for effect in arm["effects"]:
            entry = found.setdefault(repr(effect), _effect(effect))
            entry["in"].append(visible(arm["label"]))
    return [{**entry, "arms": listed(entry["in"], 12)} for entry in found.values()]


def _effect(effect: MethodEffect) -> dict[str, Any]:
    touched, skipped = defaultdict(list), defaultdict(list)
    for hit in effect["touched"]:
        touched[hit["note"]].append(hit["layer"])
    for miss in effect["skipped"]:
        skipped[miss["reason"]].append(miss["layer"])
    return {
        "in": [],
        "method": visible(effect["method"]),
        "saves": visible(effect["saves"]),
        "n_touched": len(effect["touched"]),
        "n_skipped": len(effect["skipped"]),
        "touched": _groups(touched),
        "skipped": _groups(skipped),
    }


def _groups(layers: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (note, layers) of the most common notes; the layers of all others share one last line."""
    order = sorted(layers.items(), key=lambda item: -len(item[1]))
    kept = order if len(order) <= _REASONS_SHOWN else order[: _REASONS_SHOWN - 1]
    shown = [
        (visible(note), listed(names, _LAYERS_SHOWN))
        for note, names in layers.items()
        if (note, names) in kept
    ]
    rest = sum(len(names) for _, names in order) - sum(len(names) for _, names in kept)
    return (
        [*shown, (f"{len(order) - len(kept)} other notes, see report.json", f"{rest} more")]
        if rest
        else shown
    )


def _honesty(data: ReportData) -> list[tuple[bool, str]]:
    """Return (weakens the claim, sentence): what the data itself says, then the notes of whoever measured."""
    found: list[tuple[bool, str]] = []
    aa = data["aa"]
    if aa is None:
        found.append((True, "No A/A test was run: how much the machine alone changes a time is not known."))
    else:
        said = f"{times(aa['ratio'])} {bracket(aa['lo'], aa['hi'])}, sd of a pair {percent(aa['s'])}"
        told = "holds 1.00×" if aa["ok"] else "does not hold 1.00×: every ratio here is in doubt"
        found.append((not aa["ok"], f"The baseline against itself (A/A test): {said}; the interval {told}."))
    dropped = [f"block {d['block']}: {visible(d['reason'])}" for d in data["dropped"]]
    reasons = "; ".join(dropped[:12]) + (f"; and {len(dropped) - 12} more" if len(dropped) > 12 else "")
    found.append(
        (False, f"Blocks left out: {len(dropped) or 'none'}" + (f" ({reasons})." if dropped else "."))
    )
    blocks = {arm["vs_strong"]["n"] for arm in data["arms"] if arm["vs_strong"] is not None}
    if blocks and max(blocks) < 5:
        found.append((True, f"Few blocks ({max(blocks)}): the intervals are wide and may be too hopeful."))
    failed = sum(run["failure"] is not None for arm in data["arms"] for run in arm["runs"])
    if failed:
        found.append((True, f"Runs that failed: {failed}. They count as misses and have no time."))
    late = max((excess(run) for arm in data["arms"] for run in finished(arm)), default=0.0)
    if late > 0.05:
        found.append(
            (True, f"The parts of a run exceed its wall time by up to {seconds(late)}: a clock is wrong.")
        )
    rest = [
        parts(run)["other"] / run["seconds"]["total"]
        for arm in data["arms"]
        for run in finished(arm)
        if run["seconds"]["total"] > 0
    ]
    if rest and max(rest) > 0.1:
        found.append((True, f"Up to {percent(max(rest))} of a run is in no named part."))
    return found + [(False, visible(note)) for note in data["notes"]]


def _facts(data: ReportData) -> list[tuple[str, str]]:
    s = data["settings"]
    own = [("MACs per sample, forward", count(s["macs"]))] if s["macs"] is not None else []
    seeds = sorted({run["seed"] for arm in data["arms"] for run in arm["runs"]})
    own.append(("seeds", listed([str(seed) for seed in seeds], 20) or DASH))
    return [*own, *pairs(s.get("extra", {})), *pairs(data["environment"])]
