"""One bit for each element, for ReLU and dropout, in Triton. Not yet measured on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # bytes of mask a program makes


@triton.jit
def _mask(x, y, mask, n, WITH_Y: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    at = byte[:, None] * 8 + bit[None, :]
    inside = at < n
    v = tl.load(x + at, inside, other=0.0)
    wide = v.to(tl.float32)
    kept = inside & ((wide > 0) | (wide != wide))
    if WITH_Y:
        tl.store(y + at, tl.where(kept, v, 0.0), inside)
    packed = tl.sum(kept.to(tl.int32) << bit[None, :], 1)
    tl.store(mask + byte, packed.to(tl.uint8), byte * 8 < n)


@triton.jit
def _apply(mask, g, y, n, scale, SCALED: tl.constexpr, BFLOAT16: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    at = byte[:, None] * 8 + bit[None, :]
    inside = at < n
    packed = tl.load(mask + byte, byte * 8 < n, other=0).to(tl.int32)
    kept = inside & (((packed[:, None] >> bit[None, :]) & 1) != 0)
    v = tl.load(g + at, kept, other=0.0)
    if SCALED:
        wide = tl.where(kept, v.to(tl.float32) * scale, 0.0)
        if BFLOAT16:  # to the nearest even, by hand, so that every form gives the same bits
            raw = wide.to(tl.uint32, bitcast=True)
            raw = tl.where(wide == wide, (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16, 0x7FC0)
            tl.store(y + at, raw.to(tl.uint16).to(tl.bfloat16, bitcast=True), inside)
        else:
            tl.store(y + at, wide.to(y.dtype.element_ty), inside)
    else:
        tl.store(y + at, tl.where(kept, v, 0.0), inside)


def bit_mask(x: Tensor, y: Tensor | None, mask: Tensor) -> None:
    """Fill ``mask`` with the bits of flat ``x``, and ``y``, which may be x, with its ReLU."""
    n = x.numel()
    if n:
        _mask[(triton.cdiv(n, 8 * BLOCK),)](
            x, x if y is None else y, mask, n, WITH_Y=y is not None, BYTES=BLOCK
        )


def masked(mask: Tensor, g: Tensor, y: Tensor, scale: float) -> None:
    """Fill flat ``y`` with ``scale * g`` where the bit is set, else 0."""
    n = g.numel()
    if n:
        bfloat16 = y.dtype == torch.bfloat16
        _apply[(triton.cdiv(n, 8 * BLOCK),)](
            mask, g, y, n, scale, SCALED=scale != 1.0, BFLOAT16=bfloat16, BYTES=BLOCK
        )
