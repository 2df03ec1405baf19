"""The image operations of RandAugment and TrivialAugment, on uint8 batches, as Pillow computes them.

Each takes images (B, H, W, C) and one magnitude a sample (B,), float32, and returns uint8 images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[[Tensor, Tensor], Tensor]


def affine(x: Tensor, matrix: Tensor) -> Tensor:
    """Return images whose pixel centre (u, v) shows the input at ``matrix`` (B, 2, 3) @ (u, v, 1): the nearest
    pixel, black outside.
    """
    count, height, width, channels = x.shape
    v, u = torch.meshgrid(
        torch.arange(height, device=x.device) + 0.5, torch.arange(width, device=x.device) + 0.5, indexing="ij"
    )
    place = torch.stack([u.flatten(), v.flatten(), torch.ones_like(u.flatten())])
    col, row = torch.floor(matrix @ place).long().unbind(1)
    inside = (col >= 0) & (col < width) & (row >= 0) & (row < height)
    flat = (row.clamp(0, height - 1) * width + col.clamp(0, width - 1))[..., None].expand(-1, -1, channels)
    return (x.view(count, -1, channels).gather(1, flat) * inside[..., None]).view(x.shape)


def _matrix(like: Tensor, *entries: Tensor | float) -> Tensor:
    full = [entry if isinstance(entry, Tensor) else torch.full_like(like, entry) for entry in entries]
    return torch.stack(full, 1).view(-1, 2, 3)


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Turn about the image's centre, counter-clockwise."""
    cx, cy = x.shape[2] / 2, x.shape[1] / 2
    cos, sin = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    return affine(
        x, _matrix(degrees, cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy)
    )


def blend(start: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return start + factor * (x - start), cut to 0..255 and to whole numbers; beyond 1 it extrapolates."""
    f = factor.view(-1, 1, 1, 1)
    return (start + f * (x.float() - start)).clamp(0, 255).to(torch.uint8)


def grey(x: Tensor) -> Tensor:
    """Return the luminance (B, H, W, 1) in whole numbers, float32; the mean of the channels where they are not RGB."""
    if x.shape[3] != 3:
        return x.float().mean(3, keepdim=True).add(0.5).floor()
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=x.device)
    return ((x.int() * weights).sum(3, keepdim=True) + 0x8000).bitwise_right_shift(16).float()


def contrast(x: Tensor, magnitude: Tensor) -> Tensor:
    """Move away from (or towards, below 0) the image's mean luminance."""
    mean = (grey(x).mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return blend(mean, x, 1 + magnitude)


def sharpness(x: Tensor, magnitude: Tensor) -> Tensor:
    """Move away from (or towards) the smoothed image; the outermost pixels stay."""
    planes = x.permute(0, 3, 1, 2).float()
    smooth = planes.clone()
    if min(x.shape[1:3]) > 2:
        kernel = (
            torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device)
            .div(13)
            .expand(x.shape[3], 1, 3, 3)
        )
        inner = F.conv2d(planes, kernel, groups=x.shape[3])
        smooth[:, :, 1:-1, 1:-1] = inner.add_(0.5).floor_()
    return blend(smooth.permute(0, 2, 3, 1), x, 1 + magnitude)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the ``bits`` highest bits of each value."""
    step = (2 ** (8 - bits)).to(torch.int32).view(-1, 1, 1, 1)
    return (torch.div(x.int(), step, rounding_mode="floor") * step).to(torch.uint8)


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert every value from the threshold on."""
    return torch.where(x >= threshold.view(-1, 1, 1, 1), 255 - x, x)


def autocontrast(x: Tensor, magnitude: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a channel of one value stays."""
    low, high = x.amin((1, 2), keepdim=True).int(), x.amax((1, 2), keepdim=True).int()
    stretched = torch.div((x.int() - low) * 255, (high - low).clamp(min=1), rounding_mode="floor")
    return torch.where(high > low, stretched, x.int()).to(torch.uint8)


def equalize(x: Tensor, magnitude: Tensor) -> Tensor:
    """Flatten each channel's histogram as Pillow does: integer steps of the cumulative count."""
    count, height, width, channels = x.shape
    values = x.permute(0, 3, 1, 2).reshape(count * channels, -1).long()
    histogram = torch.zeros(len(values), 256, dtype=torch.int64, device=x.device)
    histogram.scatter_add_(1, values, torch.ones_like(values))
    # The count of the highest value that occurs is left out of the step.
    last = histogram.gather(1, values.amax(1, keepdim=True))
    step = torch.div(height * width - last, 255, rounding_mode="floor")
    before = histogram.cumsum(1) - histogram
    table = torch.div(before + step // 2, step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device))
    return table.gather(1, values).view(count, channels, height, width).permute(0, 2, 3, 1).to(torch.uint8)


# By torchvision's names. Shears and translations say where a pixel comes from, so their signs are as there.
OPERATIONS: dict[str, Operation] = {
    "Identity": lambda x, m: x,
    "ShearX": lambda x, m: affine(x, _matrix(m, 1, m, 0, 0, 1, 0)),
    "ShearY": lambda x, m: affine(x, _matrix(m, 1, 0, 0, m, 1, 0)),
    "TranslateX": lambda x, m: affine(x, _matrix(m, 1, 0, -m.trunc(), 0, 1, 0)),
    "TranslateY": lambda x, m: affine(x, _matrix(m, 1, 0, 0, 0, 1, -m.trunc())),
    "Rotate": rotate,
    "Brightness": lambda x, m: blend(torch.zeros_like(x, dtype=torch.float32), x, 1 + m),
    "Color": lambda x, m: blend(grey(x).expand(x.shape), x, 1 + m),
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
}
