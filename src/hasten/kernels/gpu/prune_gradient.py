"""Stochastic pruning of a gradient, in Triton. Not yet measured on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.gpu.noise import noise16


@triton.jit
def _kernel(g, y, totals, n, tau, low, high, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(g + at, inside, other=0.0).to(tl.float32)
    size = tl.abs(x)
    noise = noise16(low.to(tl.uint32), high.to(tl.uint32), at).to(tl.float32)
    below = size < tau
    up = below & (size > (noise + 0.5) * (tau * 0.0000152587890625))
    raised = tl.where(x < 0, -tau, tau)
    kept = tl.where(up, raised, tl.where(below, 0.0, x))
    tl.store(y + at, kept.to(y.dtype.element_ty), inside)
    zero = inside & (size == 0)
    part = totals + program * 4
    tl.store(part, tl.sum(size, 0).to(tl.float64))
    tl.store(part + 1, tl.sum(zero.to(tl.int32), 0).to(tl.float64))
    tl.store(part + 2, tl.sum((inside & below & (up == 0) & (zero == 0)).to(tl.int32), 0).to(tl.float64))
    tl.store(part + 3, tl.sum((inside & up).to(tl.int32), 0).to(tl.float64))


def prune_gradient(g: Tensor, y: Tensor, tau: float, key: int) -> Tensor:
    """Fill ``y`` with ``g`` pruned at ``tau``, a value of g's dtype, and return the totals; both `dense` with the same strides.

    Totals are sums of one row a program, so they do not depend on the order in which programs run.
    """
    n, block = g.numel(), 1024
    programs = triton.cdiv(n, block)
    parts = torch.empty(programs, 4, dtype=torch.float64, device=g.device)
    if programs:
        _kernel[(programs,)](g, y, parts, n, tau, key & 0xFFFFFFFF, key >> 32, BLOCK=block)
    return parts.sum(0)
