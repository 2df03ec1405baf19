"""Selective backprop and importance sampling: time to the plain recipe's accuracy on the built-in images."""

from __future__ import annotations

from benchmarks.common import accuracy_claims, store, to_accuracy
from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, baselines, controls
from hasten.data import load

CLAIM = "selective_backprop and importance_sampling, ResNet-8 on 10,000 Fashion-MNIST images: time to plain's accuracy"
MINUTES = 7
SEEDS = 3


def main(smoke: bool = False) -> None:
    """Run each method with its defaults on the strong baseline, beside the strong one at shorter budgets."""
    both = baselines(
        PLAIN.with_(epochs=4.0, eval_every=0.0), STRONG.with_(epochs=8.0, lr=0.2, eval_every=0.0)
    )
    base = both[1]
    larger = base.recipe.with_(batch_size=384)
    arms = [
        *both,
        *controls(base, (0.4, 0.6, 0.8)),
        Arm(
            "selective_backprop",
            base.recipe,
            (*base.methods, method("selective_backprop", beta=1.0)),
            "method",
        ),
        Arm(
            "importance_sampling",
            larger,
            (*base.methods, method("importance_sampling", tau_th=1.5)),
            "method",
        ),
    ]
    data = load("fashion-mnist-12k")
    finished = to_accuracy(
        "sample_selection", "resnet8", data, arms, seeds=SEEDS, target="plain", smoke=smoke
    )
    store("sample_selection", {"report": finished.data}, smoke, accuracy_claims(finished, 1.0))
