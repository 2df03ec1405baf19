"""What the benchmarks make of a machine that is never quiet, and of a comparison's ratios: what is claimed, and in which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from benchmarks.answer_simulation import Answer, Cell, claims_of, row_of
from benchmarks.common import (
    Unjudged,
    accuracy_claims,
    at_full_budget,
    in_words,
    pairs,
    ratio_claim,
    to_accuracy,
)

from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, Comparison, baselines
from hasten.data import load
from hasten.errors import HastenError
from hasten.measure.load import Limits, Load, Watch
from hasten.measure.paired import paired_steps


def step() -> None:
    torch.ones(1000).sum()


@pytest.fixture
def never_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def disturbed(self: Load, limits: Limits) -> list[str]:
        return ["other processes"]

    monkeypatch.setattr(Load, "disturbed", disturbed)


@pytest.mark.usefixtures("never_quiet")
def test_a_smoke_run_has_figures_to_go_on_with() -> None:
    timed = pairs("busy", {"a": step, "b": step}, baseline="a", seconds=1.0, smoke=True)
    assert timed["n"] >= 2
    assert timed["n_dropped"] == 0
    for arm in ("A/A", "b"):
        assert all(math.isfinite(timed["ratios"][arm][end]) for end in ("ratio", "low", "high"))


@pytest.mark.usefixtures("never_quiet")
def test_a_real_run_claims_nothing() -> None:
    assert Unjudged().stop()[1] == []
    assert Watch().stop()[1]
    timed = paired_steps({"a": step, "b": step}, baseline="a", seconds=0.1, chunk_s=(0.01, 0.02)).to_json()
    row = ratio_claim("m", "a step", timed, "b", 1.0)
    assert row["text"] == "not measured: the machine was never quiet"
    assert row["target"] == ">= 1x"
    assert row["met"] is False


# -- ratios at equal accuracy


def versus(verdict: str, ratio: float | None = None, lo: float | None = None, hi: float | None = None,
           reason: str | None = None, note: str = "") -> Any:  # fmt: skip
    return {
        "ratio": ratio,
        "lo": lo,
        "hi": hi,
        "reason": reason,
        "n": 3,
        "blocks": 3,
        "verdict": verdict,
        "note": note,
    }


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (versus("sooner", 1.31, 1.12, 1.55), "1.31x [1.12, 1.55] sooner than strong"),
        (versus("later", 0.83, 0.8, 0.86), "later: 0.83x [0.80, 0.86] over strong"),
        (versus("not shown", 1.03, 0.95, 1.1), "not shown: 1.03x [0.95, 1.10] over strong"),
        (versus("too wide", 1.2, 0.5, 2.2), "too wide to say: 1.20x [0.50, 2.20] over strong"),
        (versus("one seed", 1.2), "one seed, no interval: 1.20x over strong"),
        (versus("not reached", reason="the method does not reach it"), "does not reach it"),
        (versus("not measured", reason="an emulated format"), "not measured: an emulated format"),
        (versus("sooner", None, 1.4, None, "above it", "above it"), "at least 1.40x sooner than strong"),
        (versus("later", None, None, 0.7, "above it", "above it"), "later: at most 0.70x over strong (above it)"),
        (versus("too wide", None, None, None, "no clean time"), "too wide to say: no figure over strong (no clean time)"),
        (
            versus("not shown", 1.31, 1.12, 1.55, note="times are not trusted here"),
            "not shown: 1.31x [1.12, 1.55] over strong (times are not trusted here)",
        ),
    ],
)  # fmt: skip
def test_what_an_interval_allows_to_say(said: Any, words: str) -> None:
    assert in_words(said, "strong") == words


def row(
    name: str,
    kind: str,
    methods: list[str],
    strong: Any = None,
    plain: Any = None,
    mean: float | None = 0.844,
) -> Any:
    return {"name": name, "kind": kind, "methods": methods, "vs_strong": strong, "vs_plain": plain,
            "accuracy": {"mean": mean}, "points": []}  # fmt: skip


def finished(*rows: Any) -> Comparison:
    data: Any = {"arms": list(rows), "target": {"accuracy": 0.84},
                 "settings": {"model": "resnet8", "dataset": "d", "train": 9000}}  # fmt: skip
    return Comparison(data, None)


BASES = (
    row("plain", "baseline", [], versus("later", 0.4, 0.3, 0.5)),
    row("strong", "strong", ["mixed_precision()"], None, versus("sooner", 2.2, 2.0, 2.4)),
)


def test_one_claim_an_arm_beside_both_baselines() -> None:
    own = ["mixed_precision()", "m(a=1)"]
    good = row("m", "method", own, versus("sooner", 1.31, 1.12, 1.55), versus("sooner", 2.9, 2.5, 3.3), 0.843)
    lost = row("s", "stack", [*own, "n()"], versus("not reached"), versus("not reached"), None)
    first, second = accuracy_claims(finished(*BASES, good, lost), 1.3)
    assert first["methods"] == ["m"]
    assert first["what"] == "time to 84.00%, resnet8 on d (9000 images)"
    assert first["text"] == (
        "1.31x [1.12, 1.55] sooner than strong; 2.90x [2.50, 3.30] sooner than plain; "
        "full budget 84.30% against strong's 84.40%"
    )
    assert first["met"] is True
    assert second["methods"] == ["m", "n"]
    assert second["text"] == "does not reach it"
    assert second["met"] is False


@pytest.mark.parametrize(
    "said",
    [versus("not shown", 1.5, 0.99, 2.0), versus("sooner", 1.2, 1.1, 1.3), versus("later", 0.5, 0.4, 0.6),
     versus("one seed", 2.0), versus("not reached"), versus("not measured")],
)  # fmt: skip
def test_only_an_interval_above_1_and_a_ratio_at_the_target_meets_it(said: Any) -> None:
    (found,) = accuracy_claims(finished(*BASES, row("m", "method", ["mixed_precision()", "m()"], said)), 1.3)
    assert found["met"] is False


def test_arms_of_the_same_methods_are_told_apart_and_strong_speaks_for_itself() -> None:
    said = versus("not shown", 1.0, 0.9, 1.1)
    twins = [row(name, "method", ["mixed_precision()", f"m(a={i})"], said) for i, name in enumerate("xy")]
    assert [c["what"][-3:] for c in accuracy_claims(finished(*BASES, *twins), 1.0)] == [", x", ", y"]
    (alone,) = accuracy_claims(finished(*BASES), 1.5)
    assert alone["methods"] == ["mixed_precision"]
    assert alone["text"].startswith("2.20x [2.00, 2.40] sooner than plain; full budget")
    assert alone["met"] is True
    with_method_only = accuracy_claims(finished(BASES[1], twins[0]), 1.0)
    assert with_method_only[0]["text"].count("over") == 1


def test_an_arm_without_a_finished_run_at_its_full_budget_is_an_error() -> None:
    with pytest.raises(HastenError, match="no run of strong"):
        at_full_budget(finished(*BASES), "strong")


def test_a_smoke_comparison_ends_in_a_report_and_claims_nothing() -> None:
    strong = baselines(PLAIN, STRONG)[1]
    arms = [strong, Arm("emp", STRONG, (*strong.methods, method("error_map_pruning", keep=0.5)), "method")]
    found = to_accuracy(
        "smoke", "resnet8", load("fashion-mnist-12k"), arms, seeds=3, smoke=True, smoke_epochs=0.5
    )
    assert [row["name"] for row in found.data["arms"]] == ["strong", "emp"]
    assert not found.data["failures"]
    assert [len(row["points"]) for row in found.data["arms"]] == [2, 2]
    assert all(c["met"] is False for c in accuracy_claims(found, 1.0))
    assert at_full_budget(found, "emp")["macs"] < at_full_budget(found, "strong")["macs"]


# -- the simulation's figures


def test_a_row_counts_what_its_answers_say() -> None:
    cell = Cell("shortened to 0.8", "rising", "normal", 5)
    answers = [Answer(1.2, 1.1, 1.3, "sooner", "method"), Answer(1.0, 0.9, 1.1, "not shown", None),
               Answer(None, 0.0, math.inf, "too wide", "strong"), Answer(0.8, 0.7, 0.9, "later", None)]  # fmt: skip
    found = row_of(cell, answers)
    assert found["ratio"] == 1.0
    assert (found["coverage"], found["sooner"], found["headline"], found["headline of strong"]) == (
        0.5, 0.25, 0.25, 0.25,
    )  # fmt: skip
    assert (found["later"], found["too wide"], found["without a ratio"]) == (0.25, 0.25, 0.25)
    assert found["typical ratio"] == 1.0


def test_noise_on_one_side_moves_the_truth_and_only_that_side() -> None:
    assert Cell("1.3x", "rising", "skewed", 3).ratio == 1.3
    one = Cell("1.3x", "rising", "skewed method only", 3)
    assert one.ratio == pytest.approx(1.3 * 1.3**-0.1)
    assert {name: law.stalls for name, law in one.laws.items()} == {
        "plain": 0.0,
        "strong": 0.0,
        "method": 0.1,
    }
    assert Cell("shortened to 0.65", "saturated", "normal", 3).laws["method"].full == 0.65


def test_the_worst_cell_decides_a_claim() -> None:
    def one(truth: str, noise: str, **figures: float) -> dict[str, Any]:
        cell = Cell(truth, "rising", noise, 5)
        return {**row_of(cell, [Answer(1.0, 0.9, 1.1, "not shown", None)]), "coverage": 0.95, **figures}

    rows = [one("1.0x", "normal"), one("shortened to 0.8", "normal", sooner=0.04), one("1.1x", "normal", sooner=0.5),
            one("1.0x", "skewed method only", coverage=0.91), one("1.3x", "normal", headline=0.81)]  # fmt: skip
    met = {c["what"]: c["met"] for c in claims_of(rows, 1000)}
    assert met == {
        "false 'sooner' in the table": False, "false headline": True, "95% intervals that hold the truth, least": True,
        "95% intervals that hold the truth, most": True,
        "95% intervals that hold the truth, noise skewed on one side only": True,
        "a true 1.3x in the headline, 5 seeds": True,
    }  # fmt: skip
