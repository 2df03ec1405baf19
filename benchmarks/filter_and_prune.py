"""Early instance filtering with error-map pruning at a fixed stream: MACs saved, accuracy kept, time to accuracy."""

from __future__ import annotations

from benchmarks.common import accuracy_claims, cifar10, store, to_accuracy
from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, baselines, controls

CLAIM = "early_instance_filtering + error_map_pruning, ResNet-20, CIFAR-10: >= 60% of MACs saved, >= 1.8x over strong"
MINUTES = 25
SEEDS = 3


def main(smoke: bool = False) -> None:
    """Run both methods on a fixed stream: a stratified tenth of CIFAR-10, 30 times, without augmentation.

    A stream this long and this redundant is where filtering has most to drop: the network learns it by heart.
    """
    both = baselines(
        PLAIN.with_(epochs=12.0, eval_every=0.0, augment=()),
        STRONG.with_(epochs=30.0, lr=0.2, eval_every=0.0, augment=()),
    )
    base = both[1]
    filtering = method("early_instance_filtering", raise_by=1.01, warmup=60, max_share=0.35)
    pruning = method("error_map_pruning", keep=0.5)
    arms = [
        *both,
        *controls(base, (0.4, 0.7)),
        Arm("filtering", base.recipe, (*base.methods, filtering), "method", "+ early_instance_filtering"),
        Arm("filtering+pruning", base.recipe, (*base.methods, filtering, pruning), "stack", "+ both"),
    ]
    cut = {} if smoke else {"train": 5_000}
    finished = to_accuracy(
        "filter_and_prune", "resnet20", cifar10(), arms, seeds=SEEDS, target="plain", smoke=smoke, **cut
    )
    store("filter_and_prune", {"report": finished.data}, smoke, accuracy_claims(finished, 1.8))
