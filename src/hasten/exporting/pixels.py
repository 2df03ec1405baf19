"""A network that takes pixels: resize, normalisation and the number format of the run around the trained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.errors import UnsupportedError

# of numbers that a tracer need not know
_min: Callable[..., Any] = torch.sym_min
_max: Callable[..., Any] = torch.sym_max
WRONG_PIXELS = "pixels must be uint8, or floating point in [0, 1]"


class Pixels(nn.Module):
    """Logits (N, classes), float32, of images (N, C, H, W): uint8, or floating point in [0, 1], of any height and width.

    Images of another size are brought to the network's as the reader of image folders does it: the shorter side to a
    length (antialiased bilinear, rounded to 8 bits after each direction, as in Pillow), then the centre is cut out; to
    one level in 255 they are the same. Those of the right size pass through untouched. Floats are rounded to the 8 bits
    that the network was trained on.

    network: takes normalised images. preprocessing: what ``DataSet.preprocessing`` gave. precision: "float32", or the
    16-bit format in which the run was evaluated.
    """

    def __init__(
        self, network: nn.Module, preprocessing: Mapping[str, Any], precision: str = "float32"
    ) -> None:
        super().__init__()
        if preprocessing.get("mean") is None or preprocessing.get("std") is None:
            raise UnsupportedError(
                "this run's images came normalised from a loader of your own, so what turns pixels into its input is "
                "not known here; give --raw (raw=True) for a network that takes what your loader gives."
            )
        self.network = network
        self.size: tuple[int, int] = tuple(preprocessing["size"])
        shorter = (preprocessing.get("resize") or {}).get("shorter_side")
        self.cover: tuple[int, int] = self.size if shorter is None else (shorter, shorter)
        self.dtype: torch.dtype = getattr(torch, precision)
        # the loader's own arithmetic, so that the network sees the very bits that it saw in training
        mean, std = np.array(preprocessing["mean"]), np.array(preprocessing["std"])
        for name, value in (("scale", 1 / (255 * std)), ("shift", -mean / std)):
            self.register_buffer(
                name, torch.tensor(value, dtype=torch.float32)[:, None, None], persistent=False
            )

    scale: Tensor
    shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ``images``."""
        x = self._resized(self._levels(images))
        x = (x * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        with nullcontext() if self.dtype == torch.float32 else torch.autocast(x.device.type, self.dtype):
            logits: Tensor = self.network(x)
        return logits.float()

    def _levels(self, images: Tensor) -> Tensor:
        """Return whole numbers from 0 to 255, as float32."""
        # One traced program serves both kinds of input: nothing less one is 255 in uint8 and -1 in a float.
        below = torch.zeros_like(images[:1, :1, :1, :1]) - 1
        levels = torch.floor(images.type_as(self.scale) * torch.where(below > 0, 1.0, 255.0) + 0.5)
        torch._assert_async(((levels >= 0) & (levels <= 255)).all(), WRONG_PIXELS)
        return levels

    def _resized(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        size, cover = self.size, self.cover
        # 0 for images of the right size and 1 for others, in numbers that a tracer need not look at
        other = _min(1, _apart(height, size[0]) + _apart(width, size[1]))
        tall = _max(cover[0], height * cover[1] // width)
        wide = _max(cover[1], width * cover[0] // height)
        tall, wide = size[0] + other * (tall - size[0]), size[1] + other * (wide - size[1])
        x = torch.floor(F.interpolate(x, (height, wide), mode="bilinear", antialias=True) + 0.5)
        x = torch.floor(F.interpolate(x, (tall, wide), mode="bilinear", antialias=True) + 0.5)
        for dim, (length, now) in enumerate(zip(size, (tall, wide), strict=True), start=2):
            half = (now - length) // 2
            first = half + (now - length) % 2 * (half % 2)  # half of it, and where that is .5 the even one
            x = x.index_select(dim, torch.arange(length, device=x.device) + first)
        return x


def _apart(a: Any, b: int) -> Any:
    return _max(a - b, b - a)
