"""Crops and flips: they only say where each output pixel comes from, so any number of them costs one gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten import keyed
from hasten.errors import SettingsError

Index = NDArray[np.int64]


class OnPixels:
    """A transform of uint8 pixels (B, H, W, C), before they are normalised."""

    def __call__(self, x: Tensor, index: Index, epoch: int, seed: int) -> Tensor:
        """Return the batch of ``x`` as its samples ``index`` (B,) look in ``epoch``, of the same shape and dtype."""
        raise NotImplementedError


class Geometric(OnPixels):
    """A transform that moves pixels by whole rows and columns.

    ``move`` maps the source row (B, H) and source column (B, W) of each output pixel; -1 stands for outside
    (black).
    """

    def move(self, rows: Index, cols: Index, index: Index, epoch: int, seed: int) -> tuple[Index, Index]:
        """Return the new source rows (B, H) and columns (B, W)."""
        raise NotImplementedError

    def __call__(self, x: Tensor, index: Index, epoch: int, seed: int) -> Tensor:
        """Return the moved batch (B, H, W, C) of ``x``, of the same dtype and device."""
        return gather(x, np.arange(len(x)), *moved([self], (x.shape[1], x.shape[2]), index, epoch, seed))


@dataclass(frozen=True)
class Crop(Geometric):
    """Random crop of the image padded by ``pad`` pixels on each side (usual for CIFAR: 4; airbench: 2).

    mode 'reflect' mirrors the image at its border without repeating it, 'zeros' pads with black.
    """

    pad: int = 4
    mode: Literal["reflect", "zeros"] = "reflect"

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise SettingsError(f"Crop pad must be 0 or more pixels, got {self.pad}.")
        if self.mode not in ("reflect", "zeros"):
            raise SettingsError(f"Crop mode must be 'reflect' or 'zeros', got {self.mode!r}.")

    def move(self, rows: Index, cols: Index, index: Index, epoch: int, seed: int) -> tuple[Index, Index]:
        """Shift rows and columns by -pad..pad."""
        if self.mode == "reflect" and self.pad >= min(rows.shape[1], cols.shape[1]):
            size = (rows.shape[1], cols.shape[1])
            raise SettingsError(f"Crop pad {self.pad} must be smaller than the image {size} to reflect it.")
        draw = keyed.uniform(index, 2, seed, epoch, "crop")
        shift = np.floor(draw * (2 * self.pad + 1)).astype(np.int64) - self.pad
        return self._shifted(rows, shift[:, 0]), self._shifted(cols, shift[:, 1])

    def _shifted(self, source: Index, shift: Index) -> Index:
        size = source.shape[1]
        at = np.arange(size) + shift[:, None]
        if self.mode == "reflect":
            at = np.abs(at)
            at = (size - 1) - np.abs((size - 1) - at)
            return np.take_along_axis(source, at, 1)
        inside = (at >= 0) & (at < size)
        return np.where(inside, np.take_along_axis(source, at.clip(0, size - 1), 1), -1)


@dataclass(frozen=True)
class Flip(Geometric):
    """Horizontal flip with probability one half, drawn anew each epoch."""

    def move(self, rows: Index, cols: Index, index: Index, epoch: int, seed: int) -> tuple[Index, Index]:
        """Reverse the columns of the drawn samples."""
        flip = keyed.uniform(index, 1, seed, epoch, "flip") < 0.5
        return rows, np.where(flip, cols[:, ::-1], cols)


@dataclass(frozen=True)
class AlternatingFlip(Geometric):
    """A random half of the images is flipped for good, then all images are flipped every other epoch.

    Any two consecutive epochs show every image in both orientations (Jordan 2024, airbench).
    """

    def move(self, rows: Index, cols: Index, index: Index, epoch: int, seed: int) -> tuple[Index, Index]:
        """Reverse the columns of the samples whose turn it is."""
        flip = (keyed.uniform(index, 1, seed, "alternating flip") < 0.5) ^ (epoch % 2 == 1)
        return rows, np.where(flip, cols[:, ::-1], cols)


def moved(
    steps: Sequence[Geometric], size: tuple[int, int], index: Index, epoch: int, seed: int
) -> tuple[Index, Index]:
    """Return source rows (B, H) and columns (B, W) of images of ``size`` (H, W) after all steps in order."""
    rows, cols = (np.broadcast_to(np.arange(length), (len(index), length)) for length in size)
    for step in steps:
        rows, cols = step.move(rows, cols, index, epoch, seed)
    return rows, cols


def gather(pixels: Tensor, images: Index, rows: Index, cols: Index) -> Tensor:
    """Return pixels[images[b], rows[b, h], cols[b, w]] as (B, H, W, C); places with -1 become 0.

    ``pixels`` is (N, H, W, C), of any dtype and device.
    """
    _, height, width, channels = pixels.shape
    outside = (rows < 0).any() or (cols < 0).any()
    base, right = (rows.clip(0) + images[:, None] * height) * width, cols.clip(0)
    first, second = (torch.from_numpy(np.ascontiguousarray(part)).to(pixels.device) for part in (base, right))
    flat = first[:, :, None] + second[:, None, :]
    out = pixels.reshape(-1, channels).index_select(0, flat.reshape(-1)).view(*flat.shape, channels)
    if outside:
        black = torch.from_numpy((rows < 0)[:, :, None] | (cols < 0)[:, None, :]).to(pixels.device)
        out.masked_fill_(black[..., None], 0)
    return out
