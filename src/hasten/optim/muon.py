"""Muon for convolution filters: momentum, then the nearest orthogonal matrix as the update.

`torch.optim.Muon` takes matrices only and rejects 4-D filters; here a filter tensor (O, C, kh, kw) is one
matrix (O, C*kh*kw). Source: Jordan et al. 2024, airbench94_muon; training_recipes.md 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from hasten.errors import SettingsError, UnsupportedError

COEFFICIENTS: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of the quintic a*x + b*x^3 + c*x^5: the steepest slope at zero, not convergence to one."""


def orthogonalise(matrix: Tensor, steps: int = 3, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return ``matrix`` (O, K) with its singular values pushed towards one, in ``dtype``; zero stays zero.

    ``steps`` Newton-Schulz iterations on the shorter side. All singular values of the result are below 1.25;
    those of a well-conditioned matrix (aspect ratio 3 or more) also above 0.5.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.T if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, for convolution filters.

    ``lr`` 0.24 and ``momentum`` 0.6 are airbench94_muon's; ``steps`` is the number of Newton-Schulz
    iterations, in bfloat16. With ``rescale``, a filter tensor is scaled to norm sqrt(O) before each update, so weight
    decay has no meaning and the layer must be followed by a normalisation. Without it any convolution can be trained:
    the update is brought to the size of AdamW's (0.2 root mean square, Liu et al. 2025, arXiv 2502.16982), so that
    AdamW's learning rates and decoupled ``weight_decay`` fit. One momentum buffer a parameter is the whole state.

    Raises UnsupportedError for anything but convolution filters: heads, biases and norms belong to another
    optimizer.
    """

    def __init__(
        self, params: Any, lr: float = 0.24, momentum: float = 0.6, nesterov: bool = True, steps: int = 3,
        rescale: bool = True, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        problems = []
        if not lr >= 0:
            problems.append(f"lr is {lr}, must be >= 0")
        if not 0 <= momentum < 1:
            problems.append(f"momentum is {momentum}, must be in [0, 1)")
        if nesterov and momentum == 0:
            problems.append("nesterov needs momentum > 0")
        if not weight_decay >= 0 or (rescale and weight_decay):
            problems.append(f"weight_decay is {weight_decay}, must be >= 0, and 0 with rescale")
        if steps < 1:
            problems.append(f"steps is {steps}, must be >= 1")
        if problems:
            raise SettingsError("Muon: " + "; ".join(problems))
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, steps=steps, rescale=rescale,
                                      weight_decay=weight_decay))  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking that it holds convolution filters only."""
        super().add_param_group(param_group)
        bad = [tuple(p.shape) for p in self.param_groups[-1]["params"] if p.ndim < 3]
        if bad:
            self.param_groups.pop()
            raise UnsupportedError(
                f"Muon: parameters of shape {bad} are no convolution filters; "
                "give heads, biases and norms to SGD"
            )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every filter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                buffer.mul_(momentum).add_(p.grad)
                direction = p.grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer
                update = orthogonalise(direction.reshape(len(p), -1), group["steps"])
                if group["rescale"]:
                    p.mul_(len(p) ** 0.5 / p.norm().clamp(min=1e-12))
                else:
                    p.mul_(1 - lr * group["weight_decay"])
                    update = update * (0.2 * max(update.shape) ** 0.5)
                p.add_(update.reshape(p.shape).to(p.dtype), alpha=-lr)
        return loss
