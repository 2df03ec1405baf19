"""Stochastic pruning of a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.reference.noise import noise16


def prune_gradient(g: Tensor, tau: float, key: int) -> tuple[Tensor, Tensor]:
    """Return ``g`` (flat, in the order of memory) pruned at ``tau``, in its dtype, and four totals (float64).

    With r uniform in (0, 1), of 16 bits: g where |g| >= tau or g is not a number; sign(g) * tau where |g| > r * tau; else 0.
    totals: the sum of |g|, the zeros in g, the other elements set to 0, those set to +-tau. tau is rounded to g's dtype
    first, so that the mean of the result is g.
    """
    wide = g if g.dtype == torch.float64 else g.float()
    level = torch.tensor(tau, dtype=g.dtype, device=g.device).to(wide.dtype)
    size = wide.abs()
    below = size < level
    bar = (noise16(key, g.numel(), g.device).to(wide.dtype) + 0.5) * (level * 2.0**-16)
    up = below & (size > bar)
    small = torch.where(up, torch.copysign(level, wide), torch.zeros_like(wide)).to(g.dtype)
    zeros = size == 0
    counts = torch.stack([zeros.sum(), (below & ~up & ~zeros).sum(), up.sum()])
    return torch.where(below, small, g), torch.cat([size.double().sum().view(1), counts.double()])
