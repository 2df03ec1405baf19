"""Activations in 1 to 8 bits a value: stochastically rounded by groups, packed, and unpacked again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import dense, extension, flat, threads
from hasten.kernels.reference import group_quantize as reference

GROUPS = "whole multiples of 32 up to 4096"


def group_problem(group: int) -> str | None:
    """Return why ``group`` cannot be the size of a group, or None."""
    if isinstance(group, int) and not isinstance(group, bool) and 0 < group <= 4096 and group % 32 == 0:
        return None
    return f"{group!r}; allowed: {GROUPS}"


def sample_dense(x: Tensor) -> Tensor:
    """Return ``x`` if each sample fills its memory without gaps and samples follow one another; else a copy.

    So values keep the order in which they lie in memory, whatever the memory format.
    """
    if x.numel() == 0 or (x.shape[0] > 1 and x.stride(0) != x[0].numel()):
        return x.contiguous()
    first = x[0]
    return x if dense(first) is first else x.contiguous()


def _checked(
    x: Tensor, bits: Tensor | None, group: int, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(
            f"group_quantize got {x.dtype}; allowed: float32, bfloat16, float16. Convert it first."
        )
    if reason := group_problem(group):
        raise UnsupportedError(f"group_quantize: the group is {reason}.")
    if x.dim() == 0 or x.numel() == 0:
        raise UnsupportedError(f"group_quantize got shape {tuple(x.shape)}; allowed: (N, ...), not empty.")
    if bits is not None and (bits.dtype != torch.int32 or bits.shape != x.shape[:1]):
        raise UnsupportedError(
            f"group_quantize: bits are {bits.dtype} {tuple(bits.shape)}; allowed: int32 ({x.shape[0]},)."
        )
    for name, each in (("scale", scale), ("shift", shift)):
        fits = each is None or (x.dim() > 1 and each.shape == x.shape[1:2] and each.dtype == torch.float32)
        if not fits or (scale is None) != (shift is None):
            got = None if each is None else (each.dtype, tuple(each.shape))
            raise UnsupportedError(
                f"group_quantize: {name} is {got}; allowed: scale and shift, float32 (C,) for x (N, C, ...), or neither."
            )
    x = sample_dense(x)
    return x.float() if x.dtype == torch.float16 else x


def _normalised(x: Tensor, bits: Tensor, group: int, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = _checked(x, bits, group, scale, shift)
    return x if scale is None or shift is None else reference.normalised(x, scale, shift)


def _together(x: Tensor) -> int | None:
    """Return how many values of a channel lie together in a `sample_dense` x (N, C, ...), if channels take turns."""
    if x[0].is_contiguous():
        return x[0, 0].numel()
    return 1 if x.stride(1) == 1 else None


def _rows(x: Tensor) -> Tensor:
    """Return a `sample_dense` x as (N, D) in the order of memory."""
    d = x.numel() // x.shape[0]
    return x.as_strided((x.shape[0], d), (d, 1))


def _empty(x: Tensor, total: int, group: int) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    m = -(-(x.numel() // n) // group)
    codes = torch.empty(total * m * group // 8, dtype=torch.uint8, device=x.device)
    return codes, torch.empty(n, m, 2, dtype=torch.bfloat16, device=x.device)


@torch.library.custom_op("hasten::group_quantize", mutates_args=())
def group_quantize(
    x: Tensor,
    bits: Tensor,
    total: int,
    group: int,
    key: int,
    stochastic: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (codes, meta) of ``x`` (N, ...): stochastically rounded in groups of ``group`` values of one sample.

    x: float32, bfloat16 or float16, in any memory format; groups run along memory. bits: int32 (N,), 1 to 8 for
    each sample, with the sum ``total``. key: 63 bits. scale, shift: float32 (C,), to pack ``x * scale + shift`` of the
    channels of ``x`` (N, C, ...) in its place. codes: uint8, meta: bfloat16 (N, M, 2) with the lowest value
    and the step of each group. Not ``stochastic``: to the nearest, which is biased. A group with a value that is
    infinite or none comes back as NaN. Raises UnsupportedError for other dtypes, groups or shapes.
    """
    x = _normalised(x, bits, group, scale, shift)
    return reference.group_quantize(_rows(x).float(), bits, group, key, stochastic)


@group_quantize.register_fake
def _(
    x: Tensor,
    bits: Tensor,
    total: int,
    group: int,
    key: int,
    stochastic: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _empty(x, total, group)


@group_quantize.register_kernel("cpu")
def _(
    x: Tensor,
    bits: Tensor,
    total: int,
    group: int,
    key: int,
    stochastic: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    native = extension()
    if native is None:
        x = _normalised(x, bits, group, scale, shift)
        return reference.group_quantize(_rows(x).float(), bits, group, key, stochastic)
    x = _checked(x, bits, group, scale, shift)
    by, inner = [torch.empty(0)] * 2, 1
    if scale is not None and shift is not None:
        if together := _together(x):
            by, inner = [scale.detach().contiguous(), shift.detach().contiguous()], together
        else:
            x = reference.normalised(x, scale, shift)
    codes, meta = _empty(x, total, group)
    native.group_quantize(
        flat(x), *by, inner, bits.contiguous(), group, codes, flat(meta), key, stochastic, threads()
    )
    return codes, meta


@group_quantize.register_kernel("cuda")
def _(
    x: Tensor,
    bits: Tensor,
    total: int,
    group: int,
    key: int,
    stochastic: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from hasten.kernels.gpu.group_quantize import group_quantize as on_gpu

    x = _normalised(x, bits, group, scale, shift)
    if group & (group - 1):  # Triton's blocks are powers of two
        return reference.group_quantize(_rows(x).float(), bits, group, key, stochastic)
    codes, meta = _empty(x, total, group)
    on_gpu(_rows(x), bits, group, codes, meta, key, stochastic)
    return codes, meta


def _result(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=like.device)


def _by_reference(
    codes: Tensor, meta: Tensor, bits: Tensor, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    x = _result(shape, stride, dtype, codes)
    d = x.numel() // x.shape[0]
    _rows(x).copy_(reference.group_dequantize(codes, meta, bits, d))
    return x


@torch.library.custom_op("hasten::group_dequantize", mutates_args=())
def group_dequantize(
    codes: Tensor,
    meta: Tensor,
    bits: Tensor,
    group: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return what `group_quantize` packed, with this shape, these strides (of a `sample_dense` tensor) and dtype."""
    return _by_reference(codes, meta, bits, shape, stride, dtype)


@group_dequantize.register_fake
def _(
    codes: Tensor,
    meta: Tensor,
    bits: Tensor,
    group: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return _result(shape, stride, dtype, codes)


@group_dequantize.register_kernel("cpu")
def _(
    codes: Tensor,
    meta: Tensor,
    bits: Tensor,
    group: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    native = extension()
    if native is None:
        return _by_reference(codes, meta, bits, shape, stride, dtype)
    half = dtype == torch.float16
    x = _result(shape, stride, torch.float32 if half else dtype, codes)
    native.group_dequantize(codes, flat(meta), bits.contiguous(), group, flat(x), threads())
    return x.half() if half else x


@group_dequantize.register_kernel("cuda")
def _(
    codes: Tensor,
    meta: Tensor,
    bits: Tensor,
    group: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    from hasten.kernels.gpu.group_quantize import group_dequantize as on_gpu

    if group & (group - 1):
        return _by_reference(codes, meta, bits, shape, stride, dtype)
    x = _result(shape, stride, dtype, codes)
    on_gpu(codes, meta, bits, group, _rows(x))
    return x


@torch.library.custom_op("hasten::group_spread", mutates_args=())
def group_spread(x: Tensor, group: int) -> Tensor:
    """Return the sum over groups of the squared range of values, (N,) float32, of ``x`` (N, ...)."""
    return reference.group_spread(_rows(_checked(x, None, group)).float(), group)


@group_spread.register_fake
def _(x: Tensor, group: int) -> Tensor:
    return torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


@group_spread.register_kernel("cpu")
def _(x: Tensor, group: int) -> Tensor:
    x = _checked(x, None, group)
    native = extension()
    if native is None:
        return reference.group_spread(_rows(x).float(), group)
    spread = torch.empty(x.shape[0], dtype=torch.float32)
    native.group_spread(flat(x), group, spread, threads())
    return spread
