"""Stochastic rounding of float32 to bfloat16, in Triton. Not yet measured on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.gpu.noise import noise16


@triton.jit
def _kernel(x, y, n, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    bits = tl.load(x + at, inside, other=0.0).to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    total = tl.minimum(size + noise16(low.to(tl.uint32), high.to(tl.uint32), at), 0x7F7F0000)
    kept = tl.where(size > 0x7F800000, size | 0x400000, size)
    total = tl.where(size >= 0x7F800000, kept, total) | (bits & 0x80000000)
    tl.store(y + at, (total >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), inside)


def round_bfloat16(x: Tensor, y: Tensor, key: int) -> None:
    """Fill bfloat16 ``y`` with float32 ``x`` rounded; both `dense` with the same strides."""
    n, block = x.numel(), 1024
    _kernel[(triton.cdiv(n, block),)](x, y, n, key & 0xFFFFFFFF, key >> 32, BLOCK=block)
