"""Building inline SVG: one tag function that escapes all it is given, scales and tick marks.

Colours and fonts are classes of the style sheet, never attributes here, so that a page's scheme can change
them and a strict Content-Security-Policy holds. A chart is drawn twice, for wide screens and for phones: text
in a scaled-down drawing cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

from hasten.report.schema import Arm
from hasten.report.words import visible

PALETTE = 6
"""Number of colours for methods and stacks in the style sheet; after that they repeat, dashed."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Return one element. Attribute names lose a final ``_`` and use ``-`` for ``_``; None leaves one out.

    Children and values are escaped unless they are Markup already; floats are written with two decimals.
    """
    parts = [Markup("<"), Markup(name)]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else visible(value)
            parts += [
                Markup(" "),
                Markup(key.rstrip("_").replace("_", "-")),
                Markup('="'),
                escape(text),
                Markup('"'),
            ]
    inner = Markup("").join(
        child if isinstance(child, Markup) else escape(visible(child)) for child in children
    )
    return Markup("").join([*parts, Markup(">"), inner, Markup("</"), Markup(name), Markup(">")])


def drawing(
    width: float, height: float, shape: str, label: str, children: Iterable[object], **more: object
) -> Markup:
    """Return an ``<svg>`` of class ``shape`` ("wide" or "narrow") that says ``label`` to a screen reader."""
    box = f"0 0 {width:.0f} {height:.0f}"
    return tag("svg", *children, class_=shape, viewBox=box, role="img", aria_label=label, **more)


def path(points: Iterable[tuple[float, float]], class_: str) -> Markup:
    """Return an open polyline."""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def series(arms: list[Arm]) -> dict[str, str]:
    """Return the colour class of each arm by name: grey and black for baselines, the palette for the rest."""
    fixed = {"baseline": "s-plain", "strong": "s-strong"}
    classes, used = {}, 0
    for arm in arms:
        colour = fixed.pop(arm["kind"], None)
        if colour is None:
            colour = f"s{used % PALETTE}" + (" again" if used >= PALETTE else "")
            used += 1
        classes[arm["name"]] = colour
    return classes


def text_width(text: str, size: float = 12.0) -> float:
    """Return a generous guess of the width of ``text`` in the page's font, in the units of ``size``."""
    return sum(0.95 if ord(char) > 0x2E80 else 0.58 for char in text) * size


@dataclass(frozen=True)
class Scale:
    """A straight map from [low, high] to pixels [start, end], after ``through`` (identity or a logarithm)."""

    low: float
    high: float
    start: float
    end: float
    through: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        low, high = self.through(self.low), self.through(self.high)
        share = (self.through(value) - low) / (high - low) if high != low else 0.5
        return self.start + share * (self.end - self.start)


def even_ticks(high: float, count: int) -> list[float]:
    """Return 0 and about ``count`` even steps of 1, 2 or 5 times a power of ten up to ``high``."""
    if high <= 0:
        return [0.0]
    raw = high / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= raw * 0.999)
    return [i * step for i in range(math.floor(high / step * 1.0001) + 1)]


def spaced(candidates: Iterable[float], place: Callable[[float], float], gap: float) -> list[float]:
    """Return those candidates, earlier ones first, whose pixels stay ``gap`` apart."""
    kept: list[float] = []
    for value in candidates:
        if all(abs(place(value) - place(other)) >= gap for other in kept):
            kept.append(value)
    return kept


def accuracy_ticks(low: float, high: float) -> list[float]:
    """Return accuracies to try as ticks from ``low`` to ``high``, coarse ones first, from the top down."""
    ticks: list[float] = []
    fine_enough = (high - low) / 15
    for step in (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001):
        if step < fine_enough:
            break
        top = math.floor(high / step + 1e-9)
        found = [round(k * step, 4) for k in range(top, max(math.ceil(low / step - 1e-9), top - 60) - 1, -1)]
        ticks += [value for value in found if value not in ticks]
    return ticks


_ROUND = (
    1,
    10,
    60,
    600,
    3600,
    36000,
    2,
    5,
    20,
    30,
    120,
    300,
    1200,
    1800,
    7200,
    18000,
    3,
    15,
    40,
    90,
    180,
    900,
    2700,
)


def time_ticks(low: float, high: float) -> list[float]:
    """Return seconds to try as ticks from ``low`` to ``high``: round in s, min and h first, then ever finer ones."""
    ticks = [float(value) for value in _ROUND if low <= value <= high]
    for digits in ((1,), (2, 5), (3, 4, 6, 8), (7, 9)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        fine = (digit * 10.0**power for power in powers for digit in digits)
        ticks += [value for value in fine if low <= value <= high and value not in ticks]
    if len(ticks) < 3:
        ticks += [low + (high - low) * part / 4 for part in range(1, 4)]
    return ticks
