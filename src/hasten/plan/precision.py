"""Formulas of time under narrow number formats and precision schedules (limited_precision.md, section 11; all derived here).

They speak of hardware that has the narrow arithmetic. An emulated format has none of these gains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hasten.errors import SettingsError


def bytes_per_element(bits: int) -> float:
    """Return beta_b, the bytes of an element of ``bits`` bits, packed without gaps."""
    _positive(bits=bits)
    return bits / 8


def rate_of_bits(rate_32: float, bits: int, gamma: float = 1.0) -> float:
    """Return R(b) = R(32) (32 / b)**gamma, operations a second on hypothetical hardware for b-bit operands.

    gamma=1: vector lanes packed twice as dense at half the width. gamma=2: multiplier arrays, whose cost grows with the
    product of both widths. Raises SettingsError for numbers that are not positive, and a negative gamma.
    """
    _positive(rate_32=rate_32, bits=bits)
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise SettingsError(f"gamma must be a finite number from 0 (1: lanes, 2: multipliers), not {gamma}.")
    return float(rate_32 * (32 / bits) ** gamma)


def schedule_seconds(phases: Sequence[tuple[float, float]]) -> float:
    """Return T_total = sum of E_i * T_epoch(p_i), for phases (epochs, seconds an epoch). Raises SettingsError for negative numbers."""
    for epochs, seconds in phases:
        if not (epochs >= 0 and seconds >= 0):
            raise SettingsError(
                f"a phase is (epochs, seconds an epoch), both 0 or more, not {(epochs, seconds)}."
            )
    return sum(epochs * seconds for epochs, seconds in phases)


def schedule_speedup(low_share: float, ratio: float) -> float:
    """Return 1 / (1 - u (1 - q)): the speed-up of a schedule with the share u of its epochs at low precision.

    low_share: u in [0, 1]. ratio: q = T_low / T_high of an epoch. Raises SettingsError outside.
    """
    if not 0 <= low_share <= 1:
        raise SettingsError(f"low_share must lie in [0, 1], not {low_share}.")
    _positive(ratio=ratio)
    return 1 / (1 - low_share * (1 - ratio))


def break_even_epochs(low_epochs: float, low_seconds: float, high_seconds: float) -> float:
    """Return how many more epochs at high precision a phase at low precision may cost and still pay.

    Low precision pays if and only if dE * T_high < E_low (T_high - T_low); this is the dE of equality, negative where
    low precision is the slower. Raises SettingsError for numbers that are not positive.
    """
    _positive(low_epochs=low_epochs, low_seconds=low_seconds, high_seconds=high_seconds)
    return low_epochs * (high_seconds - low_seconds) / high_seconds


def amdahl(share: float, ratio: float) -> float:
    """Return the gain of a step, 1 / (1 - s (1 - 1/r)), whose part s of the time is r times as fast (the ceiling statement)."""
    if not 0 <= share <= 1:
        raise SettingsError(f"share must lie in [0, 1], not {share}.")
    _positive(ratio=ratio)
    return 1 / (1 - share * (1 - 1 / ratio))


def solver_seconds(n: int, refinements: int, narrow_rate: float | None, wide_rate: float) -> float:
    """Return the time to solve n equations: (2/3) n^3 narrow, then each refinement 2 n^2 narrow and 2 n^2 wide.

    narrow_rate, wide_rate: operations a second; narrow_rate None solves in the wide format without refinement. Training
    is alike: convolutions are the n^3 part, master weights, batch norm and loss the n^2 part. It does not hold where the
    condition number times the narrow unit roundoff reaches 1 (from the paper: Baboulin et al. 2008).
    """
    _positive(n=n, wide_rate=wide_rate)
    if narrow_rate is None:
        return 2 / 3 * n**3 / wide_rate
    _positive(narrow_rate=narrow_rate)
    square = 2 * n**2
    return 2 / 3 * n**3 / narrow_rate + refinements * (square / wide_rate + square / narrow_rate)


def _positive(**numbers: float) -> None:
    bad = [
        f"{name} (={value})" for name, value in numbers.items() if not (value > 0 and math.isfinite(value))
    ]
    if bad:
        raise SettingsError(f"{', '.join(bad)} must be positive and finite.")
