"""Comparisons of known truth, driven from invented runs to the headline: what is claimed, how often, and how rightly.

The rates here are of few repetitions and pooled over cells; benchmarks/answer_simulation.py has the cells one by one.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
from tests.comparison.synthetic import RISING, SATURATED, Law, drive

REPEATS = 50
STALLS = 0.1


def rates(law: Law, strong: Law, seeds: int, truth: float, start: int) -> Counter[str]:
    """Return how often things happened in comparisons of the arm "m" with a strong baseline."""
    seen: Counter[str] = Counter()
    for i in range(REPEATS):
        found = drive({"plain": Law(strong.accuracy, 0.5), "strong": strong, "m": law}, seeds, start + i)
        versus = next(row for row in found.rows if row["name"] == "m")["vs_strong"]
        assert versus is not None
        seen["covered"] += (versus["lo"] or 0) <= truth <= (versus["hi"] or math.inf)
        seen["sooner"] += versus["verdict"] == "sooner"
        seen["claimed"] += found.verdict["claim"] == "m"
        seen["contradiction"] += found.verdict["claim"] == "m" and versus["verdict"] != "sooner"
        seen["all"] += 1
    return seen


@pytest.mark.parametrize("skewed", [0.0, STALLS], ids=["normal", "skewed"])
@pytest.mark.parametrize("accuracy", [RISING, SATURATED], ids=["rising", "saturated"])
def test_an_equal_arm_and_mere_shortenings_are_not_claimed_and_intervals_hold_the_truth(
    accuracy: object, skewed: float
) -> None:
    total: Counter[str] = Counter()
    for k, full in enumerate((1.0, 0.8, 0.65)):
        for seeds in (3, 5, 10):
            law = Law(accuracy, full=full, stalls=skewed)  # type: ignore[arg-type]
            total += rates(law, Law(accuracy, stalls=skewed), seeds, 1.0, 1000 * k + 100 * seeds)  # type: ignore[arg-type]
    assert total["all"] == 450
    assert total["contradiction"] == 0
    assert total["claimed"] / total["all"] <= 0.03 + 0.015  # 450 repetitions tell a rate of 0.03 to +-0.016
    assert total["sooner"] / total["all"] <= 0.03 + 0.015
    assert 0.93 - 0.02 <= total["covered"] / total["all"] <= 0.97 + 0.015


def test_noise_that_is_skewed_in_the_baseline_only_leaves_intervals_that_hold_the_truth() -> None:
    truth = math.exp(STALLS * math.log(1.3))
    total: Counter[str] = Counter()
    for seeds in (3, 5, 10):
        total += rates(Law(RISING), Law(RISING, stalls=STALLS), seeds, truth, 70 * seeds)
    assert total["covered"] / total["all"] >= 0.90


@pytest.mark.parametrize("accuracy", [RISING, SATURATED], ids=["rising", "saturated"])
def test_a_true_gain_of_1_3_is_found_with_five_seeds(accuracy: object) -> None:
    found = rates(Law(accuracy, 1.3), Law(accuracy), 5, 1.3, 9000)  # type: ignore[arg-type]
    assert found["claimed"] / found["all"] >= 0.80
    assert found["covered"] / found["all"] >= 0.88


def test_the_best_of_five_equal_arms_is_not_claimed_more_often_than_one() -> None:
    claimed = 0
    for i in range(120):
        laws = {"plain": Law(RISING, 0.5), "strong": Law(RISING), **{f"m{k}": Law(RISING) for k in range(5)}}
        claimed += (drive(laws, 3, i).verdict["claim"] or "").startswith("m")
    assert claimed / 120 <= 0.06


def test_an_arm_that_never_gets_there_neither_sets_the_target_nor_is_claimed() -> None:
    low = Law(lambda share: RISING(share) - 0.2, 3.0)
    for i in range(10):
        found = drive({"plain": Law(RISING, 0.5), "strong": Law(RISING), "m": low}, 3, i)
        row = next(row for row in found.rows if row["name"] == "m")
        assert not row["sets_target"]
        assert row["time"]["state"] == "not reached"
        assert found.aim is not None
        assert found.aim.accuracy > 0.80
        assert found.verdict["claim"] == "strong"


def test_a_target_set_beforehand_that_the_baseline_misses_is_not_said_to_be_reached_by_it() -> None:
    better = Law(lambda share: RISING(share) + 0.03)
    found = drive({"plain": Law(RISING, 0.5), "strong": Law(RISING), "m": better}, 5, 1, target=0.855)
    rows = {row["name"]: row for row in found.rows}
    assert rows["strong"]["time"]["state"] == "not reached"
    versus = rows["m"]["vs_strong"]
    assert versus is not None
    assert (versus["ratio"], versus["verdict"], versus["hi"]) == (None, "sooner", None)
    assert found.verdict["claim"] == "m"
    assert "at least" in found.verdict["sentence"]
