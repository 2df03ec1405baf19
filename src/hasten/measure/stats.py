"""The statistics behind every claim: paired speedups, non-inferior accuracy.

Convention: ``a`` is the baseline, ``b`` the candidate, so a speedup above 1 means that ``b`` takes less time.
scipy is imported inside the functions, so that importing hasten stays quick.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hasten.errors import SettingsError
from hasten.keyed import key64
from hasten.measure.verdict import Difference, Ratio

Floats = NDArray[np.float64]

EXACT_UP_TO = 12
"""Largest n for which all 2**n sign flips are enumerated."""

WELL_COVERED = 8
"""Blocks from which the protocol's t interval is used without a mark."""


def t_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided t interval of the mean of ``values``, shape (n,); infinite for n = 1.

    Raises:
        SettingsError: no values, a value is not finite, or ``confidence`` is outside (0, 1).
    """
    from scipy.special import stdtrit

    x = _finite("values", values)
    _check_confidence(confidence)
    if len(x) < 2:
        return -math.inf, math.inf
    half = float(stdtrit(len(x) - 1, 0.5 + confidence / 2)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def bca_interval(
    values: ArrayLike, confidence: float = 0.95, *, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Return the BCa bootstrap interval of the mean (Efron 1987); infinite for n = 1.

    BCa: bias-corrected and accelerated. ``values`` has shape (n,). Draws are keyed by ``seed``.

    Raises:
        SettingsError: as in :func:`t_interval`.
    """
    from scipy.special import ndtr, ndtri

    x = _finite("values", values)
    _check_confidence(confidence)
    n = len(x)
    if n < 2:
        return -math.inf, math.inf
    mean = float(x.mean())
    centred = x - mean
    # Jackknife means are mean - centred / (n - 1); the acceleration follows from their skewness.
    squares = float((centred**2).sum())
    if squares <= (1e-15 * abs(mean)) ** 2 * n:
        return mean, mean
    acceleration = float((centred**3).sum()) / (6.0 * squares**1.5)
    rng = np.random.Generator(np.random.Philox(key64(seed, "bca", n)))
    means = x[rng.integers(0, n, size=(resamples, n))].mean(axis=1)
    below = (float((means < mean).mean()) + float((means <= mean).mean())) / 2
    bias = float(ndtri(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples)))
    tails = bias + ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    levels = ndtr(bias + tails / (1 - acceleration * tails))
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def sign_flip_p(differences: ArrayLike, *, resamples: int = 9999, seed: int = 0) -> float:
    """Return the two-sided p of the sign-flip permutation test that ``differences``, shape (n,), centre on 0.

    Exact for n <= 12; above that from ``resamples`` random flips keyed by ``seed``, the observed one
    included.
    """
    d = _finite("differences", differences)
    observed = abs(float(d.sum()))
    tolerance = 1e-12 * float(np.abs(d).sum())
    if len(d) <= EXACT_UP_TO:
        # The first sign may stay fixed: the statistic is symmetric, so half of the flips decide.
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(d) - 1)))
        signs = signs.reshape(2 ** (len(d) - 1), len(d) - 1)
        sums = np.abs(d[0] + signs @ d[1:])
        return float((sums >= observed - tolerance).mean())
    rng = np.random.Generator(np.random.Philox(key64(seed, "sign flip", len(d))))
    flips = rng.integers(0, 2, size=(resamples, len(d))) * 2.0 - 1.0
    extreme = int((np.abs(flips @ d) >= observed - tolerance).sum())
    return (extreme + 1) / (resamples + 1)


def speedup(
    a_seconds: ArrayLike,
    b_seconds: ArrayLike,
    *,
    confidence: float = 0.95,
    interval: Literal["t", "bca"] = "t",
    seed: int = 0,
) -> Ratio:
    """Return the speedup of ``b`` over the baseline ``a`` from paired blocks; both shape (n,), in seconds.

    d = log(a / b) per block; the speedup is exp(mean d), its interval by t on d. For n < 8 the t interval is
    reported too, marked ``small_n`` (our choice: with so few blocks a bootstrap sees at most a handful of
    distinct values and its interval is too short, BCa included, while t pays for n by its wide quantiles).
    One block has no interval and shows nothing. ``interval="bca"`` asks for the bootstrap instead.

    Raises:
        SettingsError: the lists differ in length, are empty, or hold a time that is not a positive finite
        number.
    """
    a, b = _finite("a_seconds", a_seconds), _finite("b_seconds", b_seconds)
    if len(a) != len(b):
        raise SettingsError(f"speedup needs one time of each arm per block; got {len(a)} and {len(b)} times.")
    if min(a.min(), b.min()) <= 0:
        raise SettingsError("speedup needs times above 0 s; got " + str(float(min(a.min(), b.min()))) + ".")
    if interval not in ("t", "bca"):
        raise SettingsError(f"interval must be 't' or 'bca', got {interval!r}.")
    d = np.log(a / b)
    n = len(d)
    bounds = t_interval(d, confidence) if interval == "t" else bca_interval(d, confidence, seed=seed)
    return Ratio(
        ratio=math.exp(float(d.mean())),
        low=math.exp(bounds[0]) if n > 1 else 0.0,
        high=_exp(bounds[1]),
        p=sign_flip_p(d, seed=seed),
        median=math.exp(float(np.median(d))),
        n=n,
        s=float(d.std(ddof=1)) if n > 1 else math.nan,
        small_n=n < WELL_COVERED,
        interval=interval if n > 1 else "none",
        confidence=confidence,
    )


def blocks_needed(s: float, speedup: float) -> int:
    """Return the blocks that show ``speedup`` with 80% power if d has sd ``s``: (2.8 s / ln speedup)^2 + 2.

    Never less than 5. Works for slowdowns as well.

    Raises:
        SettingsError: ``s`` is negative, or ``speedup`` is not positive or exactly 1 (no number of blocks
        shows it).
    """
    if not (s >= 0 and math.isfinite(s)) or not (speedup > 0 and math.isfinite(speedup)) or speedup == 1:
        raise SettingsError(f"need s >= 0 and a speedup above 0 other than 1; got s={s}, speedup={speedup}.")
    # The small slack keeps floating-point dust from asking for one block more.
    return max(5, math.ceil((2.8 * s / math.log(speedup)) ** 2 + 2 - 1e-9))


def noninferior(
    acc_a: ArrayLike, acc_b: ArrayLike, margin: float = 0.3, *, confidence: float = 0.95
) -> Difference:
    """Return whether candidate ``b`` loses less than ``margin`` points against ``a`` (Welch, one-sided).

    Accuracies are in points (0 to 100), one per seed; the arms need not have the same number of seeds. With
    fewer than two runs in an arm there is no bound and nothing is shown.

    Raises:
        SettingsError: all accuracies look like fractions of 1, or the margin is negative.
    """
    from scipy.special import stdtrit

    a, b = _finite("acc_a", acc_a), _finite("acc_b", acc_b)
    _check_confidence(confidence)
    if margin < 0:
        raise SettingsError(f"margin must be >= 0 points, got {margin}.")
    if max(a.max(), b.max()) <= 1.0:
        raise SettingsError(
            f"accuracies look like fractions (largest {max(a.max(), b.max()):g}); give points, 0-100."
        )
    mean = float(b.mean() - a.mean())
    lower = -math.inf
    if min(len(a), len(b)) >= 2:
        va, vb = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
        lower = mean
        if va + vb > 0:
            df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
            lower = mean - float(stdtrit(df, confidence)) * math.sqrt(va + vb)
    return Difference(mean, lower, margin, len(a), len(b), confidence)


def welch_half_width(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> float:
    """Return half the width of the two-sided interval of the difference of two means (Welch); infinite for n = 1.

    Raises:
        SettingsError: as in :func:`t_interval`.
    """
    from scipy.special import stdtrit

    x, y = _finite("a", a), _finite("b", b)
    _check_confidence(confidence)
    if min(len(x), len(y)) < 2:
        return math.inf
    parts = [(float(v.var(ddof=1)) / len(v), len(v) - 1) for v in (x, y)]
    total = sum(part for part, _ in parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(part**2 / n for part, n in parts)
    return float(stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(total)


def geometric_mean(values: ArrayLike) -> float:
    """Return the geometric mean of positive ``values``, for speedups over several workloads.

    Raises:
        SettingsError: a value is not positive and finite.
    """
    x = _finite("values", values)
    if x.min() <= 0:
        raise SettingsError(f"geometric_mean needs values above 0, got {float(x.min())}.")
    return math.exp(float(np.log(x).mean()))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700.0 else math.inf


def _finite(name: str, values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise SettingsError(f"{name} must be a non-empty list of finite numbers, got {values!r}.")
    return x


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise SettingsError(f"confidence must lie between 0 and 1, got {confidence}.")
