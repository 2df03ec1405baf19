"""The three products of a convolution whose operands are 16-bit fixed-point numbers, held in float32.

Every sum is exact (float64 holds sums of 2**23 products of 16-bit numbers) and rounded once, to float32: what a wide
accumulator gives (Gupta et al. 2015, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = Sequence[int]


def _whole(x: Tensor, fraction: int) -> Tensor:
    """Return float32 ``x``, multiples of 2**-fraction, as whole numbers in float64."""
    return (x * 2.0**fraction).double()


def _narrow(total: Tensor, fraction: int) -> Tensor:
    return total.float() * 2.0**-fraction


def fixed_conv(
    x: Tensor, w: Tensor, x_fraction: int, w_fraction: int, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return x (N, C, H, W) convolved with w (O, C, kh, kw), in channels_last."""
    total = torch.conv2d(
        _whole(x, x_fraction), _whole(w, w_fraction), None, list(stride), list(padding), list(dilation)
    )
    return _narrow(total, x_fraction + w_fraction).contiguous(memory_format=torch.channels_last)


def fixed_conv_input(
    grad_output: Tensor, w: Tensor, size: Pair, g_fraction: int, w_fraction: int, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:  # fmt: skip
    """Return the gradient (N, C, *size) of the input, in channels_last."""
    g, v = _whole(grad_output, g_fraction), _whole(w, w_fraction)
    x = g.new_empty(len(g), w.shape[1], *size)
    total, _, _ = torch.ops.aten.convolution_backward(
        g, x, v, None, list(stride), list(padding), list(dilation), False, (0, 0), 1, (True, False, False)
    )
    return _narrow(total, g_fraction + w_fraction).contiguous(memory_format=torch.channels_last)


def fixed_conv_weight(
    grad_output: Tensor, x: Tensor, size: Pair, g_fraction: int, x_fraction: int, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:  # fmt: skip
    """Return the gradient (O, C, *size) of the weight, contiguous."""
    g, v = _whole(grad_output, g_fraction), _whole(x, x_fraction)
    w = g.new_empty(g.shape[1], x.shape[1], *size)
    _, total, _ = torch.ops.aten.convolution_backward(
        g, v, w, None, list(stride), list(padding), list(dilation), False, (0, 0), 1, (False, True, False)
    )
    return _narrow(total, g_fraction + x_fraction).contiguous()
