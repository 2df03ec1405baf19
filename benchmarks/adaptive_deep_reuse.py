"""Adaptive deep reuse: single layers on activations of trained networks, whole steps, then whole training.

Layers: every distinct convolution with at least 128 outputs of VGG-19 and AlexNet (CIFAR forms), on its input in a network
trained for 2 epochs on CIFAR-10, batch 128 (and 64 for VGG-19's widest), channels_last: output and both gradients, the
clustering included. Against the dense layer in float32 (the baseline) and bfloat16, and against im2col with matrix
products (what the paper's authors compared with). Two rungs each, chosen by the method's own measurement: the cheapest
with an error of at most 35% and of at most 20%; all three products from clusters, as in the paper, and for the fine rung
with an exact grad_input, the method's default.

Steps: networks with and without the method as it is by default, in float32 and bfloat16, and by im2col.

Training, at equal accuracy: two networks by the strong recipe in float32 and bfloat16, and in float32 with the method;
AlexNet also with only its output from clusters and gradients that skip the zeros ReLU leaves, CifarNet also under S1 and
with the paper's settings (all products from clusters, one mean for all lengths, errors up to 35% at first).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import (
    LEFT_OUT,
    accuracy_claims,
    beside,
    build,
    cifar10,
    claim,
    kept,
    pairs,
    ratio_claim,
    session_step,
    store,
    strong,
    to_accuracy,
)
from benchmarks.trained import Start
from hasten import STRONG, method
from hasten.comparison import Arm
from hasten.contract import Effect, Method, MethodSpec
from hasten.diagnose import look
from hasten.methods.products.activation_gradient_pruning import ActivationGradientPruning
from hasten.methods.products.adaptive_deep_reuse import NAME, AdaptiveDeepReuse
from hasten.methods.products.reuse_ladder import PRODUCTS, Measured, Rung, candidates
from hasten.methods.products.reuse_layer import How, LayerReuse
from hasten.products import Geometry, Saved, arithmetic, supported
from hasten.session import Session

CLAIM = (
    "adaptive deep reuse: layers of VGG-19 and AlexNet with >= 128 outputs >= 3x as fast as float32 at <= 35% error, >= 2x at "
    "<= 20%"
)
MINUTES = 45  # 5 to train two networks, 8 for the layers, 4 for steps, the rest for whole training; all of it is kept
NETWORKS = {"vgg19": Start("vgg19", 25_000, 2.0, 0.0), "alexnet": Start("alexnet", 25_000, 2.0, 0.0)}
BATCHES = (128, 64)
EARLY, FINE = 0.35, 0.20
AIMS = {"early": 3.0, "fine": 2.0}
SECONDS = 20.0
RUNS = {"alexnet": (12_500, 4.0, 0.02), "cifarnet": (6_400, 2.0, 0.02)}
"""Images, epochs and learning rate of whole training."""
SEEDS = 3
NETS = (("alexnet", 128), ("vgg19", 64), ("cifarnet", 128), ("resnet18", 64), ("resnet20", 128))
"""Networks and batches of whole steps."""
IM2COL = ("alexnet", "cifarnet", "vgg19")


# -- im2col with matrix products, as the authors' baseline computed
class _Im2Col:
    name = "im2col"
    selectable = False
    needs_x = False


class _Output(_Im2Col):
    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        columns = functional.unfold(x, (w.shape[2], w.shape[3]), 1, geometry.padding, geometry.stride)
        y = w.flatten(1) @ columns
        if bias is not None:
            y += bias[:, None]
        high = (x.shape[2] + 2 * geometry.padding[0] - w.shape[2]) // geometry.stride[0] + 1
        return y.view(x.shape[0], w.shape[0], high, -1), (columns,)


class _GradInput(_Im2Col):
    def __call__(self, grad_output: Tensor, w: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        columns = w.flatten(1).t() @ grad_output.flatten(2)
        size, kernel = saved.x_like.shape[2:], (w.shape[2], w.shape[3])
        return functional.fold(columns, size, kernel, 1, geometry.padding, geometry.stride)


class _GradWeight(_Im2Col):
    def __call__(self, grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        (columns,) = saved.extras
        return (grad_output.flatten(2) @ columns.transpose(1, 2)).sum(0).view(saved.w_like.shape)


@dataclass(kw_only=True, eq=False)
class Im2Col(Method):
    """Every convolution as an unfolded input times a matrix, forward and backward, in NCHW: a baseline, not a method."""

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="im2col",
        title="im2col",
        paper="",
        saves="time per step",
        acts="unfolds the input of every convolution",
        writes=frozenset({"output", "grad_input", "grad_weight"}),
        state=("steps_",),
    )

    def attach(self, session: Session) -> Effect:
        """Claim every plain convolution."""
        self.steps_ = 0
        effect = Effect()
        for name, module in session.layers(nn.Conv2d):
            assert isinstance(module, nn.Conv2d)
            if supported(module) or module.groups != 1 or module.padding_mode != "zeros":
                effect.skipped[name] = "not a plain convolution"
                continue
            plan = session.plan(name)
            plan.kernel("output", _Output(), "im2col")
            plan.kernel("grad_input", _GradInput(), "im2col")
            plan.kernel("grad_weight", _GradWeight(), "im2col")
            effect.touched[name] = "unfolded"
        return effect

    def after_update(self) -> None:
        """Count."""
        self.steps_ += 1

    def witness(self) -> dict[str, float]:
        """Return the steps."""
        return {"steps": float(self.steps_)}


# -- single layers
@dataclass(frozen=True)
class Case:
    """One layer: its input, parameters and geometry, in float32 and channels_last."""

    title: str
    x: Tensor
    w: Tensor
    bias: Tensor | None
    geometry: Geometry


def cases(name: str, batches: tuple[int, ...], smoke: bool) -> list[Case]:
    """Return the distinct layers of a trained network with at least 128 outputs, on images it was trained on."""
    model = NETWORKS[name].base(smoke).model
    assert model is not None
    pixels = torch.from_numpy(cifar10().train.stratified(max(batches)).pixels)
    images = pixels.permute(0, 3, 1, 2).float().div(255).sub(0.47).div(0.25)
    model.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[tuple[Any, ...], Case] = {}

    def see(layer: str, inputs: tuple[Any, ...], _: Any) -> None:
        module = model.get_submodule(layer)
        assert isinstance(module, nn.Conv2d)
        x = inputs[0].detach().clone(memory_format=torch.channels_last)
        o = module.out_channels
        if o < 128 or (len(x) != batches[0] and o < 256):
            return
        geometry = Geometry(True, module.stride, module.padding)  # type: ignore[arg-type]
        w = module.weight.detach().clone(memory_format=torch.channels_last)
        bias = None if module.bias is None else module.bias.detach().clone()
        size = "x".join(map(str, module.kernel_size))
        title = (
            f"{name} {layer}: {size}, {x.shape[1]} to {o} channels, {x.shape[2]}x{x.shape[3]}, batch {len(x)}"
        )
        found.setdefault((tuple(x.shape), o, size), Case(title, x, w, bias, geometry))

    for batch in batches:
        look(model, images[:batch].contiguous(memory_format=torch.channels_last), see, (nn.Conv2d,))
    return [*found.values()][: 1 if smoke else None]


def how(**changes: Any) -> How:
    """Return the method's own settings."""
    m = AdaptiveDeepReuse()
    given = {"key": (0, NAME), "order": m.order, "scope": m.scope, "norm": m.scale == "norm", "center": m.center_hash, "products": PRODUCTS, "a": m.a, "overhead": m.overhead,
             "max_rho": m.max_rho, "max_error": m.max_error, "rungs": m.rungs, "max_age": m.cr_max_age, "kernel": "native"}  # fmt: skip
    return How(**{**given, **changes})


def dense_step(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """Return the three dense products in this dtype."""
    x, w = case.x.to(dtype), case.w.to(dtype)
    bias = None if case.bias is None else case.bias.to(dtype)
    grad = torch.ones_like(arithmetic.output(x, w, bias, case.geometry))
    grad.copy_(torch.randn(grad.shape, generator=torch.Generator().manual_seed(0)))

    def step() -> None:
        arithmetic.output(x, w, bias, case.geometry)
        arithmetic.gradients(grad, x, w, case.geometry, (True, True, False))

    return step


def im2col_step(case: Case) -> Callable[[], None]:
    """Return the three products by im2col, float32 and NCHW."""
    x, w = case.x.contiguous(), case.w.contiguous()
    y, _ = _Output()(x, w, case.bias, case.geometry)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        _, extras = _Output()(x, w, case.bias, case.geometry)
        saved = Saved(x, w, extras)
        _GradInput()(grad, w, case.geometry, saved)
        _GradWeight()(grad, x, case.geometry, saved)

    return step


def reuse_step(
    case: Case, layer: LayerReuse, rung: Rung, dtype: torch.dtype, to_input: bool = True
) -> Callable[[], None]:
    """Return the three products by reuse, the clustering included; grad_input exactly if not ``to_input``."""
    x, w = case.x.to(dtype), case.w.to(dtype)
    bias = None if case.bias is None else case.bias.to(dtype)
    like = arithmetic.output(x, w, bias, case.geometry)
    grad = torch.empty_like(like)
    grad.copy_(torch.randn(like.shape, generator=torch.Generator().manual_seed(0)))

    def step() -> None:
        clusters = layer.cluster(x, w, case.geometry, rung)
        layer.output(clusters, x, w, bias, case.geometry)
        saved = Saved(x, w, tuple(clusters))
        layer.backward(grad, w, saved, case.geometry, to_input, True)
        if not to_input:
            arithmetic.grad_input(grad, w, case.geometry, saved)

    return step


def cheapest(measured: list[Measured], error: float) -> Measured | None:
    """Return the rung predicted to cost least with at most this error."""
    able = (m for m in measured if m.error <= error and m.rho < AdaptiveDeepReuse().max_rho)
    return min(able, key=lambda m: m.rho, default=None)


def median_seconds(timed: dict[str, Any], arm: str) -> float:
    """Return the median seconds of a step over the blocks that stand, or over all where none does."""
    blocks = [b for b in timed["blocks"] if not b["dropped"]] or timed["blocks"]
    return statistics.median(b["seconds_per_step"][arm] for b in blocks)


def one_layer(case: Case, smoke: bool) -> dict[str, Any]:
    """Measure every candidate's error and cost, and time the chosen ones against the dense layer."""
    o, taps = case.w.shape[0], case.w[0, 0].numel()
    m = AdaptiveDeepReuse()
    layer = LayerReuse(case.title, how(), candidates(case.w.shape[1], 16, (), m.bit_counts, o), o, taps)
    layer.due = ""
    table = layer.measure(case.x, case.w, case.bias, case.geometry)
    chosen = {"early": cheapest(table, EARLY), "fine": cheapest(table, FINE)}
    arms = {
        "float32": dense_step(case, torch.float32),
        "bfloat16": dense_step(case, torch.bfloat16),
        "im2col": im2col_step(case),
    }
    for name, rung in chosen.items():
        if rung is not None:
            arms[name] = reuse_step(case, layer, rung.rung, torch.float32)
            arms[f"{name}, bfloat16"] = reuse_step(case, layer, rung.rung, torch.bfloat16)
            if name == "fine":
                arms["fine, exact grad_input"] = reuse_step(case, layer, rung.rung, torch.float32, False)
    timed = pairs(case.title, arms, baseline="float32", seconds=SECONDS, smoke=smoke)
    seconds = {name: median_seconds(timed, name) for name in arms}
    rows = {}
    for name, rung in chosen.items():
        if rung is None:
            print(f"   {name}: no setting reaches this error")
            continue
        ours = seconds[name]
        over = {f"over {other}": seconds[other] / ours for other in ("float32", "bfloat16", "im2col")}
        row = {
            "L": rung.rung.length, "H": rung.rung.bits, "r_c": rung.remaining, "error": rung.error, **over,
            "in bfloat16, over bfloat16": seconds["bfloat16"] / seconds[f"{name}, bfloat16"],
            "over float32, exact grad_input": seconds["float32"] / seconds.get("fine, exact grad_input", math.nan),
            "rho": rung.rho, "measured cost / rho": ours / seconds["float32"] / rung.rho,
        }  # fmt: skip
        rows[name] = row
        print(f"   {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    return {"chosen": rows, "timed": timed, "table": [rung.row() for rung in table]}


def layers(smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the layers of both networks."""
    found, claims = {}, []
    for name in ("alexnet",) if smoke else NETWORKS:
        for case in cases(name, (32,) if smoke else BATCHES if name == "vgg19" else BATCHES[:1], smoke):
            one = kept(NAME, case.title.replace(" ", "-"), partial(one_layer, case, smoke), smoke)
            found[case.title] = one
            for rung in AIMS:
                if rung not in one["chosen"]:
                    claims.append(claim(NAME, f"{case.title}, {rung}", "no setting reaches this error"))
                    continue
                row = one["chosen"][rung]
                what = (
                    f"{case.title}: output and gradients at {row['error']:.0%} error (L={row['L']}, H={row['H']}, r_c "
                    f"{row['r_c']:.3f}), over float32 ({row['over bfloat16']:.2f}x over bfloat16, "
                    f"{row['over im2col']:.2f}x over im2col)"
                )
                claims.append(ratio_claim(NAME, what, one["timed"], rung))
    return found, [*(over_all(found, rung, aim) for rung, aim in AIMS.items()), *claims]


def over_all(found: dict[str, Any], rung: str, at_least: float) -> dict[str, Any]:
    """Return the claim over all layers: how many reach the target in this rung, the least and the most."""
    sound = [one for one in found.values() if one["timed"]["aa_ok"]]
    ratios = [one["timed"]["ratios"][rung]["ratio"] for one in sound if rung in one["timed"]["ratios"]]
    over_bfloat16 = [one["chosen"][rung]["over bfloat16"] for one in sound if rung in one["chosen"]]
    limit = {"early": EARLY, "fine": FINE}[rung]
    what = f"output and gradients of {len(found)} layers of VGG-19 and AlexNet at <= {limit:.0%} error, over float32"
    if not ratios:
        return claim(NAME, what, "not measured")
    good = sum(ratio >= at_least for ratio in ratios)
    text = (
        f"{min(ratios):.2f}x to {max(ratios):.2f}x, {good} of {len(ratios)} reach {at_least:g}x; over bfloat16 "
        f"{min(over_bfloat16):.2f}x to {max(over_bfloat16):.2f}x"
    )
    return claim(NAME, what, text, target=f">= {at_least:g}x in every layer", met=good == len(found))


# -- whole steps
def whole_steps(smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time steps of networks with and without the method, which falls back to dense layers where it does not pay."""
    found, claims, least = {}, [], {}
    for name, batch in NETS[: 1 if smoke else None]:
        data = cifar10().train.stratified(16 if smoke else batch)
        x = torch.from_numpy(data.pixels).permute(0, 3, 1, 2).float().div(255).sub(0.47).div(0.25)
        y = torch.from_numpy(data.labels).long()
        model = NETWORKS[name].base(smoke).model if name in NETWORKS else build(name)
        assert model is not None
        fp32 = partial(method, "mixed_precision", dtype="float32")
        own: dict[str, list[Method]] = {
            "float32": [fp32()],
            "float32, reuse": [fp32(), AdaptiveDeepReuse()],
            "strong": [strong()],
            "strong, reuse": [strong(), AdaptiveDeepReuse()],
        }
        if name in IM2COL:
            own["im2col"] = [Im2Col()]
        if name == "alexnet":
            own["float32, zeros skipped"] = [fp32(), ActivationGradientPruning(p=0.0)]
            own["float32, reuse and zeros skipped"] = [fp32(), *both()]
            own["strong, reuse and zeros skipped"] = [strong(), *both()]
        steps = {arm: session_step(copy.deepcopy(model), x, y, methods) for arm, methods in own.items()}
        timed = partial(
            pairs, f"{name}, batch {len(x)}", steps, baseline="float32", seconds=90.0, smoke=smoke
        )
        found[name] = kept(NAME, f"steps-{name}", timed, smoke)
        if smoke:
            continue
        ratios = {arm: r["ratio"] for arm, r in found[name]["ratios"].items()}
        least[f"{name}, float32"] = ratios["float32, reuse"]
        least[f"{name}, bfloat16"] = ratios["strong, reuse"] / ratios["strong"]
        for arm in own:
            if arm not in ("float32", "strong"):
                trained = ", trained 2 epochs" if name in NETWORKS else ""
                what = f"step of {name}, batch {batch}{trained}, {arm}, over float32"
                claims.append(ratio_claim([] if arm == "im2col" else NAME, what, found[name], arm))
    if least:
        worst = min(least, key=lambda name: least[name])
        what = f"steps of {len(NETS)} networks in float32 and bfloat16 with reuse where its probe takes it, over without"
        text = f"{least[worst]:.2f}x at worst ({worst})"
        claims.insert(0, claim(NAME, what, text, target=">= 0.95x", met=least[worst] >= 0.95))
    return found, claims


def both() -> list[Method]:
    """Return the methods that take a layer's output from clusters and skip the zeros of its gradients."""
    return [AdaptiveDeepReuse(products=("output",)), ActivationGradientPruning(p=0.0)]


# -- whole training
def arms(name: str, epochs: float, lr: float, smoke: bool) -> list[Arm]:
    """Return the arms for one network: the strong recipe in two precisions, and float32 with reuse.

    A smoke run forces reuse, which its few small steps need not find faster.
    """
    reuse = partial(AdaptiveDeepReuse, kernel="native" if smoke else "auto")
    recipe = STRONG.with_(epochs=epochs, lr=lr)
    fast, plain = strong(), method("mixed_precision", dtype="float32")
    found = [
        Arm("float32", recipe, (plain,), "baseline", "float32, NHWC"),
        Arm("strong", recipe, (fast,), "strong", "strong (bf16, NHWC)"),
        Arm("reuse-float32", recipe, (plain, reuse()), "method", "S2, float32"),
    ]
    if name == "alexnet":
        zeros = ActivationGradientPruning(p=0.0)
        found += [
            Arm("zeros-float32", recipe, (plain, zeros), "method", "zeros skipped, float32"),
            Arm("both-float32", recipe, (plain, *both()), "stack", "output reused, zeros skipped, float32"),
        ]
    if name == "cifarnet":
        paper = reuse(products=PRODUCTS, scale="none", max_error=EARLY)
        s1 = AdaptiveDeepReuse(strategy="S1", kernel="native")
        found += [
            Arm("reuse-paper", recipe, (plain, paper), "method", "S2, float32, the paper's settings"),
            Arm("reuse-s1", recipe, (plain, s1), "method", "S1, float32"),
        ]
    return found


def training(smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train the networks with and without reuse, to equal accuracy."""
    runs: dict[str, Any] = {}
    claims = []
    for name, (images, epochs, lr) in RUNS.items():
        if smoke and name != "cifarnet":
            continue
        finished = to_accuracy(
            f"{NAME}-{name}",
            name,
            cifar10(),
            arms(name, epochs, lr, smoke),
            seeds=SEEDS,
            smoke=smoke,
            smoke_epochs=3.0,
            train=images,
        )
        runs[name] = finished.data
        claims += accuracy_claims(finished, 1.0)
        for row in finished.data["arms"]:
            if row["kind"] in ("method", "stack") and row["accuracy"]["mean"] is not None:
                what = f"training of {name} on {images} CIFAR-10 images for {epochs:g} epochs, {row['label']}, of float32's"
                own = [] if row["name"] == "zeros-float32" else [NAME]
                claims.append(claim(own, what, beside(finished, row["name"], "float32", work=False)))
    return runs, claims


def main(smoke: bool = False) -> None:
    """Time the layers and steps, train the networks, and store all."""
    values, claims = layers(smoke)
    steps, more = whole_steps(smoke)
    claims += more
    runs: dict[str, Any] = {}
    if "training" not in LEFT_OUT:
        runs, more = training(smoke)
        claims += more
    settings = {"method": repr(AdaptiveDeepReuse()), "batches": BATCHES, "runs": RUNS, "nets": NETS}
    store(
        NAME,
        {"claim": CLAIM, "settings": settings, "layers": values, "steps": steps, "training": runs},
        smoke,
        claims,
    )
