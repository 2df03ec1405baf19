"""The keyed random bits of ``hasten.kernels.reference.noise``, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """Mix 32-bit words."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise16(low, high, element):
    """Return the 16 random bits of each ``element`` (int64) under the key's halves (uint32)."""
    block, at = element // 32, element % 32
    i = block * 16 + at % 16
    word = mix(mix(i.to(tl.uint32) + low) + high + (i >> 32).to(tl.uint32))
    return tl.where(at < 16, word & 0xFFFF, word >> 16)
