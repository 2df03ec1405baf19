"""Where the time went: one stacked bar an arm, the mean of its runs at the full budget, its parts summing to the wall time."""

from __future__ import annotations

from markupsafe import Markup

from hasten.report.derived import PARTS, mean_parts
from hasten.report.schema import ReportData
from hasten.report.svg import Scale, drawing, even_ticks, tag
from hasten.report.words import percent, seconds, shortened, visible

NAMES = {
    "data": "data",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "method": "method overhead",
    "save": "save",
    "final": "final evaluation a method needs",
    "eval": "evaluation",
    "compile": "compile, warm-up",
    "setup": "set-up",
    "other": "other",
}


def rows(data: ReportData) -> list[tuple[str, dict[str, float]]]:
    """Return (label, mean seconds of each part at the full budget) of arms that finished a run there."""
    return [(visible(arm["label"]), parts) for arm in data["arms"] if (parts := mean_parts(arm))]


def parts_shown(data: ReportData) -> list[str]:
    """Return the parts that some arm spends time in, in drawing order."""
    return [name for name in PARTS if any(parts[name] > 0.005 for _, parts in rows(data))]


def bars(data: ReportData, shape: str) -> Markup:
    """Return the chart as SVG, ``shape`` "wide" or "narrow"; empty when no run finished."""
    shown = rows(data)
    longest = max((sum(parts.values()) for _, parts in shown), default=0.0)
    if longest <= 0:
        return Markup("")
    wide = shape == "wide"
    width, pitch, thick = (920.0, 34.0, 22.0) if wide else (360.0, 46.0, 20.0)
    left, right, top = (180.0, 70.0, 8.0) if wide else (2.0, 58.0, 18.0)
    across = Scale(0.0, longest, left, width - right)
    floor = top + pitch * len(shown)
    children: list[object] = []
    for value in even_ticks(longest, 8 if wide else 4):
        x = across(value)
        children.append(tag("line", x1=x, x2=x, y1=top - 4, y2=floor, class_="grid"))
        children.append(
            tag("text", f"{value:g} s", x=x, y=floor + 16, class_="tick mid" if x > 20 else "tick")
        )
    for i, (label, parts) in enumerate(shown):
        y, start, total = top + i * pitch, 0.0, sum(parts.values())
        name = shortened(label, 28 if wide else 44)
        at = (
            {"x": left - 10, "y": y + thick * 0.7, "class_": "name end"}
            if wide
            else {"x": left, "y": y - 5, "class_": "name"}
        )
        children.append(tag("text", name, **at))
        for part, value in parts.items():
            if value <= 0:
                continue
            x, far = across(start), across(start + value)
            words = f"{label}: {NAMES[part]} {seconds(value)}, {percent(value / total)} of {seconds(total)}"
            box = {"x": x, "y": y, "width": max(far - x - 0.6, 0.4), "height": thick}
            children.append(tag("rect", tag("title", words), class_=f"part p-{part}", **box))
            inner = f"{value:.1f}"
            if far - x > 8 * len(inner) + 8:
                children.append(
                    tag("text", inner, x=(x + far) / 2, y=y + thick * 0.68, class_=f"in i-{part}")
                )
            start += value
        children.append(tag("text", seconds(total), x=across(start) + 7, y=y + thick * 0.7, class_="sum"))
    label = f"Where the time of {len(shown)} arms went; the numbers are in the table below it"
    return drawing(width, floor + 24, shape, label, children)
