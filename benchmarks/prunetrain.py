"""PruneTrain on ResNet-32: time to accuracy, training MACs beside training time, and the final narrow net from scratch."""

from __future__ import annotations

import dataclasses
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks.common import accuracy_claims, cifar10, claim, store, to_accuracy
from hasten import PLAIN, STRONG, method
from hasten.comparison import Arm, Comparison, baselines, controls
from hasten.comparison.worker import Workload, fresh_process, run_arm, threads_here
from hasten.data import DataSet
from hasten.errors import HastenError
from hasten.loop import fit
from hasten.measure.macs import macs
from hasten.models.geometry import he_init
from hasten.models.registry import seeded

CLAIM = "prunetrain, ResNet-32 on 10,000 CIFAR-10 images: >= 1.2x over strong to plain's accuracy, MACs beside time"
MINUTES = 42
SEEDS = 2
MODEL = "resnet32"
TRAIN = 10_000


def main(smoke: bool = False) -> None:
    """Run both baselines, the strong one at shorter budgets, prunetrain on it, and its final network from scratch.

    The run has a fortieth of the authors' steps, so lambda is larger and the interval the same share of the run as
    theirs. With the plain gradient nothing comes to rest below a safe threshold in so few steps; ``proximal`` does.
    """
    both = baselines(
        PLAIN.with_(epochs=8.0, eval_every=0.0), STRONG.with_(epochs=20.0, lr=0.2, eval_every=0.0)
    )
    base = both[1]
    pruned = []
    for name, r in (("prunetrain", 0.6), ("prunetrain-more", 0.75)):
        pruning = method("prunetrain", r=r, interval=2, tau=1e-3, proximal=True, min_channels=8)
        pruned.append(Arm(name, base.recipe, (*base.methods, pruning), "method", f"+ prunetrain, r={r}"))
    data = cifar10()
    cut = {} if smoke else {"train": TRAIN}
    arms = [*both, *controls(base, (0.5, 0.7)), *pruned]
    finished = to_accuracy("prunetrain", MODEL, data, arms, seeds=SEEDS, target="plain", smoke=smoke, **cut)
    narrow = from_scratch(data, pruned[0], base, smoke)
    what = f"{MODEL}, {TRAIN} CIFAR-10 images"
    claims = accuracy_claims(finished, 1.2)
    for arm in pruned:
        share = f"training MACs and time, of the strong baseline's, {what}, {arm.label.removeprefix('+ ')}"
        claims.append(claim("prunetrain", share, side_by_side(finished, arm.name)))
    claims.append(
        claim("prunetrain", f"its final network trained from scratch, {what}", in_words(narrow, finished))
    )
    store("prunetrain", {"report": finished.data, "narrow": narrow}, smoke, claims)


def from_scratch(data: DataSet, pruned: Arm, base: Arm, smoke: bool) -> dict[str, Any]:
    """Train the network that ``pruned`` ends with as ``base`` does, from fresh weights; return accuracies and seconds.

    The pruned run is repeated for its network. Raises HastenError if a run failed.
    """
    part = data.stratified(320, 100) if smoke else data.stratified(TRAIN)
    if smoke:
        short = base.recipe.with_(epochs=1.0, batch_size=64)
        pruned, base = (dataclasses.replace(arm, recipe=short) for arm in (pruned, base))
    net = fit(MODEL, part, pruned.methods, recipe=pruned.recipe, seed=0).model
    assert net is not None
    renew(net)
    work = Workload(net, part, threads=threads_here())
    arm = Arm("narrow", base.recipe, base.methods, "control", "final network from scratch")
    records = [
        (run_arm if smoke else fresh_process)(work, arm, seed) for seed in range(1 if smoke else SEEDS)
    ]
    for record in records:
        if record["failure"]:
            raise HastenError(f"the narrow network's run failed: {record['failure']}")
    return {
        "forward_macs": macs(net, torch.zeros(1, 3, 32, 32)).forward,
        "accuracy": [record["accuracy"] for record in records],
        "seconds": [record["seconds_train"] for record in records],
    }


def renew(net: nn.Module) -> None:
    """Give a network of our ResNets' form fresh weights and statistics, as a function of the seed 0."""
    with seeded(0):
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()
        head = net.fc
        assert isinstance(head, nn.Linear)
        he_init(net, head)
    net.train()


def means(finished: Comparison, name: str) -> dict[str, float]:
    """Return the mean training MACs, seconds and accuracy of an arm's runs."""
    row = next(arm for arm in finished.data["arms"] if arm["name"] == name)
    runs = [run for run in row["runs"] if run["failure"] is None]
    return {
        "macs": fmean(run["macs"] or 0.0 for run in runs),
        "seconds": fmean(run["seconds"]["train"] for run in runs),
        "accuracy": fmean(run["accuracy"] or 0.0 for run in runs),
    }


def side_by_side(finished: Comparison, arm: str) -> str:
    """Return the work and the time of the pruned runs as shares of the strong baseline's."""
    ours, theirs = means(finished, arm), means(finished, "strong")
    return (
        f"{ours['macs'] / theirs['macs']:.2f}x the MACs in {ours['seconds'] / theirs['seconds']:.2f}x the time, "
        f"accuracy {100 * ours['accuracy']:.2f}% against {100 * theirs['accuracy']:.2f}%"
    )


def in_words(narrow: dict[str, Any], finished: Comparison) -> str:
    """Return the narrow network's figures beside those of the run that found it."""
    ours = means(finished, "prunetrain")
    return (
        f"{100 * fmean(narrow['accuracy']):.2f}% in {fmean(narrow['seconds']):.0f} s, prunetrain "
        f"{100 * ours['accuracy']:.2f}% in {ours['seconds']:.0f} s; {narrow['forward_macs'] / 1e6:.1f} M forward MACs"
    )
