"""Rules of the comparison that a slip of the pen would break without a sound; each of these tests has seen its fault planted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tests.comparison.data import small_data, two_arms
from tests.comparison.test_comparison import ARMS, GOOD, SHARES, records

from hasten.comparison import Arm
from hasten.comparison.blocks import REPEATS, Runner, jobs, noise
from hasten.comparison.curves import curve, quiet
from hasten.comparison.judge import judged
from hasten.comparison.store import Runs
from hasten.comparison.worker import Workload, idle_allowed, run_arm
from hasten.kernels import probe
from hasten.measure.curve import TimeCurve, pooled_spread, sooner
from hasten.recipe import PLAIN, STRONG

ARM = Arm("strong", STRONG, (), "strong")


class Scripted(Runner):
    """A runner whose runs take the seconds of a list, some of them disturbed."""

    def script(self, seconds: list[float], disturbed: set[int] = frozenset()) -> Scripted:  # type: ignore[assignment]
        self.calls: list[tuple[str, float, int]] = []
        self._seconds, self._disturbed = seconds, disturbed
        return self

    def _run(self, arm: Arm, share: float, seed: int, key: str) -> dict[str, Any]:
        n = len(self.calls)
        self.calls.append((arm.name, share, seed))
        return {"arm": arm.name, "share": share, "seed": seed, "failure": None, "accuracy": 0.9, "seconds_train": self._seconds[n],
                "disturbed": ["busy"] if n in self._disturbed else [], "idle": [], "boot": "b", "begun": 0.0}  # fmt: skip


def runner(seconds: list[float], disturbed: set[int] | None = None, planned: int = 100) -> Scripted:
    workload, data = Workload("lenet", small_data(), threads=1), small_data()
    return Scripted(workload, Runs(None, workload, data), None, False, planned).script(
        seconds, disturbed or set()
    )


def test_an_aa_test_whose_interval_does_not_hold_1_is_not_ok_and_order_alone_does_not_fail_it() -> None:
    # copies 1 and 2 take turns in coming first: 1 2, 2 1, 1 2, 2 1
    apart = noise(runner([10.0, 8.0, 8.01, 10.02, 10.01, 8.0, 8.0, 10.0]), ARM, 0.25, 4)
    assert apart is not None
    assert (apart["ok"], round(apart["ratio"], 2), apart["n"]) == (False, 1.25, 4)
    slowing = noise(runner([8.0, 10.0, 8.01, 10.02, 8.0, 10.01, 8.0, 10.0]), ARM, 0.25, 4)
    assert slowing is not None
    assert slowing["ok"]
    assert slowing["ratio"] == pytest.approx(1.0, abs=0.01)


def test_disturbed_pairs_of_the_aa_test_do_not_count() -> None:
    seconds = [10.0, 10.0, 10.0, 10.0, 99.0, 10.0]
    found = noise(runner(seconds, {4}, planned=0), ARM, 0.25, 3)
    assert found is not None
    assert (found["n"], found["ok"]) == (2, True)
    assert noise(runner(seconds, {0, 3}, planned=0), ARM, 0.25, 3) is None


def test_a_disturbed_run_is_repeated_at_once_and_the_last_one_counts_up_to_a_quarter_of_all() -> None:
    slow = runner([50.0, 20.0, 30.0], {0, 1})
    record = slow.one((ARM, 1.0), 0, 0, "k", None)
    assert (record["seconds_train"], record["disturbed"], len(slow.calls)) == (30.0, [], 3)
    never = runner([1.0] * 40, set(range(40)), planned=8)
    for seed in range(8):
        record = never.one((ARM, 1.0), seed, seed, f"k{seed}", None)
        assert record["disturbed"] == ["busy"]
    assert len(never.calls) == 8 + REPEATS * 8


def test_the_order_within_a_block_is_random_and_its_own() -> None:
    arms = [Arm(f"arm{i}", PLAIN) for i in range(5)]
    orders = []
    for seed in range(4):
        r = runner([1.0] * 10)
        r.block(seed, seed, jobs(arms, dict.fromkeys((a.name for a in arms), (0.5, 1.0))))
        orders.append(tuple(r.calls[i][:2] for i in range(10)))
        assert sorted(orders[-1]) == sorted((a.name, s) for a in arms for s in (0.5, 1.0))
    assert len(set(orders)) == 4


def test_the_key_of_a_run_changes_with_whatever_shapes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_data()
    base = Workload("lenet", data, threads=1)

    def key(
        workload: Workload = base, arm: Arm = ARM, share: float = 0.5, seed: int = 0, copy: int = 0
    ) -> str:
        return Runs(None, workload, workload.load()).key(arm, share, seed, copy)

    keys = {
        key(), key(seed=1), key(share=1.0), key(copy=1), key(arm=Arm("strong", STRONG.with_(lr=0.3))),
        key(arm=two_arms()[1]), key(dataclasses.replace(base, threads=2)), key(dataclasses.replace(base, device="meta")),
        key(dataclasses.replace(base, model="resnet8")), key(dataclasses.replace(base, data=small_data(1))),
        key(dataclasses.replace(base, validation=0.2)),
    }  # fmt: skip
    assert len(keys) == 11
    assert key(arm=dataclasses.replace(ARM, name="other", label="x", kind="stack")) == key()
    monkeypatch.setattr(probe, "fingerprint", lambda: "another machine")
    assert key() not in keys


def test_one_quiet_block_is_not_enough() -> None:
    rows = records({"strong": 1.0, "m": 2.0}, seeds=3)
    points = {
        name: [(s, [r for r in rows if r["arm"] == name and r["share"] == s]) for s in SHARES]
        for name in ("strong", "m")
    }
    for r in rows:
        r["disturbed"] = [] if r["block"] < 2 else ["busy"]
    assert quiet(points)
    for r in rows:
        r["disturbed"] = [] if r["block"] < 1 or r["arm"] == "m" else ["busy"]
    assert not quiet(points)


def test_luck_on_the_test_images_does_not_move_the_target() -> None:
    rows = [{**r, "validation": r["accuracy"]} for r in records({"plain": 1.0, "strong": 2.0, "m": 3.0})]
    unlucky = [{**r, "accuracy": r["accuracy"] - (0.02 if r["arm"] == "m" else 0.0)} for r in rows]
    shares = {a.name: SHARES for a in ARMS}
    aims = [judged(ARMS, shares, some, goal=None, aa=GOOD).aim for some in (rows, unlucky)]
    assert aims[0] is not None
    assert aims[1] is not None
    assert aims[0].accuracy == aims[1].accuracy


def test_the_spread_of_paired_times_widens_the_interval() -> None:
    rng = np.random.Generator(np.random.Philox(5))
    budgets = np.array([2.0, 4.0, 8.0])
    accuracies = (0.9 - 0.4 / budgets)[:, None] + 1e-6 * rng.standard_normal((3, 6))

    def span(noise_: float) -> float:
        arms = [
            TimeCurve(budgets, budgets[:, None] * np.exp(noise_ * rng.standard_normal((3, 6))), accuracies)
            for _ in range(2)
        ]
        found = sooner(arms[0], arms[1], 0.8, pooled_spread(arms))
        return float(np.log(found.high / found.low))

    wide = np.mean([span(0.05) for _ in range(20)])
    # t(5) = 2.57 times sqrt(2) * 0.05 / sqrt(6) on each side
    assert 0.10 < wide < 0.20
    assert np.mean([span(0.0005) for _ in range(20)]) < 0.01


def test_a_method_that_never_acts_fails_a_full_run_and_not_a_shorter_one() -> None:
    from hasten import method

    late = Arm(
        "late", PLAIN.with_(epochs=1, batch_size=16, lr=0.01), (method("selective_backprop", prime_epochs=5),)
    )
    work = Workload("lenet", small_data(), threads=1)
    assert "never acted" in run_arm(work, late, 1.0, 0)["failure"]
    short = run_arm(work, late, 0.5, 0)
    assert (short["failure"], short["idle"]) == (None, ["selective_backprop"])
    assert idle_allowed(two_arms()[1]) == ("mixed_precision",)
    assert idle_allowed(Arm("mixed_precision", PLAIN, (method("mixed_precision"),))) == ()


def test_a_failed_run_takes_the_whole_curve_with_it() -> None:
    rows = [r for r in records({"m": 1.0}, seeds=2)]
    points = [(s, [r for r in rows if r["share"] == s]) for s in SHARES]
    assert curve(points, 2, 10.0) is not None
    rows[3]["failure"] = "it broke"
    assert curve(points, 2, 10.0) is None
