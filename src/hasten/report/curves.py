"""The picture: accuracy over training time, one curve an arm, and the gap between two of them at the target."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from hasten.report.gap import Gap, gap
from hasten.report.labels import lines_of, spread
from hasten.report.schema import Arm, Point, ReportData, headline_seconds
from hasten.report.svg import (
    Scale,
    accuracy_ticks,
    drawing,
    path,
    series,
    spaced,
    tag,
    text_width,
    time_ticks,
)
from hasten.report.trace import Trace, traces
from hasten.report.words import goal, percent, seconds, visible

LOG_FROM = 2.5
"""Times whose largest is this many times the smallest are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Plot:
    """The place of everything in one drawing, in its own units."""

    wide: bool
    width: float
    left: float
    right: float
    top: float
    floor: float
    strip: float
    across: Scale
    up: Scale
    size: float

    @property
    def height(self) -> float:
        """Height of the drawing with the time axis."""
        return self.floor + self.strip + 46


def curves(data: ReportData, shape: str) -> Markup:
    """Return the picture as SVG, ``shape`` "wide" or "narrow"; empty when no run finished."""
    drawn = traces(data)
    if not drawn:
        return Markup("")
    shown = gap(data)
    plot = _plot(data, drawn, shape, shown)
    colours = series(data["arms"])
    front = {shown.arm["name"], shown.base["name"]} if shown else set()
    order = sorted(drawn, key=lambda trace: (trace.arm["name"] in front, trace.index))
    clip = tag(
        "rect",
        x=plot.left - 8,
        y=plot.top - 8,
        width=plot.right - plot.left + 16,
        height=plot.floor - plot.top + 8,
    )
    children = [
        tag("defs", tag("clipPath", clip, id=f"clip-{shape}")),
        tag("g", *_axes(plot)),
        tag("g", *_target(data, plot, drawn)),
        tag("g", *(_curve(plot, trace, colours, front) for trace in order), clip_path=f"url(#clip-{shape})"),
        tag("g", *_names(plot, drawn, colours)),
    ]
    if shown is not None:
        children.append(
            tag("g", *_gap(data, plot, shown, colours), class_="gap claimed" if shown.claimed else "gap")
        )
    label = f"Accuracy over training time, one curve for each of {len(drawn)} arms; the numbers are in the table below"
    return drawing(plot.width, plot.height, shape, label, children, data_picture="1")


def _plot(data: ReportData, drawn: list[Trace], shape: str, shown: Gap | None) -> Plot:
    wide = shape == "wide"
    width, tall, size = (940.0, 360.0, 13.0) if wide else (360.0, 300.0, 11.5)
    left, side = (52.0, 158.0) if wide else (40.0, 101.0)
    tall = max(tall, len(drawn) * (34.0 if wide else 30.0))
    times = [x for trace in drawn for x, _ in trace.line] + [x for trace in drawn for _, x, _ in trace.points]
    low_x, high_x = min(times), max(times)
    log = high_x >= LOG_FROM * low_x
    pad = 1.1 if log else 1.03
    low_x, high_x = low_x / pad, high_x * pad
    target = data["target"]["accuracy"]
    leading = [trace for trace in drawn if trace.arm["sets_target"]] or drawn
    heights = [y for trace in leading for _, y in trace.line] + [
        y for trace in leading for _, _, y in trace.points
    ]
    low, high = min([target, *heights]), max([target, *heights])
    # An arm far below would flatten all others: of such a one only what is near them is drawn.
    low = min([low, *(y for trace in drawn for _, y in trace.line if y >= low - 0.4 * (high - low))])
    room = max((high - low) * 0.08, 0.004)
    low, high = max(low - room, 0.0), min(high + room, 1.0)
    right, top = width - side, 22.0
    floor = top + tall
    through = math.log if log else float
    return Plot(wide, width, left, right, top, floor, 66.0 if shown else 0.0,
                Scale(low_x, high_x, left, right, through), Scale(low, high, floor, top), size)  # fmt: skip


def _axes(plot: Plot) -> list[Markup]:
    found: list[Markup] = []
    base = plot.floor + plot.strip
    for value in spaced(accuracy_ticks(plot.up.low, plot.up.high), plot.up, 30.0):
        y = plot.up(value)
        digits = 0 if abs(value * 100 - round(value * 100)) < 1e-6 else 1
        found += [tag("line", x1=plot.left, x2=plot.right, y1=y, y2=y, class_="grid")]
        found += [tag("text", percent(value, digits), x=plot.left - 8, y=y + 4, class_="tick end")]
    for value in spaced(
        time_ticks(plot.across.low, plot.across.high), plot.across, 64.0 if plot.wide else 44.0
    ):
        x = plot.across(value)
        found += [tag("line", x1=x, x2=x, y1=base, y2=base + 5, class_="axis")]
        found += [tag("text", _short(value), x=x, y=base + 19, class_="tick mid")]
    found.append(tag("line", x1=plot.left, x2=plot.right, y1=base, y2=base, class_="axis"))
    middle = (plot.left + plot.right) / 2
    found.append(tag("text", "training time of a whole run", x=middle, y=base + 40, class_="tick mid"))
    return found


def _short(value: float) -> str:
    """Return a tick's time: "20 s", "5 min", "2 h"; odd ones to three digits."""
    for size, unit in ((3600, "h"), (60, "min")):
        if value >= size and abs(value / size - round(value / size, 1)) < 1e-6:
            return f"{value / size:g} {unit}"
    return f"{value:.3g} s"


def _target(data: ReportData, plot: Plot, drawn: list[Trace]) -> list[Markup]:
    """Return the line of the target and its label, put where it covers the least of the curves."""
    target = data["target"]["accuracy"]
    y, words = plot.up(target), f"target {goal(target)}"
    wide = text_width(words, plot.size)
    pixels = [(plot.across(x), plot.up(a)) for trace in drawn for x, a in trace.line]
    places = [(x, below) for below in (False, True) for x in (plot.left + 4, plot.right - wide - 4)]

    def covered(place: tuple[float, bool]) -> int:
        x, below = place
        top = y + 4 if below else y - 20
        return sum(x - 4 <= px <= x + wide + 4 and top - 2 <= py <= top + 18 for px, py in pixels)

    x, below = min(places, key=covered)
    text = tag("text", words, x=x, y=y + 17 if below else y - 7, class_="target")
    return [tag("line", x1=plot.left, x2=plot.right, y1=y, y2=y, class_="target"), text]


def _curve(plot: Plot, trace: Trace, colours: dict[str, str], front: set[str]) -> Markup:
    arm, children = trace.arm, []
    children.append(path([(plot.across(x), plot.up(y)) for x, y in trace.line], "curve"))
    for point, x, y in trace.points:
        ended = [run for run in point["runs"] if run["failure"] is None and run["accuracy"] is not None]
        runs = [run for run in ended if not run["disturbed"]]
        if len(runs) > 1:
            for run in runs:
                time = headline_seconds(run)
                if plot.across.low <= time <= plot.across.high:
                    children.append(
                        tag(
                            "circle",
                            cx=plot.across(time),
                            cy=plot.up(run["accuracy"] or 0.0),
                            r=2.2,
                            class_="seed",
                        )
                    )
        mark = tag("path", d=_mark(arm["kind"], plot.across(x), plot.up(y)), class_="mark")
        touch = tag("circle", cx=plot.across(x), cy=plot.up(y), r=13.0, class_="touch")
        children.append(tag("g", tag("title", _said(trace, point, x)), mark, touch))
    strength = " front" if arm["name"] in front else ""
    return tag(
        "g", *children, class_=f"arm {arm['kind']}{strength} {colours[arm['name']]}", data_arm=trace.index
    )


def _mark(kind: str, x: float, y: float) -> str:
    """Return the sign of a kind of arm: a square for plain, a diamond for strong, a circle for the rest."""
    if kind == "baseline":
        return f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z"
    if kind == "strong":
        return f"M{x:.1f} {y - 5.6:.1f}l5.6 5.6l-5.6 5.6l-5.6 -5.6z"
    return f"M{x - 4.4:.1f} {y:.1f}a4.4 4.4 0 1 0 8.8 0a4.4 4.4 0 1 0 -8.8 0z"


def _said(trace: Trace, point: Point, time: float) -> str:
    share = "the full schedule" if point["share"] == 1 else f"{100 * point['share']:.0f}% of the schedule"
    spread_ = f" ± {100 * point['sd']:.2f}" if point["sd"] is not None else ""
    runs = "1 seed" if point["n"] == 1 else f"{point['n']} seeds"
    return (
        f"{visible(trace.arm['label'])}, {point['epochs']:.3g} epochs ({share}): {seconds(time)}, "
        f"{percent(point['accuracy'], 2)}{spread_}, {runs}"
    )


def _names(plot: Plot, drawn: list[Trace], colours: dict[str, str]) -> list[Markup]:
    """Return each arm's name beside the plot, at the height where its curve ends, with a line from there."""
    pitch, room, most = plot.size + 2.5, plot.width - plot.right - 24, 2 if plot.wide else 3
    below = [plot.up(trace.line[-1][1]) > plot.floor for trace in drawn]
    names = [visible(trace.arm["label"]).removeprefix("+ ") for trace in drawn]
    labels = [f"↓ {name}" if low else name for name, low in zip(names, below, strict=True)]
    texts = [lines_of(label, room, plot.size, most) for label in labels]
    ends = [
        (plot.across(trace.line[-1][0]), min(plot.up(trace.line[-1][1]), plot.floor - 4)) for trace in drawn
    ]
    heights = [len(text) * pitch + 5 for text in texts]
    wanted = [y - height / 2 for (_, y), height in zip(ends, heights, strict=True)]
    tops = spread(wanted, heights, plot.top - 20, plot.floor + 8)
    found = []
    for trace, text, (x, y), height, top in zip(drawn, texts, ends, heights, tops, strict=True):
        middle, edge = top + height / 2, plot.right + 6
        leader = path([(x + 8, y), (max(edge, x + 8), y), (edge + 10, middle)], "leader")
        # always as many lines, empty ones too: no name changes what the page is made of
        lines = [
            tag("text", line, x=plot.right + 20, y=top + pitch * (i + 1) - 1, class_="label")
            for i, line in enumerate([*text, "", ""][:most])
        ]
        found.append(
            tag(
                "g",
                leader,
                *lines,
                class_=f"arm {trace.arm['kind']} {colours[trace.arm['name']]}",
                data_arm=trace.index,
            )
        )
    return found


def _gap(data: ReportData, plot: Plot, shown: Gap, colours: dict[str, str]) -> list[Markup]:
    """Return the bar between both arms at the target, carried down to a bracket with the label, above the time axis."""
    x1, x2 = (
        _at(plot, shown.arm["time"]["seconds"], plot.left),
        _at(plot, shown.base["time"]["seconds"], plot.right),
    )
    y, rail = plot.up(data["target"]["accuracy"]), plot.floor + 18
    found = [tag("line", x1=x1, x2=x2, y1=y, y2=y, class_="bar")]
    open_end = shown.base["time"]["seconds"] is None
    for x, arm in ((x1, shown.arm), (x2, shown.base)):
        known = arm["time"]["seconds"] is not None
        found.append(tag("line", x1=x, x2=x, y1=y, y2=rail + (7 if known else 0), class_="drop"))
        if known:
            found.append(tag("circle", cx=x, cy=y, r=6.0, class_=f"hit {colours[arm['name']]}"))
    found.append(tag("line", x1=x1, x2=x2, y1=rail, y2=rail, class_="rail"))
    if open_end:
        found.append(tag("path", d=f"M{x2 - 7:.1f} {rail - 5:.1f}l7 5l-7 5", class_="rail"))
    first, second = (x1, x2) if x1 <= x2 else (x2, x1)
    early, late = (shown.arm, shown.base) if x1 <= x2 else (shown.base, shown.arm)
    found.append(tag("text", _reached(early), x=first - 8, y=rail + 4, class_="when end"))
    found.append(tag("text", _reached(late), x=second + 8, y=rail + 4, class_="when"))
    big = plot.size * (1.5 if plot.wide else 1.3)
    for text, size, below, class_ in (
        (shown.text, big, 23.0, "big"),
        (shown.span, plot.size * 0.95, 40.0, "small"),
    ):
        half = text_width(text, size) / 2
        middle = min(max((x1 + x2) / 2, half + 4), plot.width - half - 4)
        found.append(tag("text", text, x=middle, y=rail + below, class_=f"{class_} mid"))
    return found


def _at(plot: Plot, value: float | None, otherwise: float) -> float:
    return otherwise if value is None else min(max(plot.across(value), plot.left), plot.right)


def _reached(arm: Arm) -> str:
    time = arm["time"]
    if time["seconds"] is not None:
        return seconds(time["seconds"])
    return time["state"] if time["state"] == "not reached" else ""
