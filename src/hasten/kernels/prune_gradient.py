"""Stochastic pruning of a gradient: small elements become 0 or +-tau at random, so that the mean stays."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import dense, extension, flat, line, threads
from hasten.kernels.reference import prune_gradient as reference

DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes with a fast form; the other floating dtypes take the reference."""


def _checked(g: Tensor, tau: float) -> Tensor:
    if not g.is_floating_point():
        raise UnsupportedError(
            f"prune_gradient got {g.dtype}; allowed: real floating point. Convert it first."
        )
    if not 0.0 <= tau < float("inf"):
        raise UnsupportedError(
            f"prune_gradient got tau={tau}; allowed: 0 or more and finite. Skip the pruning."
        )
    return dense(g)


def _level(g: Tensor, tau: float) -> float:
    """Return tau as the dtype of ``g`` holds it, for that is what elements are raised to."""
    return torch.tensor(tau, dtype=g.dtype).item()


def _by_reference(g: Tensor, tau: float, key: int) -> tuple[Tensor, Tensor]:
    g = _checked(g, tau)
    y = torch.empty_like(g)
    pruned, totals = reference.prune_gradient(line(g), tau, key)
    line(y).copy_(pruned)
    return y, totals


@torch.library.custom_op("hasten::prune_gradient", mutates_args=())
def prune_gradient(g: Tensor, tau: float, key: int) -> tuple[Tensor, Tensor]:
    """Return ``g`` pruned at ``tau``, with its shape, strides and dtype, and float64 totals (4,) on its device.

    g: any shape; its memory is read once. tau: in the units of g; 0 returns g's values. key: 63 bits, as of
    `hasten.keyed.key64`; element i in the order of memory takes the bits of (key, i). totals: sum of |g| before pruning,
    zeros found, zeros made, elements raised to +-tau. From the paper but for the 16 bits (our choice), whose rounding
    leaves a bias of at most tau / 2**17 without direction. Raises UnsupportedError for an integer g and a tau that is
    negative or not finite.
    """
    return _by_reference(g, tau, key)


@prune_gradient.register_fake
def _(g: Tensor, tau: float, key: int) -> tuple[Tensor, Tensor]:
    g = _checked(g, tau)
    return torch.empty_like(g), torch.empty(4, dtype=torch.float64, device=g.device)


@prune_gradient.register_kernel("cpu")
def _(g: Tensor, tau: float, key: int) -> tuple[Tensor, Tensor]:
    native = extension() if g.dtype in DTYPES else None
    if native is None:
        return _by_reference(g, tau, key)
    g = _checked(g, tau)
    y, totals = torch.empty_like(g), torch.empty(4, dtype=torch.float64)
    native.prune_gradient(flat(g), flat(y), totals, _level(g, tau), key, threads())
    return y, totals


@prune_gradient.register_kernel("cuda")
def _(g: Tensor, tau: float, key: int) -> tuple[Tensor, Tensor]:
    if g.dtype == torch.float64:
        return _by_reference(g, tau, key)
    from hasten.kernels.gpu.prune_gradient import prune_gradient as on_gpu

    g = _checked(g, tau)
    y = torch.empty_like(g)
    return y, on_gpu(g, y, _level(g, tau), key)
