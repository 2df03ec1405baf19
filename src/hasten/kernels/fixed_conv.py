"""Convolutions of 16-bit fixed-point numbers with exact sums: the three products, on the CPU's 16-bit dot products.

``vpdpwssd`` adds two products of 16-bit numbers to a 32-bit sum. That sum could overflow after two products, so each call
proves how long it cannot: no partial sum exceeds max |x| times the sum of |w| over its terms, in any order. Where that
bound would pass 2**31 - 1, the sums are widened first. Numbers for which no proof exists take the reference path.
On a GPU the reference runs: its matrix units have no 16-bit integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import dense, extension, flat, threads
from hasten.kernels.reference import fixed_conv as reference


class _Operand(NamedTuple):
    """A float32 tensor with the strides that say which of its dimensions serve as which."""

    tensor: Tensor
    start: int
    strides: tuple[int, int, int, int]
    scale: float

    @property
    def place(self) -> list[int]:
        return [self.start, *self.strides]


class _Shape(NamedTuple):
    """What the native convolution computes, in the order of its C++ struct."""

    images: int
    height: int
    width: int
    channels: int
    outputs: int
    taps: tuple[int, int]
    out: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def numbers(self, padded: int) -> list[int]:
        head = [self.images, self.height, self.width, padded, self.outputs]
        return [*head, *self.taps, *self.out, *self.stride, *self.dilation]


def _run(
    x: _Operand, w: _Operand, image: tuple[int, int], shape: _Shape, corner: tuple[int, int], spread: tuple[int, int]
) -> Tensor | None:  # fmt: skip
    """Return y (images, rows, columns, outputs), or None where sums cannot be proved to fit.

    image: rows and columns of x, which lies with its first element at ``corner`` of a larger image of zeros, its elements
    ``spread`` apart.
    """
    native = extension()
    if native is None or 0 in (shape.images, shape.channels, shape.outputs, *shape.out):
        return None
    padded = shape.channels + shape.channels % 2
    numbers = shape.numbers(padded)
    x16 = torch.empty(shape.images * shape.height * shape.width * padded, dtype=torch.int16)
    sizes = [shape.images, shape.channels, *image, shape.height, shape.width, padded, *corner, *spread]
    largest = native.fixed_pack_x(flat(x.tensor), x.place, x16, sizes, x.scale, threads())
    blocks = -(-shape.outputs // 32) * 32
    w16 = torch.empty(blocks * shape.taps[0] * shape.taps[1] * padded, dtype=torch.int16)
    native.fixed_pack_w(flat(w.tensor), w.place, numbers, shape.channels, w16, w.scale, threads())
    y = torch.empty(shape.images, *shape.out, shape.outputs)
    scale = 1.0 / (x.scale * w.scale)
    return y if native.fixed_conv(x16, w16, flat(y), numbers, largest, scale, threads()) else None


def _strides(x: Tensor, order: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    a, b, c, d = (x.stride(i) for i in order)
    return a, b, c, d


def _checked(**tensors: Tensor) -> list[Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 4:
            raise UnsupportedError(
                f"fixed_conv got {name} of {tensor.dtype} with {tensor.dim()} dimensions; allowed: torch.float32 with 4."
            )
    return [dense(tensor) for tensor in tensors.values()]


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


@torch.library.custom_op("hasten::fixed_conv", mutates_args=())
def fixed_conv(
    x: Tensor, w: Tensor, x_fraction: int, w_fraction: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:  # fmt: skip
    """Return x (N, C, H, W) convolved with w (O, C, kh, kw) in channels_last, summed exactly, rounded once to float32.

    x and w are float32 multiples of 2**-x_fraction and 2**-w_fraction within 16-bit words, as of `fixed_point`; other
    values are cut to that. Raises UnsupportedError for other dtypes.
    """
    x, w = _checked(x=x, w=w)
    return reference.fixed_conv(x, w, x_fraction, w_fraction, stride, padding, dilation)


@fixed_conv.register_fake
def _(
    x: Tensor, w: Tensor, x_fraction: int, w_fraction: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:  # fmt: skip
    _checked(x=x, w=w)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1
           for n, k, s, p, d in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)]  # fmt: skip
    return x.new_empty(len(x), out[0], out[1], len(w)).permute(0, 3, 1, 2)


@fixed_conv.register_kernel("cpu")
def _(
    x: Tensor, w: Tensor, x_fraction: int, w_fraction: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:  # fmt: skip
    x, w = _checked(x=x, w=w)
    (top, left), (kh, kw), image = _pair(padding), _pair(w.shape[2:]), _pair(x.shape[2:])
    (sh, sw), (dh, dw) = _pair(stride), _pair(dilation)
    height, width = image[0] + 2 * top, image[1] + 2 * left
    out = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    shape = _Shape(len(x), height, width, x.shape[1], len(w), (kh, kw), out, (sh, sw), (dh, dw))
    y = _run(
        _Operand(x, 0, _strides(x, (0, 1, 2, 3)), 2.0**x_fraction),
        _Operand(w, 0, _strides(w, (0, 1, 2, 3)), 2.0**w_fraction),
        image, shape, (top, left), (1, 1),
    )  # fmt: skip
    if y is None:
        return reference.fixed_conv(x, w, x_fraction, w_fraction, stride, padding, dilation)
    return y.permute(0, 3, 1, 2)


@torch.library.custom_op("hasten::fixed_conv_input", mutates_args=())
def fixed_conv_input(
    grad_output: Tensor, w: Tensor, size: Sequence[int], g_fraction: int, w_fraction: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Return the gradient (N, C, *size) of the input of `fixed_conv`, in channels_last, by the same rules."""
    grad_output, w = _checked(grad_output=grad_output, w=w)
    return reference.fixed_conv_input(grad_output, w, size, g_fraction, w_fraction, stride, padding, dilation)


@fixed_conv_input.register_fake
def _(
    grad_output: Tensor, w: Tensor, size: Sequence[int], g_fraction: int, w_fraction: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _checked(grad_output=grad_output, w=w)
    return grad_output.new_empty(len(grad_output), size[0], size[1], w.shape[1]).permute(0, 3, 1, 2)


@fixed_conv_input.register_kernel("cpu")
def _(
    grad_output: Tensor, w: Tensor, size: Sequence[int], g_fraction: int, w_fraction: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    grad_output, w = _checked(grad_output=grad_output, w=w)
    (kh, kw), (dh, dw), image = _pair(w.shape[2:]), _pair(dilation), _pair(grad_output.shape[2:])
    # the gradient's elements lie `stride` apart among zeros, and the filter is turned round
    corner = dh * (kh - 1) - padding[0], dw * (kw - 1) - padding[1]
    height, width = size[0] + dh * (kh - 1), size[1] + dw * (kw - 1)
    y = None
    if min(corner) >= 0:
        shape = _Shape(
            len(grad_output), height, width, w.shape[0], w.shape[1], (kh, kw), _pair(size), (1, 1), (dh, dw)
        )
        o, c, i, j = _strides(w, (0, 1, 2, 3))
        y = _run(
            _Operand(grad_output, 0, _strides(grad_output, (0, 1, 2, 3)), 2.0**g_fraction),
            _Operand(w, (kh - 1) * i + (kw - 1) * j, (c, o, -i, -j), 2.0**w_fraction),
            image, shape, corner, _pair(stride),
        )  # fmt: skip
    if y is None:
        return reference.fixed_conv_input(
            grad_output, w, size, g_fraction, w_fraction, stride, padding, dilation
        )
    return y.permute(0, 3, 1, 2)


@torch.library.custom_op("hasten::fixed_conv_weight", mutates_args=())
def fixed_conv_weight(
    grad_output: Tensor, x: Tensor, size: Sequence[int], g_fraction: int, x_fraction: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Return the gradient (O, C, *size) of the weight of `fixed_conv`, contiguous, by the same rules."""
    grad_output, x = _checked(grad_output=grad_output, x=x)
    return reference.fixed_conv_weight(
        grad_output, x, size, g_fraction, x_fraction, stride, padding, dilation
    )


@fixed_conv_weight.register_fake
def _(
    grad_output: Tensor, x: Tensor, size: Sequence[int], g_fraction: int, x_fraction: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _checked(grad_output=grad_output, x=x)
    return grad_output.new_empty(grad_output.shape[1], x.shape[1], size[0], size[1])


@fixed_conv_weight.register_kernel("cpu")
def _(
    grad_output: Tensor, x: Tensor, size: Sequence[int], g_fraction: int, x_fraction: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    grad_output, x = _checked(grad_output=grad_output, x=x)
    # the same sum with other roles: images are channels, channels of x are images, and grad_output is the filter
    (sh, sw), (dh, dw), image = _pair(stride), _pair(dilation), _pair(x.shape[2:])
    height, width = image[0] + 2 * padding[0], image[1] + 2 * padding[1]
    shape = _Shape(x.shape[1], height, width, len(x), grad_output.shape[1], _pair(grad_output.shape[2:]), _pair(size),
                   (dh, dw), (sh, sw))  # fmt: skip
    y = _run(
        _Operand(x, 0, _strides(x, (1, 0, 2, 3)), 2.0**x_fraction),
        _Operand(grad_output, 0, _strides(grad_output, (1, 0, 2, 3)), 2.0**g_fraction),
        image, shape, _pair(padding), (1, 1),
    )  # fmt: skip
    if y is None:
        return reference.fixed_conv_weight(
            grad_output, x, size, g_fraction, x_fraction, stride, padding, dilation
        )
    return y.permute(3, 0, 1, 2).contiguous()
