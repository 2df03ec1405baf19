"""What records become: ratios, misses, failures, disturbed runs, the A/A test, and the sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.comparison.data import small_data, two_arms

from hasten import HastenError, compare, fit, keyed, method
from hasten.comparison import Arm, baselines, demo_arms, stacks, usual
from hasten.comparison.answer import outcome
from hasten.comparison.judge import judged
from hasten.comparison.summary import summarise
from hasten.errors import ConflictError, SettingsError
from hasten.loop import counted
from hasten.measure.curve import Span
from hasten.recipe import STRONG
from hasten.report.schema import Noise, Settings

SHARES = (0.25, 0.5, 1.0)
SETTINGS: Settings = {"model": "m", "params": 1, "macs": 1.0, "dataset": "d", "train": 10, "test": 10, "batch": 1,
                      "epochs": 1.0, "threads": 1}  # fmt: skip
GOOD: Noise = {"arm": "strong", "ratio": 1.0, "lo": 0.98, "hi": 1.02, "s": 0.01, "n": 3, "ok": True}


def arm(name: str, kind: str = "method") -> Arm:
    return Arm(name, STRONG, (), kind)  # type: ignore[arg-type]


ARMS = [arm("plain", "baseline"), arm("strong", "strong"), arm("m")]


def records(
    speed: dict[str, float], seeds: int = 5, accuracy: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return runs on one learning curve, each arm's epochs taking 1 / speed as long."""
    rng = np.random.Generator(np.random.Philox(keyed.key64("records")))
    found = []
    for seed in range(seeds):
        slow = math.exp(rng.normal(0, 0.3))  # what a block shares cancels
        for name, faster in speed.items():
            for share in SHARES:
                seen = (
                    0.95 - 0.2 * math.exp(-3 * share) + rng.normal(0, 0.001) + (accuracy or {}).get(name, 0.0)
                )
                found.append({"arm": name, "share": share, "seed": seed, "block": seed, "failure": None,
                              "accuracy": seen, "seconds_train": 40 * share / faster * slow * math.exp(rng.normal(0, 0.01)),
                              "disturbed": [], "idle": []})  # fmt: skip
    return found


def judge(
    rows: list[dict[str, Any]], arms: list[Arm] = ARMS, aa: Noise | None = GOOD, goal: float | None = None
) -> Any:
    return judged(arms, {a.name: SHARES for a in arms}, rows, goal=goal, aa=aa)


def test_a_faster_arm_is_found_and_named_and_what_a_block_shares_cancels() -> None:
    found = judge(records({"plain": 1.0, "strong": 2.0, "m": 3.0}))
    strong, m = found.rows[1]["vs_plain"], found.rows[2]["vs_strong"]
    assert (strong["lo"], strong["hi"]) == pytest.approx((2.0, 2.0), rel=0.06)
    assert strong["lo"] < 2.0 < strong["hi"]
    assert m["lo"] < 1.5 < m["hi"] < 1.6
    assert found.verdict["claim"] == "m"
    assert found.verdict["sentence"].startswith("Use m: this network reaches ")
    assert found.rows[2]["time"]["seconds"] == pytest.approx(found.rows[1]["time"]["seconds"] / 1.5, rel=0.05)


def test_a_shorter_run_of_the_same_training_is_no_gain() -> None:
    rows = records({"plain": 1.0, "strong": 2.0})
    rng = np.random.Generator(np.random.Philox(1))
    arms = [*ARMS[:2], Arm("short", STRONG.with_(epochs=0.8 * STRONG.epochs))]
    for seed in range(5):
        for share in SHARES:
            base = next(r for r in rows if r["arm"] == "strong" and r["seed"] == seed and r["share"] == share)
            seen = 0.95 - 0.2 * math.exp(-3 * share * 0.8) + rng.normal(0, 0.001)
            rows.append(
                {**base, "arm": "short", "accuracy": seen, "seconds_train": base["seconds_train"] * 0.8}
            )
    found = judge(rows, arms)
    versus = found.rows[2]["vs_strong"]
    assert versus["ratio"] == pytest.approx(1.0, abs=0.05)
    assert versus["verdict"] == "not shown"
    assert found.verdict["claim"] == "strong"
    assert "short is not shown to be sooner" in found.verdict["sentence"]


def test_failed_runs_are_misses_and_vanish_from_no_claim() -> None:
    rows = records({"plain": 1.0, "strong": 2.0, "m": 4.0})
    for r in rows:
        if r["arm"] == "m" and r["seed"] in (1, 3) and r["share"] == 0.5:
            r |= {"failure": "RuntimeError: it broke", "accuracy": None, "seconds_train": None}
    found = judge(rows)
    m = found.rows[2]
    assert m["time"] == {
        "seconds": None,
        "lo": None,
        "hi": None,
        "state": "not reached",
        "note": "2 of 15 runs failed",
    }
    assert m["vs_strong"]["verdict"] == "not reached"
    assert found.verdict["claim"] == "strong"
    data = summarise(SETTINGS, ARMS, {a.name: SHARES for a in ARMS}, rows, goal=None, aa=GOOD)
    assert [f["arm"] for f in data["failures"]] == ["m", "m"]
    assert json.loads(json.dumps(data)) == data


def test_a_failed_baseline_is_not_beaten() -> None:
    rows = records({"plain": 1.0, "strong": 2.0, "m": 3.0})
    for r in rows:
        if r["arm"] == "strong":
            r |= {"failure": "MemoryError", "accuracy": None, "seconds_train": None}
    found = judge(rows)
    assert found.rows[2]["vs_strong"]["ratio"] is None
    assert found.verdict["claim"] is None


@pytest.mark.parametrize(
    ("aa", "why"), [(None, "A/A"), ({**GOOD, "ratio": 1.2, "lo": 1.1, "hi": 1.3, "ok": False}, "1.20x")]
)
def test_without_an_aa_test_that_holds_nothing_is_claimed_and_no_row_says_sooner(
    aa: Noise | None, why: str
) -> None:
    found = judge(records({"plain": 1.0, "strong": 2.0, "m": 3.0}), aa=aa)
    assert found.verdict["claim"] is None
    assert found.verdict["sentence"].startswith("No claim: ")
    assert why in found.verdict["sentence"]
    assert {v["verdict"] for row in found.rows for v in (row["vs_plain"], row["vs_strong"]) if v} == {
        "not shown"
    }


def test_times_beside_other_processes_are_left_out_and_without_quiet_blocks_nothing_is_claimed() -> None:
    rows = records({"plain": 1.0, "strong": 2.0, "m": 3.0})
    for r in rows:
        if r["arm"] == "m" and r["seed"] == 0:
            r |= {"disturbed": ["other processes 40% > 5%"], "seconds_train": 20 * r["seconds_train"]}
    some = judge(rows)
    assert some.rows[2]["vs_strong"]["ratio"] == pytest.approx(1.5, rel=0.05)
    assert some.rows[2]["vs_strong"]["blocks"] == 4
    data = summarise(SETTINGS, ARMS, {a.name: SHARES for a in ARMS}, rows, goal=None, aa=GOOD)
    assert [d["block"] for d in data["dropped"]] == [0]
    for r in rows:
        if r["seed"] > 0:
            r["disturbed"] = ["steal 4% > 1%"]
    none = judge(rows)
    assert none.verdict["claim"] is None
    assert "other processes" in none.verdict["sentence"]


def test_no_gain_is_told_of_an_emulated_format() -> None:
    rows = records({"plain": 1.0, "strong": 2.0, "m": 9.0})
    for r in rows:
        if r["arm"] == "m":
            r["effects"] = {
                "narrow": {"touched": {}, "skipped": {}, "saves": "", "work": None, "emulated": True}
            }
    found = judge(rows)
    for versus in (found.rows[2]["vs_strong"], found.rows[2]["vs_plain"]):
        assert versus["ratio"] is None
        assert "narrow: an emulated format" in versus["reason"]
    assert found.rows[2]["time"]["seconds"] is None
    assert found.verdict["claim"] == "strong"


def test_budgets_too_short_for_a_method_to_act_are_no_points_of_its_curve() -> None:
    rows = records({"plain": 1.0, "strong": 2.0, "m": 3.0})
    for r in rows:
        if r["arm"] == "m" and r["share"] == 0.25:
            r["idle"] = ["selective_backprop"]
    found = judge(rows)
    assert [p["share"] for p in found.rows[2]["points"]] == [0.5, 1.0]
    data = summarise(SETTINGS, ARMS, {a.name: SHARES for a in ARMS}, rows, goal=None, aa=GOOD)
    assert any("too short for the method to act" in note for note in data["notes"])


def test_the_target_lies_where_every_arm_with_a_say_is_shown_to_be() -> None:
    rows = records({"plain": 1.0, "strong": 2.0, "m": 3.0}, accuracy={"m": -0.01})
    found = judge(rows)
    tops = [row["accuracy"]["mean"] for row in found.rows]
    assert min(tops) - 0.005 < found.aim.accuracy < min(tops)
    assert all(row["time"]["state"] == "reached" for row in found.rows)
    far = judge(records({"plain": 1.0, "strong": 2.0, "m": 3.0}, accuracy={"m": -0.3}))
    assert [row["sets_target"] for row in far.rows] == [True, True, False]
    assert far.rows[2]["time"]["state"] == "not reached"


def test_the_target_is_chosen_on_validation_images_where_there_are_some() -> None:
    rows = records({"plain": 1.0, "strong": 2.0, "m": 3.0})
    for r in rows:
        r["validation"] = r["accuracy"] - 0.1
    found = judge(rows)
    assert "validation" in found.aim.chosen
    assert 0.93 < found.aim.accuracy < 0.945  # an accuracy of the test images, where the arms are at 0.94
    lucky = [{**r, "accuracy": r["accuracy"] + (0.02 if r["arm"] == "m" else 0.0)} for r in rows]
    assert judge(lucky).aim.accuracy == found.aim.accuracy  # luck on the test images does not move it


def test_one_seed_claims_nothing() -> None:
    found = judge(records({"plain": 1.0, "strong": 2.0, "m": 3.0}, seeds=1))
    assert found.verdict["claim"] is None
    assert found.verdict["sentence"].startswith("One seed, so no interval and no claim: m ")
    assert found.rows[2]["vs_strong"]["verdict"] == "one seed"


@pytest.mark.parametrize(("low", "high", "word"), [(1.001, 9.0, "sooner"), (0.2, 0.999, "later"), (0.9, 1.1, "not shown"),
                                                   (0.6, 1.5, "too wide"), (0.0, math.inf, "too wide"), (1.0, 1.2, "not shown")])  # fmt: skip
def test_words_follow_from_intervals(low: float, high: float, word: str) -> None:
    assert outcome(Span(1.0, low, high)) == word


def test_accuracies_are_compared_with_a_95_percent_interval() -> None:
    rng = np.random.Generator(np.random.Philox(7))
    held = 0
    for _ in range(300):
        rows = [{"arm": a, "share": 1.0, "seed": s, "block": s, "failure": None, "accuracy": 0.9 + rng.normal(0, 0.003),
                 "seconds_train": 1.0, "disturbed": [], "idle": []} for a in ("strong", "m") for s in range(4)]  # fmt: skip
        diff = judged(ARMS[1:], {"strong": (1.0,), "m": (1.0,)}, rows, goal=0.5, aa=GOOD).rows[1]["accuracy"][
            "vs_strong"
        ]
        assert diff is not None
        held += diff["lo"] <= 0 <= diff["hi"]  # type: ignore[operator]
    assert 0.915 <= held / 300 <= 0.985


def test_stacks_are_added_one_in_and_left_one_out() -> None:
    strong = baselines()[1]
    chosen = [method("error_map_pruning"), method("s3pool"), method("selective_backprop")]
    arms = stacks(strong, chosen)
    sizes = sorted(len(a.methods) - len(strong.methods) for a in arms)
    assert sizes == [1, 1, 1, 2, 2, 2, 3]
    assert all(a.methods[: len(strong.methods)] == strong.methods for a in arms)


def test_what_a_part_of_the_strong_baseline_brings_is_a_question_like_any_other() -> None:
    arms = usual([method("mixed_precision")])
    assert [(a.name, a.kind, [m.spec.name for m in a.methods]) for a in arms] == [
        ("plain", "baseline", []),
        ("strong-without-mixed_precision", "strong", []),
        ("mixed_precision", "method", ["mixed_precision"]),
    ]
    both = usual([method("mixed_precision"), method("s3pool")])
    assert [m.spec.name for a in both if a.kind == "stack" for m in a.methods] == [
        "mixed_precision",
        "s3pool",
    ]


def test_bad_comparisons_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(
        ConflictError,
        match=r"selective_backprop.*importance_sampling|importance_sampling.*selective_backprop",
    ):
        compare("lenet", small_data(), ["selective_backprop", "importance_sampling"], out=tmp_path / "x")
    for bad in (1.5, 0.0, "best"):
        with pytest.raises(SettingsError, match="target"):
            compare("lenet", small_data(), arms=two_arms(), target=bad)  # type: ignore[arg-type]
    for budgets in ([], [0.0], [1.2]):
        with pytest.raises(SettingsError, match="budgets"):
            compare("lenet", small_data(), arms=two_arms(), budgets=budgets)
    for limit in ("soon", "0m", "-3"):
        with pytest.raises(SettingsError, match="limit"):
            compare("lenet", small_data(), arms=two_arms(), limit=limit)
    with pytest.raises(SettingsError, match="different names"):
        compare("lenet", small_data(), arms=[two_arms()[0]] * 2)
    with pytest.raises(SettingsError, match="arm name"):
        Arm("a/b", STRONG)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("")
    with pytest.raises(HastenError, match="foreign"):
        compare("lenet", small_data(), arms=two_arms(), out=tmp_path / "foreign", isolate=False)


def test_the_demo_names_both_baselines() -> None:
    arms, settings = demo_arms()
    assert [a.kind for a in arms][:2] == ["baseline", "strong"]
    assert settings["data"] == "fashion-mnist-12k"


@pytest.mark.parametrize(("lost", "no_loss"), [(0.001, True), (0.005, False), (0.02, False)])
def test_no_loss_is_said_up_to_three_tenths_of_a_point(lost: float, no_loss: bool) -> None:
    rows = [{"arm": a, "share": 1.0, "seed": s, "block": s, "failure": None, "accuracy": 0.9 + 0.0001 * s - (lost if a == "m" else 0),
             "seconds_train": 1.0, "disturbed": [], "idle": []} for a in ("strong", "m") for s in range(4)]  # fmt: skip
    versus = judged(ARMS[1:], {"strong": (1.0,), "m": (1.0,)}, rows, goal=0.5, aa=GOOD).rows[1]["accuracy"][
        "vs_strong"
    ]
    assert versus is not None
    assert versus["noninferior"] is no_loss


def test_evaluation_saving_and_set_up_are_no_training_time_and_attaching_is() -> None:
    spans = {"data": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 8.0, "method": 16.0, "compile": 32.0,
             "eval": 64.0, "save": 128.0, "setup": 256.0}  # fmt: skip
    assert counted(spans) == 63.0
    result = fit(
        "lenet",
        small_data(),
        [method("error_map_pruning")],
        recipe=STRONG.with_(epochs=1, batch_size=16, lr=0.01),
    )
    assert result.spans["eval"] > 0
    assert result.seconds_train == pytest.approx(counted(result.spans))
    assert 0 < result.seconds_attach <= result.spans["method"]
