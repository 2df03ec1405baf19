"""ActNN: memory kept for the backward pass, the time packing takes, and accuracy on a short run.

Memory is counted twice: bytes that autograd keeps, and the growth of a fresh process over two steps, with an allocator
that gives memory back. Recomputing every block (``torch.utils.checkpoint``) is the other way to the same end; what it
keeps is no saved tensor, so only the process shows it. torch.compile with a budget for activations chooses what to
recompute; there autograd's bytes are told, for the compiler itself takes memory of the process. The accuracies are of the strong baseline (bfloat16) with and
without, so what is rounded there are bfloat16 numbers; "nearest" is 2 bits for all without noise, and biased.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hasten
from benchmarks.common import (
    LEFT_OUT,
    WORK,
    Step,
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
)
from hasten import STRONG
from hasten.contract import Method, overrides
from hasten.errors import NonFiniteError
from hasten.measure.memory import SavedActivations, fresh_process, peak_rss_bytes
from hasten.measure.store import append_jsonl, read_jsonl
from hasten.methods.products.actnn import ActNN
from hasten.session import Session

CLAIM = "ActNN: ResNet-50 and VGG-16 keep >= 10x less memory for the backward pass at <= 1.2x the time of a float32 step"
MINUTES = 20
BUDGET = 0.1  # of the activations that a compiled network would keep
NOTES = {
    "recomputed": " (recomputing every block; no ActNN)",
    "compiled": f" (torch.compile, activation memory budget {BUDGET:g}; no ActNN)",
}
NETWORKS = (("resnet50", 16), ("vgg16", 64))
SECONDS = 80.0
SEEDS, IMAGES, EPOCHS = 5, 12_500, 5.0
ACCURACY: dict[str, Callable[[], list[Method]]] = {
    "strong": lambda: [strong()],
    "L3": lambda: [strong(), ActNN()],
    "nearest": lambda: [strong(), ActNN(rounding="nearest", allocation="fixed")],
}
MEMORY: dict[str, Callable[[], list[Method]]] = {
    "plain": list,
    "recomputed": list,
    "compiled": list,
    "L2": lambda: [ActNN(level="L2")],
    "L3": lambda: [ActNN()],
    "strong": lambda: [strong()],
    "strong, L3": lambda: [strong(), ActNN()],
}


def recomputed(model: nn.Module) -> nn.Module:
    """Have every residual block, or each stage of a chain, run again in the backward pass."""
    parts = [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    if not parts:
        features = model.get_submodule("features")
        stages: list[nn.Module] = [nn.Sequential()]
        for layer in features.children():
            stages[-1].append(layer)  # type: ignore[operator]
            if isinstance(layer, nn.MaxPool2d):
                stages.append(nn.Sequential())
        parts = [stage for stage in stages if list(stage.children())]
        model.features = nn.Sequential(*parts)
    for part in parts:
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    return model


def network(name: str, arm: str) -> nn.Module:
    """Return the network of an arm."""
    return recomputed(build(name)) if arm == "recomputed" else build(name)


def session_of(name: str, arm: str, methods: list[Method], x: Tensor, y: Tensor) -> Session:
    """Return a session on the network of an arm; that of "compiled" is to be used under `budget`."""
    model = network(name, arm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    session = Session(model, optimizer, methods, sample=(x, y), total_samples=10**9)
    if arm == "compiled":
        session.forward = torch.compile(session.model, dynamic=False)
    return session


def budget(arm: str) -> AbstractContextManager[Any]:
    """Bound what a network compiled within keeps, for the arm that is."""
    return functorch.patch(activation_memory_budget=BUDGET) if arm == "compiled" else nullcontext()


def compiled_step(name: str, x: Tensor, y: Tensor) -> Step:
    """Return a step of the compiled network."""
    session = session_of(name, "compiled", [], x, y)

    def step() -> None:
        with budget("compiled"):
            session.step(x, y)

    return step


# -- memory
def child(name: str, batch: int, arm: str) -> None:
    """In a fresh process: run two steps and print bytes kept by autograd and the growth of the process."""
    x, y = real_images(batch)
    model = network(name, arm)
    step = session_step(model, x, y, MEMORY[arm]())
    small = session_step(build("resnet8"), x[:2], y[:2], [])
    small()  # what PyTorch loads when it is first used
    before = peak_rss_bytes()
    step()
    step()
    after = peak_rss_bytes()
    print(json.dumps({"process": after - before, "before": before}))


def saved_bytes(name: str, batch: int, arm: str) -> int:
    """Return the bytes that autograd keeps in one forward pass after two steps, without parameters.

    Their bfloat16 copies under autocast, as large whatever is done to activations, are taken off too.
    """
    x, y = real_images(batch)
    session = session_of(name, arm, MEMORY[arm](), x, y)
    with ExitStack() as stack:
        stack.enter_context(budget(arm))
        for _ in range(2):
            session.step(x, y)
        if arm.startswith("strong"):
            x = x.contiguous(memory_format=torch.channels_last)
        saved = stack.enter_context(SavedActivations(session.model))
        for each in session.methods:
            if overrides(each, "context"):
                stack.enter_context(each.context())
        F.cross_entropy(session.forward(x), y)
    copies = [
        p.numel()
        for m in session.model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
        for p in m.parameters()
    ]
    return saved.bytes - 2 * sum(copies) * arm.startswith("strong")


def memory(name: str, batch: int, smoke: bool) -> dict[str, dict[str, float]]:
    """Return MB by arm."""
    found: dict[str, dict[str, float]] = {}
    # memory that is freed goes back at once, so that the process is as large as what it holds
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for arm in ("plain", "L3") if smoke else MEMORY:
        row = found[arm] = {}
        if arm != "compiled":
            code = f"from benchmarks.actnn import child; child({name!r}, {batch}, {arm!r})"
            run = fresh_process([sys.executable, "-c", code], timeout=600, env=environment)
            if run.returncode:
                raise RuntimeError(run.stderr[-2000:])
            row["process_mb"] = json.loads(run.stdout.splitlines()[-1])["process"] / 1e6
        if arm != "recomputed":
            row["kept_mb"] = saved_bytes(name, batch, arm) / 1e6
        told = ", ".join(f"{what} {megabytes:.1f} MB" for what, megabytes in row.items())
        print(f"{name}, batch {batch}, {arm}: {told}", flush=True)
    return found


# -- time
def time_arms(name: str, x: Tensor, y: Tensor, smoke: bool) -> dict[str, Step]:
    """Return the steps to time."""
    return {
        "plain": session_step(build(name), x, y, []),
        "strong": session_step(build(name), x, y, [strong()]),
        "L3": session_step(build(name), x, y, [ActNN()]),
        "L3, by samples": session_step(build(name), x, y, [ActNN(allocation="samples")]),
        "recomputed": session_step(recomputed(build(name)), x, y, []),
        "strong, L3": session_step(build(name), x, y, [strong(), ActNN()]),
    } | ({} if smoke else {"compiled": compiled_step(name, x, y)})


def steps(title: str, name: str, x: Tensor, y: Tensor, smoke: bool) -> dict[str, Any]:
    """Time the arms' steps in one interleaved run."""
    return pairs(title, time_arms(name, x, y, smoke), baseline="plain", seconds=SECONDS, smoke=smoke)


# -- accuracy
def accuracies(smoke: bool) -> list[dict[str, Any]]:
    """Train every arm on every seed, seeds interleaved, continuing where an earlier run stopped."""
    path = WORK / "actnn.jsonl"
    WORK.mkdir(parents=True, exist_ok=True)
    data = cifar10().stratified(train=320 if smoke else IMAGES, test=100 if smoke else None)
    epochs, seeds = (1.0, 1) if smoke else (EPOCHS, SEEDS)
    rows = [] if smoke or not path.exists() else read_jsonl(path)
    done = {(row["arm"], row["seed"], row["epochs"], row["images"]) for row in rows}
    recipe = STRONG.with_(epochs=epochs, lr=0.2, eval_every=0.0)
    for seed in range(seeds):
        for arm, methods in ACCURACY.items():
            if (arm, seed, epochs, len(data.train)) in done:
                continue
            with tempfile.TemporaryDirectory() as aside:
                out = Path(aside) if smoke else WORK / f"actnn-{arm}-{seed}-{epochs:g}"
                try:
                    run = hasten.fit("resnet8", data, methods(), recipe=recipe, seed=seed, out=out / "run")
                    result: dict[str, Any] = {
                        "accuracy": 100 * run.accuracy,
                        "seconds": run.seconds_train,
                        "failure": "",
                    }
                except NonFiniteError as error:  # it learnt nothing, which is worth a guess
                    result = {"accuracy": 10.0, "seconds": 0.0, "failure": str(error)}
            row: dict[str, Any] = {
                "arm": arm,
                "seed": seed,
                "epochs": epochs,
                "images": len(data.train),
                **result,
            }
            print(
                f"resnet8 seed {seed} {arm}: {row['accuracy']:.2f} % in {row['seconds']:.1f} s {row['failure']}",
                flush=True,
            )
            rows.append(row)
            if not smoke:
                append_jsonl(path, row)
    return [row for row in rows if row["epochs"] == epochs and row["images"] == len(data.train)]


def difference(rows: list[dict[str, Any]], arm: str) -> tuple[float, float]:
    """Return the mean of the arm's accuracies minus strong's, by seed, and its standard error, in points."""
    by = {(row["arm"], row["seed"]): row["accuracy"] for row in rows}
    each = [by[arm, seed] - value for (name, seed), value in by.items() if name == "strong"]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else math.nan
    return statistics.mean(each), error


def main(smoke: bool = False) -> None:
    """Measure and store all."""
    networks = (("resnet8", 16),) if smoke else NETWORKS
    taken, timed, claims = {}, {}, []
    for name, batch in networks:
        x, y = real_images(batch)
        title = f"{name}, batch {batch}, 32x32"
        taken[name] = kept("actnn", f"memory-{name}", partial(memory, name, batch, smoke), smoke)
        times = partial(steps, title, name, x, y, smoke)
        timed[name] = kept("actnn", f"steps-{name}", times, smoke)
        if smoke:
            continue
        for arm, base in (("L3", "plain"), ("strong, L3", "strong")):
            less = taken[name][base]["kept_mb"] / taken[name][arm]["kept_mb"]
            small, large = taken[name][arm]["process_mb"], taken[name][base]["process_mb"]
            text = f"{less:.1f}x less ({taken[name][arm]['kept_mb']:.1f} MB of {taken[name][base]['kept_mb']:.1f} MB); "
            text += f"the process grows by {small:.0f} MB where {base} grows by {large:.0f} MB"
            if base == "plain":
                text += f" and recomputed blocks by {taken[name]['recomputed']['process_mb']:.0f} MB; torch.compile with a memory "
                text += f"budget of {BUDGET:g} keeps {taken[name]['compiled']['kept_mb']:.1f} MB"
            aim = 10.0 if base == "plain" else None
            what = f"kept for the backward pass, {title}, over {base}"
            claims.append(
                claim(
                    "actnn",
                    what,
                    text,
                    target=f">= {aim:g}x less" if aim else "",
                    met=less >= aim if aim else None,
                )
            )
        for arm, least in (
            ("L3", 1 / 1.2),
            ("L3, by samples", None),
            ("recomputed", None),
            ("strong, L3", None),
            ("compiled", None),
        ):
            note = NOTES.get(arm, "")
            what = f"step of {title}, {arm}{note}, over plain"
            claims.append(ratio_claim("actnn", what, timed[name], arm, least))
    rows = [] if "accuracy" in LEFT_OUT else accuracies(smoke)
    if rows and not smoke:
        lost, error = difference(rows, "L3")
        worse, worse_error = difference(rows, "nearest")
        what = f"accuracy, ResNet-8, {IMAGES} CIFAR-10 images, {EPOCHS:g} epochs, {SEEDS} seeds, over strong"
        text = f"{lost:+.2f} points (standard error {error:.2f}); rounded to nearest {worse:+.2f} ({worse_error:.2f})"
        if failed := sum(bool(row["failure"]) for row in rows if row["arm"] == "nearest"):
            text += f", where {failed} of {SEEDS} runs ended in NaN, counted as 10 %"
        claims.append(
            claim(
                "actnn",
                what,
                text,
                target="within 0.5 points, and nearest lower",
                met=lost >= -0.5 and worse < lost,
            )
        )
    settings = {
        "networks": networks,
        "method": repr(ActNN()),
        "epochs": EPOCHS,
        "images": IMAGES,
        "seeds": SEEDS,
    }
    values = {"claim": CLAIM, "settings": settings, "memory": taken, "steps": timed, "accuracies": rows}
    store("actnn", values, smoke, claims)
