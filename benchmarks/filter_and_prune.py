"""Early instance filtering with error-map pruning at a fixed stream: MACs saved, accuracy kept, time to equal accuracy."""

from __future__ import annotations

from benchmarks.common import accuracy_claims, beside, cifar10, claim, store, to_accuracy
from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, baselines

CLAIM = "early_instance_filtering + error_map_pruning, ResNet-20, CIFAR-10: >= 60% of MACs saved, >= 1.8x over strong"
MINUTES = 36
SEEDS = 3
TRAIN, EPOCHS = 4_000, 20.0


def main(smoke: bool = False) -> None:
    """Run both methods on a fixed stream: 4,000 images of CIFAR-10, 20 times, without augmentation.

    A stream this long and this redundant is where filtering has most to drop: the network learns it by heart.
    """
    both = baselines(
        PLAIN.with_(epochs=EPOCHS, augment=()),
        STRONG.with_(epochs=EPOCHS, lr=0.2, augment=()),
    )
    base = both[1]
    filtering = method("early_instance_filtering", raise_by=1.01, warmup=60, max_share=0.35)
    pruning = method("error_map_pruning", keep=0.5)
    arms = [
        *both,
        Arm("filtering", base.recipe, (*base.methods, filtering), "method", "+ early_instance_filtering"),
        Arm("filtering+pruning", base.recipe, (*base.methods, filtering, pruning), "stack", "+ both"),
    ]
    finished = to_accuracy(
        "filter_and_prune", "resnet20", cifar10(), arms, seeds=SEEDS, smoke=smoke, train=TRAIN
    )
    claims = accuracy_claims(finished, 1.8)
    names = {"filtering": ["early_instance_filtering"],
             "filtering+pruning": ["early_instance_filtering", "error_map_pruning"]}  # fmt: skip
    for arm, methods in names.items():
        what = f"training MACs and time of {arm}, of the strong baseline's, ResNet-20, {TRAIN} CIFAR-10 images, {EPOCHS:g} epochs"
        claims.append(claim(methods, what, beside(finished, arm, "strong")))
    store("filter_and_prune", {"report": finished.data}, smoke, claims)
