"""How much of a tensor lies in each of its channels, or in each of its samples, at little cost.

A score only ranks, so it may be computed on some of the images. Under channels_last a norm over (N, H, W) by
``vector_norm`` costs more than a convolution; one row of ones times the matrix (N*H*W, C) costs a tenth of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_sums(x: Tensor, dim: int, power: int, images: int | None = None) -> Tensor:
    """Return the sum of ``|x| ** power`` in each slice along ``dim``, float32, shape (x.shape[dim],).

    x: (N, C, H, W) or (O, C, kh, kw) with ``dim`` 0 or 1, or (..., C) with ``dim`` 0 (two dimensions) or -1.
    power: 1 or 2. images: for 4-D x with ``dim`` 1, how many of the N samples are read, evenly spaced (None:
    all); the sum is then scaled up to N.
    """
    if dim == 0:
        return _per_row(x, power)
    if x.dim() != 4:
        return _per_column(x.reshape(-1, x.shape[-1]), power)
    n = x.shape[0]
    every = 1 if images is None else max(1, n // images)
    part = x[::every]
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        sums = _powered(part, power).sum((0, 2, 3))
    else:
        sums = _per_column(part.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), power)
    return sums if every == 1 else sums * (n / part.shape[0])


def _powered(x: Tensor, power: int) -> Tensor:
    return x.float().square() if power == 2 else x.float().abs()


def _per_column(rows: Tensor, power: int) -> Tensor:
    return torch.ones(rows.shape[0], device=rows.device) @ _powered(rows, power)


def _per_row(x: Tensor, power: int) -> Tensor:
    if x.dim() == 4 and not x.is_contiguous():
        x = x.permute(0, 2, 3, 1)
    return _powered(x, power).reshape(x.shape[0], -1).sum(1)
