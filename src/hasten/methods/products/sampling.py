"""Which terms of a sum to compute: the largest, or a random sample whose weighted sum is right on average.

Each function takes the scores w of the terms, float (n,), not negative, and returns tensors of the same device.
No function draws random numbers itself; the uniform numbers u in [0, 1) are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hasten.products import Selection

Scheme = Literal["topk", "crs", "bernoulli"]
SCHEMES = ("topk", "crs", "bernoulli")


def top(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores, sorted; of equal scores the first ones are taken."""
    return torch.sort(scores, descending=True, stable=True).indices[:k].sort().values


def explored(scores: Tensor, k: int, share: float, u: Tensor) -> Tensor:
    """Return scores of which `top` takes ``share * k`` random ones, on average, in the place of the smallest.

    A term outside the top is raised to infinity with the probability that makes this the mean. Channels that
    are never taken get no gradient and would stay small for ever.
    """
    n = scores.shape[0]
    if share == 0 or k == n:
        return scores
    return scores.masked_fill(u < min(0.5, share * k / (n - k)), torch.inf)


def crs_probabilities(scores: Tensor, epsilon: float) -> Tensor:
    """Return p, float64, proportional to the scores, mixed with the uniform: ``(1 - epsilon) p + epsilon / n``.

    Proportional p have the least error. Scores that are all 0 give the uniform distribution.
    """
    w = _positive(scores)
    return (1.0 - epsilon) * w / w.sum() + epsilon / w.shape[0]


def bernoulli_probabilities(scores: Tensor, k: float, epsilon: float) -> Tensor:
    """Return p in (0, 1], float64, with sum k: ``min(1, c w)`` by exact water-filling, mixed with ``k / n``.

    The mix ``(1 - epsilon) p + epsilon k / n`` keeps the sum, where the authors' code (which adds
    ``epsilon / n`` and clamps) expects fewer than k terms.
    """
    w = _positive(scores)
    n = w.shape[0]
    falling = w.sort(descending=True).values
    # with the m largest at 1, the rest share k - m in proportion: c_m = (k - m) / (sum of the rest)
    rest = falling.flip(0).cumsum(0).flip(0)
    full = torch.arange(n, dtype=w.dtype, device=w.device)
    c = (k - full) / rest
    # the right m is the first for which the largest of the rest stays within 1
    within = c * falling <= 1.0 + 1e-12
    m = within.to(torch.int64).argmax()
    p = torch.clamp(c[m] * w, max=1.0)
    return (1.0 - epsilon) * p + epsilon * k / n


def _positive(scores: Tensor) -> Tensor:
    """Return the scores in float64, zeros replaced by next to nothing, so that every term can be drawn."""
    w = scores.double()
    largest = w.max()
    return torch.where(largest > 0, w.clamp_min(1e-9 * largest), torch.ones_like(w))


def draw_crs(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw len(u) indices with replacement by the probabilities p; return them, sorted, and ``1 / (k p)``."""
    edges = p.cumsum(0)
    index = torch.searchsorted(edges, u.to(edges.dtype) * edges[-1], right=True)
    index = index.clamp_max(p.shape[0] - 1).sort().values
    return index, 1.0 / (u.shape[0] * p.index_select(0, index))


def draw_bernoulli(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Take each index with its probability p, where u < p; return the indices, sorted, and ``1 / p``.

    If none was taken, the first is returned with factor 0, since a product over nothing does not exist.
    """
    index = (u < p).nonzero().view(-1)
    if index.numel() == 0:
        return index.new_zeros(1), p.new_zeros(1)
    return index, 1.0 / p.index_select(0, index)


@dataclass(frozen=True)
class Chooser:
    """Chooses about k of n slices in aligned blocks of ``block``, by their scores."""

    n: int
    k: int
    scheme: Scheme = "topk"
    block: int = 1
    epsilon: float = 0.1
    explore: float = 0.0

    @property
    def numbers(self) -> int:
        """How many uniform numbers `choose` uses."""
        if self.scheme == "crs":
            return self.k // self.block
        return self.n // self.block if self.scheme == "bernoulli" or self.explore else 0

    def choose(self, scores: Tensor, u: Tensor) -> Selection:
        """Return the selection by scores (n,). A block's score is the root of its sum of squares."""
        block, units = self.block, self.k // self.block
        if block > 1:
            scores = scores.view(-1, block).square().sum(1).sqrt()
        scale = None
        if self.scheme == "topk":
            index = top(explored(scores, units, self.explore, u), units)
        elif self.scheme == "crs":
            index, scale = draw_crs(crs_probabilities(scores, self.epsilon), u)
        else:
            index, scale = draw_bernoulli(bernoulli_probabilities(scores, units, self.epsilon), u)
        if block > 1:
            index = (index[:, None] * block + torch.arange(block, device=index.device)).view(-1)
            scale = None if scale is None else scale.repeat_interleave(block)
        return Selection(index, scale, block, repeats=self.scheme == "crs")
