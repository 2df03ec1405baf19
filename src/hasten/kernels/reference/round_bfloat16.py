"""Stochastic rounding of float32 to bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.reference.noise import noise16

_LARGEST, _INFINITE = 0x7F7F0000, 0x7F800000


def round_bfloat16(x: Tensor, key: int) -> Tensor:
    """Return float32 ``x`` (flat, in the order of memory) rounded to bfloat16.

    The magnitude's bits plus 16 random bits, cut to the upper 16: up with the probability of the distance, so that
    the mean is x. Finite values stay finite, infinities and what is not a number stay what they are.
    """
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    size, sign = bits & 0x7FFFFFFF, bits & 0x80000000
    total = (size + noise16(key, x.numel(), x.device)).clamp(max=_LARGEST)
    total = torch.where(size >= _INFINITE, size | torch.where(size > _INFINITE, 0x400000, 0), total)
    upper = (total | sign) >> 16
    return torch.where(upper >= 0x8000, upper - 0x10000, upper).to(torch.int16).view(torch.bfloat16)
