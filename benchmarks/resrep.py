"""ResRep on a trained ResNet-56: MACs, accuracy and inference time of what it leaves, beside training on without it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.common import Step, claim, pairs, ratio_claim, real_images, store
from benchmarks.trained import RESNET56
from hasten import Session
from hasten.measure.macs import macs
from hasten.methods.structure.resrep import ResRep

CLAIM = "ResNet-56, CIFAR-10: half the MACs at the accuracy of training on (-0.3 points), inference >= 1.6x faster"
MINUTES = 20
# the authors' run has 375,000 steps, this one 1,404: lambda is larger, and rows are chosen sooner and more at a time
PRUNING = ResRep(
    target=0.45, lam=0.003, momentum=0.95, every=4, granularity=24, warmup=0.1, threshold=0.03, relative=True
)
TRIVIAL = ResRep(target=0.5, lam=0.1, every=1, granularity=1000, threshold=0.999, relative=True, warmup=0.0)
"""For smoke runs of a few steps, where rows go that have hardly shrunk."""


def inference(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    """Return one forward pass of ``model`` in evaluation, channels_last."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(x)

    return step


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """Return ``model`` merged like a pruned one, with no row gone: what the merge alone gives."""
    model = copy.deepcopy(model)
    sample = (x, torch.zeros(len(x), dtype=torch.int64))
    return Session(model, SGD(model.parameters(), lr=0.0), [PRUNING], sample=sample, total_samples=1).export()


def main(smoke: bool = False) -> None:
    """Train a base, go on from it with and without ResRep, and time the networks in evaluation."""
    method = TRIVIAL if smoke else PRUNING
    base = RESNET56.base(smoke)
    control = RESNET56.on("control", base, [], smoke)
    pruned = RESNET56.on("resrep", base, [method], smoke)
    assert base.model is not None
    assert pruned.model is not None
    x, _ = real_images(128)
    count = {name: macs(net, x[:1]).forward for name, net in (("base", base.model), ("pruned", pruned.model))}
    share, lost = count["pruned"] / count["base"], control.accuracy - pruned.accuracy
    text = (
        f"{share:.3f} of the MACs at {100 * pruned.accuracy:.2f}% accuracy (base {100 * base.accuracy:.2f}%, trained on "
        f"without it {100 * control.accuracy:.2f}%), one seed; {RESNET56}; lam={method.lam:g}, every={method.every}, "
        f"granularity={method.granularity} (paper: 1e-4, 200, 4 in 375,000 steps)"
    )
    claims = [
        claim("resrep", "resnet56 on CIFAR-10 from a trained base", text,
              target="<= 0.5 of the MACs, at most 0.3 points lost", met=share <= 0.5 and lost <= 0.003)
    ]  # fmt: skip
    timed: dict[str, Any] = {}
    networks = {"whole": base.model, "folded": folded(base.model, x), "pruned": pruned.model}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        title = f"inference of resnet56, batch 128, {name}, channels_last"
        arms = {arm: inference(net, x, dtype) for arm, net in networks.items()}
        timed[name] = pairs(title, arms, baseline="whole", seconds=60, smoke=smoke)
        for arm, target in (("pruned", 1.6), ("folded", None)):
            if arm in timed[name]["ratios"]:
                what = f"{title}, {'pruned against whole' if target else 'merged without pruning'}"
                claims.append(ratio_claim("resrep", what, timed[name], arm, target))
    runs = {"base": base, "control": control, "pruned": pruned}
    store("resrep", {
        "claim": CLAIM, "settings": repr(method), "macs": count,
        "accuracy": {name: run.accuracy for name, run in runs.items()},
        "witness": pruned.witness, "inference": timed,
    }, smoke, claims)  # fmt: skip
