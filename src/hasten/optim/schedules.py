"""Learning-rate schedules as pure functions of progress: 0 at the first step, 1 at the end of training.

Because they see progress and not steps, a shorter budget rescales every milestone by itself, and nothing has
to be stored in a checkpoint but the step. Every schedule in ``BY_NAME`` takes ``(progress, warmup)`` and
returns the factor of the peak learning rate; in the share ``warmup`` of the run the factor rises in a line
from ``START`` to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hasten import errors
from hasten.errors import SettingsError

Schedule = Callable[[float, float], float]

START = 0.2
"""Factor at the first step of a warm-up: the record recipe's. Zero would waste that step."""


def _after_warmup(progress: float, warmup: float) -> float | None:
    """Return the progress after the warm-up in [0, 1], or None while it lasts. Raises SettingsError."""
    if not 0 <= progress <= 1 or not 0 <= warmup < 1:
        raise SettingsError(
            f"schedule: progress (={progress}) must be in [0, 1], warmup (={warmup}) in [0, 1)"
        )
    return None if progress < warmup else (progress - warmup) / (1 - warmup)


def _rise(progress: float, warmup: float) -> float:
    return START + (1 - START) * progress / warmup


def constant(progress: float, warmup: float = 0.0) -> float:
    """Return 1 after the warm-up."""
    return _rise(progress, warmup) if _after_warmup(progress, warmup) is None else 1.0


def step(
    progress: float, warmup: float = 0.0, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1
) -> float:
    """Return gamma to the number of ``milestones`` reached, shares of the whole run (He et al. on CIFAR)."""
    if _after_warmup(progress, warmup) is None:
        return _rise(progress, warmup)
    return float(gamma ** sum(progress >= m for m in milestones))


def cosine(progress: float, warmup: float = 0.0, end: float = 0.0) -> float:
    """Return half a cosine from 1 after the warm-up to ``end``."""
    rest = _after_warmup(progress, warmup)
    if rest is None:
        return _rise(progress, warmup)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * rest))


def linear(progress: float, warmup: float = 0.0, end: float = 0.0) -> float:
    """Return a line from 1 after the warm-up to ``end``; with a warm-up this is the one-cycle schedule."""
    rest = _after_warmup(progress, warmup)
    return _rise(progress, warmup) if rest is None else 1 + (end - 1) * rest


def one_cycle(progress: float, warmup: float = 0.3) -> float:
    """Return the factor of PyTorch's OneCycleLR: from 1/25 up to 1 in the share ``warmup``, then down to 4e-6, by cosines."""
    rest = _after_warmup(progress, warmup)
    low, high, share = (1 / 25, 1.0, progress / warmup) if rest is None else (1.0, 1 / 25 / 1e4, rest)
    return high + (low - high) * 0.5 * (1 + math.cos(math.pi * share))


def record94(progress: float, warmup: float = 0.23) -> float:
    """Return airbench94's factor: 0.2 at the start, 1.0 at 23%, 0.07 at the end."""
    return linear(progress, warmup, end=0.07)


def record96(progress: float, warmup: float = 0.1) -> float:
    """Return airbench96's factor: 0.2 at the start, 1.0 at 10%, 0 at the end."""
    return linear(progress, warmup)


BY_NAME: dict[str, Schedule] = {"constant": constant, "step": step, "cosine": cosine, "linear": linear,
                                "one_cycle": one_cycle}  # fmt: skip


def schedule(name: str) -> Schedule:
    """Return the schedule of this name; raises UnknownName."""
    if name not in BY_NAME:
        raise errors.unknown("schedule", name, BY_NAME)
    return BY_NAME[name]
