"""Small runs for the tests of the loop: a data set, networks, and states that can be compared bit for bit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hasten import keyed
from hasten.checkpoint import Store
from hasten.conformance import differences
from hasten.data import DataSet, Images
from hasten.recipe import Recipe

CLASSES, SIZE, BATCH, PER_EPOCH, EPOCHS = 4, 16, 16, 8, 3
STEPS = PER_EPOCH * EPOCHS
RECIPE = Recipe(epochs=EPOCHS, batch_size=BATCH, lr=0.02, augment=("crop2", "flip", "cutout"), ema=0.9,
                label_smoothing=0.1, eval_every=0.5)  # fmt: skip


def images(count: int, seed: int, size: int = SIZE, classes: int = CLASSES) -> Images:
    """Return noisy patterns, one a class."""
    g = np.random.Generator(np.random.Philox(keyed.key64("loop images", size)))
    patterns = g.integers(0, 256, (classes, size, size, 3))
    g = np.random.Generator(np.random.Philox(keyed.key64("loop images", size, seed)))
    labels = np.arange(count) % classes
    noisy = patterns[labels] + g.normal(0, 60, (count, size, size, 3))
    names = tuple(f"class {i}" for i in range(classes))
    return Images(np.clip(noisy, 0, 255).astype(np.uint8), labels.astype(np.int64), names)


def data(train: int = BATCH * PER_EPOCH + 5, test: int = 20) -> DataSet:
    """Return the runs' data set; the training images do not fill the last batch."""
    return DataSet("patterns", images(train, 1), images(test, 2), flip_ok=True)


def write_npz(path: Path, train: int = BATCH * PER_EPOCH + 5, test: int = 20) -> Path:
    """Write the same data set as an .npz file."""
    whole = data(train, test)
    np.savez(path, x_train=whole.train.pixels, y_train=whole.train.labels, x_test=whole.test.pixels,
             y_test=whole.test.labels)  # fmt: skip
    return path


def net(dropout: float = 0.0) -> nn.Module:
    """Return a network in which every method finds something: wide convolutions, pooling, batch norm, a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(32, CLASSES),
    )  # fmt: skip


def final(out: Path) -> dict[str, Any]:
    """Return all that must be equal at the end of two equal runs: the newest checkpoint (less its times), the logs."""
    loaded = Store(out / "checkpoints").load()
    assert loaded is not None
    parts = dict(loaded.parts)
    state = {k: v for k, v in parts.pop("state").items() if k not in ("clock", "curve", "logs")}
    curve = [row[1:] for row in loaded.parts["state"]["curve"]]
    return {"step": loaded.step, "parts": parts, "state": state, "curve": curve, "steps": steps(out),
            "evaluations": evaluations(out)}  # fmt: skip


def steps(out: Path) -> list[dict[str, Any]]:
    """Return the lines of steps.jsonl."""
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def evaluations(out: Path) -> list[dict[str, str]]:
    """Return the rows of evaluations.csv without their times."""
    with (out / "evaluations.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same(a: dict[str, Any], b: dict[str, Any], what: object) -> None:
    """Fail with the names of everything that differs in any bit."""
    wrong = differences(a, b)
    assert not wrong, f"{what}: {wrong[:8]}"
