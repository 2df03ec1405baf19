"""Knowledge distillation: time to equal accuracy with and without a teacher.

ResNet-8 on a stratified quarter of CIFAR-10. The teacher is a ResNet-20 trained on the same images, once for all arms and
seeds; its training is not in the clock, for the method is meant for a teacher that is at hand. Its forward passes are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import hasten
from benchmarks.common import WORK, accuracy_claims, cifar10, store, strong, to_accuracy
from hasten import STRONG, method
from hasten.comparison import Arm
from hasten.data import DataSet

CLAIM = "knowledge distillation: ResNet-8 taught by ResNet-20 on 12,500 CIFAR-10 images is sooner at equal accuracy"
MINUTES = 30
IMAGES, EPOCHS, TEACHER_EPOCHS, SEEDS = 12_500, 12.0, 20.0, 3


def train_teacher(data: DataSet, folder: Path, epochs: float) -> float:
    """Train the teacher into ``folder``, or find it there, and return its accuracy. No label smoothing: it teaches less."""
    recipe = STRONG.with_(epochs=epochs, lr=0.2, label_smoothing=0.0, eval_every=0.0)
    return hasten.fit("resnet20", data, [strong()], recipe=recipe, seed=0, out=folder).accuracy


def arms(teacher: Path) -> list[Arm]:
    """Return the strong baseline alone and with the teacher."""
    recipe = STRONG.with_(epochs=EPOCHS, lr=0.2)
    teach = method("knowledge_distillation", teacher=str(teacher))
    return [
        Arm("strong", recipe, (strong(),), "strong", "strong (bf16, NHWC)"),
        Arm("taught", recipe, (strong(), teach), "method", "+ knowledge_distillation"),
    ]


def main(smoke: bool = False) -> None:
    """Train the teacher, then both arms, continuing where an earlier run stopped.

    A tenth of the images chooses the target; the teacher does not see it either.
    """
    cut = {"train": 320, "test": 100} if smoke else {"train": IMAGES}
    data = cifar10().stratified(**cut).hold_out(0.1)
    with tempfile.TemporaryDirectory() as aside:
        folder = (Path(aside) if smoke else WORK) / f"knowledge_distillation-teacher-{TEACHER_EPOCHS:g}"
        accuracy = train_teacher(data, folder, 1.0 if smoke else TEACHER_EPOCHS)
        finished = to_accuracy(
            "knowledge_distillation", "resnet8", data, arms(folder), seeds=SEEDS, smoke=smoke
        )
    claims = accuracy_claims(finished, 1.0)
    for row in claims:
        row["what"] += f", teacher ResNet-20 of {100 * accuracy:.2f}%, its training not counted"
    teacher = {"model": "resnet20", "epochs": TEACHER_EPOCHS, "accuracy": accuracy}
    store("knowledge_distillation", {"report": finished.data, "teacher": teacher}, smoke, claims)
