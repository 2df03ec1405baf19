"""ResRep on a trained ResNet-20: MACs, accuracy and inference time of what it leaves, beside training on without it."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.common import WORK, Step, cifar10, claim, pairs, ratio_claim, real_images, store
from hasten import PLAIN, Session, fit
from hasten.contract import Method
from hasten.loop import Result
from hasten.measure.macs import macs
from hasten.methods.structure.resrep import ResRep
from hasten.recipe import Recipe

CLAIM = "ResNet-20, CIFAR-10: half the MACs at the accuracy of training on (-0.5 points), inference >= 1.3x faster"
MINUTES = 60
MODEL, TARGET = "resnet20", 0.45
BASE = PLAIN.with_(epochs=14.0, eval_every=0.0)
MORE = PLAIN.with_(epochs=10.0, lr=0.05, eval_every=0.0)
# the paper's 375,000 steps are 3,900 here: a row needs 400 of them at the highest rate, the choice about 800
PRUNING = ResRep(target=TARGET, lam=5e-4, every=20)


def pruning(smoke: bool) -> ResRep:
    """Return the method; in the smoke form for a run of a few steps, where rows go that have hardly shrunk."""
    if not smoke:
        return PRUNING
    return ResRep(
        target=TARGET, lam=0.1, every=1, granularity=1000, threshold=0.999, relative=True, warmup=0.0
    )


def train(
    name: str, model: str | nn.Module, recipe: Recipe, methods: list[Method], folder: Path, smoke: bool
) -> Result:
    """Return a run on CIFAR-10, continued where it was stopped."""
    data = cifar10()
    if smoke:
        data, recipe = data.stratified(320, 100), recipe.with_(epochs=1.0, batch_size=32)
    result = fit(model, data, methods, recipe=recipe, out=folder / name)
    print(f"{name}: {100 * result.accuracy:.2f}% in {result.seconds_train:.0f} s", flush=True)
    return result


def inference(model: nn.Module, x: Tensor) -> Step:
    """Return one forward pass of ``model`` in evaluation."""
    model = copy.deepcopy(model).eval()

    def step() -> None:
        with torch.no_grad():
            model(x)

    return step


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """Return ``model`` merged like a pruned one, with no row gone: what the merge alone gives."""
    model = copy.deepcopy(model)
    sample = (x, torch.zeros(len(x), dtype=torch.int64))
    return Session(model, SGD(model.parameters(), lr=0.0), [PRUNING], sample=sample, total_samples=1).export()


def main(smoke: bool = False) -> None:
    """Train a base, go on from it with and without ResRep, and time the networks in evaluation."""
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) if smoke else WORK / "resrep"
        base = train("base", MODEL, BASE, [], folder, smoke)
        assert base.model is not None
        control = train("control", base.model, MORE, [], folder, smoke)
        pruned = train("pruned", base.model, MORE, [pruning(smoke)], folder, smoke)
    assert pruned.model is not None
    x, _ = real_images(128)
    count = {name: macs(net, x[:1]).forward for name, net in (("base", base.model), ("pruned", pruned.model))}
    arms = {
        "whole": inference(base.model, x), "folded": inference(folded(base.model, x), x),
        "pruned": inference(pruned.model, x),
    }  # fmt: skip
    timed = pairs(f"inference of {MODEL}, batch 128", arms, baseline="whole", seconds=90, smoke=smoke)
    share, lost = count["pruned"] / count["base"], control.accuracy - pruned.accuracy
    what = f"{MODEL} on CIFAR-10, {MORE.epochs:g} epochs from a trained base"
    text = f"{share:.3f} of the MACs at {100 * pruned.accuracy:.2f}% accuracy (base {100 * base.accuracy:.2f}%, trained on without pruning {100 * control.accuracy:.2f}%), one seed"
    claims = [
        claim(
            "resrep",
            what,
            text,
            target="<= 0.5 of the MACs, at most 0.5 points lost",
            met=share <= 0.5 and lost <= 0.005,
        )
    ]
    if "pruned" in timed["ratios"]:
        claims.append(
            ratio_claim(
                "resrep",
                f"inference of {MODEL}, batch 128, pruned against whole",
                timed["ratios"]["pruned"],
                1.3,
            )
        )
        claims.append(
            claim(
                "resrep",
                f"inference of {MODEL}, batch 128, merged without pruning",
                timed["ratios"]["folded"]["text"],
            )
        )
    seconds = {"base": base.seconds_train, "control": control.seconds_train, "pruned": pruned.seconds_train}
    accuracy = {"base": base.accuracy, "control": control.accuracy, "pruned": pruned.accuracy}
    store("resrep", {"claim": CLAIM, "macs": count, "accuracy": accuracy, "seconds": seconds, "witness": pruned.witness,
                     "inference": timed}, smoke, claims)  # fmt: skip
