"""Rounding to the grid of a fixed-point format, in Triton. Not yet measured on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.gpu.noise import noise16
from hasten.kernels.reference.fixed_point import SECOND


@triton.jit
def _kernel(x, y, counts, sizes, n, scale, eps, top, low_a, high_a, low_b, high_b, STOCHASTIC: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    given = tl.load(x + at, inside, other=0.0)
    v = given * scale
    if STOCHASTIC:
        size = tl.abs(v)
        low = tl.floor(size)
        share = (size - low) * 65536.0
        whole = tl.floor(share)
        first = noise16(low_a.to(tl.uint32), high_a.to(tl.uint32), at).to(tl.float32)
        second = noise16(low_b.to(tl.uint32), high_b.to(tl.uint32), at).to(tl.float32)
        up = (first < whole) | ((first == whole) & (second < (share - whole) * 65536.0))
        raised = low + tl.where(up, 1.0, 0.0)
        r = tl.where(v < 0, -raised, raised)
    else:
        low = tl.floor(v)
        r = low + tl.where(v - low >= 0.5, 1.0, 0.0)
    r = tl.where(r > top, top, r)
    r = tl.where(r < -top - 1.0, -top - 1.0, r)
    tl.store(y + at, r * eps, inside)
    outside = (v > top) | (v < -top - 1.0)
    tl.store(counts + program, tl.sum(tl.where(outside & inside, 1, 0)).to(tl.int64))
    magnitude = tl.abs(given)
    tl.store(sizes + program, tl.max(tl.where(magnitude >= 0, magnitude, 0.0)))


def fixed_point(
    x: Tensor, y: Tensor, word: int, fraction: int, key: int, stochastic: bool
) -> tuple[Tensor, Tensor]:
    """Fill float32 ``y`` with float32 ``x`` rounded; both `dense` with the same strides. Return (saturated, largest)."""
    n, block = x.numel(), 1024
    programs = triton.cdiv(n, block)
    counts, sizes = x.new_empty(programs, dtype=torch.int64), x.new_empty(programs)
    if not n:
        return counts.sum(), x.new_zeros(())
    other = key ^ SECOND
    _kernel[(programs,)](
        x, y, counts, sizes, n, 2.0**fraction, 2.0**-fraction, 2.0 ** (word - 1) - 1, key & 0xFFFFFFFF, key >> 32,
        other & 0xFFFFFFFF, other >> 32, STOCHASTIC=stochastic, BLOCK=block,
    )  # fmt: skip
    return counts.sum(), sizes.max()
