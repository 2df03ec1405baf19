"""What stands in the place of a convolution's weight gradient: zeros, or one patch of x for each map."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.one_patch import one_patch
from hasten.products import arithmetic
from hasten.products.arithmetic import Geometry, Saved


class NoWeightGradient:
    """The kernel of a grad_weight that is 0: nothing is computed, and x is not kept for it."""

    name = "no weight gradient"
    selectable = True
    needs_x = False

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return zeros, like ``saved.w_like``."""
        if not torch.compiler.is_compiling():
            self.calls += 1
        return torch.zeros_like(saved.w_like)


class PatchGradient:
    """The kernel of a grad_weight made of one patch for each image and output channel.

    scale: what it is multiplied by (0-dimensional), or None. measuring: the product is exact instead, and what compares
    the two is added to ``sums`` (3,): <exact, patch>, |exact|**2, |patch|**2, both without scale.
    """

    name = "one-patch gradient"
    selectable = True
    needs_x = True

    def __init__(self, position: str, weight: str, sums: Tensor, scale: Tensor | None) -> None:
        self.position, self.weight = position, weight
        self.sums, self.scale = sums, scale
        self.measuring = False
        self.calls = 0

    def __call__(self, grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_weight, like ``saved.w_like``."""
        guess: Tensor = one_patch(
            grad_output, x, saved.w_like.shape[2:], geometry.stride, geometry.padding, self.position, self.weight
        )  # fmt: skip
        if self.measuring:
            exact = arithmetic.grad_weight(grad_output, x, geometry, saved)
            a, b = exact.float(), guess.float()
            self.sums.add_(torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]))
            return exact
        if not torch.compiler.is_compiling():
            self.calls += 1
        guess = guess.to(saved.w_like.dtype)
        return guess if self.scale is None else guess * self.scale
