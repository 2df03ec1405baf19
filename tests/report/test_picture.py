"""The drawings: the curve is the one that times are read from, marks and labels lie where they must, odd data."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.report import render, summary_lines
from hasten.report.bars import bars, rows
from hasten.report.curves import curves
from hasten.report.derived import all_runs, excess, full_runs, parts
from hasten.report.labels import lines_of, spread
from hasten.report.svg import accuracy_ticks, spaced, tag, text_width, time_ticks
from hasten.report.trace import time_curve, traces

from .fixture import TARGET, report


def test_the_drawn_curve_meets_the_target_at_the_time_that_is_told() -> None:
    for trace in traces(report()):
        seconds = trace.arm["time"]["seconds"]
        heights = [y for _, y in trace.line]
        assert heights == sorted(heights), "a curve never falls"
        if seconds is None:
            assert max(heights) < TARGET
        else:
            assert np.interp(TARGET, heights, [x for x, _ in trace.line]) == pytest.approx(seconds, rel=0.01)


def test_the_gap_begins_and_ends_on_the_two_curves() -> None:
    """The bar at the target runs between the two rings, whose places are the times of both arms on the axis."""
    data = report()
    for shape in ("wide", "narrow"):
        page = str(curves(data, shape))
        bar = re.search(r'<line x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="\3" class="bar"', page)
        rail = re.search(r'<line x1="([\d.]+)" x2="([\d.]+)" [^>]*class="rail"', page)
        rings = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="6" class="hit', page)
        assert bar
        assert rail
        assert bar.groups()[:2] == rail.groups()
        assert {x for x, _ in rings} == set(rail.groups())
        ticks = re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="tick mid">([\d.]+) s<', page)
        (x1, t1), (x2, t2) = [(float(x), float(t)) for x, t in ticks[:2]]
        slope = (x2 - x1) / math.log(t2 / t1)
        times = [data["arms"][i]["time"]["seconds"] or 0.0 for i in (5, 1)]
        assert float(bar[2]) - float(bar[1]) == pytest.approx(slope * math.log(times[1] / times[0]), abs=1.5)


def test_a_disturbed_run_gives_no_time_and_a_failed_one_no_point() -> None:
    data = report()
    before = {trace.arm["name"]: trace for trace in traces(data)}
    slow = data["arms"][1]["points"][3]["runs"][0]
    slow["seconds"]["train"] *= 50
    slow["disturbed"] = ["steal 9%"]
    for run in data["arms"][2]["points"][3]["runs"]:
        run.update(failure="out of memory", accuracy=None)
    data["arms"][2]["points"][3].update(seconds=None, accuracy=None, sd=None, n=0)
    after = {trace.arm["name"]: trace for trace in traces(data)}
    assert after["strong"].line[-1][0] == pytest.approx(before["strong"].line[-1][0], rel=0.05)
    assert [y for _, y in after["strong"].line] == [y for _, y in before["strong"].line]
    assert len(after["resize"].points) == 3
    for run in data["arms"][0]["points"][0]["runs"]:
        run["failure"] = "x"
    curve = time_curve(data["arms"][0])
    assert curve is not None
    assert curve.budgets.tolist() == [0.5, 0.75, 1.0]


def test_an_end_that_is_never_reached_is_open() -> None:
    data = report()
    strong, best = data["arms"][1], data["arms"][5]
    strong["time"] = {"seconds": None, "lo": None, "hi": None, "state": "not reached", "note": ""}
    best["vs_strong"] = {**(best["vs_strong"] or {}), "ratio": None, "lo": 1.2, "hi": None, "reason": "never"}  # type: ignore[typeddict-item]
    data["verdict"] |= {"ratio": None, "ci": [1.1, None]}
    page = curves(data, "wide")
    assert "at least 1.10x sooner" in page
    assert ">not reached</text>" in page
    assert page.count('class="hit') == 1


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(12, 40)), min_size=1, max_size=12))
def test_no_label_covers_another(boxes: list[tuple[float, float]]) -> None:
    wanted, heights = [w for w, _ in boxes], [h for _, h in boxes]
    tops = spread(wanted, heights, 0.0, 500.0)
    order = sorted(range(len(boxes)), key=lambda i: tops[i])
    assert all(tops[a] + heights[a] <= tops[b] + 1e-6 for a, b in pairwise(order))
    assert min(tops) >= 0
    if sum(heights) <= 500:
        assert max(top + height for top, height in zip(tops, heights, strict=True)) <= 500 + 1e-6


@given(st.text(min_size=1, max_size=60), st.integers(1, 3))
def test_names_keep_to_their_room(text: str, most: int) -> None:
    found = lines_of(text, 90.0, 12.0, most)
    assert 1 <= len(found) <= max(most, 1)
    assert all(text_width(line, 12.0) <= 90.0 or len(line) <= 12 for line in found)


@given(st.floats(1e-3, 1e6), st.floats(1.001, 1e4))
def test_time_ticks_lie_inside_and_are_at_least_two(low: float, reach: float) -> None:
    ticks = time_ticks(low, low * reach)
    assert len(ticks) >= 2
    assert len(set(ticks)) == len(ticks)
    assert all(low <= value <= low * reach for value in ticks)


@given(st.floats(0, 0.98), st.floats(0.01, 0.5))
def test_accuracy_ticks_lie_inside_and_apart(low: float, reach: float) -> None:
    high = min(low + reach, 1.0)
    ticks = spaced(accuracy_ticks(low, high), lambda a: 400 * (a - low) / (high - low), 24)
    assert all(low - 1e-6 <= value <= high + 1e-6 for value in ticks)
    ordered = sorted(ticks)
    assert all(b - a >= (high - low) * 24 / 400 - 1e-9 for a, b in pairwise(ordered))


def test_the_parts_of_every_run_sum_to_its_wall_time() -> None:
    for run in all_runs(report()):
        assert sum(parts(run).values()) == pytest.approx(run["seconds"]["total"], abs=1e-9)


def test_parts_that_exceed_the_wall_time_are_said_on_the_page() -> None:
    data = report()
    run = full_runs(data["arms"][0])[0]
    assert excess(run) == 0
    run["spans"]["forward"] += 40.0
    assert excess(run) > 20
    assert "exceed its wall time" in render(data)
    assert "exceed its wall time" not in render(report())


def test_the_drawn_bars_are_as_long_as_their_seconds() -> None:
    """A bar, the gaps between its parts given back, is as many pixels long as its run has seconds."""
    data = report()
    drawn = re.findall(
        r'<rect class="part p-(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', bars(data, "wide")
    )
    by_row: dict[str, float] = {}
    for _, _, y, width in drawn:
        by_row[y] = by_row.get(y, 0.0) + float(width) + 0.6
    totals = [sum(values.values()) for _, values in rows(data)]
    scale = max(by_row.values()) / max(totals)
    for width, total in zip(by_row.values(), totals, strict=True):
        assert width == pytest.approx(total * scale, abs=1.0)


def test_tags_escape_text_and_values() -> None:
    made = str(tag("a", "<b>&", title='"<x>', n=1.5))
    assert made == '<a title="&#34;&lt;x&gt;" n="1.5">&lt;b&gt;&amp;</a>'


def _nothing_claimed(data: Any) -> None:
    data["verdict"].update(claim=None, against=None, ratio=None, ci=None)


def _failed(data: Any) -> None:
    _nothing_claimed(data)
    for arm in data["arms"]:
        arm["accuracy"].update(mean=None, sd=None, n=0, vs_strong=None)
        arm["vs_plain"] = arm["vs_strong"] = arm["seconds"] = None
        arm["time"] = {
            "seconds": None,
            "lo": None,
            "hi": None,
            "state": "not reached",
            "note": "all runs failed",
        }
        for point in arm["points"]:
            point.update(seconds=None, accuracy=None, sd=None, n=0)
            for run in point["runs"]:
                run.update(failure="out of memory", accuracy=None)


def _without_strong(data: Any) -> None:
    _nothing_claimed(data)
    data["arms"] = [arm for arm in data["arms"] if arm["kind"] in ("baseline", "method")]
    for arm in data["arms"]:
        arm["vs_strong"] = None


def _instant(data: Any) -> None:
    for arm in data["arms"]:
        for point in arm["points"]:
            point["seconds"] = 0.0
            for run in point["runs"]:
                run["seconds"] = dict.fromkeys(run["seconds"], 0.0)
                run["spans"] = {}


def _perfect(data: Any) -> None:
    data["target"]["accuracy"] = 1.0
    for arm in data["arms"]:
        for point in arm["points"]:
            point["accuracy"] = 1.0
            for run in point["runs"]:
                run["accuracy"] = 1.0


def _one_arm(data: Any) -> None:
    _nothing_claimed(data)
    data["arms"] = data["arms"][:1]
    data["aa"] = data["plan"] = data["network"] = None


def _no_runs(data: Any) -> None:
    data["arms"][3]["points"] = []


def _all_disturbed(data: Any) -> None:
    for run in all_runs(data):
        run["disturbed"] = ["steal"]
    data["dropped"] = [{"block": i, "reason": "steal"} for i in range(3)]


@pytest.mark.parametrize(
    "change", [_failed, _without_strong, _instant, _perfect, _one_arm, _no_runs, _all_disturbed]
)
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("shares", [(1.0,), (0.5, 1.0)])
def test_odd_reports_are_drawn_without_nonsense(change: Any, seeds: int, shares: tuple[float, ...]) -> None:
    data = copy.deepcopy(report(seeds, shares))
    change(data)
    page = render(data)
    body = page[page.index("</style>") : page.index("<script>")]
    assert not re.search(r"\b(nan|inf|None|undefined)\b", body)
    assert all(line.isprintable() for line in summary_lines(data))
    assert max(map(len, summary_lines(data))) <= 100
    if change is _without_strong:
        assert "than strong" not in body
