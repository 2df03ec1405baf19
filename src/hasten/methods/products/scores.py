"""How much of a tensor lies in each of its channels, or in each of its samples, at little cost.

A score only ranks, so it may be computed on some of the images. Under channels_last a norm over (N, H, W) by
``vector_norm`` costs more than a convolution; one row of ones times the matrix (N*H*W, C) costs a tenth of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LINES = 8  # of each image that is read for a score


def channel_sums(x: Tensor, dim: int, power: int, images: int | None = None) -> Tensor:
    """Return the sum of ``|x| ** power`` in each slice along ``dim``, float32, shape (x.shape[dim],).

    x: (N, C, H, W) or (O, C, kh, kw) with ``dim`` 0 or 1, or (..., C) with ``dim`` 0 (two dimensions) or -1.
    power: 1 or 2. images: for 4-D x with ``dim`` 1, from how many of the N samples the sum is estimated, evenly
    spaced, and of these from at least `LINES` lines, evenly spaced (None: everything is read).
    """
    if dim == 0:
        return _per_row(x, power)
    if x.dim() != 4:
        return _per_column(x.reshape(-1, x.shape[-1]), power)
    part = x
    if images is not None:
        part = x[:: max(1, x.shape[0] // images), :, :: max(1, x.shape[2] // LINES)]
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        sums = _powered(part, power).sum((0, 2, 3))
    else:
        sums = _per_column(part.permute(0, 2, 3, 1), power)
    return sums if part is x else sums * (x.numel() / part.numel())


def _powered(x: Tensor, power: int) -> Tensor:
    wide = x.float()
    return wide * wide if power == 2 else wide.abs()


def _per_column(x: Tensor, power: int) -> Tensor:
    # float() of a slice is its dense copy, so that no other one is made
    rows = _powered(x, power).reshape(-1, x.shape[-1])
    return torch.ones(rows.shape[0], device=rows.device) @ rows


def _per_row(x: Tensor, power: int) -> Tensor:
    if x.dim() == 4 and not x.is_contiguous():
        x = x.permute(0, 2, 3, 1)
    return _powered(x, power).reshape(x.shape[0], -1).sum(1)


def sample_norms(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each x[n], float32, shape (N,)."""
    rows = x.permute(0, 2, 3, 1) if x.dim() == 4 and not x.is_contiguous() else x
    # to ask bfloat16 for a float32 result costs five times as much; only float16 could overflow
    wide = torch.float32 if x.dtype == torch.float16 else None
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(x.shape[0], -1), dim=1, dtype=wide)
    return norms.float()
