"""Running a comparison: what is stored and taken again, what stops it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.comparison.data import Dies, small_data, two_arms
from torch import nn

from hasten import compare, exporting
from hasten.comparison import Arm, Told
from hasten.comparison import blocks as blocks_
from hasten.comparison import store as store_
from hasten.comparison.plan import Cost, Plan, duration, fitted, from_text
from hasten.comparison.shares import GRID, around, crossing, placed
from hasten.comparison.worker import Workload, fresh_process
from hasten.data import DataSet, Images
from hasten.errors import HastenError, SettingsError, UnsupportedError
from hasten.measure.load import Load, Watch
from hasten.recipe import PLAIN
from hasten.report import from_json

QUICK: dict[str, Any] = {"isolate": False, "budgets": (0.5,), "aa_pairs": 0, "compile": False, "threads": 1}
NET = """
import torch.nn as nn
from helper import WIDTH
def make(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, WIDTH, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes))
"""


class Calm(Watch):
    """Sees no other process, so that a test does not depend on what else the machine does."""

    def stop(self) -> tuple[Load, list[str]]:
        return super().stop()[0], []


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_, "Watch", Calm)


class Seen(Told):
    """Keeps what is told; stops the comparison after ``stop`` runs."""

    def __init__(self, stop: int = 0) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.stop = stop

    def say(self, line: str) -> None:
        self.lines.append(line)

    def run(self, done: int, planned: int, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.stop and done == self.stop:
            raise KeyboardInterrupt


def stored(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_a_comparison_runs_stores_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        compare("lenet", small_data(), arms=two_arms(), seeds=2, out=out, told=Seen(stop=3), **QUICK)
    assert len(stored(out)) == 3
    told = Seen()
    again = compare("lenet", small_data(), arms=two_arms(), seeds=2, out=out, told=told, **QUICK)
    assert len(stored(out)) == 8
    assert f"3 of 8 runs taken from {out}" in told.lines
    assert again.data["plan"] is not None
    assert (again.data["plan"]["reused"], again.data["plan"]["runs"]) == (3, 8)
    assert again.folder is not None
    assert from_json((again.folder / "report.json").read_text()) == again.data
    assert (again.folder / "report.html").stat().st_size < 400_000
    assert again.lines()[0].startswith("No claim")
    assert {p["share"] for arm in again.data["arms"] for p in arm["points"]} == {0.5, 1.0}


def test_the_whole_course_with_its_aa_test_and_first_pass(tmp_path: Path) -> None:
    told = Seen()
    found = compare("lenet", small_data(), arms=two_arms(), seeds=[5, 9], out=tmp_path / "c", told=told, isolate=False,
                    compile=False, threads=1)  # fmt: skip
    first = [(r["arm"], r["share"], r["seed"]) for r in told.records]
    assert first[:6] == [("strong", 0.25, s) for s in (0, 0, 1, 1, 2, 2)]  # the A/A test comes first
    assert sorted(first[6:12]) == [(a, s, 5) for a in ("plain", "strong") for s in (0.25, 0.5, 1.0)]
    seeds = {
        arm["name"]: [{r["seed"] for r in p["runs"]} for p in arm["points"]] for arm in found.data["arms"]
    }
    assert all(one == {5, 9} for per in seeds.values() for one in per)
    assert all(arm["points"][-1]["share"] == 1.0 and len(arm["points"]) >= 3 for arm in found.data["arms"])
    assert found.data["aa"] is None or found.data["aa"]["n"] <= 3
    assert any(line.startswith("Plan ") and "predicted" in line for line in told.lines)
    # the validation images were cut from the training images, and every run was judged on them
    assert found.data["settings"]["train"] == 87
    assert all(r["validation"] is not None for r in told.records)


def test_the_network_of_the_best_arm_is_kept_and_nothing_else(tmp_path: Path) -> None:
    found = compare("lenet", small_data(), arms=two_arms(), seeds=1, out=tmp_path / "c", **QUICK)
    assert found.data["network"] == "network"
    assert not (tmp_path / "c/work").exists()
    trained = exporting.load_run(tmp_path / "c/network")
    best = max(found.data["arms"], key=lambda row: row["accuracy"]["mean"] or 0.0)
    assert trained.accuracy == pytest.approx(best["accuracy"]["mean"])


def test_edited_code_its_neighbour_and_changed_data_are_run_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    out = tmp_path / "c"

    def ran(data: DataSet) -> int:
        before = len(stored(out)) if (out / "runs.jsonl").exists() else 0
        compare("net.py:make", data, arms=two_arms(), seeds=1, out=out, **QUICK)
        return len(stored(out)) - before

    data = small_data()
    assert ran(data) == 4
    assert ran(data) == 0
    (tmp_path / "net.py").write_text(NET.replace("nn.ReLU()", "nn.Tanh()"))
    assert ran(data) == 4
    sys.modules.pop("helper", None)
    (tmp_path / "helper.py").write_text("WIDTH = 5\n")
    assert ran(data) == 4
    mixed = Images(data.train.pixels, np.roll(data.train.labels, 1), data.classes)
    assert ran(DataSet("small", mixed, data.test, flip_ok=True)) == 4
    sys.modules.pop("helper", None)


def test_an_object_is_known_by_its_weights(tmp_path: Path) -> None:
    def net(value: float) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
        with torch.no_grad():
            made[1].bias.fill_(value)
        return made

    out = tmp_path / "c"
    for value, runs in ((0.0, 4), (0.0, 4), (1.0, 8)):
        compare(net(value), small_data(), arms=two_arms(), seeds=1, out=out, **QUICK)
        assert len(stored(out)) == runs


def test_failures_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, flag = tmp_path / "c", tmp_path / "broken"
    flag.touch()

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(256, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if flag.exists() and self.training and self.calls > 3:
                raise HastenError("it broke")
            self.calls += 1
            return self.head(x.flatten(1))

        calls = 0

    monkeypatch.setattr("hasten.comparison.plan.PROBE_STEPS", 2)
    first = compare(Fragile(), small_data(), arms=two_arms(), seeds=1, out=out, **QUICK)
    assert len(first.data["failures"]) == 4
    flag.unlink()
    second = compare(Fragile(), small_data(), arms=two_arms(), seeds=1, out=out, **QUICK)
    assert second.data["failures"] == []
    assert len(stored(out)) == 8


def test_runs_of_another_day_or_boot_are_never_paired_with_todays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    compare("lenet", small_data(), arms=two_arms(), seeds=1, out=out, **QUICK)
    third = Arm("third", two_arms()[0].recipe.with_(lr=0.02))
    told = Seen()
    compare("lenet", small_data(), arms=[*two_arms(), third], seeds=1, out=out, told=told, **QUICK)
    assert any(line.startswith("4 of 6") for line in told.lines)  # of the same hour: the block goes on
    yesterday = [{**r, "begun": r["begun"] - 24 * 3600} for r in stored(out)[:4]]
    (out / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in yesterday))
    told = Seen()
    compare("lenet", small_data(), arms=[*two_arms(), third], seeds=1, out=out, told=told, **QUICK)
    assert not any("taken" in line for line in told.lines)
    monkeypatch.setattr(store_, "boot", lambda: "another boot")
    fourth = Arm("fourth", two_arms()[0].recipe.with_(lr=0.03))
    told = Seen()
    compare("lenet", small_data(), arms=[*two_arms(), fourth], seeds=1, out=out, told=told, **QUICK)
    assert not any("taken" in line for line in told.lines)


def test_asked_again_a_finished_comparison_times_anew_what_was_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy(Watch):
        def stop(self) -> tuple[Load, list[str]]:
            return super().stop()[0], ["busy"]

    out = tmp_path / "c"
    monkeypatch.setattr(blocks_, "Watch", Busy)
    with pytest.raises(KeyboardInterrupt):
        compare("lenet", small_data(), arms=two_arms(), seeds=1, out=out, told=Seen(stop=2), **QUICK)
    told = Seen()
    compare("lenet", small_data(), arms=two_arms(), seeds=1, out=out, told=told, **QUICK)
    assert f"2 of 4 runs taken from {out}" in told.lines  # what was stopped goes on
    monkeypatch.setattr(blocks_, "Watch", Calm)
    told = Seen()
    compare("lenet", small_data(), arms=two_arms(), seeds=1, out=out, told=told, **QUICK)
    assert not any("taken" in line for line in told.lines)
    assert all(not r["disturbed"] for r in told.records)


def test_a_plan_is_kept_for_each_question(tmp_path: Path) -> None:
    out = tmp_path / "c"
    for epochs in (2.0, 3.0, 2.0):
        compare("lenet", small_data(), arms=two_arms(epochs), seeds=1, out=out, **QUICK)
    assert len(json.loads((out / "plan.json").read_text())) == 2
    assert len(stored(out)) == 8


def test_arms_that_have_learned_nothing_are_told_so() -> None:
    noise = np.random.default_rng(0)
    pixels = noise.integers(0, 255, (96, 16, 16, 1)).astype(np.uint8)
    images = Images(pixels, noise.permutation(np.arange(96) % 3), ("a", "b", "c"))
    data = DataSet("noise", images, images.take(np.arange(48)), flip_ok=True)
    found = compare("lenet", data, arms=two_arms(0.5), seeds=2, **{**QUICK, "aa_pairs": 2})
    assert "hardly learned anything" in found.sentence
    assert str(found).startswith(found.sentence[:20])
    assert len(repr(found)) < 400


def test_equal_arms_of_two_questions_share_their_runs_but_an_aa_test_makes_its_own(tmp_path: Path) -> None:
    same = Arm("again", two_arms()[1].recipe, two_arms()[1].methods)
    told = Seen()
    compare("lenet", small_data(), arms=[*two_arms(), same], seeds=2, out=tmp_path / "c", told=told,
            **{**QUICK, "aa_pairs": 2})  # fmt: skip
    assert len({r["key"] for r in told.records[:4]}) == 4
    strong, again = ([r["key"] for r in told.records[4:] if r["arm"] == name] for name in ("strong", "again"))
    assert sorted(strong) == sorted(again)


def test_model_and_data_are_built_once_before_anything_runs(tmp_path: Path) -> None:
    def broken(num_classes: int) -> nn.Module:
        raise RuntimeError("the new net was built")

    with pytest.raises(HastenError, match="cannot be built: RuntimeError: the new net was built"):
        compare(broken, small_data(), arms=two_arms(), **QUICK)
    with pytest.raises(HastenError, match="cannot take an image of 16x16"):
        compare(nn.Linear(7, 3), small_data(), arms=two_arms(), **QUICK)
    late = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(HastenError, match="2 outputs"):
        compare(late, small_data(), arms=two_arms(), out=tmp_path / "c", **QUICK)
    assert not (tmp_path / "c/runs.jsonl").exists()


def test_a_dead_process_is_a_failure_and_a_lambda_is_refused_with_what_to_do() -> None:
    arm = Arm("dies", PLAIN.with_(epochs=0.2, batch_size=16, lr=0.01))
    record = fresh_process(Workload(Dies, small_data(), threads=1), arm, 1.0, 0)
    assert "killed by signal 9" in record["failure"]
    with pytest.raises(UnsupportedError, match="isolate=False"):
        fresh_process(Workload(lambda: nn.Linear(1, 1), small_data(), threads=1), arm, 1.0, 0)
    with pytest.raises(UnsupportedError, match=r"isolate=False"):
        compare(lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), small_data(), arms=two_arms(),
                **{**QUICK, "isolate": True})  # fmt: skip
    told = Seen()
    compare(lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), small_data(), arms=two_arms(), seeds=1, told=told,
            **{**QUICK, "isolate": None})  # fmt: skip
    assert any("share this process" in line for line in told.lines)


SCRIPT = """
import numpy as np, sys
import torch.nn as nn
from hasten import compare
from tests.comparison.data import small_data, two_arms
class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__(); self.f = nn.Linear(256, num_classes)
    def forward(self, x): return self.f(x.flatten(1))
c = compare(Net, small_data(), arms=two_arms(), seeds=1, budgets=(0.5,), aa_pairs=0, compile=False, threads=1)
print("ENDED", len(c.data["failures"]), *c.data["notes"])
"""


def test_a_class_from_standard_input_runs_and_a_script_without_a_main_guard_is_told(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    piped = subprocess.run(
        [sys.executable, "-"], input=SCRIPT, capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert "ENDED 0 " in piped.stdout, piped.stderr
    assert "All runs shared one process" in piped.stdout
    (tmp_path / "script.py").write_text(SCRIPT)
    bare = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
        check=False,
    )
    assert bare.returncode != 0
    assert 'if __name__ == "__main__":' in bare.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_killing_a_comparison_ends_its_worker(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "hasten", "compare", "--model", "resnet20", "--epochs", "9", "--seeds", "1", "--threads", "1",
               "--budgets", "1.0", "--out", str(tmp_path / "c")]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
                          cwd=tmp_path) as process:  # fmt: skip

        def group() -> list[int]:
            rows = [line.split() for line in subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True,
                                                            check=True).stdout.splitlines()[1:]]  # fmt: skip
            return [
                int(pid) for pid, pgid, stat in rows if int(pgid) == process.pid and not stat.startswith("Z")
            ]

        until, seen = time.monotonic() + 60, 0
        while seen < 4 and time.monotonic() < until:  # itself, the server of processes, its helper, and a run
            time.sleep(0.05)
            seen = len(group())
        assert seen >= 4
        process.send_signal(number)
        assert process.stderr is not None
        said = process.stderr.read() if number != signal.SIGKILL else ""
        process.wait(60)
        until = time.monotonic() + 20
        while group() and time.monotonic() < until:
            time.sleep(0.2)
        assert group() == []
    if number == signal.SIGINT:
        assert "the same command goes on" in said


@pytest.mark.parametrize(
    ("text", "seconds"), [("20m", 1200), ("90s", 90), ("1h30m", 5400), ("2", 120), ("0.5h", 1800)]
)
def test_limits_are_read(text: str, seconds: float) -> None:
    assert from_text(text) == seconds
    assert duration(5400) == "90 min" or duration(5400) == "1 h 30 min"


def test_a_limit_gives_epochs_first_then_images_and_adds_seeds_where_there_is_time() -> None:
    arms = [
        Arm("plain", PLAIN.with_(epochs=10), (), "baseline"),
        Arm("strong", PLAIN.with_(epochs=10), (), "strong"),
    ]
    costs = {"plain": Cost(1.0, 0.0, 0.5, 400), "strong": Cost(1.0, 0.5, 0.2, 400)}

    def plan(limit: float | None) -> Plan:
        return fitted(
            Plan(arms, [0, 1, 2], costs, 1.0, None, 3, limit), 5000, 10, seeds_given=False, spent=0.0
        )

    free = plan(None)
    assert free.changes == []
    for limit in (free.seconds * 0.5, free.seconds * 0.1, free.seconds * 1.2, free.seconds * 3):
        cut = plan(limit)
        assert cut.seconds <= limit
        assert cut.seconds >= 0.6 * limit or len(cut.seeds) == 10
        assert bool(cut.changes) == (limit != free.seconds * 1.2)
    half = plan(free.seconds * 0.5)
    assert half.keep == 1.0
    assert 2 < half.arms[0].recipe.epochs < 6
    assert plan(free.seconds * 0.1).keep < 1.0
    assert len(plan(free.seconds * 3).seeds) > 3
    with pytest.raises(SettingsError, match="too short"):
        plan(10.0)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.33, 0.5, 0.7, 0.9, 1.0])
def test_the_budgets_bracket_where_the_arm_reaches_the_target(share: float) -> None:
    chosen = around(share)
    assert 1.0 in chosen
    assert set(chosen) <= set(GRID)
    assert min(chosen) < share <= max(chosen)
    assert sum(g < share for g in chosen) >= 1
    assert 3 <= len(chosen) <= 4


def test_a_first_pass_places_each_arm_by_its_own_points() -> None:
    def points(faster: float) -> dict[float, float]:
        return {s: 0.9 - 0.4 * float(np.exp(-3 * s * faster)) for s in (0.25, 0.5, 1.0)}

    placed_ = placed({"strong": points(1.0), "m": points(2.0)}, "strong", None)
    assert min(placed_["m"]) < min(placed_["strong"])
    assert crossing([0.25, 0.5, 1.0], [0.7, 0.8, 0.9], 0.85) == pytest.approx(2**-0.5)
    assert crossing([0.25, 0.5, 1.0], [0.7, 0.8, 0.9], 0.95) == 1.0
    assert crossing([0.25, 0.5, 1.0], [0.7, 0.8, 0.9], 0.65) < 0.25


def own_loop(session: Any, data: Any, budget: Any) -> None:
    """A loop of the user's own."""
    done = 0
    while done < budget.steps:
        for batch in data.epoch(done):
            session.step(batch.inputs, batch.targets, batch.index)
            done += 1
            if done >= budget.steps:
                break


def test_a_loop_of_the_users_own_is_compared_like_any_arm(tmp_path: Path) -> None:
    own = [Arm(a.name, a.recipe, a.methods, a.kind, train_fn=own_loop) for a in two_arms()]
    found = compare("lenet", small_data(), arms=own, seeds=1, out=tmp_path / "c", **QUICK)
    assert found.data["failures"] == []
    assert {run["samples_backward"] for arm in found.data["arms"] for run in arm["points"][-1]["runs"]} == {
        160
    }


def test_a_data_loader_decides_order_and_augmentation_and_the_report_says_so() -> None:
    data = small_data()
    x = torch.from_numpy(data.train.pixels).permute(0, 3, 1, 2).float() / 255 - 0.3
    pairs = torch.utils.data.TensorDataset(x, torch.from_numpy(data.train.labels))
    loader = torch.utils.data.DataLoader(pairs, batch_size=16, shuffle=True)
    test = torch.utils.data.DataLoader(pairs, batch_size=48)
    found = compare("lenet", (loader, test), arms=two_arms(), seeds=1, **QUICK)
    assert found.data["failures"] == []
    assert any("own loader" in note for note in found.data["notes"])
    assert any("chosen on the test images" in note for note in found.data["notes"])
