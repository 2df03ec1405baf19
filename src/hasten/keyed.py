"""Randomness keyed by what it is for, never by what ran before.

Every draw hasten makes is a pure function of a key such as (seed, epoch, place) or, vectorised, of
(seed, epoch, sample, place). A resumed run therefore draws what the uninterrupted one would have drawn, without
replaying anything, and no draw touches PyTorch's or NumPy's global generators.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

Key = int | str


def key64(*key: Key) -> int:
    """Return a 63-bit integer that depends on every part of ``key``, the same on every machine and run."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded by ``key``."""
    return torch.Generator(device=device).manual_seed(key64(*key))


def permutation(n: int, *key: Key) -> NDArray[np.int64]:
    """Return a random order of ``range(n)`` that depends on ``key`` alone."""
    return np.random.Generator(np.random.Philox(key64(*key))).permutation(n)


def uniform(samples: NDArray[np.int64], draws: int, *key: Key) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), shape (len(samples), draws): a pure function of (key, sample, draw).

    Each number is the SplitMix64 finaliser (Steele, Lea, Flood 2014) of a counter, so any subset of samples in any
    order gives the same numbers for the same sample.
    """
    with np.errstate(over="ignore"):
        draw = np.arange(draws, dtype=np.uint64)
        counter: NDArray[np.uint64] = np.add.outer(
            np.multiply(samples.astype(np.uint64), np.uint64(draws)), draw
        )
        z: NDArray[np.uint64] = (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            key64(*key)
        )
        z = (z ^ np.right_shift(z, 30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ np.right_shift(z, 27)) * np.uint64(0x94D049BB133111EB)
        z = z ^ np.right_shift(z, 31)
    return np.right_shift(z, 11).astype(np.float64) * 2.0**-53
