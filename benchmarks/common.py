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
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten import Session, compare, method, models
from hasten.comparison import Arm, Comparison, Told
from hasten.contract import Method
from hasten.data import DataSet, load
from hasten.errors import HastenError
from hasten.measure.environment import source_version
from hasten.measure.load import Load, Watch
from hasten.measure.paired import paired_steps
from hasten.measure.store import result_file
from hasten.report.schema import Arm as Row
from hasten.report.schema import Versus

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


class Printed(Told):
    """Prints what a comparison tells: its plan, and a line a run."""

    def say(self, line: str) -> None:
        """Print the line."""
        print(line, flush=True)

    def run(self, done: int, planned: int, record: dict[str, Any]) -> None:
        """Print what the run came to."""
        what = record["failure"] or f"{100 * record['accuracy']:.2f}% in {record['seconds_train']:.1f} s"
        where = f"{record['arm']} at {record['share']:.0%}, seed {record['seed']}"
        print(f"{done}/{planned} {where}: {what} {', '.join(record['disturbed'])}".rstrip(), flush=True)


def to_accuracy(
    name: str,
    model: str,
    data: DataSet,
    arms: Sequence[Arm],
    *,
    seeds: int,
    smoke: bool,
    target: float | None = None,
    budgets: Sequence[float] | None = None,
    aa_pairs: int = 3,
    smoke_epochs: float = 1.0,
    **cut: Any,
) -> Comparison:
    """Compare the arms at equal accuracy, resuming what is stored under ``runs/benchmarks/NAME``.

    target, budgets: as in `hasten.compare`. A smoke run trains each arm for ``smoke_epochs`` and half of that, on a few
    images.
    """
    if smoke:
        cut = {**cut, "train": min(320, data.train_count), "test": min(100, data.test_count)}
        arms = [shortened(arm, smoke_epochs) for arm in arms]
        with tempfile.TemporaryDirectory() as folder:
            return compare(model, data, arms=arms, seeds=1, budgets=(0.5,), aa_pairs=0, compile=False, isolate=False,
                           out=Path(folder) / name, **cut)  # fmt: skip
    finished = compare(model, data, arms=arms, seeds=seeds, target=target, budgets=budgets, aa_pairs=aa_pairs,
                       out=WORK / name, title=name, command=f"make bench BENCH={name}", told=Printed(), **cut)  # fmt: skip
    print("\n".join(finished.lines()), flush=True)
    return finished


def shortened(arm: Arm, epochs: float = 1.0) -> Arm:
    """Return the arm for a smoke run: few epochs of small batches."""
    recipe = arm.recipe.with_(epochs=epochs, batch_size=min(64, arm.recipe.batch_size))
    return dataclasses.replace(arm, recipe=recipe)


def accuracy_claims(finished: Comparison, at_least: float) -> list[dict[str, Any]]:
    """Return a claim for every method and stack of a comparison, or for the strong baseline where there is neither."""
    settings = finished.data["settings"]
    where = f"{settings['model']} on {settings['dataset']} ({settings['train']} images)"
    return claims_of(finished.data["arms"], finished.data["target"]["accuracy"], where, at_least)


def claims_of(rows: Sequence[Row], goal: float, where: str, at_least: float) -> list[dict[str, Any]]:
    """Return the claims of the rows of a report: how much sooner each arm is at ``goal`` than the baselines.

    at_least: our own target for the ratio to the strongest baseline.
    """
    bases = {row["kind"]: row for row in rows if row["kind"] in ("baseline", "strong")}
    shown = [row for row in rows if row["kind"] not in bases] or [bases["strong"]]
    base = bases["baseline"] if shown[0]["kind"] == "strong" else bases["strong"]
    own = [_added(row, base) for row in shown]
    claims = []
    for row, names in zip(shown, own, strict=True):
        versus = [(row["vs_strong"], bases.get("strong")), (row["vs_plain"], bases.get("baseline"))]
        against = [(v, other) for v, other in versus if v is not None and other is not None]
        text = "; ".join(dict.fromkeys(in_words(v, other["name"]) for v, other in against))
        mean, theirs = row["accuracy"]["mean"], base["accuracy"]["mean"]
        if mean is not None and theirs is not None:
            text += f"; full budget {100 * mean:.2f}% against {base['name']}'s {100 * theirs:.2f}%"
        what = f"time to {100 * goal:.2f}%, {where}" + (f", {row['name']}" if own.count(names) > 1 else "")
        first = against[0][0]
        met = first["verdict"] == "sooner" and (first["ratio"] or first["lo"] or 0.0) >= at_least
        claims.append(
            claim(names, what, text, target=f">= {at_least:g}x sooner than {base['name']}", met=met)
        )
    return claims


def _added(row: Row, base: Row) -> list[str]:
    """Return the names of the methods that an arm adds to the baseline."""
    names = [[text.partition("(")[0] for text in each["methods"]] for each in (row, base)]
    return [name for name in names[0] if name not in names[1]] or names[0]


def in_words(versus: Versus, base: str) -> str:
    """Return what a ratio of times to one accuracy and its interval say, in a few words."""
    low, high = versus["lo"], versus["hi"]
    if versus["verdict"] == "not reached":
        return "does not reach it"
    if versus["verdict"] == "not measured":
        return f"not measured: {versus['reason']}"
    if versus["ratio"] is not None:
        figure = f"{versus['ratio']:.2f}x"
        if low is not None and high is not None:
            figure += f" [{low:.2f}, {high:.2f}]"
    elif low is not None and versus["verdict"] != "later":
        figure = f"at least {low:.2f}x"
    elif high is not None and versus["verdict"] != "sooner":
        figure = f"at most {high:.2f}x"
    else:
        figure = "no figure"
    if versus["verdict"] == "sooner":
        return f"{figure} sooner than {base}"
    word = {"too wide": "too wide to say", "one seed": "one seed, no interval"}.get(versus["verdict"])
    note = f" ({versus['note'] or versus['reason']})" if versus["note"] or versus["reason"] else ""
    return f"{word or versus['verdict']}: {figure} over {base}{note}"


def at_full_budget(finished: Comparison, name: str) -> dict[str, float]:
    """Return the mean training MACs, seconds and accuracy of an arm's runs at its full budget. Raises HastenError without any."""
    row = next(arm for arm in finished.data["arms"] if arm["name"] == name)
    runs = [run for point in row["points"][-1:] for run in point["runs"] if run["failure"] is None]
    if not runs:
        raise HastenError(f"no run of {name} at its full budget finished.")
    return {
        "macs": fmean(run["macs"] or 0.0 for run in runs),
        "seconds": fmean(run["seconds"]["train"] for run in runs),
        "accuracy": fmean(run["accuracy"] or 0.0 for run in runs),
    }


def beside(finished: Comparison, arm: str, base: str, *, work: bool = True) -> str:
    """Return work, time and accuracy of an arm at its full budget beside those of ``base`` at its own.

    work: False leaves the MACs out, where the method does not count what it saves.
    """
    ours, theirs = at_full_budget(finished, arm), at_full_budget(finished, base)
    macs = f"{ours['macs'] / theirs['macs']:.2f}x the MACs in " if work else ""
    return (
        f"{macs}{ours['seconds'] / theirs['seconds']:.2f}x the time, "
        f"accuracy {100 * ours['accuracy']:.2f}% against {100 * theirs['accuracy']:.2f}%"
    )


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
