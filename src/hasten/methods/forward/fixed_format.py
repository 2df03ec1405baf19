"""The number format <IL, FL> and Convert, the rounding of a tensor to it, with its straight-through gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.kernels.fixed_point import MOST_BITS, fixed_point

ROUNDINGS = ("stochastic", "nearest")


class Format(NamedTuple):
    """IL integer bits, the sign among them, and FL fraction bits (Gupta et al. 2015, section 3; from the paper)."""

    il: int
    fl: int

    @property
    def wl(self) -> int:
        """The word length IL + FL."""
        return self.il + self.fl

    @property
    def eps(self) -> float:
        """The distance of two neighbours, 2**-FL."""
        return 2.0**-self.fl

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number, -2**(IL-1) and 2**(IL-1) - eps."""
        return -(2.0 ** (self.il - 1)), 2.0 ** (self.il - 1) - self.eps

    def moved(self, bits: int) -> Format:
        """Return the format of numbers 2**bits times as small, the word as long as before."""
        return Format(self.il - bits, self.fl + bits)

    def __str__(self) -> str:
        return f"<{self.il},{self.fl}>"


def format_problems(name: str, value: Any) -> list[str]:
    """Return what is wrong with a setting that should be (IL, FL)."""
    if not (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(type(bits) is int for bits in value)
    ):
        return [f"{name} is {value!r}; allowed: (IL, FL), two whole numbers such as (2, 14)."]
    il, fl = value
    found = []
    if il < 1:
        found.append(f"{name} has IL={il}; allowed: from 1, for the sign takes a bit.")
    if fl < 0:
        found.append(f"{name} has FL={fl}; allowed: from 0.")
    if il + fl > MOST_BITS:
        found.append(
            f"{name} has a word of IL + FL = {il + fl} bits; allowed: up to {MOST_BITS}, because fixed point is emulated "
            f"on float32, whose mantissa of {MOST_BITS} bits cannot represent a finer grid."
        )
    return found


def convert(x: Tensor, form: Format, key: int, rounding: str = "stochastic") -> tuple[Tensor, Tensor, Tensor]:
    """Return (Convert(x, <IL, FL>), elements outside the range int64 (), largest magnitude float32 ()).

    x: float32, any shape. key: of the random bits, as of `hasten.keyed.key64`. Ties of "nearest" go up (our choice).
    Infinities become the ends of the range; NaN stays. Raises UnsupportedError for another dtype.
    """
    y, saturated, largest = fixed_point(x.detach(), form.wl, form.fl, key, rounding == "stochastic")
    return y, saturated, largest


class StraightThrough(torch.autograd.Function):
    """Convert whose gradient is 1 inside the range and 0 where the number saturated (recommended by the specification).

    ``StraightThrough.apply(x, form, key, rounding, seen)``; seen(n, saturated, largest) is told what was met.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, form, key, rounding, seen = args
        y, saturated, largest = convert(x, form, key, rounding)
        seen(x.numel(), saturated, largest)
        # without saturation, the usual case, nothing needs to be kept
        low, high = form.ends
        ctx.outside = (x < low) | (x > high) if ctx.needs_input_grad[0] and saturated else None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0] if ctx.outside is None else grads[0].masked_fill(ctx.outside, 0.0)
        return grad, None, None, None, None
