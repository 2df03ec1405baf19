"""Net2Net on CIFAR-10: equal accuracy sooner, from a small network grown in the run or made before it.

Two comparisons with the strong baseline. In the first every arm trains WRN-16-4 from fresh weights, and the grown ones
begin with half its channels. In the second a trained WRN-16-2 is widened to WRN-16-4 and trained on; it exists for other
reasons, so its training is not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    WORK,
    Printed,
    accuracy_claims,
    build,
    cifar10,
    claims_of,
    shortened,
    store,
    strong,
    to_accuracy,
)
from hasten import STRONG, fit, keyed
from hasten.comparison import Arm
from hasten.comparison.blocks import Job, Runner
from hasten.comparison.judge import Judged, judged
from hasten.comparison.store import Runs
from hasten.comparison.worker import Workload, threads_here
from hasten.data import DataSet
from hasten.methods.structure.growing import target_widths, widen
from hasten.methods.structure.net2net import Net2Net
from hasten.report.schema import Noise
from hasten.surgery import Surgeon

CLAIM = "net2net, WRN-16-4, CIFAR-10: equal accuracy >= 1.5x sooner from an existing WRN-16-2, >= 1.15x in one run"
MINUTES = 38
SEEDS, EPOCHS = 3, 2.0
TRAIN, TEST, HELD_OUT = 12_500, 2_500, 0.1
LARGE, SMALL = "wrn-16-4", "wrn-16-2"
LONGER = 1.25
RATES = (0.1, 0.3)  # of the teacher's initial rate; the first is the paper's advice
SHARES = (0.25, 0.5, 1.0)
"""Budgets of the second comparison; the full one of a student is half of the strong baseline's."""
Record = dict[str, Any]


def main(smoke: bool = False) -> None:
    """Run both comparisons and store them in one result."""
    base = Arm("strong", STRONG.with_(epochs=EPOCHS, lr=0.2), (strong(),), "strong", "strong (bf16, NHWC)")
    arms = [
        base,
        grown("grown-0.4", base, "grown at 40%, scheduled rate", at=(0.4,), lr_scale=1.0),
        grown("grown-0.6", base, "grown at 60%, 1.25x the epochs", LONGER, at=(0.6,), lr_scale=1.0),
    ]
    finished = to_accuracy(
        "net2net", LARGE, cifar10(), arms, seeds=SEEDS, smoke=smoke, train=TRAIN, test=TEST
    )
    found, records = students(shortened(base) if smoke else base, finished.data["aa"], smoke)
    claims = accuracy_claims(finished, 1.15)
    if found.aim is not None:
        where = f"{LARGE} from an existing {SMALL} on cifar10 ({TRAIN} images)"
        claims += claims_of(found.rows, found.aim.accuracy, where, 1.5)
        for row in claims:
            row["methods"] = ["net2net"]
    values = {"report": finished.data, "student": {"rows": found.rows, "records": records}}
    store("net2net", values, smoke, claims)


def grown(name: str, base: Arm, label: str, times: float = 1.0, **settings: Any) -> Arm:
    """Return the strong baseline that begins with half the channels, run for ``times`` its epochs."""
    recipe = base.recipe.with_(epochs=times * base.recipe.epochs)
    return Arm(name, recipe, (*base.methods, Net2Net(narrow=0.5, **settings)), "method", label)


# -- from a small network that exists
def students(base: Arm, aa: Noise | None, smoke: bool) -> tuple[Judged, list[Record]]:
    """Return what the second comparison amounts to, and its runs.

    Every seed has a small network of its own. aa: the strong baseline against itself, from the first comparison.
    """
    part = cifar10().stratified(320, 100) if smoke else cifar10().stratified(TRAIN, TEST)
    data = part.hold_out(HELD_OUT)
    arms = [base, *student_arms(base)]
    records: list[Record] = []
    with tempfile.TemporaryDirectory() if smoke else nullcontext(WORK / "net2net-student") as place:
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        for block in range(1 if smoke else SEEDS):
            records += one_seed(arms, data, block, folder, smoke)
    shares = dict.fromkeys((arm.name for arm in arms), SHARES)
    return judged(arms, shares, records, goal=None, aa=aa), records


def one_seed(arms: Sequence[Arm], data: DataSet, seed: int, folder: Path, smoke: bool) -> list[Record]:
    """Run all budgets of all arms for one seed in random order, or find them stored."""
    large = runner(LARGE, data, folder, smoke)
    grown = runner(student(data, arms[0], seed, folder), data, folder, smoke)
    jobs: list[Job] = [(arm, share) for arm in arms for share in SHARES]
    order = [jobs[i] for i in keyed.permutation(len(jobs), "students", seed)]
    runners = [large if arm.kind == "strong" else grown for arm, _ in order]
    keys = [each.runs.key(arm, share, seed) for each, (arm, share) in zip(runners, order, strict=True)]
    stored = large.runs.block(keys)  # both find all that the folder holds
    return [
        each.one(job, seed, seed, key, stored.get(key))
        for each, job, key in zip(runners, order, keys, strict=True)
    ]


def runner(model: str | nn.Module, data: DataSet, folder: Path, smoke: bool) -> Runner:
    """Return what runs ``model`` and keeps the records in ``folder``."""
    work = Workload(model, data, threads=threads_here())
    told = Printed()
    return Runner(work, Runs(folder, work, data), folder, not smoke, len(SHARES) * (1 + len(RATES)), told.run,
                  first_seed=-1)  # fmt: skip


def student_arms(base: Arm) -> list[Arm]:
    """Return the strong baseline for the student: half of the epochs, at lower rates."""
    half = base.recipe.scaled(0.5)
    return [
        Arm(f"student-lr{rate:g}", half.with_(lr=base.recipe.lr * rate), base.methods, "method",
            f"student, {rate:g} of the rate")
        for rate in RATES
    ]  # fmt: skip


def student(data: DataSet, base: Arm, seed: int, folder: Path) -> nn.Module:
    """Return the large network with the function of the small one, which is trained when it is first needed."""
    done = fit(SMALL, data, base.methods, recipe=base.at(1.0), seed=seed, out=folder / f"teacher-{seed}")
    assert done.model is not None
    print(f"teacher of seed {seed}: {100 * done.accuracy:.2f}%", flush=True)
    height, width, depth = data.train.shape
    surgeon = Surgeon(done.model.train(), (), torch.zeros(2, depth, height, width))
    widen(surgeon, target_widths(surgeon, {"layer*": 2.0}), seed=seed)
    large = build(LARGE, num_classes=len(data.classes), in_channels=depth, image_size=height)
    large.load_state_dict(done.model.state_dict())  # raises unless every shape is the large network's
    return large
