"""Which (L, H) a layer may use, what each costs and errs, and the ladder from the coarsest to the finest.

The cost is in multiply-adds relative to the three dense products. With T the taps that share one clustering (kh * kw
where pixels' pieces are clustered, 1 where those of the unfolded input are) and a the cost of one add in the gather:

    rho = ( H / (T M) + 3 r_c + 2 a / L + 2 / (T M) ) / 3 + overhead / M

The last term is ours: what reading, laying out and writing the tensors costs beside the arithmetic. Where
some products stay dense, both costs are those of the others: r_c and a / L count once for each of their passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

PRODUCTS = ("output", "grad_input", "grad_weight")


class Rung(NamedTuple):
    """A setting of one layer: L, the length of a piece, and H, the bits of its hash. (0, 0) is the dense layer."""

    length: int
    bits: int


DENSE = Rung(0, 0)


@dataclass(frozen=True)
class Measured:
    """A rung with what one batch showed: remaining ratio r_c, relative error of the output, and predicted cost rho."""

    rung: Rung
    remaining: float
    error: float
    rho: float

    def row(self) -> list[float]:
        """Return the values as plain numbers, for a checkpoint."""
        return [self.rung.length, self.rung.bits, self.remaining, self.error, self.rho]

    @classmethod
    def of_row(cls, row: Sequence[float]) -> Measured:
        """Take back what `row` gave."""
        return cls(Rung(int(row[0]), int(row[1])), row[2], row[3], row[4])


def rho(
    rung: Rung,
    outputs: int,
    remaining: float,
    a: float,
    taps: int = 1,
    overhead: float = 0.0,
    reused: Sequence[str] = PRODUCTS,
) -> float:
    """Return the predicted cost of ``reused`` over that of the same products when dense (multiply-adds: derived).

    reused: those of `PRODUCTS` that are computed from clusters; "output" is one of them.
    """
    gathers = 1 + (len(reused) > 1)  # the sums of grad_output serve both gradients
    passes = 1 + ("grad_input" in reused)
    adds = (rung.bits + passes) / (taps * outputs) + len(reused) * remaining + gathers * a / rung.length
    return adds / len(reused) + overhead / outputs


def divisors(n: int) -> list[int]:
    """Return the divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def candidates(
    width: int, multiple: int, lengths: Sequence[int], bits: Sequence[int], outputs: int
) -> list[Rung]:
    """Return the rungs to measure: L among ``lengths``, or the divisors of ``width`` that are multiples of ``multiple``.

    A hash with as many bits as there are outputs alone costs a dense pass, so H < ``outputs``.
    """
    able = [d for d in divisors(width) if (d in lengths if lengths else d % multiple == 0)]
    return [Rung(length, h) for length in able for h in bits if h < outputs]


def ladder(measured: Sequence[Measured], max_rho: float, max_error: float = math.inf) -> list[Measured]:
    """Return the Pareto front of cost and error, the largest error first.

    Left out: predicted costs from ``max_rho`` on, which a dense layer beats, and errors above ``max_error``.
    """
    front: list[Measured] = []
    for m in sorted(measured, key=lambda m: (m.rho, m.error)):
        if m.rho < max_rho and m.error <= max_error and (not front or m.error < front[-1].error):
            front.append(m)
    return front


def step_finer(front: Sequence[Measured], error: float, left: int) -> Rung:
    """Return the next rung of ``front`` with an error below the present one's, or dense.

    left: how many rungs may still come before the dense one; the finer ones are spread evenly over them.
    """
    finer = [m for m in front if m.error < error]
    if left < 1 or not finer:
        return DENSE
    return finer[math.ceil(len(finer) / left) - 1].rung
