"""Putting labels beside a drawing: names broken into lines, and moved apart as little as it takes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from hasten.measure.curve import isotonic
from hasten.report.svg import text_width
from hasten.report.words import shortened


def lines_of(text: str, room: float, size: float, most: int = 2) -> list[str]:
    """Return ``text`` in at most ``most`` lines no wider than ``room``, broken at spaces and after underscores."""
    lines: list[str] = []
    for word in re.findall(r"[^\s_]*_+|[^\s_]+|\s+", text):
        if lines and (text_width((lines[-1] + word).rstrip(), size) <= room or len(lines) == most):
            lines[-1] += word
        elif word.strip():
            lines.append(word)
    lines = [line.rstrip() for line in lines]
    fit = [
        line if text_width(line, size) <= room else shortened(line, max(int(room / size / 0.58), 3))
        for line in lines
    ]
    return fit or [""]


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Return the tops of boxes that begin at ``wanted``, moved so that none overlaps and all lie within [low, high].

    They keep the order of ``wanted``; together they move as little as possible in squares. Boxes that do not fit in
    there all run over its end.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    before = np.cumsum([0.0, *(heights[i] for i in order)])
    if not order:
        return []
    room = max(high - low - float(before[-1]), 0.0)
    free = isotonic([wanted[i] - b for i, b in zip(order, before[:-1], strict=True)], np.ones(len(order)))
    free = np.clip(free, low, low + room)
    tops = dict(zip(order, (free + before[:-1]).tolist(), strict=True))
    return [tops[i] for i in range(len(wanted))]
