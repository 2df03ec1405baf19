"""S3Pool against max pooling: accuracy from all, half and a fifth of the labels, with and without augmentation.

A table of accuracies, no time claim: S3Pool costs time in a step. The network is a VGG-like CNN with three max
poolings; the data a stratified part of CIFAR-10. All arms take the same number of steps, so that fewer labels mean
more passes over them and not a shorter training.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

import hasten
from benchmarks.common import WORK, cifar10, claim, store
from hasten import keyed
from hasten.contract import Method
from hasten.data import DataSet
from hasten.measure.store import append_jsonl, read_jsonl
from hasten.methods.forward.mixed_precision import MixedPrecision
from hasten.methods.forward.s3pool import S3Pool
from hasten.recipe import Recipe

CLAIM = "S3Pool: accuracy against max pooling with fewer labelled images (CIFAR-10, a quarter of it at most)"
MINUTES = 40
IMAGES, BATCH, STEPS, SEEDS = 12_500, 128, 800, 3
SHARES = (1.0, 0.5, 0.2)
AUGMENT: dict[str, tuple[str, ...]] = {"none": (), "crop+flip": ("crop", "flip")}
POOLING = ("max", "s3pool")


def network(seed: int) -> nn.Module:
    """Return a CNN of six 3x3 convolutions with batch norm and a max pooling after each two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed.key64(seed, "weights"))
        layers: list[nn.Module] = []
        c_in = 3
        for c_out in (32, 64, 128):
            for _ in range(2):
                layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
                c_in = c_out
            layers.append(nn.MaxPool2d(2))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 10))


def run(
    full: DataSet, pooling: str, share: float, augment: str, seed: int, images: int, steps: int
) -> dict[str, Any]:
    """Train one network and return its row."""
    data = full.stratified(train=round(images * share), test=None if images == IMAGES else images, seed=seed)
    per_epoch = len(data.train) // BATCH  # the loader leaves the rest of an epoch out
    recipe = Recipe(
        epochs=steps / per_epoch, batch_size=BATCH, lr=0.1, augment=AUGMENT[augment], eval_every=0
    )
    methods: list[Method] = [MixedPrecision(), *([S3Pool()] if pooling == "s3pool" else [])]
    result = hasten.fit(network(seed), data, methods, recipe=recipe, seed=seed)
    return {
        "pooling": pooling,
        "share": share,
        "augment": augment,
        "seed": seed,
        "images": images,
        "steps": result.steps,
        "accuracy": 100 * result.accuracy,
        "seconds": result.seconds_train,
        "witness": result.witness,
    }


def main(smoke: bool = False) -> None:
    """Run all arms and seeds, continuing where an earlier run stopped, and store the table."""
    images, steps, seeds = (1000, 3, 1) if smoke else (IMAGES, STEPS, SEEDS)
    full, path = cifar10(), WORK / "s3pool.jsonl"
    WORK.mkdir(parents=True, exist_ok=True)
    rows = [] if smoke or not path.exists() else [r for r in read_jsonl(path) if r["images"] == images]
    done = {(r["pooling"], r["share"], r["augment"], r["seed"]) for r in rows}
    for seed in range(seeds):
        for share in SHARES:
            for augment in AUGMENT:
                for pooling in POOLING:
                    if (pooling, share, augment, seed) in done:
                        continue
                    row = run(full, pooling, share, augment, seed, images, steps)
                    print(
                        f"seed {seed}  {share:4.0%} of {images}  {augment:9} {pooling:6} {row['accuracy']:5.1f} %",
                        flush=True,
                    )
                    rows.append(row)
                    if not smoke:
                        append_jsonl(path, row)
    table = []
    for share in SHARES:
        for augment in AUGMENT:
            cell = {p: {r["seed"]: r["accuracy"] for r in rows if (r["pooling"], r["share"], r["augment"]) ==
                        (p, share, augment)} for p in POOLING}  # fmt: skip
            gain = [cell["s3pool"][s] - cell["max"][s] for s in cell["max"]]
            mean = {p: statistics.mean(cell[p].values()) for p in POOLING}
            sd = statistics.stdev(gain) if len(gain) > 1 else None
            table.append(
                {
                    "share": share,
                    "augment": augment,
                    **mean,
                    "gain": statistics.mean(gain),
                    "gain_sd": sd,
                    "n": len(gain),
                }
            )
            print(table[-1])
    settings = {"images": images, "steps": steps, "batch": BATCH, "lr": 0.1, "grid": 0.5, "shares": SHARES}
    claims = [
        claim(
            "s3pool",
            f"accuracy over max pooling, {row['share']:.0%} of {images} CIFAR-10 images, augmentation {row['augment']}",
            f"{row['gain']:+.2f} points (n={row['n']})",
        )
        for row in table
    ]
    store("s3pool", {"claim": CLAIM, "settings": settings, "rows": rows, "table": table}, smoke, claims)
