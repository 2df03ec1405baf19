"""The best stack of methods: WRN-16-4 on a fifth of CIFAR-10, time to equal accuracy over plain and over strong."""

from __future__ import annotations

from benchmarks.common import accuracy_claims, cifar10, store, to_accuracy
from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, baselines

CLAIM = "WRN-16-4 on 10,000 CIFAR-10 images: the best stack at equal accuracy >= 4x sooner than plain, >= 1.5x than strong"
MINUTES = 36
SEEDS, EPOCHS = 3, 1.5
TRAIN, TEST = 10_000, 2_500


def main(smoke: bool = False) -> None:
    """Run both baselines and stacks of layer methods on the strong one."""
    both = baselines(PLAIN.with_(epochs=EPOCHS), STRONG.with_(epochs=EPOCHS, lr=0.2))
    base = both[1]
    # gentle settings: at ratio and keep 0.5 a run this short loses 8 to 20 points
    inputs = method("approximate_tensor_ops", ratio=0.75, stop_at=0.5)
    errors = method("error_map_pruning", keep=0.75, stop_at=0.7)
    arms = [
        *both,
        Arm("emp", base.recipe, (*base.methods, errors), "method", "+ error_map_pruning"),
        Arm("ato+emp", base.recipe, (*base.methods, inputs, errors), "stack", "+ both"),
    ]
    finished = to_accuracy(
        "best_stack", "wrn-16-4", cifar10(), arms, seeds=SEEDS, smoke=smoke, train=TRAIN, test=TEST
    )
    store("best_stack", {"report": finished.data}, smoke, accuracy_claims(finished, 1.5))
