"""float32 to the grid of a fixed-point format: Convert(x, <IL, FL>) in one pass, with what it met on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import SettingsError, UnsupportedError
from hasten.kernels.native import dense, extension, flat, line, threads
from hasten.kernels.reference import fixed_point as reference

MOST_BITS = 24
"""The mantissa of float32: the grid of a longer word is not exact in it."""
CHUNK = 1 << 14  # elements that a task of the native form takes
Result = tuple[Tensor, Tensor, Tensor]


def _checked(x: Tensor, word: int, fraction: int) -> Tensor:
    if x.dtype != torch.float32:
        raise UnsupportedError(f"fixed_point got {x.dtype}; allowed: torch.float32. Convert it first.")
    if not (1 <= word <= MOST_BITS and -100 <= fraction <= 100):
        raise SettingsError(
            f"fixed_point: a word of {word} bits with {fraction} of them behind the point; allowed: 1 to {MOST_BITS} "
            f"bits, for float32 holds no finer grid exactly, and -100 to 100."
        )
    return dense(x)


def _by_reference(x: Tensor, word: int, fraction: int, key: int, stochastic: bool) -> Result:
    x = _checked(x, word, fraction)
    y = torch.empty_like(x)
    rounded, saturated, largest = reference.fixed_point(line(x), word, fraction, key, stochastic)
    line(y).copy_(rounded)
    return y, saturated, largest


@torch.library.custom_op("hasten::fixed_point", mutates_args=())
def fixed_point(
    x: Tensor, word: int, fraction: int, key: int, stochastic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, saturated, largest): float32 ``x`` of any shape on the grid of a fixed-point format.

    word: WL = IL + FL, 1 to 24 bits. fraction: FL, which may be negative (a step above one). key: 63 bits, as of
    `hasten.keyed.key64`; element i in the order of memory takes the bits of (key, i). y has the shape and strides of
    x; saturated, int64 (), counts what lay outside the range; largest, float32 (), is the largest magnitude. See the
    reference for the rounding. Raises UnsupportedError for another dtype, SettingsError for another format.
    """
    return _by_reference(x, word, fraction, key, stochastic)


@fixed_point.register_fake
def _(x: Tensor, word: int, fraction: int, key: int, stochastic: bool) -> Result:
    y = torch.empty_like(_checked(x, word, fraction))
    return y, x.new_empty((), dtype=torch.int64), x.new_empty(())


@fixed_point.register_kernel("cpu")
def _(x: Tensor, word: int, fraction: int, key: int, stochastic: bool) -> Result:
    native = extension()
    if native is None:
        return _by_reference(x, word, fraction, key, stochastic)
    x = _checked(x, word, fraction)
    y = torch.empty_like(x)
    tasks = -(-x.numel() // CHUNK)
    counts, sizes = torch.empty(tasks, dtype=torch.int64), torch.empty(tasks)
    native.fixed_point(flat(x), flat(y), counts, sizes, word, fraction, key, stochastic, threads())
    return y, counts.sum(), sizes.max() if tasks else x.new_zeros(())


@fixed_point.register_kernel("cuda")
def _(x: Tensor, word: int, fraction: int, key: int, stochastic: bool) -> Result:
    from hasten.kernels.gpu.fixed_point import fixed_point as on_gpu

    x = _checked(x, word, fraction)
    y = torch.empty_like(x)
    saturated, largest = on_gpu(x, y, word, fraction, key, stochastic)
    return y, saturated, largest
