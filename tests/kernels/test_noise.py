"""The keyed noise: uniform, independent of its key's past, the same as its definition word by word."""

from __future__ import annotations

import torch

from hasten.kernels.reference.noise import noise16, noise_words

LOW = 0xFFFFFFFF


def by_hand(key: int, i: int) -> int:
    """The definition, with Python's integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & LOW
        x ^= x >> 15
        x = x * 0x846CA68B & LOW
        return x ^ x >> 16

    return mix((mix((i + key) & LOW) + (key >> 32) + (i >> 32)) & LOW)


def test_words_follow_the_definition() -> None:
    positions = [0, 1, 15, 16, 2**31, 2**32 - 1, 2**32, 2**40 + 5]
    for key in (0, 1, 2**62 + 12345, 2**63 - 1, 0xFFFFFFFF):
        got = noise_words(key, torch.tensor(positions)).tolist()
        assert got == [by_hand(key, i) for i in positions]


def test_each_element_has_its_own_half_of_a_word() -> None:
    bits = noise16(987654321987, 77).tolist()
    for e, got in enumerate(bits):
        word = by_hand(987654321987, e // 32 * 16 + e % 16)
        assert got == (word & 0xFFFF if e % 32 < 16 else word >> 16)


def test_uniform_and_uncorrelated() -> None:
    n = 1 << 20
    a, b = noise16(1, n).double(), noise16(2, n).double()
    for values in (a, b):
        counts = torch.bincount((values / 1024).long(), minlength=64).double()
        chi2 = ((counts - n / 64) ** 2 / (n / 64)).sum().item()
        assert chi2 < 63 + 5 * (2 * 63) ** 0.5
    unit = [(v - v.mean()) / v.std() for v in (a, b)]
    for x, y in (
        (unit[0], unit[1]),
        (unit[0][1:], unit[0][:-1]),
        (unit[0][16:], unit[0][:-16]),
        (unit[0][32:], unit[1][:-32]),
    ):
        assert abs((x * y).mean().item()) < 5 / n**0.5
