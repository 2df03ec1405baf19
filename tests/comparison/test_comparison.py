"""Comparisons: blocks, resuming, dead processes, and what the numbers become."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from hasten import HastenError, compare, keyed, method
from hasten.comparison import Arm, baselines, controls, demo_arms
from hasten.comparison.arms import stacks
from hasten.comparison.run import run_blocks
from hasten.comparison.summary import summarise
from hasten.comparison.worker import Workload, fresh_process
from hasten.data import DataSet, Images
from hasten.errors import ConflictError, SettingsError
from hasten.recipe import PLAIN, STRONG
from hasten.report import from_json


def small_data() -> DataSet:
    rng = np.random.Generator(np.random.Philox(0))
    labels = np.arange(96) % 3
    pixels = rng.integers(0, 60, (96, 16, 16, 1)) + 60 * labels[:, None, None, None]
    images = Images(pixels.astype(np.uint8), labels, ("a", "b", "c"))
    return DataSet("small", images, images.take(np.arange(48)), flip_ok=True)


def two_arms(epochs: float = 1.0) -> list[Arm]:
    recipe = STRONG.with_(epochs=epochs, batch_size=16, lr=0.01)
    return [
        Arm("plain", recipe, (), "baseline"),
        Arm("strong", recipe, (method("mixed_precision", dtype="float32"),), "strong"),
    ]


class Dies(nn.Module):
    """Kills its process in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 3)

    def forward(self, x: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        return self.head(x.flatten(1))


def test_a_comparison_runs_stores_and_goes_on_where_it_was(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    arms = two_arms()

    def stop_after_three(done: int, total: int, record: dict[str, Any]) -> None:
        told.append((done, record["key"]))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(
            "lenet",
            small_data(),
            arms=arms,
            seeds=[0, 1],
            out=tmp_path / "c",
            isolate=False,
            tell=stop_after_three,
        )
    stored = (tmp_path / "c/runs.jsonl").read_text().splitlines()
    assert len(stored) == 3
    again = compare("lenet", small_data(), arms=arms, seeds=[0, 1], out=tmp_path / "c", isolate=False)
    lines = (tmp_path / "c/runs.jsonl").read_text().splitlines()
    assert lines[:3] == stored
    assert len(lines) == 4
    assert again.folder is not None
    assert from_json((again.folder / "report.json").read_text()) == again.data
    assert (again.folder / "report.html").stat().st_size < 400_000
    assert any("strong" in line for line in again.lines())


def test_every_block_runs_every_arm_once_in_an_order_of_its_own() -> None:
    seen: list[tuple[int, str]] = []
    arms = [Arm(f"arm{i}", PLAIN.with_(epochs=0.2, batch_size=16, lr=0.01)) for i in range(4)]
    records = run_blocks(Workload("lenet", small_data(), threads=1), arms, [5, 6, 7], None, False,
                         lambda d, t, r: seen.append((r["seed"], r["arm"])))  # fmt: skip
    assert [s for s, _ in seen] == [5] * 4 + [6] * 4 + [7] * 4
    orders = [tuple(a for s, a in seen if s == seed) for seed in (5, 6, 7)]
    assert all(sorted(order) == sorted(a.name for a in arms) for order in orders)
    assert len(set(orders)) > 1
    assert {r["block"] for r in records} == {0, 1, 2}
    assert len({r["key"] for r in records}) == 12


def test_a_dead_process_is_a_failure_in_the_report_and_not_a_missing_row() -> None:
    arm = Arm("dies", PLAIN.with_(epochs=0.2, batch_size=16, lr=0.01))
    record = fresh_process(Workload(Dies, small_data(), threads=1), arm, 0)
    assert "killed by signal 9" in record["failure"]
    fine = {"arm": "plain", "seed": 0, "block": 0, "failure": None, "accuracy": 0.9, "seconds_train": 2.0}
    arms = [Arm("plain", PLAIN, (), "baseline"), Arm("dies", PLAIN)]
    data = summarise(Workload("lenet", small_data()), arms, [fine, {**record, "block": 0}], target=0.5)
    assert data["failures"][0]["arm"] == "dies"
    assert data["arms"][1]["reached"]["yes"] is False
    assert data["arms"][1]["vs_plain"] is not None
    assert data["arms"][1]["vs_plain"]["verdict"] == "not measured"


def fake(
    arm: str, seed: int, seconds: float, accuracy: float, disturbed: list[str] | None = None
) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "block": seed, "failure": None, "accuracy": accuracy, "seconds_train": seconds,
            "seconds_total": seconds + 1, "disturbed": disturbed or []}  # fmt: skip


def test_ratios_and_verdicts_follow_from_the_runs() -> None:
    plain, strong = baselines()
    arms = [
        plain,
        strong,
        *controls(strong, (0.5,)),
        Arm("fast", STRONG),
        Arm("wrong", STRONG),
        Arm("equal", STRONG),
    ]
    rng = np.random.Generator(np.random.Philox(keyed.key64("ratios")))
    records = []
    for seed in range(8):
        slow = math.exp(rng.normal(0, 0.05))  # what a block shares cancels
        for name, seconds, accuracy in (("plain", 40.0, 0.90), ("strong", 20.0, 0.92), ("strong-0.5", 10.0, 0.89),
                                        ("fast", 10.0, 0.915), ("wrong", 5.0, 0.8), ("equal", 20.0, 0.92)):  # fmt: skip
            noise = math.exp(rng.normal(0, 0.01))
            records.append(fake(name, seed, seconds * slow * noise, accuracy + rng.normal(0, 0.001)))
    data = summarise(Workload("lenet", small_data()), arms, records, target="plain")
    rows = {arm["name"]: arm for arm in data["arms"]}
    assert data["target"]["accuracy"] == pytest.approx(0.9, abs=0.002)
    fast = rows["fast"]["vs_strong"]
    assert fast is not None
    assert fast["verdict"] == "faster"
    assert fast["lo"] is not None
    assert fast["hi"] is not None
    assert fast["lo"] < 2.0 < fast["hi"]
    assert fast["hi"] / fast["lo"] < 1.05  # the block's share cancels in the pair
    curve = rows["fast"]["vs_curve"]
    assert curve is not None
    assert curve["ratio"] is not None
    assert 1.5 < curve["ratio"] < 2.0  # the curve reaches 0.915 before 20 s and after 15 s
    assert rows["wrong"]["vs_strong"] is not None
    assert rows["wrong"]["vs_strong"]["verdict"] == "missed"
    assert rows["equal"]["vs_strong"] is not None
    assert rows["equal"]["vs_strong"]["verdict"] == "not shown"
    assert data["verdict"]["claim"] == "fast", data["verdict"]
    assert json.loads(json.dumps(data)) == data


def test_no_gain_is_told_of_an_emulated_format() -> None:
    plain, strong = baselines()
    arms = [plain, strong, *controls(strong, (0.5,)), Arm("imitated", STRONG)]
    records = [fake(arm.name, seed, 10.0, 0.9) for seed in range(3) for arm in arms]
    for record in records:
        if record["arm"] == "imitated":
            record["seconds_train"] = 1.0
            record["effects"] = {
                "narrow": {"touched": {}, "skipped": {}, "saves": "", "work": None, "emulated": True}
            }
    data = summarise(Workload("lenet", small_data()), arms, records, target="plain")
    row = next(arm for arm in data["arms"] if arm["name"] == "imitated")
    for ratio in (row["vs_strong"], row["vs_plain"], row["vs_curve"]):
        assert ratio is not None
        assert ratio["ratio"] is None
        assert "narrow: an emulated format" in (ratio["reason"] or "")
    assert data["verdict"]["claim"] != "imitated"


def test_disturbed_blocks_leave_the_ratios_and_are_named() -> None:
    plain, strong = baselines()
    records = [fake("plain", s, 40.0, 0.9) for s in range(4)] + [
        fake("strong", s, 20.0, 0.92) for s in range(3)
    ]
    records.append(fake("strong", 3, 90.0, 0.92, ["other processes 40% > 5%"]))
    data = summarise(Workload("lenet", small_data()), [plain, strong], records, target="plain")
    versus = data["arms"][1]["vs_plain"]
    assert versus is not None
    assert versus["n"] == 3
    assert versus["ratio"] == pytest.approx(2.0)
    slow = Arm("same", STRONG)
    again = [
        *records,
        *(fake("strong-0.5", s, 10.0, 0.90) for s in range(4)),
        *(fake("same", s, 20.0, 0.92) for s in range(4)),
    ]
    curve = summarise(
        Workload("lenet", small_data()),
        [plain, strong, *controls(strong, (0.5,)), slow],
        again,
        target="plain",
    )
    at_equal = curve["arms"][-1]["vs_curve"]
    assert at_equal is not None
    assert at_equal["ratio"] == pytest.approx(1.0)  # the 90 s of the disturbed block are not in the yardstick
    assert data["dropped"] == [{"block": 3, "reason": "strong: other processes 40% > 5%"}]


def test_the_key_of_a_run_changes_with_whatever_shapes_it() -> None:
    common = Workload("lenet", small_data()).describe()
    arm = Arm("a", STRONG, (method("error_map_pruning"),))
    keys = {
        arm.key(0, common),
        arm.key(1, common),
        Arm("a", STRONG.with_(lr=0.3), arm.methods).key(0, common),
        Arm("a", STRONG, (method("error_map_pruning", keep=0.7),)).key(0, common),
        Arm("b", STRONG, arm.methods).key(0, common),  # the same training twice is two runs
        arm.key(0, {**common, "threads": 7}),
        arm.key(0, {**common, "train": 10}),
    }
    assert len(keys) == 7
    assert Arm("a", STRONG, arm.methods, "stack", "label").key(0, common) == arm.key(0, common)


def test_stacks_are_added_one_in_and_left_one_out() -> None:
    strong = baselines()[1]
    chosen = [method("error_map_pruning"), method("s3pool"), method("selective_backprop")]
    arms = stacks(strong, chosen)
    sizes = sorted(len(arm.methods) - len(strong.methods) for arm in arms)
    assert sizes == [1, 1, 1, 2, 2, 2, 3]
    assert all(arm.methods[: len(strong.methods)] == strong.methods for arm in arms)


def test_bad_comparisons_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(
        ConflictError,
        match=r"selective_backprop.*importance_sampling|importance_sampling.*selective_backprop",
    ):
        compare(
            "lenet",
            small_data(),
            [method("selective_backprop"), method("importance_sampling")],
            out=tmp_path / "x",
        )
    for bad in (1.5, 0.0, "best"):
        with pytest.raises(SettingsError, match="target"):
            compare("lenet", small_data(), arms=two_arms(), target=bad)
    with pytest.raises(SettingsError, match="different names"):
        compare("lenet", small_data(), arms=[two_arms()[0]] * 2)
    with pytest.raises(SettingsError, match="arm name"):
        Arm("a/b", STRONG)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("")
    with pytest.raises(HastenError, match="foreign"):
        compare("lenet", small_data(), arms=two_arms(), out=tmp_path / "foreign", isolate=False)


def test_the_demo_names_both_baselines_a_control_and_a_stack() -> None:
    arms, settings = demo_arms()
    kinds = [arm.kind for arm in arms]
    assert {"baseline", "strong", "control", "stack"} <= set(kinds)
    assert settings["data"] == "fashion-mnist-12k"
