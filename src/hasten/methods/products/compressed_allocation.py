"""How many bits each sample or layer gets: what rounding costs it, and the greedy choice under a budget.

Rounding a tensor to b bits adds a variance proportional to ``C / (2^b - 1)^2`` to the gradient of a weight. C follows
from the ranges of the groups, the layer's geometry and the size of the gradient that meets the tensor (from the
authors' code).
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 8


def product_sensitivity(
    spread: Tensor, gradient: Tensor, *, group: int, positions: int, kernel: int, groups: int
) -> Tensor:
    """Return C of each sample, (N,), for the input of a convolution or linear layer (from the authors' code).

    spread: (N,), the sum over groups of squared ranges. gradient: (N,) or (), squared norms of the output's
    gradient. group: G. positions: I, values of the input a channel. kernel: K, positions of the kernel (1 for
    linear). groups: of the convolution.
    """
    return kernel / 4 / groups * (group * spread / positions) * gradient


def norm_sensitivity(spread: Tensor, *, group: int, positions: int) -> Tensor:
    """Return C of each sample, (N,), for the input of a batch norm (from the authors' code: no gradient)."""
    return group * spread / positions


def objective(c: Tensor, bits: Tensor) -> Tensor:
    """Return the sum of C / (2^b - 1)^2, which the choice makes small."""
    return (c.double() / (2.0 ** bits.double() - 1).square()).sum()


def allocate(c: Tensor, weight: Tensor | None, budget: float, most: int = MOST) -> Tensor:
    """Return bits (n,), int32 from 1 to ``most``, with ``sum(weight * bits) <= budget`` where 1 each allows it.

    c: (n,), C of each item; NaN counts as 0. weight: (n,), what one bit of an item costs, or None for 1. From the
    authors' code: all begin with the most, and the item whose objective grows least per unit weight loses a bit,
    until the budget holds; equal ones in turn. What an item loses grows with each bit, so the order of all
    losses is one sort, which needs no answer from the device (our choice).
    """
    n = c.numel()
    cost = torch.ones_like(c, dtype=torch.float64) if weight is None else weight.double()
    levels = torch.arange(most, 1, -1, device=c.device, dtype=torch.float64)
    growth = (2.0 ** (levels - 1) - 1) ** -2 - (2.0**levels - 1) ** -2
    loss = growth[:, None] * (c.double().nan_to_num(0.0) / cost)
    # level by level, so that a stable sort takes equal items in turn
    order = loss.flatten().sort(stable=True).indices % n
    if weight is None:
        taken = order[: max(0, most * n - int(budget))]
    else:
        freed = cost[order].cumsum(0)
        # up to and with the removal at which the budget holds
        taken = order[(freed - cost[order]) < most * cost.sum() - budget]
    return (most - torch.bincount(taken, minlength=n)).to(torch.int32)
