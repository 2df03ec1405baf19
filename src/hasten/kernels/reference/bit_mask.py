"""One bit for each element: whether it is above 0 (or not a number, as the gradient of ReLU has it)."""

from __future__ import annotations

import torch
from torch import Tensor


def bit_mask(x: Tensor) -> Tensor:
    """Return the bits of flat ``x``: bit i % 8 of byte i // 8 says not (x[i] <= 0). The last byte ends in zeros."""
    bits = ~(x <= 0)
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, device=x.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def masked(mask: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    """Return flat ``g`` times ``scale`` where its bit is set, else 0."""
    bits = (mask[:, None] >> torch.arange(8, device=g.device, dtype=torch.uint8)) & 1
    wide = g if g.dtype == torch.float64 else g.float()
    kept = g if scale == 1.0 else (wide * scale).to(g.dtype)
    return torch.where(bits.flatten()[: len(g)].bool(), kept, 0)
