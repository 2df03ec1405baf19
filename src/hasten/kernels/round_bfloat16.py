"""float32 to bfloat16 with stochastic rounding: the mean of the result is the value."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import dense, extension, flat, line, threads
from hasten.kernels.reference import round_bfloat16 as reference


def _checked(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise UnsupportedError(f"round_bfloat16 got {x.dtype}; allowed: torch.float32. Convert it first.")
    return dense(x)


def _by_reference(x: Tensor, key: int) -> Tensor:
    x = _checked(x)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    line(y).copy_(reference.round_bfloat16(line(x), key))
    return y


@torch.library.custom_op("hasten::round_bfloat16", mutates_args=())
def round_bfloat16(x: Tensor, key: int) -> Tensor:
    """Return float32 ``x``, any shape, as bfloat16 of the same shape and strides, rounded stochastically.

    key: 63 bits, as of `hasten.keyed.key64`; element i in the order of memory takes the bits of (key, i).
    Unbiased but for magnitudes beyond bfloat16's largest, which become that. Infinities and NaN stay. Raises UnsupportedError for another dtype.
    """
    return _by_reference(x, key)


@round_bfloat16.register_fake
def _(x: Tensor, key: int) -> Tensor:
    return torch.empty_like(_checked(x), dtype=torch.bfloat16)


@round_bfloat16.register_kernel("cpu")
def _(x: Tensor, key: int) -> Tensor:
    native = extension()
    if native is None:
        return _by_reference(x, key)
    x = _checked(x)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    native.round_bfloat16(flat(x), flat(y), key, threads())
    return y


@round_bfloat16.register_kernel("cuda")
def _(x: Tensor, key: int) -> Tensor:
    from hasten.kernels.gpu.round_bfloat16 import round_bfloat16 as on_gpu

    x = _checked(x)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    on_gpu(x, y, key)
    return y
