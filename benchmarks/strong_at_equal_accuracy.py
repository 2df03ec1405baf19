"""The strong baseline against plain PyTorch at equal accuracy: ResNet-20 on CIFAR-10 and on Fashion-MNIST.

``strong_over_plain`` times single steps; here whole runs, with their schedules, count.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import LEFT_OUT, accuracy_claims, cifar10, store, to_accuracy
from hasten import PLAIN, STRONG
from hasten.comparison import baselines
from hasten.data import DataSet, load

CLAIM = "strong against plain, ResNet-20 on 10,000 images of CIFAR-10 and of Fashion-MNIST: >= 1.5x sooner at equal accuracy"
MINUTES = 18  # 12 for CIFAR-10; --without cifar10 or --without fashion-mnist leaves one out
NAME = "strong_at_equal_accuracy"
SEEDS, TRAIN = 3, 10_000
EPOCHS = {"cifar10": 4.0, "fashion-mnist": 3.0}


def images(name: str) -> DataSet:
    """Return the images called ``name``."""
    return cifar10() if name == "cifar10" else load("fashion-mnist-12k")


def main(smoke: bool = False) -> None:
    """Compare both baselines on both sets."""
    reports: dict[str, Any] = {}
    claims = []
    for name, epochs in EPOCHS.items():
        if name in LEFT_OUT:
            continue
        arms = baselines(PLAIN.with_(epochs=epochs), STRONG.with_(epochs=epochs, lr=0.2))
        finished = to_accuracy(
            f"{NAME}-{name}", "resnet20", images(name), arms, seeds=SEEDS, smoke=smoke, train=TRAIN
        )
        reports[name] = finished.data
        claims += accuracy_claims(finished, 1.5)
    store(NAME, {"reports": reports}, smoke, claims)
