"""Speedups with intervals on a logarithmic axis around 1: against the strong baseline, at equal accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from hasten.report.derived import only_trains_less
from hasten.report.schema import Arm, Ratio, ReportData, Versus
from hasten.report.svg import Scale, drawing, spaced, tag
from hasten.report.words import bracket, shortened, times, visible

_TICKS = (1.0, 2.0, 0.5, 4.0, 0.25, 1.5, 0.67, 3.0, 1.25, 0.8, 1.1, 0.9, 8.0, 16.0, 0.1, 1.05, 0.95)
_NONE: Ratio = {"ratio": None, "lo": None, "hi": None, "reason": None}


@dataclass(frozen=True)
class Row:
    """One arm: its ratio to the baseline and at equal accuracy, and the class that colours its verdict."""

    label: str
    versus: Versus
    curve: Ratio
    state: str


def against(data: ReportData) -> str:
    """Return the key of the ratio that decides: "vs_strong" where a strong baseline ran, else "vs_plain"."""
    return "vs_strong" if any(arm["kind"] == "strong" for arm in data["arms"]) else "vs_plain"


def state(arm: Arm, versus: Versus | None) -> str:
    """Return the class of a verdict: "faster", "slower", "missed" or "unclear"."""
    if versus is None:
        return "unclear"
    if arm["reached"]["n"] > 1 and not arm["reached"]["yes"]:
        return "missed"
    if versus["verdict"] == "faster" and only_trains_less(arm):
        return "unclear"
    return versus["verdict"] if versus["verdict"] in ("faster", "slower", "missed") else "unclear"


def rows(data: ReportData) -> list[Row]:
    """Return the arms that have a ratio, shortened baselines left out."""
    found = []
    for arm in data["arms"]:
        versus = arm["vs_strong"] if against(data) == "vs_strong" else arm["vs_plain"]
        if versus is not None and versus["ratio"] is not None and arm["kind"] != "control":
            found.append(Row(visible(arm["label"]), versus, arm["vs_curve"] or _NONE, state(arm, versus)))
    return found


def forest(data: ReportData, shape: str) -> Markup:
    """Return the chart as SVG, ``shape`` "wide" or "narrow"; empty when no arm has a ratio."""
    shown = rows(data)
    if not shown:
        return Markup("")
    wide = shape == "wide"
    width, pitch = (920.0, 46.0) if wide else (360.0, 74.0)
    left, right, top = (190.0, 225.0, 26.0) if wide else (10.0, 10.0, 26.0)
    values = [value for row in shown for ratio in (row.versus, row.curve) for value in _values(ratio)]
    reach = max(1.12, *(max(value, 1 / value) for value in values)) * 1.04
    low = max(1 / reach, min(*values, 1.0) / 1.08)
    across = Scale(low, min(reach, max(*values, 1.0) * 1.08), left, width - right, math.log)
    floor = top + pitch * len(shown)
    children: list[object] = []
    inside = [value for value in _TICKS if low < value < across.high]
    for value in spaced(inside, across, 44.0 if wide else 38.0):
        x, kind = across(value), "one" if value == 1 else "grid"
        children.append(tag("line", x1=x, x2=x, y1=top - 8, y2=floor, class_=kind))
        children.append(tag("text", f"{value:g}×", x=x, y=floor + 17, class_="tick mid"))
    one = across(1.0)
    if one - left > 60:
        children.append(tag("text", "← slower", x=one - 8, y=top - 12, class_="tick end"))
    children.append(tag("text", "faster →", x=one + 8, y=top - 12, class_="tick"))
    for i, row in enumerate(shown):
        y = top + i * pitch
        first, second = (y + 14, y + 31) if wide else (y + 44, y + 58)
        group: list[object] = [_mark(row.versus, across, first, "main", f"{row.label}: {_said(row.versus)}")]
        if row.curve["ratio"] is not None:
            words = f"{row.label}, at equal accuracy: {_said(row.curve)}"
            group.append(_mark(row.curve, across, second, "equal", words))
        equal = f"{_said(row.curve)} at equal accuracy" if row.curve["ratio"] is not None else ""
        if wide:
            group.append(tag("text", shortened(row.label, 28), x=left - 12, y=first + 5, class_="name end"))
            group.append(tag("text", _said(row.versus), x=width - right + 14, y=first + 4, class_="said"))
            group.append(tag("text", equal, x=width - right + 14, y=second + 4, class_="said faint"))
        else:
            group.append(tag("text", shortened(row.label, 25), x=2.0, y=y + 14, class_="name"))
            group.append(tag("text", _said(row.versus), x=width - 4, y=y + 14, class_="said end"))
            group.append(tag("text", equal, x=width - 4, y=y + 29, class_="said faint end"))
        children.append(tag("g", *group, class_=f"row {row.state}"))
    label = f"Speedups of {len(shown)} arms with 95% intervals; the numbers are in the table above"
    return drawing(width, floor + 24, shape, label, children)


def _values(ratio: Ratio) -> list[float]:
    return [value for value in (ratio["ratio"], ratio["lo"], ratio["hi"]) if value is not None]


def _said(ratio: Ratio) -> str:
    missing = "no interval" if ratio["reason"] else "one run"
    return f"{times(ratio['ratio'])} {bracket(ratio['lo'], ratio['hi']) or missing}"


def _mark(ratio: Ratio, across: Scale, y: float, kind: str, words: str) -> Markup:
    parts: list[object] = [tag("title", words)]
    if ratio["lo"] is not None and ratio["hi"] is not None:
        parts.append(tag("line", x1=across(ratio["lo"]), x2=across(ratio["hi"]), y1=y, y2=y, class_="span"))
    x = across(ratio["ratio"] or 1.0)
    if kind == "main":
        parts.append(tag("circle", cx=x, cy=y, r=5.0, class_="dot"))
    else:
        parts.append(tag("path", d=f"M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z", class_="dot"))
    parts.append(tag("rect", x=x - 22, y=y - 9, width=44.0, height=18.0, class_="touch"))
    return tag("g", *parts, class_=kind)
