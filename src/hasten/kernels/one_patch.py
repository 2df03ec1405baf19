"""The weight gradient of a convolution from one patch of x for each image and output channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import extension, flat, threads
from hasten.kernels.reference import one_patch as reference

POSITIONS = ("argmax_abs", "argmax", "fixed")
WEIGHTS = ("sum", "max_value")
DTYPES = (torch.float32, torch.bfloat16)
LARGEST_MAP = 2**15  # places along one side that an index of 32 bits allows
_LAST = torch.channels_last


def refused(grad_output: Tensor, x: Tensor) -> str | None:
    """Return why the faster forms cannot take these operands, or None; the reference can take any real ones."""
    if grad_output.dtype not in DTYPES or x.dtype != grad_output.dtype:
        return f"grad_output is {grad_output.dtype} and x {x.dtype}; allowed: both float32 or both bfloat16"
    if max(grad_output.shape[2:]) > LARGEST_MAP:
        return f"maps of {tuple(grad_output.shape[2:])} are larger than {LARGEST_MAP} along a side"
    return None


def _check(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
           position: str, weight: str) -> None:  # fmt: skip
    problems = []
    if position not in POSITIONS:
        problems.append(f"position is {position!r}; allowed: {', '.join(POSITIONS)}.")
    if weight not in WEIGHTS:
        problems.append(f"weight is {weight!r}; allowed: {', '.join(WEIGHTS)}.")
    if not (grad_output.is_floating_point() and x.is_floating_point()):
        problems.append(f"got {grad_output.dtype} and {x.dtype}; allowed: real floating point.")
    if grad_output.dim() != 4 or x.dim() != 4:
        problems.append(
            f"got grad_output {tuple(grad_output.shape)} and x {tuple(x.shape)}; allowed: (N, O, Ho, Wo) and (N, C, Hi, Wi)."
        )
    else:
        expected = [
            (size + 2 * p - k) // s + 1
            for size, k, s, p in zip(x.shape[2:], kernel_size, stride, padding, strict=True)
        ]
        if list(grad_output.shape[2:]) != expected or grad_output.shape[0] != x.shape[0]:
            problems.append(
                f"grad_output {tuple(grad_output.shape)} is not that of x {tuple(x.shape)} under kernel {tuple(kernel_size)}, "
                f"stride {tuple(stride)}, padding {tuple(padding)}, without dilation: (N, O, {expected[0]}, {expected[1]})."
            )
    if problems:
        raise UnsupportedError("one_patch: " + " ".join(problems))


def _empty(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], dtype: torch.dtype) -> Tensor:
    shape = (grad_output.shape[1], x.shape[1], *kernel_size)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_LAST)


def _by_reference(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
                  padding: Sequence[int], position: str, weight: str) -> Tensor:  # fmt: skip
    _check(grad_output, x, kernel_size, stride, padding, position, weight)
    found = reference.one_patch(
        grad_output, x, list(kernel_size), list(stride), list(padding), position, weight
    )
    return _empty(grad_output, x, kernel_size, grad_output.dtype).copy_(found)


@torch.library.custom_op("hasten::one_patch", mutates_args=())
def one_patch(
    grad_output: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    position: str = "argmax_abs",
    weight: str = "sum",
) -> Tensor:
    """Return grad_weight (O, C, kh, kw), ``sum_n t[n,o] * patch(x[n], q[n,o])``, in channels_last and grad_output's dtype.

    grad_output (N, O, Ho, Wo), x (N, C, Hi, Wi), of any layout; channels_last is the fastest. q is where the map
    grad_output[n,o] has its largest magnitude (position="argmax_abs") or value ("argmax"), the first of equals, or place
    (1, 1) or the nearest that exists ("fixed"). t is the map's sum (weight="sum") or its value at q ("max_value").
    Sums are taken in float32. Maps that hold a NaN have an undefined q.

    Raises UnsupportedError for shapes that do not belong together and unknown variants.
    """
    return _by_reference(grad_output, x, kernel_size, stride, padding, position, weight)


@one_patch.register_fake
def _(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
      position: str = "argmax_abs", weight: str = "sum") -> Tensor:  # fmt: skip
    return _empty(grad_output, x, kernel_size, grad_output.dtype)


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """Return ``x``, copied if it is neither contiguous nor channels_last, and whether it is channels_last."""
    if x.is_contiguous(memory_format=_LAST):
        return x, True
    return x.contiguous(), False


def _sizes(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
           padding: Sequence[int]) -> tuple[int, ...]:  # fmt: skip
    return (*grad_output.shape, *x.shape[1:], *kernel_size, *stride, *padding)


@one_patch.register_kernel("cpu")
def _(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
      position: str = "argmax_abs", weight: str = "sum") -> Tensor:  # fmt: skip
    native = extension()
    empty = 0 in grad_output.shape or 0 in x.shape
    if native is None or empty or refused(grad_output, x):
        return _by_reference(grad_output, x, kernel_size, stride, padding, position, weight)
    _check(grad_output, x, kernel_size, stride, padding, position, weight)
    (g, g_last), (x, x_last) = _laid_out(grad_output), _laid_out(x)
    n, o = g.shape[:2]
    sizes = _sizes(g, x, kernel_size, stride, padding)
    found = _empty(g, x, kernel_size, torch.float32)
    t, q = torch.empty(n, o), torch.empty(n, o, dtype=torch.int32)
    scratch = torch.empty(native.one_patch_scratch(sizes, x_last))
    native.one_patch(flat(g), flat(x), flat(found), t, q, scratch, sizes, g_last, x_last, POSITIONS.index(position),
                     WEIGHTS.index(weight), threads())  # fmt: skip
    return found.to(g.dtype)


@one_patch.register_kernel("cuda")
def _(grad_output: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
      position: str = "argmax_abs", weight: str = "sum") -> Tensor:  # fmt: skip
    if grad_output.numel() == 0 or x.numel() == 0 or refused(grad_output, x):
        return _by_reference(grad_output, x, kernel_size, stride, padding, position, weight)
    from hasten.kernels.gpu.one_patch import one_patch as on_gpu

    _check(grad_output, x, kernel_size, stride, padding, position, weight)
    found = _empty(grad_output, x, kernel_size, torch.float32)
    on_gpu(grad_output.contiguous(memory_format=_LAST), x.contiguous(memory_format=_LAST), found, kernel_size, stride,
           padding, position, weight)  # fmt: skip
    return found.to(grad_output.dtype)
