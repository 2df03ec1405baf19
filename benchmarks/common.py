"""What the benchmarks share: step-time pairs, real data, and where results go."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten import Session, compare, method, models
from hasten.comparison import Arm, Comparison
from hasten.contract import Method
from hasten.data import DataSet, load
from hasten.measure.environment import source_version
from hasten.measure.load import Load, Watch
from hasten.measure.paired import paired_steps
from hasten.measure.store import result_file

WORK = Path(os.environ.get("HASTEN_BENCH", "runs/benchmarks"))
Step = Callable[[], None]
LEFT_OUT: set[str] = set()
"""Parts that the command line leaves for another session; what was stored says so."""


def real_images(n: int, size: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Return n real images (n, 3, size, size), normalised, and labels: Fashion-MNIST, grey repeated, resized."""
    train = load("fashion-mnist-12k").train.stratified(n)
    x = torch.from_numpy(train.pixels).permute(0, 3, 1, 2).float().div(255).sub(0.29).div(0.35)
    x = (
        F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        .expand(-1, 3, -1, -1)
        .contiguous()
    )
    return x, torch.from_numpy(train.labels) % classes


def bare_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return one step of the plainest PyTorch loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def session_step(model: nn.Module, x: Tensor, y: Tensor, methods: Sequence[Method]) -> Step:
    """Return one step of a session with these methods, on images in channels_last if the model is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    session = Session(model, optimizer, methods, sample=(x, y), total_samples=10**9)
    if any(m.spec.name == "mixed_precision" for m in methods):
        x = x.contiguous(memory_format=torch.channels_last)
    index = torch.arange(len(x))

    def step() -> None:
        session.step(x, y, index)

    return step


def build(name: str, **settings: Any) -> nn.Module:
    """Return the model called ``name`` with weights of seed 0."""
    return models.build(name, seed=0, **settings)


def strong() -> Method:
    """Return the method that makes the strong baseline."""
    return method("mixed_precision")


class Unjudged(Watch):
    """Drops no block: a smoke run tells nothing of speed, and must end well whatever else runs on the machine."""

    def stop(self) -> tuple[Load, list[str]]:
        """Return the load and no reason to drop the block."""
        return super().stop()[0], []


def pairs(name: str, arms: dict[str, Step], *, baseline: str, seconds: float, smoke: bool) -> dict[str, Any]:
    """Time the arms against ``baseline`` in interleaved chunks, print the table, and return what to store."""
    chunk = (0.05, 0.2) if smoke else (0.5, 2.0)
    result = paired_steps(
        arms,
        baseline=baseline,
        seconds=1.0 if smoke else seconds,
        chunk_s=chunk,
        warmup=3 if smoke else 5,
        seed=0,
        watch=Unjudged if smoke else Watch,
    )
    print(f"-- {name}")
    for line in result.table():
        print(line, flush=True)
    return dict(result.to_json())


def kept(benchmark: str, part: str, make: Callable[[], Any], smoke: bool) -> Any:
    """Return what a part of a benchmark gave before, or run it and keep that, so that a long benchmark comes in pieces.

    Deleting ``runs/benchmarks/BENCHMARK`` has every part run anew.
    """
    path = WORK / benchmark / f"{part}.json"
    if not smoke and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        print(f"-- {part}: kept from commit {found['commit']}", flush=True)
        return found["value"]
    value = make()
    if not smoke:
        source = source_version() or {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"commit": source.get("commit"), "value": value}), encoding="utf-8")
        value = json.loads(path.read_text(encoding="utf-8"))["value"]  # the same whether it was found or made
    return value


def claim(
    methods: str | Sequence[str], what: str, text: str, *, target: str = "", met: bool | None = None
) -> dict[str, Any]:
    """Return one measured statement for the methods' cards: what was measured, the figure, and whether it met its target."""
    names = [methods] if isinstance(methods, str) else list(methods)
    return {"methods": names, "what": what, "text": text, "target": target, "met": met}


def ratio_claim(
    methods: str | Sequence[str], what: str, timed: dict[str, Any], arm: str, at_least: float | None = None
) -> dict[str, Any]:
    """Return the claim of the time ratio of ``arm`` in the result of `pairs`, against its target if it has one.

    Where the baseline did not equal itself, nothing is claimed.
    """
    ratio, sound = timed["ratios"].get(arm), timed["aa_ok"]
    if ratio is None:
        text = "not measured: the machine was never quiet"
    else:
        text = ratio["text"] if sound else f"{ratio['text']}, not claimed: the A/A test failed"
    if at_least is None:
        return claim(methods, what, text)
    met = ratio is not None and sound and ratio["ratio"] >= at_least
    return claim(methods, what, text, target=f">= {at_least:g}x", met=met)


def store(name: str, values: dict[str, Any], smoke: bool, claims: Sequence[dict[str, Any]] = ()) -> None:
    """Store ``values`` and ``claims`` under ``benchmarks/results``; a smoke run stores them where nobody looks."""
    for row in claims:
        target = f" (target {row['target']}: {'met' if row['met'] else 'missed'})" if row["target"] else ""
        print(f"{', '.join(row['methods']) or 'hasten'}: {row['what']}: {row['text']}{target}", flush=True)
    values = {**values, "claims": list(claims), "left_out": sorted(LEFT_OUT)}
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            result_file(name, values, folder=folder)
    else:
        print(f"stored {result_file(name, values)}")


def to_accuracy(
    name: str,
    model: str,
    data: DataSet,
    arms: Sequence[Arm],
    *,
    seeds: int,
    target: float | str,
    smoke: bool,
    **cut: Any,
) -> Comparison:
    """Run the arms to their accuracies, seeds interleaved, resuming what is stored under ``runs/benchmarks/NAME``.

    A smoke run trains each arm once for a few steps on a few images.
    """
    if smoke:
        cut = {**cut, "train": 320, "test": 100}
        arms = [
            dataclasses.replace(
                arm, recipe=arm.recipe.with_(epochs=1.0, batch_size=min(64, arm.recipe.batch_size))
            )
            for arm in arms
        ]
        with tempfile.TemporaryDirectory() as folder:
            return compare(
                model,
                data,
                arms=arms,
                seeds=[0],
                target=target,
                out=Path(folder) / name,
                isolate=False,
                **cut,
            )

    def tell(done: int, total: int, record: dict[str, Any]) -> None:
        what = record["failure"] or f"{100 * record['accuracy']:.2f}% in {record['seconds_train']:.1f} s"
        print(
            f"{done}/{total} {record['arm']} seed {record['seed']}: {what} {record['disturbed'] or ''}",
            flush=True,
        )

    finished = compare(model, data, arms=arms, seeds=range(seeds), target=target, out=WORK / name, title=name, tell=tell,
                       command=f"make bench BENCH={name}", **cut)  # fmt: skip
    print("\n".join(finished.lines()), flush=True)
    return finished


def accuracy_claims(finished: Comparison, at_least: float) -> list[dict[str, Any]]:
    """Return a claim for every method and stack of a comparison: its time to the target over strong and over plain."""
    claims = []
    target = f"{100 * finished.data['target']['accuracy']:.2f}%"
    settings = finished.data["settings"]
    for arm in finished.data["arms"]:
        versus, plain, curve = arm["vs_strong"], arm["vs_plain"], arm["vs_curve"]
        if arm["kind"] not in ("method", "stack") or versus is None or versus["ratio"] is None:
            continue
        names = [text.partition("(")[0] for text in arm["methods"]]
        span = (
            f" [{versus['lo']:.2f}, {versus['hi']:.2f}]"
            if versus["lo"] is not None and versus["hi"] is not None
            else ""
        )
        text = f"{versus['ratio']:.2f}x{span}: {versus['verdict']}"
        if plain and plain["ratio"]:
            text += f"; {plain['ratio']:.2f}x over plain"
        if curve and curve["ratio"]:
            text += f"; {curve['ratio']:.2f}x over a strong baseline of equal accuracy"
        if arm["accuracy"]["mean"] is not None:
            text += f"; accuracy {100 * arm['accuracy']['mean']:.2f}%"
        if arm["work_reduction"] is not None:
            text += f"; {1 - arm['work_reduction']:.2f}x plain's MACs"
        what = f"time to {target}, {settings['model']} on {settings['dataset']} ({settings['train']} images)"
        # training the strong baseline for less must not do as well
        better = curve is None or curve["ratio"] is None or curve["ratio"] > 1
        met = versus["verdict"] == "faster" and versus["ratio"] >= at_least and better
        claims.append(
            claim(names, what, text, target=f">= {at_least:g}x over strong, > 1x at equal accuracy", met=met)
        )
    return claims


def shared_set(name: str, present: str) -> DataSet:
    """Return the set ``name`` from HASTEN_DATA, or unpacked once (``present`` tells) from the shared data beside the project."""
    unpack, here = Path("../shared/tools/unpack_data.py"), WORK / "data"
    if "HASTEN_DATA" in os.environ or not unpack.exists():
        return load(name)
    if not (here / present).exists():
        subprocess.run([sys.executable, unpack, here, name], check=True)
    return load(name, here)


def cifar10() -> DataSet:
    """Return full CIFAR-10."""
    return shared_set("cifar10", "cifar-10-batches-bin/test_batch.bin")
