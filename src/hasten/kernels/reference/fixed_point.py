"""Rounding of float32 to the grid of a fixed-point format."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.reference.noise import noise16

SECOND = 0x5851F42D4C957F2D
"""What the key is changed by for the bits that follow the first 16 of an element (our choice)."""


def fixed_point(
    x: Tensor, word: int, fraction: int, key: int, stochastic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, saturated, largest) for float32 ``x`` (flat, in the order of memory).

    y: multiples of eps = 2**-fraction in [-2**(word-1), 2**(word-1) - 1] * eps (Gupta et al. 2015, section 3). Nearest: ties
    go up. Stochastic: up with the probability of the distance, in 32 random bits: the first 16 decide, and where they
    equal the distance the next 16 do. What lies outside the range becomes its end; NaN stays.
    saturated: how many elements lay outside, int64 (). largest: the largest magnitude that is not NaN, float32 ().
    """
    eps = 2.0**-fraction
    v = x * 2.0**fraction
    if stochastic:
        size = v.abs()
        low = size.floor()
        share = (size - low) * 65536
        whole = share.floor()
        first, second = (noise16(k, x.numel(), x.device).to(torch.float32) for k in (key, key ^ SECOND))
        up = (first < whole) | ((first == whole) & (second < (share - whole) * 65536))
        r = torch.copysign(low + up, v)
    else:
        low = v.floor()
        r = torch.where(v - low >= 0.5, low + 1, low)
    top = 2.0 ** (word - 1)
    y = r.clamp(-top, top - 1) * eps
    saturated = ((v > top - 1) | (v < -top)).sum()
    known = torch.where(x.isnan(), 0.0, x.abs())
    largest = known.max() if x.numel() else x.new_zeros(())
    return y, saturated, largest
