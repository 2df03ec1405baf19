"""Selective backprop and importance sampling: time to equal accuracy on the built-in images."""

from __future__ import annotations

from benchmarks.common import accuracy_claims, store, to_accuracy
from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, baselines
from hasten.data import load

CLAIM = "selective_backprop and importance_sampling, ResNet-8 on 10,000 Fashion-MNIST images: time to equal accuracy"
MINUTES = 18
SEEDS, EPOCHS = 3, 8.0


def main(smoke: bool = False) -> None:
    """Run each method on the strong baseline, beside both baselines."""
    both = baselines(PLAIN.with_(epochs=EPOCHS), STRONG.with_(epochs=EPOCHS, lr=0.2))
    base = both[1]
    larger = base.recipe.with_(batch_size=384)
    selective = method("selective_backprop", beta=1.0)
    important = method("importance_sampling", tau_th=1.5)
    arms = [
        *both,
        Arm("selective_backprop", base.recipe, (*base.methods, selective), "method"),
        Arm("importance_sampling", larger, (*base.methods, important), "method"),
    ]
    data = load("fashion-mnist-12k")
    finished = to_accuracy(
        "sample_selection", "resnet8", data, arms, seeds=SEEDS, smoke=smoke, smoke_epochs=3.0
    )
    store("sample_selection", {"report": finished.data}, smoke, accuracy_claims(finished, 1.0))
