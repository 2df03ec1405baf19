"""Cutout and random erasing: a rectangle of each image is set to zero.

In a Loader they run on normalised pixels, where zero is the mean colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hasten import keyed
from hasten.data.boxes import Span, check_span, drawn
from hasten.data.geometric import Index
from hasten.errors import SettingsError


@dataclass(frozen=True)
class Cutout:
    """Set a square of ``size`` pixels to zero, its centre anywhere in the image (DeVries and Taylor 2017).

    The square is cut at the border.
    """

    size: int = 8

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SettingsError(f"Cutout size must be 1 pixel or more, got {self.size}.")

    def __call__(self, x: Tensor, index: Index, epoch: int, seed: int) -> Tensor:
        """Return ``x`` (B, H, W, C) with one square a sample set to zero."""
        size = np.array(x.shape[1:3])
        first = (
            np.floor(keyed.uniform(index, 2, seed, epoch, "cutout") * size).astype(np.int64) - self.size // 2
        )
        return _erased(x, first, first + self.size)


@dataclass(frozen=True)
class RandomErasing:
    """Set a rectangle to zero with probability ``p`` (Zhong et al., arXiv 1708.04896; drawn as in torchvision).

    scale: range of its share of the image's area. ratio: range of height / width, drawn evenly in its logarithm. A
    rectangle that does not fit is drawn again, up to ten times; then the image stays as it is.
    """

    p: float = 0.5
    scale: Span = (0.02, 0.33)
    ratio: Span = (0.3, 3.3)

    def __post_init__(self) -> None:
        check_span("RandomErasing", self.scale, self.ratio)
        if not 0 <= self.p <= 1:
            raise SettingsError(f"RandomErasing p must lie in [0, 1], got {self.p}.")

    def __call__(self, x: Tensor, index: Index, epoch: int, seed: int) -> Tensor:
        """Return ``x`` (B, H, W, C) with the rectangles of the drawn samples set to zero."""
        size = x.shape[1], x.shape[2]
        first, extent, fits = drawn(
            size, self.scale, self.ratio, index, seed, epoch, "random erasing", proper=True
        )
        hit = fits & (keyed.uniform(index, 1, seed, epoch, "random erasing p")[:, 0] < self.p)
        return _erased(x, first, first + extent * hit[:, None])


def _erased(x: Tensor, first: Index, last: Index) -> Tensor:
    """Set the rectangles from ``first`` up to ``last``, both (B, 2) of row and column, to zero."""
    inside = [
        (np.arange(n) >= begin[:, None]) & (np.arange(n) < end[:, None])
        for n, begin, end in zip(x.shape[1:3], first.T, last.T, strict=True)
    ]
    rows, cols = (torch.from_numpy(mask).to(x.device) for mask in inside)
    return x.masked_fill((rows[:, :, None] & cols[:, None, :])[..., None], 0)
