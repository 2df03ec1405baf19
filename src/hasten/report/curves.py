"""Accuracy against wall time: seeds thin, medians thick, a flag at each finish, and the "train less" line."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from hasten.report.derived import finished, frontier, median_curve, stride, thinned
from hasten.report.schema import ReportData
from hasten.report.svg import (
    Scale,
    accuracy_ticks,
    drawing,
    even_ticks,
    logit_error,
    path,
    series,
    spaced,
    tag,
    text_width,
)
from hasten.report.words import percent, seconds, shortened, visible

_ROW = 16.0


@dataclass
class Flag:
    """A finish: where the median curve of an arm ends, and the text that hangs above it."""

    arm: int
    colour: str
    text: str
    x: float
    y: float
    row: int = 0
    left: float = 0.0
    right: float = 0.0


@dataclass(frozen=True)
class Line:
    """The curves of one arm: [seconds, samples, accuracy] rows of each seed, and of their median."""

    arm: int
    name: str
    label: str
    kind: str
    seeds: list[tuple[int, list[list[float]]]]
    median: list[list[float]]


def lines(data: ReportData) -> list[Line]:
    """Return what is drawn, in the order of the arms; runs without an evaluation are left out."""
    step, found = stride(data), []
    for i, arm in enumerate(data["arms"]):
        seeds = [(run["seed"], thinned(run["curve"], step)) for run in finished(arm) if run["curve"]]
        if seeds:
            label = visible(arm["label"])
            found.append(Line(i, arm["name"], label, arm["kind"], seeds, median_curve([c for _, c in seeds])))
    return found


def place_flags(flags: list[Flag], limit: float, size: float) -> int:
    """Give each flag a row such that no text touches another text or pole; return the number of rows.

    Texts run right from their pole, so a flag further left hangs higher. Those that would leave the drawing
    run left from their pole, above the others, the rightmost highest.
    """
    for flag in flags:
        width = text_width(flag.text, size) + 8
        fits = flag.x + width <= limit
        flag.left, flag.right = (flag.x, flag.x + width) if fits else (flag.x - width, flag.x)
    order = sorted(flags, key=lambda flag: (flag.left < flag.x, flag.x if flag.left < flag.x else -flag.x))
    for i, flag in enumerate(order):
        below = [
            other.row for other in order[:i] if other.left < flag.right + 4 and other.right + 4 > flag.left
        ]
        flag.row = max(below, default=-1) + 1
    return max((flag.row for flag in flags), default=-1) + 1


def curves(data: ReportData, shape: str) -> Markup:
    """Return the chart as SVG, ``shape`` "wide" or "narrow"; empty when no run has an evaluation."""
    drawn = lines(data)
    if not drawn:
        return Markup("")
    wide = shape == "wide"
    width, plot, size = (920.0, 380.0, 12.5) if wide else (360.0, 300.0, 11.0)
    left, right, bottom = (50.0, 20.0, 44.0) if wide else (38.0, 10.0, 40.0)
    target = data["target"]["accuracy"]
    rows = [row for line in drawn for _, curve in line.seeds for row in curve]
    high_x = max(row[0] for row in rows) * 1.02 or 1.0
    # The first evaluations, far away, would take most of the height: begin at three times its error.
    low = min([1 - 3 * (1 - target), *(line.median[-1][2] for line in drawn)])
    low = max(low - (1 - low) * 0.05, min([target * 0.9, *(row[2] for row in rows)]), 0.0)
    high = max([target, *(row[2] for row in rows)])
    high = min(high + (1 - high) * 0.12, 1.0)
    across = Scale(0.0, high_x, left, width - right)
    colours = series(data["arms"])
    flags = []
    for line in drawn:
        if line.kind != "control":
            end = line.median[-1]
            text = f"{shortened(line.label, 26 if wide else 20)} · {seconds(end[0])}"
            flags.append(Flag(line.arm, colours[line.name], text, across(end[0]), end[2]))
    top = place_flags(flags, width, size) * _ROW + 14
    height = top + plot + bottom
    up = Scale(low, high, top + plot, top, logit_error)
    edge, floor = width - right, top + plot

    axes: list[object] = []
    gap = 26.0 if wide else 24.0
    for value in spaced(accuracy_ticks(low, high), up, gap):
        y = up(value)
        digits = 0 if abs(value * 100 - round(value * 100)) < 1e-6 else 1
        axes += [tag("line", x1=left, x2=edge, y1=y, y2=y, class_="grid")]
        axes += [tag("text", percent(value, digits), x=left - 7, y=y + 4, class_="tick end")]
    for value in even_ticks(high_x, 8 if wide else 4):
        axes += [tag("text", f"{value:g}", x=across(value), y=floor + 18, class_="tick mid")]
    axes.append(tag("line", x1=left, x2=edge, y1=floor, y2=floor, class_="axis"))
    caption = "seconds of training, everything a method adds included"
    axes.append(tag("text", caption, x=(left + edge) / 2, y=height - 6, class_="tick mid"))

    inside: list[object] = []
    frame: list[object] = []
    order = sorted(
        drawn, key=lambda line: ("control", "baseline", "strong", "method", "stack").index(line.kind)
    )
    for line in order:
        thin = [path([(across(r[0]), up(r[2])) for r in c], "seed") for _, c in line.seeds]
        thick = path([(across(r[0]), up(r[2])) for r in line.median], "median")
        inside.append(
            tag("g", *thin, thick, class_=f"arm {colours[line.name]} {line.kind}", data_arm=line.arm)
        )
    less = frontier(data)
    if less:
        inside.append(path([(across(x), up(y)) for x, y in less], "less"))
        for x, y in less:
            inside.append(
                _diamond(across(x), up(y), f"strong baseline trained for {seconds(x)}: {percent(y)}")
            )
    y = up(target)
    frame.append(tag("line", x1=left, x2=edge, y1=y, y2=y, class_="target"))
    frame.append(tag("text", f"target {percent(target)}", x=left + 6, y=y - 6, class_="target"))
    poles: list[object] = []
    texts: list[object] = []
    for flag in flags:
        head = top - 14 - flag.row * _ROW
        start = flag.left >= flag.x
        pole = tag("line", x1=flag.x, x2=flag.x, y1=head - 10, y2=up(flag.y) - 4, class_="pole")
        side = {"x": flag.x + 5, "class_": "flag"} if start else {"x": flag.x - 5, "class_": "flag end"}
        text = tag("text", flag.text, y=head, **side)
        dot = tag("circle", cx=flag.x, cy=up(flag.y), r=4.0, class_="dot")
        # Every pole before every text: where a pole must pass a text, the text's halo interrupts it.
        poles.append(tag("g", pole, class_=f"arm {flag.colour}", data_arm=flag.arm))
        texts.append(tag("g", text, dot, class_=f"arm {flag.colour}", data_arm=flag.arm))
    clip = tag("rect", x=left, y=top - 6, width=edge - left, height=plot + 6)
    body = tag("g", *inside, class_="inside", clip_path=f"url(#clip-{shape})")
    children = [
        tag("defs", tag("clipPath", clip, id=f"clip-{shape}")),
        tag("g", *axes, class_="axes"),
        tag("g", *frame, class_="frame"),
        body,
        tag("g", *poles, *texts, class_="poles"),
    ]
    label = f"Accuracy against wall time of {len(drawn)} arms; the numbers are in the table above"
    more = {
        "data_plot": f"{left:g} {edge:g} {top:g} {floor:g}",
        "data_domain": f"0 {high_x:.6g} {low:.6g} {high:.6g}",
    }
    return drawing(width, height, shape, label, children, **more)


def _diamond(x: float, y: float, words: str) -> Markup:
    shape = f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"
    return tag("path", tag("title", words), d=shape, class_="lessdot")
