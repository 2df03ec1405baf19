"""Small things to compare."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
from torch import nn

from hasten import method
from hasten.comparison import Arm
from hasten.data import DataSet, Images
from hasten.recipe import PLAIN, STRONG


def small_data(seed: int = 0, n: int = 96) -> DataSet:
    """Return 16 x 16 images of three classes that differ in brightness."""
    rng = np.random.Generator(np.random.Philox(seed))
    labels = np.arange(n) % 3
    pixels = rng.integers(0, 60, (n, 16, 16, 1)) + 60 * labels[:, None, None, None]
    images = Images(pixels.astype(np.uint8), labels, ("a", "b", "c"))
    return DataSet("small", images, images.take(np.arange(48)), flip_ok=True)


def two_arms(epochs: float = 2.0) -> list[Arm]:
    """Return a plain and a strong arm that take no time."""
    quick = {"epochs": epochs, "batch_size": 16, "lr": 0.01}
    return [
        Arm("plain", PLAIN.with_(**quick), (), "baseline"),
        Arm("strong", STRONG.with_(**quick), (method("mixed_precision", dtype="float32"),), "strong"),
    ]


class Dies(nn.Module):
    """Kills its process in the first forward pass of training."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 3)

    def forward(self, x: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        return self.head(x.flatten(1))
