"""Thresholds of stochastic gradient pruning: from the mean magnitude, from a sample, and predicted from past batches.

Symbols: p, target share of elements below the threshold; tau, the threshold; t = tau / sigma.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from hasten import keyed

SAMPLES = 4096


def sigma(mean_size: float) -> float:
    """Return the standard deviation of a normal distribution about 0 whose mean magnitude is ``mean_size``."""
    return math.sqrt(math.pi / 2) * mean_size


def normal_level(p: float) -> float:
    """Return t: the share p of a standard normal distribution lies within -t .. t (from the paper)."""
    return NormalDist().inv_cdf((1 + p) / 2) if p > 0 else 0.0


def threshold(p: float, mean_size: float) -> float:
    """Return tau for gradients of this mean magnitude, taken as normal (from the paper)."""
    return normal_level(p) * sigma(mean_size)


def expected_density(p: float) -> float:
    """Return the share of non-zeros that pruning at p leaves of normal data (closed form; no zeros before)."""
    t = normal_level(p)
    return (1 - p) + math.sqrt(2 / math.pi) / t * (1 - math.exp(-t * t / 2)) if t > 0 else 1.0


def added_variance(p: float) -> float:
    """Return the variance that pruning at p adds to normal data, in units of sigma**2 (closed form)."""
    t = normal_level(p)
    root = math.sqrt(2 / math.pi)
    return t * root * (1 - math.exp(-t * t / 2)) - (p - root * t * math.exp(-t * t / 2))


def norm_level(p: float, m: int) -> float:
    """Return the p-quantile of the norm of m independent standard normals over its mean; for blocks (our choice)."""
    if p <= 0:
        return 0.0
    half = torch.tensor(m / 2, dtype=torch.float64)
    low, high = 0.0, m + 40 * math.sqrt(m) + 80.0  # of the squared norm / 2
    for _ in range(200):
        middle = (low + high) / 2
        if float(torch.special.gammainc(half, torch.tensor(middle, dtype=torch.float64))) < p:
            low = middle
        else:
            high = middle
    mean = math.sqrt(2) * math.exp(math.lgamma((m + 1) / 2) - math.lgamma(m / 2))
    return math.sqrt(2 * high) / mean


def quantile(sizes: Tensor, p: float, *key: keyed.Key) -> float:
    """Return the p-quantile of ``sizes`` (any shape, not negative) from 4096 of them drawn by ``key`` (our choice)."""
    line = sizes.as_strided((sizes.numel(),), (1,))
    if line.numel() > SAMPLES:
        draw = torch.randint(line.numel(), (SAMPLES,), generator=keyed.generator(*key))
        line = line[draw.to(line.device)]
    rank = min(line.numel(), max(1, math.ceil(p * line.numel())))
    return float(line.float().abs().kthvalue(rank).values)


def predicted(past: list[float], n_f: int) -> float | None:
    """Return the threshold for the next batch: the mean of the last ``n_f``; None while there are fewer (from the paper)."""
    return math.fsum(past[-n_f:]) / n_f if len(past) >= n_f else None


def pushed(past: list[float], tau: float, n_f: int) -> list[float]:
    """Return the thresholds to remember: ``past`` and tau, the last ``n_f``; one that is not finite is left out."""
    return [*past, tau][-n_f:] if math.isfinite(tau) else past
