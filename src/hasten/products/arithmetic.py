"""The three products of a convolution or linear layer, exactly as PyTorch computes them.

    output[n,o]      = sum_c x[n,c] * w[o,c] + bias[o]
    grad_input[n,c]  = sum_o grad_output[n,o] * w[o,c]
    grad_weight[o,c] = sum_n grad_output[n,o] * x[n,c]

These are the reference for every product kernel, and the signatures that kernels share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PRODUCTS = ("output", "grad_input", "grad_weight")


class Geometry(NamedTuple):
    """What a layer is besides its tensors. A linear layer has ``conv`` False and ignores the rest."""

    conv: bool
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def channel_dim(self) -> int:
        """The dimension of x, output and their gradients that holds channels (conv) or features (linear)."""
        return 1 if self.conv else -1


class Saved(NamedTuple):
    """What a backward kernel may ask about the forward: operand layouts and what its output kernel kept.

    x_like and w_like have the shape, dtype and strides of the operands (w_like: of the computed rows of w).
    Their values are undefined.
    """

    x_like: Tensor
    w_like: Tensor
    extras: tuple[Tensor, ...] = ()


def output(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the layer's output: x (N, C, H, W) and w (O, C / groups, kh, kw), or x (..., C) and w (O, C)."""
    if not geometry.conv:
        return functional.linear(x, w, bias)
    _, stride, padding, dilation, groups = geometry
    return functional.conv2d(x, w, bias, stride, padding, dilation, groups)


def gradients(
    grad_output: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (grad_input, grad_weight, grad_bias), each only if ``wanted``, by the ops autograd calls."""
    if geometry.conv:
        _, stride, padding, dilation, groups = geometry
        gi, gw, gb = torch.ops.aten.convolution_backward(
            grad_output, x, w, [w.shape[0]], stride, padding, dilation, False, (0, 0), groups, wanted
        )
        return (gi if wanted[0] else None, gw if wanted[1] else None, gb if wanted[2] else None)
    rows = grad_output.reshape(-1, w.shape[0])
    return (
        rows.mm(w).view(x.shape) if wanted[0] else None,
        rows.t().mm(x.reshape(-1, w.shape[1])) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def grad_input(grad_output: Tensor, w: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
    """Return the gradient of x, like ``saved.x_like``."""
    result, _, _ = gradients(grad_output, saved.x_like, w, geometry, (True, False, False))
    assert result is not None
    return result


def grad_weight(grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
    """Return the gradient of w, like ``saved.w_like``."""
    _, result, _ = gradients(grad_output, x, saved.w_like, geometry, (False, True, False))
    assert result is not None
    return result


def grad_bias(grad_output: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of the bias (O,): the sum of grad_output over everything but its channels."""
    return (
        grad_output.sum((0, 2, 3)) if geometry.conv else grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
    )
