"""Random rectangles as torchvision draws them, and the crop that is resized back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten import keyed
from hasten.data.geometric import Index, OnPixels
from hasten.errors import SettingsError

Span = tuple[float, float]
TRIES = 10


def check_span(name: str, scale: Span, ratio: Span) -> None:
    """Raise SettingsError where a range is empty or out of bounds."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise SettingsError(f"{name} scale must be a range within (0, 1], got {scale}.")
    if not 0 < ratio[0] <= ratio[1] < float("inf"):
        raise SettingsError(f"{name} ratio must be a range above 0, got {ratio}.")


def drawn(
    size: tuple[int, int], scale: Span, ratio: Span, index: Index, *key: keyed.Key, proper: bool = False
) -> tuple[Index, Index, NDArray[np.bool_]]:
    """Return, for each sample, a rectangle's (top, left) and (height, width), both (B, 2), and whether one fits.

    Its area is an even share in ``scale`` of the image's (H, W), its width / height even in the logarithm of
    ``ratio`` (height / width with ``proper``), its place even. The first of ten draws that fits is taken; with
    ``proper`` it must be smaller than the image in both directions.
    """
    height, width = size
    draw = keyed.uniform(index, 2 * TRIES + 2, *key)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draw[:, :TRIES])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draw[:, TRIES : 2 * TRIES])
    tall, wide = (np.sqrt(area * aspect), np.sqrt(area / aspect))
    rows, cols = (np.rint(side).astype(np.int64) for side in ((tall, wide) if proper else (wide, tall)))
    inside = (rows < height) & (cols < width) if proper else (rows <= height) & (cols <= width)
    inside &= (rows > 0) & (cols > 0)
    first = inside.argmax(1)[:, None]
    extent = np.concatenate([np.take_along_axis(side, first, 1) for side in (rows, cols)], 1)
    room = np.maximum(np.array(size) - extent, 0)
    start = np.floor(draw[:, 2 * TRIES :] * (room + 1)).astype(np.int64)
    return start, extent, inside.any(1)


@dataclass(frozen=True)
class RandomResizedCrop(OnPixels):
    """A random rectangle of the image, resized to the whole (Szegedy et al., arXiv 1409.4842; as in torchvision).

    scale: range of its share of the area. ratio: range of width / height, drawn evenly in its logarithm. Where none
    of ten draws fits, the largest centred rectangle within ``ratio`` is taken. Resizing is bilinear; since the crop
    is never larger than the image, nothing has to be antialiased.
    """

    scale: Span = (0.08, 1.0)
    ratio: Span = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_span("RandomResizedCrop", self.scale, self.ratio)

    def boxes(self, size: tuple[int, int], index: Index, epoch: int, seed: int) -> tuple[Index, Index]:
        """Return (top, left) and (height, width) of each sample's rectangle, both (B, 2)."""
        start, extent, fits = drawn(size, self.scale, self.ratio, index, seed, epoch, "random resized crop")
        height, width = size
        centred = np.array([
            min(height, round(width / self.ratio[0])), min(width, round(height * self.ratio[1])),
        ])  # fmt: skip
        start = np.where(fits[:, None], start, (np.array(size) - centred) // 2)
        return start, np.where(fits[:, None], extent, centred)

    def __call__(self, x: Tensor, index: Index, epoch: int, seed: int) -> Tensor:
        """Return the resized crops of uint8 ``x`` (B, H, W, C)."""
        start, extent = self.boxes((x.shape[1], x.shape[2]), index, epoch, seed)
        for axis in (1, 0):
            x = _stretched(x, 1 + axis, start[:, axis], extent[:, axis])
        return x


def _stretched(x: Tensor, axis: int, start: Index, extent: Index) -> Tensor:
    """Bring the part [start, start + extent) of ``axis`` to its whole length, linearly, rounded to uint8 as Pillow
    does after each direction.
    """
    length = x.shape[axis]
    at = (np.arange(length) + 0.5) * (extent / length)[:, None] - 0.5
    at = at.clip(0, (extent - 1)[:, None])
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, (extent - 1)[:, None])
    shape = [len(x), 1, 1, 1]
    shape[axis] = length
    first, second = (
        torch.from_numpy(start[:, None] + where).to(x.device).view(shape).expand(*x.shape)
        for where in (low, high)
    )
    share = torch.from_numpy(at - low).to(x.device, torch.float32).view(shape)
    one, other = x.gather(axis, first).float(), x.gather(axis, second).float()
    return torch.lerp(one, other, share).add_(0.5).to(torch.uint8)
