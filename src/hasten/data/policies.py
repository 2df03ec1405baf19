"""RandAugment and TrivialAugment (wide): random operations at random strengths, as torchvision defines them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten import keyed
from hasten.data.geometric import Index, OnPixels
from hasten.data.pixel_ops import OPERATIONS
from hasten.errors import SettingsError, UnsupportedError

NAMES = tuple(OPERATIONS)
# Operations whose magnitude gets a random sign.
SIGNED = (
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
)


@dataclass(frozen=True)
class _Range:
    """The strongest magnitudes of a policy: shear (a slope), translation (pixels for a width or height), rotation
    (degrees), colour (added to the factor 1) and bits that posterize takes away.
    """

    shear: float
    translate: float
    relative: bool
    rotate: float
    colour: float
    bits: int

    def magnitudes(self, name: str, share: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
        """Return the magnitudes of an operation at ``share`` of its range, in [0, 1], for images of ``size``."""
        if name == "Posterize":
            return 8 - np.rint(share * self.bits)
        if name == "Solarize":
            return 255 * (1 - share)
        if name in ("TranslateX", "TranslateY"):
            side = size[1] if name == "TranslateX" else size[0]
            return share * self.translate * (side if self.relative else 1)
        if name in ("ShearX", "ShearY"):
            return share * self.shear
        return share * (self.rotate if name == "Rotate" else self.colour)


def _applied(
    x: Tensor, choice: Index, share: NDArray[np.float64], negative: NDArray[np.bool_], limits: _Range
) -> Tensor:
    if x.dtype != torch.uint8:
        raise UnsupportedError(f"RandAugment and TrivialAugment work on uint8 pixels, got {x.dtype}.")
    out = x.clone()
    for number in np.unique(choice):
        name, rows = NAMES[number], np.flatnonzero(choice == number)
        magnitude = limits.magnitudes(name, share[rows], (x.shape[1], x.shape[2]))
        if name in SIGNED:
            magnitude = np.where(negative[rows], -magnitude, magnitude)
        where = torch.from_numpy(rows).to(x.device)
        out[where] = OPERATIONS[name](x[where], torch.from_numpy(magnitude).to(x.device, torch.float32))
    return out


@dataclass(frozen=True)
class RandAugment(OnPixels):
    """``num_ops`` random operations, one after the other, at one strength (Cubuk et al., arXiv 1909.13719).

    magnitude: the strength, a bin of ``num_magnitude_bins`` from 0 on.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        if self.num_ops < 0 or not 0 <= self.magnitude < self.num_magnitude_bins:
            raise SettingsError(
                f"RandAugment needs num_ops (={self.num_ops}) >= 0 and magnitude (={self.magnitude}) in "
                f"0..{self.num_magnitude_bins - 1}."
            )

    def __call__(self, x: Tensor, index: Index, epoch: int, seed: int) -> Tensor:
        """Return the augmented uint8 batch."""
        limits = _Range(shear=0.3, translate=150 / 331, relative=True, rotate=30, colour=0.9, bits=4)
        share = np.full(len(x), self.magnitude / max(1, self.num_magnitude_bins - 1))
        for turn in range(self.num_ops):
            draw = keyed.uniform(index, 2, seed, epoch, "randaugment", turn)
            x = _applied(x, _choice(draw[:, 0]), share, draw[:, 1] < 0.5, limits)
        return x


@dataclass(frozen=True)
class TrivialAugmentWide(OnPixels):
    """One random operation at a random strength (Müller and Hutter, arXiv 2103.10158, the wide ranges)."""

    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        if self.num_magnitude_bins < 2:
            raise SettingsError(
                f"TrivialAugmentWide num_magnitude_bins must be 2 or more, got {self.num_magnitude_bins}."
            )

    def __call__(self, x: Tensor, index: Index, epoch: int, seed: int) -> Tensor:
        """Return the augmented uint8 batch."""
        limits = _Range(shear=0.99, translate=32, relative=False, rotate=135, colour=0.99, bits=6)
        draw = keyed.uniform(index, 3, seed, epoch, "trivialaugment")
        share = np.floor(draw[:, 1] * self.num_magnitude_bins) / (self.num_magnitude_bins - 1)
        return _applied(x, _choice(draw[:, 0]), share, draw[:, 2] < 0.5, limits)


def _choice(draw: NDArray[np.float64]) -> Index:
    return np.floor(draw * len(NAMES)).astype(np.int64)
