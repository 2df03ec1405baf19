"""The best stack of methods on full CIFAR-10: time to the plain recipe's accuracy, over plain and over strong."""

from __future__ import annotations

from benchmarks.common import accuracy_claims, cifar10, store, to_accuracy
from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, baselines, controls

CLAIM = "WRN-16-4 on full CIFAR-10, one epoch: the best stack reaches plain's accuracy >= 4x sooner, >= 1.5x over strong"
MINUTES = 16
SEEDS = 1


def main(smoke: bool = False) -> None:
    """Run both baselines, the strong one at shorter budgets, and stacks of layer methods on it."""
    both = baselines(
        PLAIN.with_(epochs=1.0, eval_every=0.0), STRONG.with_(epochs=1.0, lr=0.2, eval_every=0.0)
    )
    base = both[1]
    # gentle settings: at ratio and keep 0.5 a run of one epoch loses 8 to 20 points
    inputs = method("approximate_tensor_ops", ratio=0.75, stop_at=0.5)
    errors = method("error_map_pruning", keep=0.75, stop_at=0.7)
    short = base.recipe.scaled(0.6)
    arms = [
        *both,
        *controls(base, (0.5, 0.7)),
        Arm("emp-0.6", short, (*base.methods, errors), "method", "+ error_map_pruning"),
        Arm("ato+emp-0.6", short, (*base.methods, inputs, errors), "stack", "+ both"),
    ]
    finished = to_accuracy(
        "best_stack", "wrn-16-4", cifar10(), arms, seeds=SEEDS, target="plain", smoke=smoke
    )
    store("best_stack", {"report": finished.data}, smoke, accuracy_claims(finished, 1.5))
