"""Keyed random bits: a pure function of (key, position), the same in torch, C++ and Triton.

Word i is two rounds of a 32-bit mixing function (our choice: shifts 16, 15, 16 and multipliers 0x7feb352d, 0x846ca68b)
of i, each after adding one half of the key. An element takes 16 bits: elements come in blocks of 32, and words
16 b .. 16 b + 15 serve block b, their low halves its first 16 elements and their high halves its last 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Mix 32-bit numbers, held as int64; products of 32-bit numbers may wrap around, their low halves stay right."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def noise_words(key: int, i: Tensor) -> Tensor:
    """Return the 32-bit words at positions ``i`` (int64) as int64 in [0, 2**32)."""
    low, high = key & _LOW, (key >> 32) & _LOW
    return _mix((_mix((i + low) & _LOW) + high + (i >> 32)) & _LOW)


def noise16(key: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Return 16 random bits for each of elements 0 .. n-1, as int64 (n,) in [0, 65536)."""
    words = noise_words(key, torch.arange(-(-n // 32) * 16, device=device)).view(-1, 1, 16)
    return torch.cat([words & 0xFFFF, words >> 16], 1).flatten()[:n]
