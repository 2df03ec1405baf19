"""The two backward products of a convolution, by PyTorch's own operation: zeros in grad_output are multiplied too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    to_input: bool,
) -> Tensor:
    mask = (to_input, not to_input, False)
    both = torch.ops.aten.convolution_backward(
        g, x, w, None, list(stride), list(padding), list(dilation), False, [0, 0], 1, mask
    )
    result = both[0 if to_input else 1]
    assert isinstance(result, Tensor)
    return result.contiguous(memory_format=torch.channels_last)


def grad_input(
    g: Tensor,
    w: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the gradient of x, of shape ``size`` (N, C, H, W), channels last: g (N, O, H', W'), w (O, C, kh, kw)."""
    x = torch.empty(list(size), dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
    return _backward(g, x, w, stride, padding, dilation, True)


def grad_weight(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the gradient of w (O, C, kh, kw), channels last: g (N, O, H', W'), x (N, C, H, W), ``kernel`` (kh, kw)."""
    size = (g.shape[1], x.shape[1], *kernel)
    w = torch.empty(size, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
    return _backward(g, x, w, stride, padding, dilation, False)
