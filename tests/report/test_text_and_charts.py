"""Terminal text, spreadsheet rows, derived numbers, drawings: sums, order, no overlaps, odd data."""

from __future__ import annotations

import copy
import re
import statistics
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.report import csv_rows, render, summary_lines
from hasten.report.bars import bars, rows
from hasten.report.curves import Flag, place_flags
from hasten.report.derived import excess, mean_time, median_curve, parts, thinned
from hasten.report.schema import Run, headline_seconds
from hasten.report.svg import accuracy_ticks, even_ticks, spaced, tag
from hasten.report.words import block, count, points, seconds, visible

from .fixture import report
from .hostile import PAYLOADS, hostile


def test_the_parts_of_every_run_sum_to_its_wall_time() -> None:
    for arm in report()["arms"]:
        for run in arm["runs"]:
            assert sum(parts(run).values()) == pytest.approx(run["seconds"]["total"], abs=1e-9)


def test_parts_that_exceed_the_wall_time_are_said_on_the_page() -> None:
    data = report()
    run: Run = data["arms"][0]["runs"][0]
    assert excess(run) == 0
    run["spans"]["forward"] += 30.0
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


def test_the_mean_time_lies_in_its_interval_and_in_its_runs() -> None:
    arm = report(seeds=5)["arms"][0]
    times = [headline_seconds(run) for run in arm["runs"]]
    found = mean_time(arm)
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(times))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.mean < found.high
    single = mean_time(report(seeds=1)["arms"][0])
    assert single is not None
    assert single.low is None


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=9), min_size=1, max_size=6))
def test_the_median_curve_is_within_the_curves(values: list[list[float]]) -> None:
    curves = [[[float(i), 10.0 * i, v] for i, v in enumerate(row)] for row in values]
    for i, row in enumerate(median_curve(curves)):
        here = [curve[i][2] for curve in curves if i < len(curve)]
        assert min(here) <= row[2] <= max(here)
        assert 2 * len(here) >= len(curves)


@given(st.integers(1, 50), st.integers(1, 9))
def test_thinning_keeps_the_last_evaluation(n: int, step: int) -> None:
    curve = [[float(i)] * 3 for i in range(n)]
    kept = thinned(curve, step)
    assert kept[-1] == curve[-1]
    assert len(kept) == -(-n // step)


@given(st.lists(st.tuples(st.floats(40, 900), st.integers(3, 34)), min_size=1, max_size=14))
def test_no_flag_covers_another(places: list[tuple[float, int]]) -> None:
    flags = [Flag(i, "s0", "x" * n, x, 0.9) for i, (x, n) in enumerate(places)]
    rows_used = place_flags(flags, 920.0, 12.5)
    assert rows_used <= len(flags)
    for i, one in enumerate(flags):
        for other in flags[:i]:
            if one.row == other.row:
                assert one.right <= other.left or other.right <= one.left


@given(st.floats(1e-3, 1e6), st.integers(3, 10))
def test_time_ticks_are_even_and_inside(high: float, n: int) -> None:
    ticks = even_ticks(high, n)
    assert ticks[0] == 0
    assert ticks[-1] <= high * 1.0002
    assert 2 <= len(ticks) <= 2 * n + 2


@given(st.floats(0, 0.98), st.floats(0.01, 0.5))
def test_accuracy_ticks_lie_inside_and_apart(low: float, reach: float) -> None:
    high = min(low + reach, 1.0)
    ticks = spaced(accuracy_ticks(low, high), lambda a: 400 * (a - low) / (high - low), 24)
    assert all(low - 1e-6 <= value <= high + 1e-6 for value in ticks)
    ordered = sorted(ticks)
    assert all(b - a >= (high - low) * 24 / 400 - 1e-9 for a, b in pairwise(ordered))


def test_tags_escape_text_and_values() -> None:
    made = str(tag("a", "<b>&", title='"<x>', n=1.5))
    assert made == '<a title="&#34;&lt;x&gt;" n="1.5">&lt;b&gt;&amp;</a>'


def test_summary_gives_every_arm_its_time_ratio_and_verdict() -> None:
    data = report()
    lines = summary_lines(data)
    assert lines[0] == "Result time to 90.0% (mean of 3, 95% interval)"
    for arm in data["arms"]:
        found = [line for line in lines if line.strip().startswith(arm["label"] + "  ")]
        assert len(found) == (0 if arm["kind"] == "control" else 1)
        if found and arm["vs_strong"]:
            assert f"{arm['vs_strong']['ratio']:.2f}× [" in found[0]
    slow = next(line for line in lines if "all three" in line)
    assert "misses the target (0 of 3)" in slow
    assert data["verdict"]["sentence"] in " ".join(line.strip() for line in lines)


def test_faster_by_training_less_is_said_so() -> None:
    """An arm whose gain the shortened baseline has too is not called faster without saying that."""
    data = report()
    arm = data["arms"][2]
    assert arm["vs_strong"] is not None
    assert arm["vs_strong"]["verdict"] == "faster"
    for low, said in ((0.97, "faster, but not at equal accuracy"), (1.01, "faster")):
        arm["vs_curve"] = {"ratio": 1.05, "lo": low, "hi": 1.1, "reason": None}
        line = next(line for line in summary_lines(data) if arm["label"] in line)
        assert line.endswith("  " + said)
        assert f'v-{"unclear" if low < 1 else "faster"}">{said}<' in render(data)


def test_summary_marks_single_runs() -> None:
    lines = summary_lines(report(seeds=1))
    assert "no claims" in lines[0]
    assert "[one run]" in lines[2]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_terminal_text_has_no_control_characters(payload: str) -> None:
    for line in summary_lines(hostile(lambda: payload, seeds=2, evals=2)):
        assert line.isprintable(), line


@pytest.mark.parametrize(
    "start", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", " =1", "\u200b=1", "\x00=1", "\ufeff@x"]
)
def test_no_cell_is_a_formula(start: str) -> None:
    data = copy.deepcopy(report(seeds=1, evals=1))
    arm = data["arms"][0]
    arm["label"], arm["methods"], arm["runs"][0]["failure"] = start, [start], start
    header, first = csv_rows(data)[:2]
    for name in ("label", "methods", "failure"):
        cell = first[header.index(name)]
        assert cell.startswith("'"), name


def test_rows_hold_the_numbers_exactly() -> None:
    data = report(seeds=2, evals=1)
    header, *found = csv_rows(data)
    runs = [run for arm in data["arms"] for run in arm["runs"]]
    assert len(found) == len(runs)
    for cells, run in zip(found, runs, strict=True):
        assert len(cells) == len(header)
        assert float(cells[header.index("total")]) == run["seconds"]["total"]
        assert float(cells[header.index("accuracy")]) == run["accuracy"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (seconds(0.417), "0.42 s"),
        (seconds(9.999), "10.0 s"),
        (seconds(607), "607 s"),
        (seconds(1203), "20 min 03 s"),
        (seconds(7384), "2 h 03 min"),
        (seconds(None), "–"),
        (count(77850), "77,850"),
        (count(12.3e6), "12.3 M"),
        (count(3.7e12), "3.7 T"),
        (points(-0.0034), "−0.34"),
        (visible("\ud83d\ude00 \udcff a\xa0b\u2028"), "\U0001f600 \ufffd a b"),
        (block("a:\r\n\tb\x1b[2J\n  c"), "a:\n    b[2J\n  c"),
        (visible("a\x1b[31m\nb\u202e"), "a[31m b"),
    ],
)
def test_numbers_and_text_for_readers(made: str, said: str) -> None:
    assert made == said


def _failed(data: Any) -> None:
    for arm in data["arms"]:
        arm["accuracy"].update(mean=None, sd=None, n=0, vs_strong=None)
        arm["vs_plain"] = arm["vs_strong"] = arm["vs_curve"] = arm["step_ratio"] = None
        for run in arm["runs"]:
            run.update(failure="out of memory", curve=[], accuracy=None)
    data["verdict"].update(claim=None, ratio=None, ci=None)


def _without_strong(data: Any) -> None:
    data["arms"] = [arm for arm in data["arms"] if arm["kind"] in ("baseline", "method")]
    for arm in data["arms"]:
        arm["vs_strong"] = arm["vs_curve"] = None
    data["verdict"]["claim"] = None


def _instant(data: Any) -> None:
    for arm in data["arms"]:
        for run in arm["runs"]:
            run["seconds"] = dict.fromkeys(run["seconds"], 0.0)
            run["spans"] = {}
            run["curve"] = [[0.0, 0.0, 1.0]]


def _perfect(data: Any) -> None:
    data["target"]["accuracy"] = 1.0
    for arm in data["arms"]:
        for run in arm["runs"]:
            run["accuracy"] = 1.0
            run["curve"][-1][2] = 1.0


def _one_arm(data: Any) -> None:
    data["arms"] = data["arms"][:1]
    data["verdict"].update(claim=None, ratio=None, ci=None)
    data["aa"] = None


def _no_runs(data: Any) -> None:
    data["arms"][3]["runs"] = []


@pytest.mark.parametrize("change", [_failed, _without_strong, _instant, _perfect, _one_arm, _no_runs])
@pytest.mark.parametrize("seeds", [1, 2])
def test_odd_reports_are_drawn_without_nonsense(change: Any, seeds: int) -> None:
    data = report(seeds=seeds, evals=1)
    change(data)
    page = render(data)
    body = page[page.index("</style>") : page.index('<script type="application/json"')]
    assert not re.search(r"\b(nan|inf|None|undefined)\b", body)
    assert all(line.isprintable() for line in summary_lines(data))
    if change is _without_strong:
        assert "vs strong" not in body
