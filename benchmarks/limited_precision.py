"""Limited precision: what 16-bit and 8-bit products take, what bfloat16 weights save, and what fixed point learns.

Fixed point is emulated on float32, so only its accuracy is reported, never a gain in time. Three parts: the three products
of single layers on 16-bit numbers against oneDNN's; memory and time of bfloat16 weights without a float32 copy; accuracy
on MNIST by rounding, and on CIFAR-10 with a switch from 9 to 20 bits for the last third of the run.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    real_images,
    session_step,
    shared_set,
    store,
    strong,
)
from hasten import Session, keyed
from hasten.contract import Method
from hasten.data import DataSet, Images
from hasten.kernels.fixed_conv import fixed_conv, fixed_conv_input, fixed_conv_weight
from hasten.kernels.fixed_point import fixed_point
from hasten.kernels.probe import seconds
from hasten.measure.memory import fresh_process, peak_rss_bytes
from hasten.measure.store import append_jsonl, read_jsonl
from hasten.methods.forward.limited_precision import LimitedPrecision

CLAIM = "limited precision: 16-bit stochastic rounding within 0.3 points of float32 on MNIST; bfloat16 weights save memory"
MINUTES = 13
# images, channels in and out, size, kernel, stride: layers of VGG-16 and ResNet on 32 x 32 images
LAYERS = (
    (32, 64, 64, 32, 3, 1), (32, 128, 128, 16, 3, 1), (32, 256, 256, 8, 3, 1), (32, 512, 512, 4, 3, 1),
    (32, 64, 128, 32, 3, 2), (32, 256, 64, 16, 1, 1),
)  # fmt: skip
SEEDS, BATCH = 3, 100
MNIST_EPOCHS, MNIST_IMAGES, CIFAR_EPOCHS, CIFAR_IMAGES = 3, 30_000, 6, 6000


def every(il: int, fl: int) -> dict[str, Any]:
    """Return settings with one format for all tensors."""
    return {"f_w": (il, fl), "f_act": (il, fl), "f_err": (il, fl), "f_grad": (il, fl)}


NEAREST = {"rounding": "nearest", "rounding_activations": "nearest"}
STOCHASTIC = {"rounding_activations": "stochastic"}
MNIST: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "16 bits, stochastic, weights <2,14>": {"until": 1.0},
    "16 bits, stochastic, <8,8>": {"until": 1.0, **every(8, 8), **STOCHASTIC},
    "16 bits, nearest, <8,8>": {"until": 1.0, **every(8, 8), **NEAREST},
}
COARSE = {**every(4, 5), **STOCHASTIC}
CIFAR: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "16 bits <4,12>": {"until": 1.0, **every(4, 12), **STOCHASTIC},
    "9 bits <4,5>": {"until": 1.0, **COARSE},
    "9 bits <4,5>, then 20 bits <4,16>": {
        "schedule": ((0, COARSE), (2 * CIFAR_EPOCHS // 3, {**every(4, 16), **STOCHASTIC})),
    },
}  # fmt: skip


# -- single layers
def int8_forward(
    x: Tensor, w: Tensor, how: tuple[list[int], ...]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return oneDNN's convolution of 8-bit operands with a float32 result, and the quantisation of its input."""
    scale, scales = float(x.abs().max()) / 127, w.abs().amax((1, 2, 3)) / 127
    weight = (w / scales[:, None, None, None]).round().to(torch.int8)
    zeros = torch.zeros(len(w), dtype=torch.int64)
    packed = torch.ops.onednn.qconv_prepack(weight, scales, scale, 128, *how, 1, list(x.shape))

    def quantise() -> Tensor:
        return x.mul(1 / scale).add_(128).round_().clamp_(0, 255).to(torch.uint8)

    narrow = quantise()

    def run() -> Tensor:
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            narrow, scale, 128, packed, scales, zeros, None, *how, 1, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    return run, quantise


def layer_times(shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Return milliseconds of each product of one layer, by format, one thread, in turn."""
    n, c, o, size, k, s = shape
    g, nhwc = keyed.generator("limited_precision"), torch.channels_last
    how = ([s, s], [k // 2, k // 2], [1, 1])
    x = fixed_point(torch.randn(n, c, size, size, generator=g), 16, 10, 1, False)[0].contiguous(
        memory_format=nhwc
    )
    w = fixed_point(torch.randn(o, c, k, k, generator=g) * (2 / (c * k * k)) ** 0.5, 16, 14, 1, False)[0]
    w = w.contiguous(memory_format=nhwc)
    y = torch.conv2d(x, w, None, *how)
    e = fixed_point(0.1 * torch.randn(y.shape, generator=g), 16, 14, 1, False)[0].contiguous(
        memory_format=nhwc
    )

    def backward(t: tuple[Tensor, Tensor, Tensor], *mask: bool) -> object:
        return torch.ops.aten.convolution_backward(
            t[0], t[1], t[2], None, *how, False, (0, 0), 1, [*mask, False]
        )

    wide, half = (e, x, w), (e.bfloat16(), x.bfloat16(), w.bfloat16())
    run8, quantise = int8_forward(x, w, how)
    taken = seconds(
        {
            "int16 output": lambda: fixed_conv(x, w, 10, 14, *how),
            "int16 grad_input": lambda: fixed_conv_input(e, w, x.shape[2:], 14, 14, *how),
            "int16 grad_weight": lambda: fixed_conv_weight(e, x, w.shape[2:], 14, 10, *how),
            "float32 output": lambda: torch.conv2d(x, w, None, *how),
            "float32 grad_input": lambda: backward(wide, True, False),
            "float32 grad_weight": lambda: backward(wide, False, True),
            "bfloat16 output": lambda: torch.conv2d(half[1], half[2], None, *how),
            "bfloat16 grad_input": lambda: backward(half, True, False),
            "bfloat16 grad_weight": lambda: backward(half, False, True),
            "int8 output": run8,
            "int8 quantisation": quantise,
            "rounding of x": lambda: fixed_point(x, 16, 10, 7, True),
        },
        rounds=rounds,
    )
    found = {name: 1e3 * value for name, value in taken.items()}
    products = ("output", "grad_input", "grad_weight")
    return found | {f: sum(found[f"{f} {p}"] for p in products) for f in ("int16", "float32", "bfloat16")}


def layers(smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time the layers with one thread; return the table and the claims."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shapes = ((2, 8, 8, 8, 3, 1),) if smoke else LAYERS
        table = {str(shape): layer_times(shape, 2 if smoke else 15) for shape in shapes}
    finally:
        torch.set_num_threads(before)
    claims = []
    for shape, row in table.items():
        told = {"three products": ("int16", "float32", "bfloat16"),
                "output": ("int16 output", "float32 output", "bfloat16 output")}  # fmt: skip
        for what, (ours, wide, half) in told.items():
            text = f"{row[wide] / row[ours]:.2f}x over float32, {row[half] / row[ours]:.2f}x over bfloat16"
            claims.append(
                claim("limited_precision", f"{what} on 16-bit integers, layer {shape}, 1 thread", text)
            )
        eight = row["int8 output"] + row["int8 quantisation"]
        text = f"{row['float32 output'] / eight:.2f}x over float32, {row['bfloat16 output'] / eight:.2f}x over bfloat16"
        claims.append(
            claim("limited_precision", f"output on 8-bit integers (oneDNN), layer {shape}, 1 thread", text)
        )
        print(shape, {k: round(v, 2) for k, v in row.items()}, flush=True)
    return table, claims


# -- bfloat16 weights
def held(arm: str, model: str, images: int) -> None:
    """Train three steps and print the peak of resident memory: what a fresh process runs."""
    x, y = real_images(images)
    methods = [strong()] if arm == "strong" else [LimitedPrecision(policy="bfloat16", until=1.0)]
    step = session_step(build(model), x, y, methods)
    for _ in range(3):
        step()
    print(peak_rss_bytes())


def bfloat16_weights(smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return step times over the strong baseline, and peak memory at a small batch, where weights weigh most."""
    name, images = ("wrn-10-2", 16) if smoke else ("vgg16", 64)
    x, y = real_images(images)
    arms = {
        "plain": bare_step(build(name), x, y),
        "strong": session_step(build(name), x, y, [strong()]),
        "bfloat16 weights": session_step(build(name), x, y, [LimitedPrecision(policy="bfloat16", until=1.0)]),
    }
    timed = pairs(f"{name}, batch {images}", arms, baseline="strong", seconds=45.0, smoke=smoke)
    peaks = {}
    for arm in ("strong", "bfloat16 weights"):
        command = f"from benchmarks.limited_precision import held; held({arm!r}, {name!r}, 10)"
        done = fresh_process([sys.executable, "-c", command], timeout=300)
        assert done.returncode == 0, done.stderr
        peaks[arm] = int(done.stdout.split()[-1])
    weights = sum(p.numel() for p in build(name).parameters())
    saved = (peaks["strong"] - peaks["bfloat16 weights"]) / 2**20
    print(f"peak memory {peaks}, {weights} parameters", flush=True)
    text = f"{saved:.0f} MiB less at the peak of {peaks['strong'] / 2**20:.0f} (batch 10; 2 bytes less for each of " \
           f"{weights / 1e6:.1f} M weights and gradients are {4 * weights / 2**20:.0f} MiB)"  # fmt: skip
    what = f"bfloat16 weights without a float32 copy, {name}"
    claims = [claim("limited_precision", f"{what}, memory over strong", text, target="less", met=saved > 0)]
    if not smoke:
        claims.append(ratio_claim("limited_precision", f"{what}, step at batch {images} over strong", timed,
                                  "bfloat16 weights"))  # fmt: skip
    return {"steps": timed, "peaks": peaks, "parameters": weights}, claims


# -- accuracy
def network(data: str, seed: int) -> nn.Module:
    """Return the CNN of the paper's experiments in size: two convolutions for MNIST, three for CIFAR-10."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed.key64(seed, "weights"))
        if data == "mnist":
            return nn.Sequential(
                nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
            )  # fmt: skip
        return nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(1024, 10),
        )  # fmt: skip


def pixels(images: Images) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) in about [-1, 1], and labels."""
    x = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(images.labels)


def accuracy(
    data: str, settings: dict[str, Any] | None, seed: int, train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor], epochs: int,
) -> dict[str, Any]:  # fmt: skip
    """Train once and return the test accuracy in percent; the rate falls by ten for the last sixth, an epoch at least."""
    x, y = train
    model = network(data, seed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rate = 0.05 if data == "mnist" else 0.03
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    methods: list[Method] = [] if settings is None else [LimitedPrecision(**settings)]
    session = Session(model, optimizer, methods, sample=(x[:BATCH], y[:BATCH]), seed=seed)
    last = epochs - max(1, epochs // 6)
    for epoch in range(epochs):
        session.start_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate if epoch < last else rate / 10
        order = torch.from_numpy(keyed.permutation(len(x), seed, "order", epoch))
        for rows in order[: len(x) // BATCH * BATCH].split(BATCH):
            session.step(x[rows], y[rows], rows)
        session.end_epoch()
    with session.inference() as forward:
        scores = torch.cat([forward(part) for part in test[0].split(1000)])
    right = 100 * (scores.argmax(1) == test[1]).double().mean().item()
    return {
        "accuracy": right,
        "test_loss": F.cross_entropy(scores, test[1]).item(),
        "witness": session.witness(),
    }


def trained(
    data: str, held_set: DataSet, arms: dict[str, dict[str, Any] | None], epochs: int, images: int, smoke: bool
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:  # fmt: skip
    """Run all arms and seeds, continuing where an earlier run stopped; return the rows and the mean accuracies."""
    train = pixels(held_set.train.stratified(300 if smoke else images))
    test = pixels(held_set.test.stratified(300) if smoke else held_set.test)
    path = WORK / "limited_precision.jsonl"
    WORK.mkdir(parents=True, exist_ok=True)
    rows = [] if smoke or not path.exists() else [r for r in read_jsonl(path) if r["data"] == data]
    done = {(r["arm"], r["seed"], r["epochs"], r["settings"]) for r in rows}
    for seed in range(1 if smoke else SEEDS):
        for arm, settings in arms.items():
            if (arm, seed, epochs, repr(settings)) in done:
                continue
            row = {"data": data, "arm": arm, "seed": seed, "epochs": epochs, "settings": repr(settings),
                   **accuracy(data, settings, seed, train, test, 2 if smoke else epochs)}  # fmt: skip
            print(f"{data} seed {seed}  {arm:40} {row['accuracy']:6.2f} %", flush=True)
            rows.append(row)
            if not smoke:
                append_jsonl(path, row)
    table = {}
    for arm, settings in arms.items():
        values = [r["accuracy"] for r in rows if r["arm"] == arm and r["settings"] == repr(settings)]
        table[arm] = {"n": len(values), "mean": statistics.mean(values),
                      "sd": statistics.stdev(values) if len(values) > 1 else 0.0}  # fmt: skip
    return rows, table


def told(data: str, table: dict[str, dict[str, float]]) -> str:
    """Return the accuracies of all arms as text."""
    return f"{data}: " + ", ".join(
        f"{arm} {row['mean']:.2f} % (sd {row['sd']:.2f})" for arm, row in table.items()
    )


def main(smoke: bool = False) -> None:
    """Run all parts and store what was found."""
    layer_table, claims = kept("limited_precision", "layers", partial(layers, smoke), smoke)
    weights, more = kept("limited_precision", "weights", partial(bfloat16_weights, smoke), smoke)
    claims += more
    if "accuracy" in LEFT_OUT:
        store(
            "limited_precision",
            {"claim": CLAIM, "emulated": True, "layers": layer_table, "weights": weights},
            smoke,
            claims,
        )
        return
    mnist_rows, mnist = trained(
        "mnist", shared_set("mnist", "MNIST/raw"), MNIST, MNIST_EPOCHS, MNIST_IMAGES, smoke
    )
    cifar_rows, cifar = trained("cifar10", cifar10(), CIFAR, CIFAR_EPOCHS, CIFAR_IMAGES, smoke)
    full, default, coarse, nearest = (mnist[arm]["mean"] for arm in MNIST)
    claims.append(claim(
        "limited_precision", f"MNIST ({MNIST_IMAGES} images), CNN, {MNIST_EPOCHS} epochs, mean of {SEEDS} seeds, emulated", told("accuracy", mnist),
        target="16 bits stochastic within 0.3 points of float32; nearest <8,8> at least 1 point below stochastic <8,8>",
        met=abs(full - default) <= 0.3 and coarse - nearest >= 1.0,
    ))  # fmt: skip
    full, _, low, raised = (cifar[arm]["mean"] for arm in CIFAR)
    claims.append(claim(
        "limited_precision", f"CIFAR-10 ({CIFAR_IMAGES} images), CNN, {CIFAR_EPOCHS} epochs, mean of {SEEDS} seeds, emulated",
        told("accuracy", cifar), target="the switch to 20 bits at least as good as 9 bits, within 1 point of float32",
        met=raised >= low and full - raised <= 1.0,
    ))  # fmt: skip
    record = {
        "claim": CLAIM, "emulated": True, "layers": layer_table, "weights": weights, "mnist": mnist, "cifar10": cifar,
        "rows": mnist_rows + cifar_rows,
    }  # fmt: skip
    store("limited_precision", record, smoke, claims)
