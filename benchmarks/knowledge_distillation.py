"""Knowledge distillation: epochs and time to the strong baseline's accuracy, with and without a teacher.

ResNet-8 on a stratified quarter of CIFAR-10. The teacher is a ResNet-20 trained on the same images, once for all arms and
seeds; its training is not in the clock, for the method is meant for a teacher that is at hand. Its forward passes are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import hasten
from benchmarks.common import WORK, cifar10, claim, store, strong, to_accuracy
from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, Comparison, baselines, controls
from hasten.data import DataSet

CLAIM = "knowledge distillation: ResNet-8 taught by ResNet-20 on 12,500 CIFAR-10 images reaches strong's accuracy sooner"
MINUTES = 40
IMAGES, EPOCHS, TEACHER_EPOCHS, SEEDS = 12_500, 16.0, 20.0, 3
SHARES = (0.5, 0.7)
"""Shares of the strong baseline's epochs at which both, with and without a teacher, are also trained."""


def train_teacher(data: DataSet, folder: Path, epochs: float) -> float:
    """Train the teacher into ``folder``, or find it there, and return its accuracy. No label smoothing: it teaches less."""
    recipe = STRONG.with_(epochs=epochs, lr=0.2, label_smoothing=0.0, eval_every=0.0)
    return hasten.fit("resnet20", data, [strong()], recipe=recipe, seed=0, out=folder).accuracy


def arms(teacher: Path) -> list[Arm]:
    """Return both baselines, the strong one at fewer epochs, and the strong one with the teacher at each of these."""
    both = baselines(
        PLAIN.with_(epochs=EPOCHS, eval_every=0.0), STRONG.with_(epochs=EPOCHS, lr=0.2, eval_every=0.0)
    )
    base = both[1]
    teach = method("knowledge_distillation", teacher=str(teacher))
    taught = [
        Arm(f"taught-{share:g}", base.recipe.scaled(share), (*base.methods, teach), "method", f"+ teacher, {share:.0%} of the epochs")
        for share in (*SHARES, 1.0)
    ]  # fmt: skip
    return [*both, *controls(base, SHARES), *taught]


def claims(finished: Comparison, teacher: float) -> list[dict[str, Any]]:
    """Return how many epochs, and what time, the strong baseline's accuracy takes with a teacher."""
    rows = {arm["name"]: arm for arm in finished.data["arms"]}
    goal, settings = finished.data["target"]["accuracy"], finished.data["settings"]
    where = f"{settings['model']} on {settings['dataset']} ({settings['train']} images), teacher ResNet-20 of {100 * teacher:.2f}%"
    alone = [s for s in SHARES if rows[f"strong-{s:g}"]["reached"]["yes"]]
    taught = [s for s in (*SHARES, 1.0) if rows[f"taught-{s:g}"]["reached"]["yes"]]
    without = min(alone, default=1.0) * EPOCHS
    full = rows["taught-1"]["accuracy"]["mean"]
    after = "" if full is None else f"; {100 * full:.2f}% after all {EPOCHS:g} epochs"
    found = [
        claim(
            "knowledge_distillation",
            f"epochs to {100 * goal:.2f}%, {where}",
            (f"{min(taught) * EPOCHS:g}, {without:g} without a teacher" if taught else "not reached") + after,
            target="fewer than without a teacher",
            met=bool(taught) and min(taught) * EPOCHS < without,
        )
    ]
    versus = rows[f"taught-{min(taught):g}"]["vs_strong"] if taught else None
    if versus is not None and versus["ratio"] is not None:
        found.append(
            claim(
                "knowledge_distillation",
                f"time to {100 * goal:.2f}%, {where}",
                f"{versus['ratio']:.2f}x over strong: {versus['verdict']}; the teacher's training not counted",
                target="> 1x over strong",
                met=versus["verdict"] == "faster",
            )
        )
    return found


def main(smoke: bool = False) -> None:
    """Train the teacher, then all arms, continuing where an earlier run stopped."""
    data = cifar10()
    with tempfile.TemporaryDirectory() as aside:
        folder = (Path(aside) if smoke else WORK) / f"knowledge_distillation-teacher-{TEACHER_EPOCHS:g}"
        part = data.stratified(train=320, test=100) if smoke else data.stratified(train=IMAGES, test=None)
        accuracy = train_teacher(part, folder, 1.0 if smoke else TEACHER_EPOCHS)
        finished = to_accuracy(
            "knowledge_distillation", "resnet8", data, arms(folder), seeds=SEEDS, target="strong", smoke=smoke,
            train=IMAGES,
        )  # fmt: skip
    values = {
        "report": finished.data,
        "teacher": {"model": "resnet20", "epochs": TEACHER_EPOCHS, "accuracy": accuracy},
    }
    store("knowledge_distillation", values, smoke, claims(finished, accuracy))
