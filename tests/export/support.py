"""Small trained runs for the tests of export, and a process in which hasten cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import hasten
from hasten import keyed
from hasten.data import DataSet, Images
from hasten.loop import Result

CLASSES, SIZE, TEST = ("ant", "bee", "cat", "dog"), 16, 301
RECIPE = hasten.STRONG.with_(epochs=4.0, batch_size=16, lr=0.05, eval_every=0.0, augment=(), ema=0.8)
NETWORK = """
from torch import nn

print("net.py was imported")


def make(num_classes):
    print("net.py makes a network")
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, num_classes),
    )
"""
WITHOUT_HASTEN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hasten":
            raise ImportError("hasten is not installed here")
sys.meta_path.insert(0, Refuse())
"""


def images(count: int, seed: int, channels: int = 3) -> Images:
    """Return patterns under so much noise that a short run gets a part of them right."""
    g = np.random.Generator(np.random.Philox(keyed.key64("export images")))
    patterns = g.integers(0, 256, (len(CLASSES), SIZE, SIZE, channels))
    g = np.random.Generator(np.random.Philox(keyed.key64("export images", seed)))
    labels = np.arange(count) % len(CLASSES)
    noisy = patterns[labels] + g.normal(0, 150, (count, SIZE, SIZE, channels))
    return Images(np.clip(noisy, 0, 255).astype(np.uint8), labels.astype(np.int64), CLASSES)


def data(channels: int = 3) -> DataSet:
    return DataSet("patterns", images(160, 1, channels), images(TEST, 2, channels), flip_ok=True)


def trained(folder: Path, *, low: bool = True, model: str | None = None) -> Result:
    """Train a run into ``folder``/run, of the factory in ``folder``/net.py; ``low``: in bfloat16."""
    (folder / "net.py").write_text(NETWORK)
    methods = [hasten.method("mixed_precision", dtype="bfloat16", force=True)] if low else []
    return hasten.fit(
        model or f"{folder / 'net.py'}:make", data(), methods, recipe=RECIPE, out=folder / "run", device="cpu"
    )


def right(result: Result) -> int:
    """Return how many test images the run itself got right."""
    count = round(result.accuracy * TEST)
    assert count / TEST == result.accuracy
    assert 0.3 < result.accuracy < 0.99, (
        "the run must be neither blind nor perfect, or the counts say nothing"
    )
    return count


def run_python(code: str, folder: Path, *, without_hasten: bool = True) -> str:
    """Return what ``code`` prints in a fresh process, in which hasten cannot be imported."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", (WITHOUT_HASTEN if without_hasten else "") + code],
        cwd=folder, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
