"""The backward products of a convolution whose grad_output is mostly zeros: only the non-zeros are multiplied.

On a GPU the dense products run: there is no Triton form, because zeros without structure leave whole tiles of
16x16 non-zero (the chance that one is empty at 1% density is 0.99**256 = 8%), so that tensor cores could skip nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import extension, flat, threads
from hasten.kernels.reference import zero_skip as reference

DTYPES = (torch.float32, torch.bfloat16)
LAYOUT = torch.channels_last
_LARGEST = 1 << 26  # elements of one image, and of one tensor's row, that 32-bit positions can hold


def _numbers(
    g: Tensor,
    x: Sequence[int],
    w: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return (n, h, w, c, oh, ow, o, kh, kw, strides, paddings, dilations). Raises UnsupportedError if they do not fit."""
    n, c, h, width = x
    o, c_in, kh, kw = w
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((h, width), (kh, kw), stride, padding, dilation, strict=True)
    ]
    if c_in != c or tuple(g.shape) != (n, o, *sizes) or min(*stride, *dilation) < 1 or min(padding) < 0:
        raise UnsupportedError(
            f"zero_skip got grad_output {tuple(g.shape)}, x {tuple(x)} and weight {tuple(w)} at stride {tuple(stride)}, "
            f"padding {tuple(padding)}, dilation {tuple(dilation)}; allowed: those of one convolution without groups, "
            f"whose grad_output is {(n, o, *sizes)}."
        )
    return [n, h, width, c, *sizes, o, kh, kw, *stride, *padding, *dilation]


def _fast(*tensors: Tensor) -> bool:
    """Whether the native form can run: CPU, one dtype of `DTYPES`, sizes within 32-bit positions."""
    dtype = tensors[0].dtype
    return (
        dtype in DTYPES
        and all(t.dtype == dtype and t.device.type == "cpu" and t.numel() > 0 for t in tensors)
        and all(16 * t[0].numel() < _LARGEST for t in tensors)
        and extension() is not None
    )


def _last(x: Tensor) -> Tensor:
    """Return the elements of ``x`` (N, C, H, W) in the order N, H, W, C, flat."""
    return flat(x.contiguous(memory_format=LAYOUT))


@torch.library.custom_op("hasten::zero_skip_grad_input", mutates_args=())
def grad_input(
    g: Tensor,
    w: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the gradient of x, of shape ``size`` (N, C, H, W), channels last, dtype of g.

    g: (N, O, H', W'), w: (O, C, kh, kw), float32 or bfloat16 (others and other devices take the dense product), any
    layout, fastest channels last. A product with a zero of g counts as 0 even where w is not finite. Sums are float32 in a fixed order:
    the result does not depend on the number of threads. Raises UnsupportedError for shapes that do not fit.
    """
    _numbers(g, size, w.shape, stride, padding, dilation)
    return reference.grad_input(g, w, size, stride, padding, dilation)


@grad_input.register_fake
def _(
    g: Tensor,
    w: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return torch.empty(list(size), dtype=g.dtype, device=g.device, memory_format=LAYOUT)


@grad_input.register_kernel("cpu")
def _(
    g: Tensor,
    w: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    numbers = _numbers(g, size, w.shape, stride, padding, dilation)
    if not _fast(g, w) or 16 * size[1] * size[2] * size[3] >= _LARGEST:
        return reference.grad_input(g, w, size, stride, padding, dilation)
    result = torch.empty(list(size), dtype=g.dtype, memory_format=LAYOUT)
    native = extension()
    assert native is not None
    native.skip_grad_input(_last(g), _last(w), flat(result), torch.tensor(numbers), threads())
    return result


@torch.library.custom_op("hasten::zero_skip_grad_weight", mutates_args=())
def grad_weight(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the gradient of w (O, C, kh, kw), channels last, dtype of g.

    g: (N, O, H', W'), x: (N, C, H, W), ``kernel``: (kh, kw); the rest as for `grad_input`.
    """
    _numbers(g, x.shape, (g.shape[1], x.shape[1], *kernel), stride, padding, dilation)
    return reference.grad_weight(g, x, kernel, stride, padding, dilation)


@grad_weight.register_fake
def _(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = (g.shape[1], x.shape[1], *kernel)
    return torch.empty(size, dtype=g.dtype, device=g.device, memory_format=LAYOUT)


@grad_weight.register_kernel("cpu")
def _(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = (g.shape[1], x.shape[1], *kernel)
    numbers = _numbers(g, x.shape, size, stride, padding, dilation)
    if not _fast(g, x):
        return reference.grad_weight(g, x, kernel, stride, padding, dilation)
    result = torch.empty(size, dtype=torch.float32, memory_format=LAYOUT)
    native = extension()
    assert native is not None
    native.skip_grad_weight(_last(g), _last(x), flat(result), torch.tensor(numbers), threads())
    return result.to(g.dtype)
