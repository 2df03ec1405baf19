"""Adaptive gates on WRN-16-4: half of the parameters at the strong baseline's accuracy, and what that does to time."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    WORK,
    Step,
    build,
    cifar10,
    claim,
    pairs,
    real_images,
    session_step,
    store,
    strong,
)
from hasten import STRONG, fit
from hasten.contract import Method
from hasten.data import DataSet
from hasten.loop import Result
from hasten.measure.macs import macs
from hasten.methods.structure.adaptive_channel_layer_pruning import AdaptiveGatePruning
from hasten.models.geometry import he_init
from hasten.models.registry import seeded

CLAIM = "adaptive gates, WRN-16-4, CIFAR-10: half the parameters, no accuracy lost against strong at the same epochs"
MINUTES = 18
MODEL, TRAIN, TARGET = "wrn-16-4", 10_000, 0.5
SEEDS = 2
RECIPE = STRONG.with_(epochs=8.0, lr=0.2, eval_every=0.0)
# in 600 steps gates have to fall faster than in the authors' 500,000; a pull of 0.03 from the start cost 4 points
PRUNING = AdaptiveGatePruning(g_c=2e-3, g_b=1e-3, k=3.0, target=TARGET)
HURRIED = AdaptiveGatePruning(g_c=5.0, g_b=5.0, target=0.8, patience=0, until=0.5, release_at=0.5)


def main(smoke: bool = False) -> None:
    """Train with and without gates, the network that is left from fresh weights, and time steps and inference."""
    data = cifar10()
    data = data.stratified(320, 100) if smoke else data.stratified(TRAIN)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) if smoke else WORK / "adaptive_channel_layer_pruning"
        runs = accuracies(data, folder, smoke)
    whole, pruned = runs["strong"][0], runs["pruned"][0]
    assert whole.model is not None
    assert pruned.model is not None
    timed = times(pruned.model, smoke)
    claims = [size_claim(runs), *time_claims(runs, timed)]
    figures = {name: [{"accuracy": run.accuracy, "seconds": run.seconds_train, "spans": run.spans, "witness": run.witness}
                      for run in results] for name, results in runs.items()}  # fmt: skip
    left = {name: {"params": parameters(run), "macs": forward_macs(run)} for name, (run, *_) in runs.items()}
    store(
        "adaptive_channel_layer_pruning",
        {"claim": CLAIM, "runs": figures, "left": left, "times": timed},
        smoke,
        claims,
    )


# -- accuracy, for which the machine need not be quiet
def accuracies(data: DataSet, folder: Path, smoke: bool) -> dict[str, list[Result]]:
    """Return the runs by arm, one for each seed: strong, strong with gates, and what these left from fresh weights."""
    runs: dict[str, list[Result]] = {"strong": [], "pruned": [], "narrow": []}
    for seed in range(1 if smoke else SEEDS):
        runs["strong"].append(train("strong", MODEL, data, [strong()], folder, seed, smoke))
        gated = [strong(), HURRIED if smoke else PRUNING]
        runs["pruned"].append(train("pruned", MODEL, data, gated, folder, seed, smoke))
        if not seed:
            runs["narrow"].append(
                train("narrow", renewed(runs["pruned"][0]), data, [strong()], folder, seed, smoke)
            )
    return runs


def train(
    name: str,
    model: str | nn.Module,
    data: DataSet,
    methods: list[Method],
    folder: Path,
    seed: int,
    smoke: bool,
) -> Result:
    """Return a run, continued where it was stopped."""
    recipe = RECIPE.with_(epochs=2.0, batch_size=32) if smoke else RECIPE
    result = fit(model, data, methods, recipe=recipe, seed=seed, out=folder / f"{name}-{seed}")
    print(f"{name}, seed {seed}: {100 * result.accuracy:.2f}%, {parameters(result):,} parameters, {result.seconds_train:.0f} s",
          flush=True)  # fmt: skip
    return result


def renewed(run: Result) -> nn.Module:
    """Return the network that a run left, with fresh weights of seed 0."""
    assert run.model is not None
    net = copy.deepcopy(run.model)
    with seeded(0):
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()
        head = net.fc
        assert isinstance(head, nn.Linear)
        he_init(net, head)
    return net.train()


def parameters(run: Result) -> int:
    """Return the parameters of the network that a run left."""
    assert run.model is not None
    return sum(p.numel() for p in run.model.parameters())


def forward_macs(run: Result) -> int:
    """Return the forward MACs of the network that a run left."""
    assert run.model is not None
    return macs(run.model, torch.zeros(1, 3, 32, 32)).forward


def mean(runs: list[Result]) -> float:
    """Return the mean accuracy in per cent."""
    return 100 * sum(run.accuracy for run in runs) / len(runs)


# -- time, for which it must be
def times(pruned: nn.Module, smoke: bool) -> dict[str, Any]:
    """Time training steps and inference of the whole network, the whole one with gates, and the one that is left."""
    x, y = real_images(128)
    training = {
        "whole": session_step(build(MODEL), x, y, [strong()]),
        "gated": session_step(build(MODEL), x, y, [strong(), PRUNING]),
        "left": session_step(copy.deepcopy(pruned), x, y, [strong()]),
    }
    running = {"whole": inference(build(MODEL), x), "left": inference(pruned, x)}
    return {
        "step": pairs(
            f"training step of {MODEL}, batch 128", training, baseline="whole", seconds=90, smoke=smoke
        ),
        "inference": pairs(
            f"inference of {MODEL}, batch 128", running, baseline="whole", seconds=45, smoke=smoke
        ),
    }


def inference(model: nn.Module, x: Tensor) -> Step:
    """Return one forward pass of ``model`` in evaluation, as the strong baseline evaluates."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(x)

    return step


# -- what is claimed
def size_claim(runs: dict[str, list[Result]]) -> dict[str, Any]:
    """Return the claim of half the parameters without loss."""
    first = parameters(runs["strong"][0])
    share = max(parameters(run) for run in runs["pruned"]) / first
    ours, theirs, narrow = (mean(runs[name]) for name in ("pruned", "strong", "narrow"))
    blocks = [int(run.witness["adaptive_channel_layer_pruning"]["blocks_removed"]) for run in runs["pruned"]]
    text = (
        f"{share:.3f} of the parameters at {ours:.2f}% (strong {theirs:.2f}%, what is left from fresh weights "
        f"{narrow:.2f}%), {len(runs['pruned'])} seeds, blocks removed {blocks}"
    )
    what = f"{MODEL}, {TRAIN} CIFAR-10 images, {RECIPE.epochs:g} epochs"
    return claim("adaptive_channel_layer_pruning", what, text, target="<= 0.51 of the parameters, no accuracy lost",
                 met=share <= 0.51 and ours >= theirs)  # fmt: skip


def time_claims(runs: dict[str, list[Result]], timed: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what training and inference took, beside the strong baseline's; no figure was set for these."""
    name = "adaptive_channel_layer_pruning"
    seconds = {arm: sum(run.seconds_train for run in runs[arm]) for arm in ("strong", "pruned")}
    work = [-run.witness[name]["extra_macs"] for run in runs["pruned"]]
    text = f"{seconds['pruned'] / seconds['strong']:.2f}x the strong baseline's time, {sum(work) / len(work):.3g} training MACs saved a run"
    claims = [claim(name, f"training time of whole runs, {MODEL}, {RECIPE.epochs:g} epochs", text)]
    for kind, arm, what in (
        ("step", "gated", "a training step with gates on everything, before anything has gone"),
        ("step", "left", "a training step of what is left"),
        ("inference", "left", "inference of what is left"),
    ):
        if arm in timed[kind]["ratios"]:
            claims.append(claim(name, f"{what}, {MODEL}, over strong", timed[kind]["ratios"][arm]["text"]))
    return claims
