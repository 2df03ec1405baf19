"""Activation gradient pruning: what skipping zeros saves by layer and density, at the densities of training, and in a step.

Parts, each stored when done and not run again: layers by density (6 minutes), real gradients of AlexNet and ResNet-18
(4), whole steps (8), accuracy of AlexNet on CIFAR-10 (25). Dense products are oneDNN's, channels last, in float32 and in
bfloat16, called in turn with ours on the same gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import (
    LEFT_OUT,
    WORK,
    bare_step,
    build,
    cifar10,
    claim,
    kept,
    pairs,
    ratio_claim,
    session_step,
    store,
    strong,
)
from hasten import PLAIN, Session, fit, keyed, method
from hasten.contract import Method
from hasten.data import DataSet
from hasten.kernels import zero_skip
from hasten.kernels.probe import seconds
from hasten.kernels.reference import zero_skip as dense
from hasten.methods.products.activation_gradient_pruning import NAME, ActivationGradientPruning

CLAIM = "activation gradient pruning: AlexNet's backward convolutions >= 5.9x as fast as fp32, >= 2.5x as bf16; step >= 1.8x"
MINUTES = 43
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
# name: (batch, size of x, C, O, kernel, stride, padding)
LAYERS = {
    "alexnet conv2, 32x32 images": (128, 4, 64, 192, 5, 1, 2),
    "alexnet conv3, 32x32 images": (128, 2, 192, 384, 3, 1, 1),
    "alexnet conv4, 32x32 images": (128, 2, 384, 256, 3, 1, 1),
    "alexnet conv5, 32x32 images": (128, 2, 256, 256, 3, 1, 1),
    "alexnet conv2, 224x224 images": (16, 27, 64, 192, 5, 1, 2),
    "alexnet conv3, 224x224 images": (32, 13, 192, 384, 3, 1, 1),
    "resnet18 layer1": (32, 32, 64, 64, 3, 1, 1),
    "resnet18 layer2": (64, 16, 128, 128, 3, 1, 1),
    "resnet18 layer3": (64, 8, 256, 256, 3, 1, 1),
    "resnet18 layer4": (128, 4, 512, 512, 3, 1, 1),
}
EPOCHS, SEEDS, RATE = 4.0, 3, 0.02
ONCE = ("p0.99", "p0.9-strips")  # arms with one seed
Call = tuple[str, tuple[Any, ...]]


def last(t: Tensor) -> Tensor:
    """Return ``t`` channels last."""
    return t.contiguous(memory_format=torch.channels_last)


def candidates(
    g: Tensor, x: Tensor, w: Tensor, rest: tuple[Any, ...], product: str
) -> dict[str, Callable[[], object]]:
    """Return calls of one product: ours and oneDNN's, in both dtypes."""
    out: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, c = (last(t.to(dtype)) for t in (g, x, w))
        name = str(dtype).removeprefix("torch.")
        for kind, module in (("dense", dense), ("skipping", zero_skip)):
            if product == "grad_input":
                out[f"{kind} {name}"] = partial(module.grad_input, a, c, list(x.shape), *rest)
            else:
                out[f"{kind} {name}"] = partial(module.grad_weight, a, b, list(w.shape[2:]), *rest)
    return out


def timed(
    g: Tensor, x: Tensor, w: Tensor, rest: tuple[Any, ...], products: tuple[str, ...], rounds: int
) -> dict[str, Any]:
    """Return median milliseconds of each product by each candidate, called in turn."""
    found: dict[str, Any] = {"density": float((g != 0).double().mean())}
    for product in products:
        taken = seconds(candidates(g, x, w, rest, product), rounds=rounds)
        found[product] = {name: 1000 * value for name, value in taken.items()}
    return found


def ratio(rows: list[dict[str, Any]], baseline: str, ours: str = "skipping float32") -> float:
    """Return the time of all products of ``rows`` by ``baseline`` over that by ``ours``."""
    products = [row[p] for row in rows for p in ("grad_input", "grad_weight") if p in row]
    return float(sum(p[baseline] for p in products) / sum(p[ours] for p in products))


def layer_table(smoke: bool) -> dict[str, Any]:
    """Time each layer's two backward products at each density, and find where dense float32 is as fast."""
    table: dict[str, Any] = {}
    for name, (n, size, c, o, kernel, stride, padding) in list(LAYERS.items())[: 1 if smoke else None]:
        images = 8 if smoke else n
        random = keyed.generator("layers", name)
        out = (size + 2 * padding - kernel) // stride + 1
        x, w = (
            torch.randn(images, c, size, size, generator=random),
            torch.randn(o, c, kernel, kernel, generator=random),
        )
        rest = ([stride] * 2, [padding] * 2, [1, 1])
        rows = []
        for density in DENSITIES[:2] if smoke else DENSITIES:
            kept = torch.rand(images, o, out, out, generator=random) < density
            g = torch.randn(images, o, out, out, generator=random) * kept
            rows.append(timed(g, x, w, rest, ("grad_input", "grad_weight"), 2 if smoke else 9))
            line = f"{name} density {density}: {ratio(rows[-1:], 'dense float32'):.2f}x over fp32"
            print(f"{line}, {ratio(rows[-1:], 'dense bfloat16'):.2f}x over bf16", flush=True)
        ratios = [ratio([row], "dense float32") for row in rows]
        table[name] = {"rows": rows, "break_even": crossing(DENSITIES[: len(ratios)], ratios)}
    return table


def crossing(densities: tuple[float, ...], ratios: list[float]) -> float:
    """Return the density at which the ratio falls to 1, interpolated; the last density if it never does."""
    for (a, ra), (b, rb) in zip(
        zip(densities, ratios, strict=True), list(zip(densities, ratios, strict=True))[1:], strict=False
    ):
        if ra >= 1 > rb:
            return a + (b - a) * (ra - 1) / (ra - rb)
    return 0.0 if ratios[0] < 1 else densities[-1]


@contextmanager
def captured(into: list[Call]) -> Iterator[None]:
    """Keep the operands of every zero-skipping product of the block."""
    plain = {"grad_input": zero_skip.grad_input, "grad_weight": zero_skip.grad_weight}

    def keep(name: str, *args: Any) -> Tensor:
        into.append((name, args))
        result: Tensor = plain[name](*args)
        return result

    with (
        patch.object(zero_skip, "grad_input", partial(keep, "grad_input")),
        patch.object(zero_skip, "grad_weight", partial(keep, "grad_weight")),
    ):
        yield


def batches(data: DataSet, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images, channels last, and labels, in a fixed order."""
    order = torch.from_numpy(keyed.permutation(len(data.train.labels), "order"))
    for step in range(steps):
        rows = order[torch.arange(step * batch, (step + 1) * batch) % len(order)].numpy()
        x = torch.from_numpy(data.train.pixels[rows]).permute(0, 3, 1, 2).float().div(255).sub(0.47).div(0.25)
        yield last(x), torch.from_numpy(data.train.labels[rows]).long()


def real_gradients(smoke: bool) -> dict[str, Any]:
    """Train a while, then time every backward product on the gradients of the last step; tell densities by layer."""
    found: dict[str, Any] = {}
    data = cifar10()
    nets = (("alexnet", 16, 8),) if smoke else (("alexnet", 128, 400), ("resnet18", 64, 25))
    for name, batch, steps in nets:
        for p in (0.0, 0.9, 0.99):
            if name == "resnet18" and p == 0.0:
                continue  # batch norm leaves no zeros
            x, y = next(batches(data, batch, 1))
            model = build(name)
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
            methods = [
                method("mixed_precision", dtype="float32"),
                ActivationGradientPruning(p=p, kernel="native"),
            ]
            session = Session(model, optimizer, methods, sample=(x, y))
            calls: list[Call] = []
            for step, (inputs, targets) in enumerate(batches(data, batch, steps)):
                if step < steps - 1:
                    session.step(inputs, targets)
                    continue
                with captured(calls):
                    session.step(inputs, targets)
            rows = []
            for product, args in calls:
                g, other, shape, *rest = args
                x_of = torch.empty(shape) if product == "grad_input" else other
                w_of = other if product == "grad_input" else torch.empty(g.shape[1], other.shape[1], *shape)
                row = timed(g, x_of, w_of, tuple(rest), (product,), 1 if smoke else 9)
                rows.append({"x": list(x_of.shape), "w": list(w_of.shape), **row})
            own = next(m for m in session.methods if isinstance(m, ActivationGradientPruning))
            entry: dict[str, Any] = {"steps": steps, "products": rows, "sites": own.densities()}
            for dtype in ("float32", "bfloat16"):
                entry[f"over {dtype}"] = ratio(rows, f"dense {dtype}")
                entry[f"in bfloat16 over {dtype}"] = ratio(rows, f"dense {dtype}", "skipping bfloat16")
            found[f"{name}, p={p}"] = entry
            print(f"{name} p={p} after {steps} steps: {entry['over float32']:.2f}x over fp32, {entry['over bfloat16']:.2f}x over bf16; "
                  f"densities {[round(r['density'], 3) for r in rows]}", flush=True)  # fmt: skip
    return found


def whole_steps(smoke: bool) -> dict[str, Any]:
    """Time whole training steps of pruned float32 and bfloat16 networks beside the plain and the strong baseline."""
    found: dict[str, Any] = {}
    data = cifar10()
    for name, batch in (("alexnet", 128), ("resnet18", 64))[: 1 if smoke else None]:
        x, y = next(batches(data, 16 if smoke else batch, 1))
        fp32 = partial(method, "mixed_precision", dtype="float32")
        arms = {
            "fp32, plain": bare_step(build(name), x.contiguous(), y),
            "fp32": session_step(build(name), x, y, [fp32()]),
            "fp32, p=0": session_step(build(name), x, y, [fp32(), ActivationGradientPruning(p=0.0)]),
            "fp32, p=0.9": session_step(build(name), x, y, [fp32(), ActivationGradientPruning(p=0.9)]),
            "fp32, p=0.99": session_step(build(name), x, y, [fp32(), ActivationGradientPruning(p=0.99)]),
            "fp32, p=0.99, strips": session_step(
                build(name), x, y, [fp32(), ActivationGradientPruning(p=0.99, unit="strip")]
            ),
            "strong": session_step(build(name), x, y, [strong()]),
            "strong, p=0": session_step(build(name), x, y, [strong(), ActivationGradientPruning(p=0.0)]),
            "strong, p=0.99": session_step(build(name), x, y, [strong(), ActivationGradientPruning(p=0.99)]),
        }
        if name != "alexnet":
            del arms["fp32, p=0"], arms["strong, p=0"]  # all of its layers have batch norm
        found[name] = pairs(
            f"{name}, batch {len(x)}, 32x32", arms, baseline="fp32", seconds=200.0, smoke=smoke
        )
    return found


def accuracy(smoke: bool) -> dict[str, Any]:
    """Train AlexNet on CIFAR-10 with and without pruning; every run is kept and continued."""
    data = cifar10().stratified(320, 100) if smoke else cifar10()
    recipe = PLAIN.with_(epochs=EPOCHS, lr=RATE, batch_size=128, augment=("crop", "flip"), eval_every=0.0)
    if smoke:
        recipe = recipe.with_(epochs=1.0, batch_size=32)
    fp32 = partial(method, "mixed_precision", dtype="float32")
    arms: dict[str, list[Method]] = {
        "fp32": [fp32()],
        "p0.9": [fp32(), ActivationGradientPruning(p=0.9)],
        "p0.99": [fp32(), ActivationGradientPruning(p=0.99)],
        "p0.9-strips": [fp32(), ActivationGradientPruning(p=0.9, unit="strip")],
        "bf16": [strong()],
        "bf16-p0": [strong(), ActivationGradientPruning(p=0.0)],
    }
    if smoke:
        arms = {"p0.9": arms["p0.9"]}
    table: dict[str, Any] = {arm: [] for arm in arms}
    for seed in range(1 if smoke else SEEDS):
        for arm, methods in arms.items():
            if seed > 0 and arm in ONCE:
                continue
            out = None if smoke else str(WORK / NAME / f"alexnet-{EPOCHS:g}-{arm}-{seed}")
            result = fit("alexnet", data, methods, recipe=recipe, seed=seed, out=out)
            table[arm].append({"accuracy": 100 * result.accuracy, "seconds": result.seconds_train})
            print(
                f"seed {seed} {arm}: {100 * result.accuracy:.2f} % in {result.seconds_train:.0f} s",
                flush=True,
            )
    return table


def claims_of(
    layers: dict[str, Any], real: dict[str, Any], steps: dict[str, Any], table: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return what may be said of the figures, each against its target."""
    claims = []
    for p in (0.9, 0.99):
        for dtype, target in (("float32", 5.9), ("bfloat16", 2.5)):
            value = real[f"alexnet, p={p}"][f"over {dtype}"]
            what = f"grad_input + grad_weight of AlexNet's convolutions in training on CIFAR-10, p={p}, over oneDNN {dtype}"
            claims.append(claim(NAME, what, f"{value:.2f}x", target=f">= {target}x", met=value >= target))
        value = real[f"resnet18, p={p}"]["over float32"]
        what = f"grad_input + grad_weight of ResNet-18's convolutions, p={p}, over oneDNN float32"
        claims.append(claim(NAME, what, f"{value:.2f}x", target=">= 1.5x", met=value >= 1.5))
    worst = min(layers, key=lambda name: layers[name]["break_even"])
    value = layers[worst]["break_even"]
    what = f"density at which skipping zeros is as fast as oneDNN float32, least of {len(layers)} layers ({worst})"
    claims.append(claim(NAME, what, f"{value:.2f}", target=">= 0.5", met=value >= 0.5))
    claims.append(
        ratio_claim(
            NAME, "step of alexnet, batch 128, over fp32, p=0.9", steps["alexnet"], "fp32, p=0.9", 1.8
        )
    )
    claims.append(
        ratio_claim(
            NAME, "step of alexnet, batch 128, over fp32, p=0.99", steps["alexnet"], "fp32, p=0.99", 1.8
        )
    )
    claims.append(
        ratio_claim(NAME, "step of resnet18, batch 64, over fp32, p=0.99", steps["resnet18"], "fp32, p=0.99")
    )
    steps_of = steps["alexnet"]
    ratios = steps_of["ratios"]
    claims.append(
        ratio_claim(
            NAME, "step of alexnet, batch 128, bf16 beside it, over fp32, p=0.99", steps_of, "strong, p=0.99"
        )
    )
    what = (
        "step of alexnet, batch 128, bf16 beside it, over fp32, p=0 (exact gradients, natural zeros skipped)"
    )
    claims.append(ratio_claim(NAME, what, steps_of, "strong, p=0", 1.8))
    for p in ("0", "0.99"):
        both = ratios[f"strong, p={p}"]["ratio"] / ratios["strong"]["ratio"]
        what = f"step of alexnet, batch 128, bf16 beside it, over bf16 alone, p={p}"
        claims.append(claim(NAME, what, f"{both:.2f}x"))
    loop = ratios["fp32, plain"]["ratio"]  # channels last is the slower layout for float32 here
    for arm in ("fp32, p=0", "fp32, p=0.99", "strong, p=0"):
        what = f"step of alexnet, batch 128, {arm}, over a plain loop in float32 without channels_last"
        claims.append(claim(NAME, what, f"{ratios[arm]['ratio'] / loop:.2f}x"))
    means = {arm: statistics.mean(run["accuracy"] for run in runs) for arm, runs in table.items()}
    for arm in ("bf16-p0", "p0.9", "p0.99", "p0.9-strips") if table else ():
        exact = means["fp32"] if arm not in ONCE else table["fp32"][0]["accuracy"]
        lost = exact - means[arm]
        what = (
            f"accuracy of AlexNet after {EPOCHS:g} epochs of CIFAR-10, {arm}, mean of {len(table[arm])} seeds"
        )
        text = f"{means[arm]:.2f} %, fp32 {exact:.2f} %"
        claims.append(claim(NAME, what, text, target="at most 0.3 points less", met=lost <= 0.3))
    return claims


def main(smoke: bool = False) -> None:
    """Run the parts that are not stored yet, and store all."""
    layers = kept(NAME, "layers", lambda: layer_table(smoke), smoke)
    real = kept(NAME, "real", lambda: real_gradients(smoke), smoke)
    steps = kept(NAME, "steps", lambda: whole_steps(smoke), smoke)
    table = {} if "accuracy" in LEFT_OUT else kept(NAME, "accuracy", lambda: accuracy(smoke), smoke)
    claims = [] if smoke else claims_of(layers, real, steps, table)
    settings = {"densities": DENSITIES, "layers": LAYERS, "epochs": EPOCHS, "rate": RATE, "seeds": SEEDS}
    record = {
        "claim": CLAIM,
        "settings": settings,
        "layers": layers,
        "real": real,
        "steps": steps,
        "accuracy": table,
    }
    store(NAME, record, smoke, claims)
