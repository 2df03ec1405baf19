"""Gradient approximation: step time of zero, random and patch gradients, the kernel's time, and what they cost in accuracy.

The weight gradients of half of the convolutions are about a sixth of a step, so a step can be 1.2x as fast at most. The
paper reports upwards of 1.07x on a GPU. What has to be beaten is the zero gradient, which is cheaper and needs no kernel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    LEFT_OUT,
    Step,
    accuracy_claims,
    at_full_budget,
    bare_step,
    build,
    cifar10,
    claim,
    kept,
    pairs,
    ratio_claim,
    real_images,
    session_step,
    store,
    strong,
    to_accuracy,
)
from hasten import STRONG, method
from hasten.comparison import Arm
from hasten.contract import Method
from hasten.kernels.one_patch import one_patch
from hasten.kernels.reference.one_patch import one_patch as plain
from hasten.methods.products.gradient_approximation import GradientApproximation

CLAIM = "gradient approximation: steps of ResNet-20 and VGG-19 >= 1.1x as fast as in float32, at a stated cost in accuracy"
MINUTES = 30  # 8 for layers and steps, the rest for accuracy
NAME = "gradient_approximation"
NETWORKS = (("resnet20", 128, 90.0), ("vgg19", 32, 90.0))
#         C,   size, O
LAYERS = ((16, 32, 16), (32, 16, 32), (64, 8, 64), (64, 32, 64), (128, 16, 128), (256, 8, 256), (512, 4, 512))
LAYER_BATCH, LAYER_SECONDS = 128, 16.0
EPOCHS, TRAIN, TEST, SEEDS = 4.0, 8_000, 5_000, 3


def float32() -> Method:
    """Return the method that makes the fast float32 baseline: channels_last, no 16-bit arithmetic."""
    return method("mixed_precision", dtype="float32")


def stands(**settings: Any) -> GradientApproximation:
    """Return the method for the whole of a run."""
    return GradientApproximation(exact_epochs=0, stop_fraction=1.0, **settings)


ARMS = {f"{what}, period {period}": partial(stands, method=what, period=period)
        for what in ("zero", "random", "patch") for period in (1, 2)}  # fmt: skip
ARMS["patch, all layers, period 1"] = partial(stands, layers=("*",), period=1)


def layer_steps(c: int, size: int, o: int, dtype: torch.dtype) -> dict[str, Step]:
    """Return the exact and the patch gradient of one 3x3 convolution, in channels_last."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    x, g, w = (
        random(LAYER_BATCH, c, size, size).relu(),
        random(LAYER_BATCH, o, size, size),
        random(o, c, 3, 3),
    )
    backward = torch.ops.aten.convolution_backward
    one = (1, 1)

    def exact() -> None:
        backward(g, x, w, [o], one, one, one, False, (0, 0), 1, (False, True, False))

    def patch() -> None:
        one_patch(g, x, (3, 3), one, one)

    def reference() -> None:
        plain(g, x, [3, 3], [1, 1], [1, 1])

    return {"exact": exact, "patch": patch, "patch without native kernels": reference}


def time_layers(smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time the kernel against the exact weight gradient of the same dtype, layer by layer."""
    found, claims = {}, []
    for c, size, o in LAYERS[:1] if smoke else LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            title = (
                f"grad_weight, 3x3, {c} to {o} channels, {size}x{size}, batch {LAYER_BATCH}, {str(dtype)[6:]}"
            )
            arms = layer_steps(c, size, o, dtype)
            times = partial(pairs, title, arms, baseline="exact", seconds=LAYER_SECONDS, smoke=smoke)
            timed = found[title] = kept(NAME, f"layer-{c}-{size}-{o}-{str(dtype)[6:]}", times, smoke)
            if not smoke:
                wide = dtype == torch.float32 and c >= 64 and size >= 8
                claims.append(ratio_claim(NAME, f"{title}, over exact", timed, "patch", 10 if wide else None))
                if c == 16:
                    without = "patch without native kernels"
                    claims.append(ratio_claim(NAME, f"{title}, over exact, in plain torch", timed, without))
    return found, claims


def time_steps(smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time whole steps of every arm, in float32 and with bfloat16 beside it, in one interleaved run a network."""
    found, claims = {}, []
    for name, batch, seconds in (("resnet8", 16, 1.0),) if smoke else NETWORKS:
        x, y = real_images(batch)
        arms = {
            "float32": session_step(build(name), x, y, [float32()]),
            "plain": bare_step(build(name), x, y),
            "bfloat16": session_step(build(name), x, y, [strong()]),
        }
        for label, make in ARMS.items():
            arms[label] = session_step(build(name), x, y, [float32(), make()])
        for label in ("zero, period 1", "patch, period 1"):
            arms[f"bfloat16, {label}"] = session_step(build(name), x, y, [strong(), ARMS[label]()])
        title = f"{name}, batch {batch}, 32x32"
        times = partial(pairs, title, arms, baseline="float32", seconds=seconds, smoke=smoke)
        timed = found[name] = kept(NAME, f"steps-{name}", times, smoke)
        ratios = timed["ratios"]
        if timed["aa_ok"] and "bfloat16" in ratios:
            timed["over_bfloat16"] = {
                label: ratios[f"bfloat16, {label}"]["ratio"] / ratios["bfloat16"]["ratio"]
                for label in ("zero, period 1", "patch, period 1")
            }
            print(f"over bfloat16: {timed['over_bfloat16']}", flush=True)
        if not smoke:
            for label in ARMS:
                at_least = 1.1 if label.startswith("patch") and label.endswith("period 1") else None
                claims.append(ratio_claim(NAME, f"step of {title}, float32, {label}", timed, label, at_least))
            for label, ratio in timed.get("over_bfloat16", {}).items():
                claims.append(
                    claim(NAME, f"step of {title}, bfloat16, {label}", f"{ratio:.3f}x over bfloat16")
                )
    return found, claims


def accuracy(smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train ResNet-20 in float32 with and without the method: accuracy at equal epochs, and time to equal accuracy."""
    base = Arm("float32", STRONG.with_(epochs=EPOCHS, lr=0.2), (float32(),), "strong")
    variants = {
        "patch-2": GradientApproximation(),
        "random-2": GradientApproximation(method="random"),
        "freeze-2": GradientApproximation(method="zero", freeze_on_zero=True),
    }
    arms = [base]
    arms += [Arm(name, base.recipe, (*base.methods, variant), "method") for name, variant in variants.items()]
    finished = to_accuracy(f"{NAME}-resnet20", "resnet20", cifar10(), arms, seeds=SEEDS, smoke=smoke, smoke_epochs=4.0,
                           train=TRAIN, test=TEST)  # fmt: skip
    claims = accuracy_claims(finished, 1.0)
    exact = at_full_budget(finished, "float32")
    for name in variants:
        own = at_full_budget(finished, name)
        what = f"accuracy of {name}, ResNet-20, {TRAIN} CIFAR-10 images, {EPOCHS:g} epochs, mean of {SEEDS} seeds"
        lost, share = 100 * (own["accuracy"] - exact["accuracy"]), own["seconds"] / exact["seconds"]
        text = f"{100 * own['accuracy']:.2f}%, {lost:+.2f} points, in {share:.2f} of float32's seconds"
        claims.append(claim(NAME, what, text))
    return {"report": finished.data}, claims


def main(smoke: bool = False) -> None:
    """Time layers and steps, train, and store it all."""
    values, claims = {}, []
    for name, part in (("layers", time_layers), ("steps", time_steps), ("accuracy", accuracy)):
        if name in LEFT_OUT:
            continue
        values[name], found = part(smoke)
        claims += found
    settings = {"networks": NETWORKS, "layer_batch": LAYER_BATCH, "method": repr(stands())}
    store(NAME, {"claim": CLAIM, "settings": settings, **values}, smoke, claims)
