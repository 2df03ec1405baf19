"""The sentence, the picture, the table and the terminal say the same, whatever the runs gave."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hasten.report import check, render, summary_lines
from hasten.report.curves import curves
from hasten.report.gap import gap
from hasten.report.outcome import WORDS, deciding, time_answer, tone, versus_answer
from hasten.report.schema import Arm, ReportData, Versus
from hasten.report.words import bracket, times

from .fixture import report
from .randomly import reports

QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)


def _versuses(data: ReportData) -> list[tuple[Arm, Versus]]:
    return [(arm, v) for arm in data["arms"] for v in (arm["vs_plain"], arm["vs_strong"]) if v is not None]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


@QUICK
@given(reports())
def test_a_row_says_sooner_only_with_an_interval_above_1_that_it_shows(data: ReportData) -> None:
    check(data)
    for _, versus in _versuses(data):
        answer = versus_answer(versus)
        shown = _numbers(answer.span or (answer.value if versus["ratio"] is None else ""))
        if answer.word == "sooner":
            assert shown
            assert min(shown) > 1
        elif answer.word == "later":
            assert shown
            assert max(shown) < 1
        if versus["ratio"] is not None:
            assert float(answer.value.rstrip("x")) == pytest.approx(versus["ratio"], abs=0.005)


@QUICK
@given(reports())
def test_the_gap_is_a_gain_exactly_where_something_is_claimed(data: ReportData) -> None:
    shown, verdict = gap(data), data["verdict"]
    if verdict["claim"] is None:
        assert shown is None or not (shown.claimed or shown.text.endswith("sooner"))
        for shape in ("wide", "narrow"):
            assert "gap claimed" not in curves(data, shape)
    else:
        assert shown is not None
        assert shown.claimed
        assert (shown.arm["name"], shown.base["name"]) == (verdict["claim"], verdict["against"])
        if verdict["ratio"] is not None:
            assert shown.text == f"{times(verdict['ratio'])} sooner"
        else:
            assert shown.text.startswith("at least ")
        low, high = verdict["ci"] or [None, None]
        assert shown.span.startswith(bracket(low, high))
        assert min(_numbers(bracket(low, high))) > 1


@QUICK
@given(reports())
def test_the_terminal_says_what_the_page_says(data: ReportData) -> None:
    lines = summary_lines(data)
    assert lines[0] == data["verdict"]["sentence"]
    assert max(map(len, lines)) <= 100
    text, page = "\n".join(lines), render(data)
    for arm in data["arms"]:
        row = next(line for line in lines[2 : lines.index("", 2)] if line.startswith(arm["label"][:19]))
        time, versus = time_answer(arm["time"], arm), deciding(arm)
        assert (
            time.value if arm["time"]["seconds"] is not None or "already" in time.word else time.word
        ) in row
        if versus is not None:
            answer = versus_answer(versus)
            assert answer.value in row
            assert (" sooner" in row) == (answer.word == "sooner")
            assert f">{answer.word}</small>" in page
    assert ("t-gain" in page.partition("</style>")[2]) == any(
        v["verdict"] == "sooner" and arm["kind"] != "baseline" for arm, v in _versuses(data)
    )
    assert "None" not in text
    assert not re.search(
        r"\b(nan|inf|None|undefined)\b", page.partition("</style>")[2].partition("<script>")[0]
    )


@QUICK
@given(reports(), st.data())
def test_a_claim_whose_interval_is_not_above_1_is_refused_and_not_drawn(
    data: Any, draw: st.DataObject
) -> None:
    """The planted fault: whatever row a claim is put on, without the interval the report is not made."""
    data = copy.deepcopy(data)
    arm = data["arms"][-1]
    other = draw.draw(st.sampled_from([a["name"] for a in data["arms"]]))
    low = draw.draw(st.one_of(st.none(), st.floats(0.1, 1.0)))
    data["verdict"] |= {"claim": arm["name"], "against": other, "ratio": 1.5, "ci": [low, 2.0]}
    with pytest.raises(Exception, match="not report data"):
        render(data)


def test_without_a_claim_the_largest_gap_is_grey_with_its_interval_and_not_shown() -> None:
    data = report()
    data["verdict"] |= {"claim": None, "against": None, "ratio": None, "ci": None}
    for arm in data["arms"][2:]:
        if arm["vs_strong"] and arm["vs_strong"]["ratio"]:
            arm["vs_strong"] |= {"lo": 0.7, "hi": 2.3, "verdict": "not shown"}
    data["arms"][1]["vs_plain"] = None
    shown = gap(data)
    assert shown is not None
    assert shown.text.endswith("x, not shown")
    assert (shown.arm["name"], shown.base["name"]) == ("all", "strong")
    assert shown.span.startswith("[0.70, 2.30] all of them against strong")
    for shape in ("wide", "narrow"):
        assert ", not shown</text>" in curves(data, shape)


def test_the_label_of_the_gap_is_the_ratio_of_the_sentence_and_of_the_row() -> None:
    data = report()
    ratio, row = data["verdict"]["ratio"], data["arms"][5]["vs_strong"]
    assert ratio is not None
    assert row is not None
    said = f"{ratio:.2f}x"
    assert said in data["verdict"]["sentence"]
    assert versus_answer(row).value == said
    for shape in ("wide", "narrow"):
        picture = curves(data, shape)
        assert f">{said} sooner</text>" in picture
        assert f"[{row['lo']:.2f}, {row['hi']:.2f}] against strong (bf16, NHWC)</text>" in picture


def test_only_sooner_looks_like_a_gain() -> None:
    assert [word for word in WORDS.values() if tone(word) == "gain"] == ["sooner"]


def test_a_gain_that_the_a_a_test_forbids_is_not_claimed() -> None:
    data = report()
    data["verdict"] |= {"claim": None, "against": None, "ratio": None, "ci": None}
    assert data["aa"] is not None
    data["aa"] |= {"lo": 1.01, "hi": 1.03, "ratio": 1.02, "ok": False}
    page = render(data)
    shown = gap(data)
    assert shown is not None
    assert shown.text.endswith("not claimed")
    assert re.search(r'<li class="warn">[^<]*does not hold 1, so nothing is claimed', page)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1.0004, 1.2, "[1.0004, 1.2000]"),
        (0.8, 0.9996, "[0.8000, 0.9996]"),
        (1.0, 1.2, "[1.00, 1.20]"),
        (1.3, None, "at least 1.30"),
        (None, 0.7, "at most 0.70"),
        (None, None, ""),
    ],
)
def test_an_interval_is_never_rounded_onto_1(low: float | None, high: float | None, said: str) -> None:
    assert bracket(low, high) == said
