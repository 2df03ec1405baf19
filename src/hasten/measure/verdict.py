"""What a measurement lets us say: ratios and differences with their intervals, in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["faster", "slower", "not shown"]


def verdict_of(low: float, high: float) -> Verdict:
    """Return the claim a speedup interval allows: "faster" only above 1, "slower" only below 1."""
    if low > 1.0:
        return "faster"
    if high < 1.0:
        return "slower"
    return "not shown"


def ratio_text(ratio: float, low: float, high: float) -> str:
    """Return e.g. ``1.04x [0.98, 1.10]: not shown``, with more digits where two would hide the side of 1."""
    verdict = verdict_of(low, high)
    edge = low if verdict == "faster" else high
    digits = 2
    while verdict != "not shown" and digits < 6 and round(edge, digits) == 1.0:
        digits += 1
    if not (math.isfinite(low) or math.isfinite(high)) or (low == 0.0 and math.isinf(high)):
        return f"{ratio:.{digits}f}x [no interval]: {verdict}"
    return f"{ratio:.{digits}f}x [{low:.{digits}f}, {high:.{digits}f}]: {verdict}"


@dataclass(frozen=True)
class Ratio:
    """A paired speedup: ``ratio`` = exp(mean d), d = log(baseline / candidate) per block. Above 1 is faster.

    ``low`` and ``high`` bound it with the stated ``confidence``, ``p`` is the two-sided sign-flip permutation
    p, ``median`` is exp(median d), ``n`` the blocks, ``s`` the sd of d, ``interval`` how the bounds were made
    ("t", "bca" or "none"). ``small_n`` marks n < 8, where the interval leans on d being normal.
    """

    ratio: float
    low: float
    high: float
    p: float
    median: float
    n: int
    s: float
    small_n: bool
    interval: Literal["t", "bca", "none"]
    confidence: float

    @property
    def verdict(self) -> Verdict:
        """The claim this interval allows."""
        return verdict_of(self.low, self.high)

    def text(self) -> str:
        """Return e.g. ``1.04x [0.98, 1.10]: not shown``."""
        return ratio_text(self.ratio, self.low, self.high)

    def to_json(self) -> dict[str, object]:
        """Return every field and the verdict; ends that do not exist are None."""
        values: dict[str, object] = dict(asdict(self), verdict=self.verdict, text=self.text())
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


@dataclass(frozen=True)
class Difference:
    """An accuracy difference in points, candidate minus baseline, with its one-sided lower bound.

    "no loss" is claimed only if ``lower`` exceeds ``-margin``.
    """

    mean: float
    lower: float
    margin: float
    n_baseline: int
    n_candidate: int
    confidence: float

    @property
    def no_loss(self) -> bool:
        """True if the candidate is shown to lose less than the margin."""
        return self.lower > -self.margin

    def text(self) -> str:
        """Return e.g. ``-0.05 points, lower 95% bound -0.21: no loss (margin 0.3)``."""
        bound = f"{self.lower:+.2f}" if math.isfinite(self.lower) else "none (needs 2 runs in each arm)"
        claim = "no loss" if self.no_loss else "no loss not shown"
        shown = f"{self.mean:+.2f} points, lower {self.confidence:.0%} bound {bound}"
        return f"{shown}: {claim} (margin {self.margin:g})"
