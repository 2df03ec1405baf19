"""SSL on trained networks: MACs, accuracy and inference time of what it leaves, layers it takes out, and dead columns.

Three parts: accuracies beside those of training on without it; inference of the whole and the narrowed networks; and
single convolutions with dead columns, dense and in every form that computes the same from what is left.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import WORK, Step, cifar10, claim, pairs, real_images, store, strong
from hasten import PLAIN, fit
from hasten.contract import Method
from hasten.data import DataSet
from hasten.keyed import generator
from hasten.loop import Result
from hasten.measure.macs import macs
from hasten.measure.paired import paired_steps
from hasten.methods.structure.shape_wise import column_forms, cropped
from hasten.methods.structure.structured_sparsity_learning import StructuredSparsityLearning
from hasten.recipe import Recipe

NAME = "structured_sparsity_learning"
CLAIM = "SSL, CIFAR-10: inference of AlexNet and ResNet-20 >= 3x faster at <= 1 point lost; ResNet-20 to 18 layers; columns"
MINUTES = 18
SMALL = 15_000
SMOKE = StructuredSparsityLearning(filter=2.0, channel=2.0, proximal=True, regularise=0.5)
ONE_BLOCK = {
    f"layer{stage}.{block}.conv{conv}": {"depth": 0.0}
    for stage in (1, 2, 3)
    for block in range(3)
    for conv in (1, 2)
    if (stage, block) != (1, 2)
}
"""No pull but on the block that the uniform one takes out first."""
PLANS: dict[str, tuple[str, int | None, Recipe, Recipe, dict[str, StructuredSparsityLearning]]] = {
    "alexnet": (
        "alexnet", None, PLAIN.with_(epochs=5.0, lr=0.05, eval_every=0.0),
        PLAIN.with_(epochs=7.0, lr=0.02, eval_every=0.0),
        {
            "narrow": StructuredSparsityLearning(filter=4.5e-3, channel=4.5e-3, proximal=True, regularise=0.4),
            "narrow-longer": StructuredSparsityLearning(filter=5.2e-3, channel=5.2e-3, proximal=True, regularise=0.2),
        },
    ),
    "resnet20": (
        "resnet20", SMALL, PLAIN.with_(epochs=8.0, eval_every=0.0),
        PLAIN.with_(epochs=6.0, lr=0.05, eval_every=0.0),
        {
            "narrow": StructuredSparsityLearning(filter=8e-3, channel=8e-3, proximal=True, regularise=0.5),
            "narrow-longer": StructuredSparsityLearning(filter=1.5e-2, channel=1.5e-2, proximal=True, regularise=0.4),
            "shallow": StructuredSparsityLearning(filter=0.0, channel=0.0, depth=0.06, proximal=True, regularise=0.5),
            "shallow-one-block": StructuredSparsityLearning(
                filter=0.0, channel=0.0, depth=0.075, proximal=True, regularise=0.4, multipliers=ONE_BLOCK
            ),
        },
    ),
}  # fmt: skip
"""By model: its name, images to train on, recipes of the base and of going on, and the arms."""

LONGER = {("alexnet", "narrow-longer"): 2.0, ("resnet20", "narrow-longer"): 3.0}
"""Arms that go on for so many times the epochs. AlexNet's steps are shorter, so that the time is about the same."""

LAYERS = {
    "AlexNet conv2, 5x5, 64 to 192, 4x4 map": (64, 192, 5, 4),
    "ResNet-20 stage 2, 3x3, 32 to 32, 16x16 map": (32, 32, 3, 16),
    "VGG-16 stage 3, 3x3, 256 to 256, 8x8 map": (256, 256, 3, 8),
}
"""Convolutions: input and output channels, kernel, and side of the map."""
DEAD = (0.5, 0.75, 0.9)
PRECISIONS = ("fp32", "bf16 channels_last")


# -- accuracy
def train(
    name: str, model: str | nn.Module, data: DataSet, recipe: Recipe, methods: Sequence[Method], folder: Path
) -> Result:
    """Return a run in the strong baseline's precision, continued where it was stopped."""
    result = fit(model, data, [strong(), *methods], recipe=recipe, out=folder / name)
    print(f"{name}: {100 * result.accuracy:.2f}% in {result.seconds_train:.0f} s", flush=True)
    return result


def accuracies(smoke: bool, folder: Path) -> dict[str, dict[str, Result]]:
    """Train each model, and go on from it without and with SSL; return the runs by model and arm."""
    whole, found = cifar10(), dict[str, dict[str, Result]]()
    for key, (name, images, first, more, arms) in PLANS.items():
        data = whole if images is None else whole.stratified(images)
        model: str = name
        if smoke:
            data, model = whole.stratified(320, 100), "resnet8" if name == "resnet20" else name
            first, more = (r.with_(epochs=1.0, batch_size=32) for r in (first, more))  # noqa: PLW2901
        base = train(f"{key}-base", model, data, first, [], folder)
        assert base.model is not None
        runs = {"base": base, "control": train(f"{key}-control", base.model, data, more, [], folder)}
        for arm, method in arms.items():
            chosen = method
            if smoke:  # in another network, whose blocks have other names
                chosen = SMOKE if arm == "narrow" else dataclasses.replace(method, multipliers=None)
            recipe = more if smoke else more.with_(epochs=LONGER.get((key, arm), 1.0) * more.epochs)
            runs[arm] = train(f"{key}-{arm}", base.model, data, recipe, [chosen], folder)
        found[key] = runs
    return found


def depth_of(model: nn.Module) -> int:
    """Return the number of convolutions and linear layers on the way, as networks are named by."""
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())


# -- time of whole networks
def inference(model: nn.Module, x: Tensor, precision: str) -> Step:
    """Return one forward pass of ``model`` in evaluation."""
    model = copy.deepcopy(model).eval()
    narrow = precision != "fp32"
    if narrow:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            model(x)

    return step


def times(runs: dict[str, dict[str, Result]], smoke: bool) -> dict[str, dict[str, Any]]:
    """Time the whole and the narrowed networks in evaluation."""
    x, _ = real_images(128)
    found: dict[str, dict[str, Any]] = {}
    for key, own in runs.items():
        for precision in PRECISIONS:
            nets = {
                "whole": own["base"].model,
                **{arm: own[arm].model for arm in own if arm in PLANS[key][4]},
            }
            arms = {arm: inference(net, x, precision) for arm, net in nets.items() if net is not None}
            title = f"inference of {key}, batch 128, {precision}"
            found.setdefault(key, {})[precision] = pairs(
                title, arms, baseline="whole", seconds=25, smoke=smoke
            )
    return found


# -- dead columns
def with_dead_columns(c_in: int, c_out: int, kernel: int, dead: float | None) -> nn.Conv2d:
    """Return a convolution with a share of columns dead, scattered; None leaves a margin of the kernel dead."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    draw = generator("ssl columns", c_in, kernel)
    with torch.no_grad():
        conv.weight.copy_(0.1 * torch.randn(conv.weight.shape, generator=draw))
        if dead is None:
            conv.weight[:, :, 0], conv.weight[:, :, -1] = 0, 0
        else:
            conv.weight.mul_(torch.rand(1, *conv.weight.shape[1:], generator=draw) >= dead)
    return conv


def columns(smoke: bool) -> dict[str, dict[str, Any]]:
    """Time convolutions with dead columns, dense and in every form that computes the same."""
    found: dict[str, dict[str, Any]] = {}
    layers = dict(list(LAYERS.items())[1:2]) if smoke else LAYERS
    for what, (c_in, c_out, kernel, side) in layers.items():
        for dead in (*DEAD, None):
            conv = with_dead_columns(c_in, c_out, kernel, dead)
            forms = {"crop": form} if (form := cropped(conv)) is not None else column_forms(conv)
            nets = {"dense": conv, **{name: form.built(conv) for name, form in forms.items()}}
            x = torch.randn(64, c_in, side, side, generator=generator("ssl inputs"))
            for precision in PRECISIONS:
                arms = {name: inference(net, x, precision) for name, net in nets.items()}
                result = paired_steps(
                    arms,
                    baseline="dense",
                    seconds=0.5 if smoke else 4.0,
                    chunk_s=(0.02, 0.2),
                    warmup=3,
                    seed=0,
                )
                share = "the upper and lower row" if dead is None else f"{dead:.0%}"
                title = f"{what}, {precision}, {share} of the columns dead"
                found[title] = {**result.to_json(), "dead": dead, "precision": precision}
                print(f"-- {title}", *result.table(), sep="\n", flush=True)
    return found


def column_claims(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the forms came to: for each share of dead columns and precision, the best form on each layer."""
    claims = []
    for dead in (*DEAD, None):
        for precision in PRECISIONS:
            rows = [row for row in found.values() if (row["dead"], row["precision"]) == (dead, precision)]
            best = []
            for row in rows:
                ratios = {arm: r["ratio"] for arm, r in row["ratios"].items() if arm != "A/A"}
                if ratios and row["aa_ok"]:
                    name = max(ratios, key=ratios.__getitem__)
                    best.append((ratios[name], name))
            if not best:
                continue
            text = ", ".join(f"{ratio:.2f}x ({name})" for ratio, name in best)
            if dead is None:
                what = f"a rectangle of live columns, cropped kernel against dense, {precision}"
            else:
                what = f"{dead:.0%} of the columns dead and scattered, best form against dense, {precision}"
                verdict = "a fast path" if min(best)[0] > 1.05 else "no fast path that holds on every layer"
                text = f"{text}: {verdict} (median {median(ratio for ratio, _ in best):.2f}x)"
            claims.append(claim(NAME, f"{what}, {len(best)} layers", text))
    return claims


# -- together
def network_claims(
    runs: dict[str, dict[str, Result]], timed: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the claims of accuracy beside time, and of layers taken out."""
    claims = []
    sample = torch.zeros(1, 3, 32, 32)
    for key, own in runs.items():
        control, base = own["control"].accuracy, own["base"].model
        whole = macs(base, sample).forward if base is not None else 0
        for arm in PLANS[key][4]:
            net = own[arm].model
            assert net is not None
            assert base is not None
            lost, epochs = 100 * (control - own[arm].accuracy), PLANS[key][3].epochs
            share = macs(net, sample).forward / whole
            accuracy = (
                f"accuracy {100 * own[arm].accuracy:.2f}% after {LONGER.get((key, arm), 1.0) * epochs:g} epochs (trained on "
                f"without it for {epochs:g} {100 * control:.2f}%, base "
                f"{100 * own['base'].accuracy:.2f}%), {share:.3f} of the MACs, one seed"
            )
            if arm.startswith("shallow"):
                layers = depth_of(net)
                met = layers <= depth_of(base) - 2 and lost <= 0
                text = f"{layers} of {depth_of(base)} layers; {accuracy}"
                claims.append(
                    claim(NAME, f"layers of {key}, CIFAR-10", text, target="18 layers, no loss", met=met)
                )
            for precision, result in timed[key].items():
                ratio = result["ratios"].get(arm)
                if ratio is not None:
                    fast = arm.startswith("shallow") or ratio["ratio"] >= 3
                    text = f"{ratio['text']}; {accuracy}"
                    target = "" if arm.startswith("shallow") else ">= 3x, <= 1 point lost"
                    what = f"inference of {key}, {arm}, batch 128, {precision}"
                    met = None if arm.startswith("shallow") else fast and lost <= 1
                    claims.append(claim(NAME, what, text, target=target, met=met))
    return claims


def main(smoke: bool = False) -> None:
    """Train, then time networks, then time convolutions with dead columns."""
    with tempfile.TemporaryDirectory() as aside:
        runs = accuracies(smoke, Path(aside) if smoke else WORK / NAME)
    timed = times(runs, smoke)
    dead = columns(smoke)
    claims = [*network_claims(runs, timed), *column_claims(dead)]
    rows = {
        key: {
            arm: {"accuracy": run.accuracy, "witness": run.witness} for arm, run in own.items()
        }
        for key, own in runs.items()
    }  # fmt: skip
    settings = {key: {arm: repr(method) for arm, method in plan[4].items()} for key, plan in PLANS.items()}
    store(
        NAME,
        {"claim": CLAIM, "settings": settings, "runs": rows, "inference": timed, "columns": dead},
        smoke,
        claims,
    )
