"""Terminal text, spreadsheet rows, and how numbers and words are written."""

from __future__ import annotations

import copy

import pytest

from hasten.report import csv_rows, summary_lines
from hasten.report.words import block, called, count, points, scalar, seconds, times, visible

from .fixture import report
from .hostile import PAYLOADS, hostile


def _row(lines: list[str], label: str) -> str:
    return next(line for line in lines if line.startswith(label))


def test_the_first_line_is_the_answer_and_every_arm_has_its_row() -> None:
    data = report()
    lines = summary_lines(data)
    assert " ".join(lines).startswith(data["verdict"]["sentence"])
    for arm in data["arms"]:
        row = _row(lines, arm["label"])
        if arm["vs_strong"] and arm["vs_strong"]["ratio"]:
            assert f"{arm['vs_strong']['ratio']:.2f}x [" in row
    assert _row(lines, "all of them").endswith("  sooner")
    assert _row(lines, "+ selective").endswith("  not shown")
    assert "  not reached  " in _row(lines, "+ layer freezing")
    assert "+ layer freezing: not reached, its curve ends at 88" in "\n".join(lines)
    assert "hold the true value in 95 of 100" in " ".join(lines)


@pytest.mark.parametrize("width", [80, 90, 100, 140])
def test_nothing_is_wider_than_asked(width: int) -> None:
    data = report()
    data["arms"][3]["label"] = "a method with a name that does not end soon enough"
    lines = summary_lines(data, width)
    assert max(map(len, lines)) <= width
    assert ("91." in _row(lines, "plain PyTorch")) == (width == 140)
    assert "1.49x" in _row(lines, "all of them") or "1.50x" in _row(lines, "all of them")


def test_single_runs_have_no_interval_and_no_claim() -> None:
    lines = summary_lines(report(seeds=1))
    assert "One seed each, so there are no intervals and no claims." in lines
    assert "  one seed  " in _row(lines, "all of them")
    assert "[" not in "".join(lines)


def test_failures_are_counted() -> None:
    data = report(1, (1.0,))
    data["failures"] = [{"arm": "all", "seed": 0, "text": "out of memory"}]
    assert summary_lines(data)[-1] == "1 run failed; the report gives the reasons in full."


@pytest.mark.parametrize("payload", PAYLOADS)
def test_terminal_text_has_no_control_characters(payload: str) -> None:
    for line in summary_lines(hostile(lambda: payload, seeds=2, shares=(0.5, 1.0))):
        assert line.isprintable(), line


@pytest.mark.parametrize(
    "start", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", " =1", "\u200b=1", "\x00=1", "\ufeff@x"]
)
def test_no_cell_is_a_formula(start: str) -> None:
    data = copy.deepcopy(report(1, (1.0,)))
    arm = data["arms"][0]
    arm["label"], arm["methods"] = start, [start]
    arm["points"][0]["runs"][0].update(failure=start, disturbed=[start])
    header, first = csv_rows(data)[:2]
    for name in ("label", "methods", "failure", "disturbed"):
        cell = first[header.index(name)]
        assert cell.startswith("'"), name


def test_there_is_a_row_for_every_run_that_holds_its_numbers_exactly() -> None:
    data = report(seeds=2, shares=(0.5, 1.0))
    header, *found = csv_rows(data)
    runs = [(point, run) for arm in data["arms"] for point in arm["points"] for run in point["runs"]]
    assert len(found) == len(runs) == 2 * 2 * len(data["arms"])
    for cells, (point, run) in zip(found, runs, strict=True):
        assert len(cells) == len(header)
        row = dict(zip(header, cells, strict=True))
        assert float(row["share"]) == point["share"]
        assert float(row["epochs"]) == point["epochs"]
        assert float(row["total"]) == run["seconds"]["total"]
        assert float(row["accuracy"]) == run["accuracy"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (seconds(0.417), "0.42 s"),
        (seconds(9.999), "10.0 s"),
        (seconds(607), "607 s"),
        (seconds(1203), "20 min 03 s"),
        (seconds(7384), "2 h 03 min"),
        (seconds(None), "–"),
        (times(1.234), "1.23x"),
        (called("selective_backprop(beta=2.0, k=3)"), "selective_backprop, beta 2.0, k 3"),
        (called("mixed_precision()"), "mixed_precision"),
        (scalar("{'a': [1, 2]}"), "a 1, 2"),
        (scalar("{not python"), "{not python"),
        (scalar("(" * 5000), "(" * 5000),
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
