"""Products of a convolution from the means of similar channel pieces of its input (pixels' pieces, all taps at once).

`reference.deep_reuse` says what is computed. Native kernels take float32 and bfloat16 (computed in float32); the
reference takes everything else.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import NonFiniteError, UnsupportedError
from hasten.kernels.native import extension, threads
from hasten.kernels.reference import deep_reuse as reference
from hasten.kernels.reference.deep_reuse import HIGHEST_BITS, Clusters

_NATIVE = (torch.float32, torch.bfloat16)
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _check(x: Tensor, v: Tensor, groups: int) -> None:
    problems = []
    if not x.is_floating_point() or x.dim() != 4:
        problems.append(f"x must be floating point (B, C, H, W), not {x.dtype} with {x.dim()} dimensions")
    elif x.shape[1] % v.shape[0]:
        divisors = [d for d in range(1, x.shape[1] + 1) if x.shape[1] % d == 0]
        problems.append(
            f"L={v.shape[0]} does not divide C={x.shape[1]}; valid: {', '.join(map(str, divisors))}"
        )
    if not 0 <= v.shape[1] <= HIGHEST_BITS:
        problems.append(f"H={v.shape[1]} hash vectors; allowed: 0 to {HIGHEST_BITS}")
    if groups < 1 or x.shape[0] % groups:
        problems.append(f"groups={groups} must divide the batch of {x.shape[0]}")
    if problems:
        raise UnsupportedError(f"deep_reuse: {'; '.join(problems)}.")


def _by_reference(x: Tensor, v: Tensor, shift: Tensor | None, groups: int, norm: bool) -> Six:
    _check(x, v, groups)
    if not bool(x.isfinite().all()):
        raise NonFiniteError(_NON_FINITE)
    found = reference.cluster(reference.pixel_pieces(x, v.shape[0]), v, shift, groups, norm)
    return found


_NON_FINITE = (
    "deep_reuse got an input that is infinite or not a number, whose hash would mean nothing; lower the learning rate, "
    "check the data, or resume from the last checkpoint."
)


@torch.library.custom_op("hasten::deep_reuse_cluster", mutates_args=())
def deep_reuse_cluster(
    x: Tensor, v: Tensor, shift: Tensor | None, groups: int, norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the `Clusters` of x (B, C, H, W) in pieces of L channels, by the hash vectors v (L, H).

    shift (C / L, H): thresholds of the projections, or None for 0; with ``norm`` of those of unit vectors. groups: equal
    parts of the batch that share no clusters. norm: cluster unit vectors. Rows beyond those in use are undefined. Raises UnsupportedError for sizes that
    do not fit, NonFiniteError for infinite values and NaN.
    """
    return _by_reference(x, v, shift, groups, norm)


@deep_reuse_cluster.register_fake
def _(x: Tensor, v: Tensor, shift: Tensor | None, groups: int, norm: bool) -> Six:
    _check(x, v, groups)
    return _room(x, v.shape[0], groups, norm)


def _room(x: Tensor, length: int, groups: int, norm: bool) -> Six:
    b, c, h, w = x.shape
    blocks, pixels = c // length, b * h * w
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32

    def whole(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    rows = pixels + groups
    means = torch.empty(blocks, rows, length, dtype=dtype, device=x.device)
    scale = torch.empty((blocks, pixels) if norm else (0,), dtype=dtype, device=x.device)
    return (
        whole(blocks, pixels), whole(blocks, rows), whole(blocks, rows), whole(blocks, groups + 1), means, scale
    )  # fmt: skip


@deep_reuse_cluster.register_kernel("cpu")
def _(x: Tensor, v: Tensor, shift: Tensor | None, groups: int, norm: bool) -> Six:
    _check(x, v, groups)
    native = extension()
    if native is None or x.dtype not in _NATIVE or not x.numel() or not v.shape[1] >= 1:
        return _by_reference(x, v, shift, groups, norm)
    length, bits = v.shape
    b, c, h, w = x.shape
    found = _room(x, length, groups, norm)
    finite = torch.empty(c // length, dtype=torch.int32)
    # of the clusters' sizes only, the output's are not used
    sizes = torch.tensor([b, h, w, c, h, w, 1, 1, 1, 1, 1, 0, 0, length, bits, groups])
    none = torch.empty(0)
    limits = none if shift is None else _lanes(shift)
    native.deep_reuse_cluster(_line(x.permute(0, 2, 3, 1)), x.dtype == torch.bfloat16, _lanes(v), limits, sizes, *found,
                              finite, threads())  # fmt: skip
    if not bool(finite.all()):
        raise NonFiniteError(_NON_FINITE)
    return found


_ROOM = threading.local()


def _scratch(n: int) -> Tensor:
    """Return n floats that this thread may use until it asks again: memory fresh from the system costs more to touch."""
    held: Tensor | None = getattr(_ROOM, "floats", None)
    if held is None or held.numel() < n:
        held = _ROOM.floats = torch.empty(n)
    return held


def _lanes(columns: Tensor) -> Tensor:
    """Return (n, H) as (n, 32) with the first bit's column in the highest lane used, zeros beyond."""
    n, bits = columns.shape
    out = torch.zeros(n, 32)
    out[:, :bits] = columns.detach().flip(1)
    return out


def _line(x: Tensor) -> Tensor:
    """Return x in row-major order, detached; bfloat16 as int16 of the same bits."""
    x = x.detach().contiguous().view(-1)
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _kernel(w: Tensor) -> Tensor:
    """Return w (O, C, kh, kw) as float32 (O, kh, kw, C)."""
    return w.detach().permute(0, 2, 3, 1).to(torch.float32).contiguous()


def _sizes(shape: list[int], w: Tensor, stride: list[int], padding: list[int], found: Clusters) -> list[int]:
    o, c, kh, kw = w.shape
    b, h, width = shape
    high, wide = (h + 2 * padding[0] - kh) // stride[0] + 1, (width + 2 * padding[1] - kw) // stride[1] + 1
    return [
        b,
        h,
        width,
        c,
        high,
        wide,
        o,
        kh,
        kw,
        *stride,
        *padding,
        found.means.shape[-1],
        1,
        found.starts.shape[1] - 1,
    ]


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _triple(values: list[int]) -> tuple[int, int, int]:
    return values[0], values[1], values[2]


def _output_by_reference(
    found: Clusters,
    w: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    first: Tensor | None,
    shape: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    how = (_triple(shape), _pair(stride), _pair(padding))
    if z is not None:
        assert first is not None
        y = reference.pixel_assembled(found, z, first, w, bias, *how)
    else:
        y = reference.pixel_output(found, w, bias, *how)
    return y.to(w.dtype).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("hasten::deep_reuse_output", mutates_args=())
def deep_reuse_output(
    clusters: Sequence[Tensor],
    w: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    first: Tensor | None,
    shape: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """Return the output (B, O, H', W'), in channels_last and the dtype of w, for `Clusters` of an input (B, C, H, W).

    shape: [B, H, W]. z (rows of all blocks, taps, O) with first (blocks + 1,): products to assemble, or None to compute
    them from w (O, C, kh, kw).
    """
    found = Clusters(*clusters)
    return _output_by_reference(found, w, bias, z, first, shape, stride, padding)


@deep_reuse_output.register_fake
def _(
    clusters: Sequence[Tensor],
    w: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    first: Tensor | None,
    shape: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    return _empty_output(_sizes(shape, w, stride, padding, Clusters(*clusters)), w)


def _empty_output(sizes: list[int], w: Tensor) -> Tensor:
    b, _, _, _, high, wide, o = sizes[:7]
    return w.new_empty(b, high, wide, o).permute(0, 3, 1, 2)


@deep_reuse_output.register_kernel("cpu")
def _(
    clusters: Sequence[Tensor],
    w: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    first: Tensor | None,
    shape: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    native = extension()
    found = Clusters(*clusters)
    if (
        native is None
        or w.dtype not in _NATIVE
        or found.means.dtype != torch.float32
        or not found.ids.numel()
    ):
        return _output_by_reference(found, w, bias, z, first, shape, stride, padding)
    sizes = _sizes(shape, w, stride, padding, found)
    y = _empty_output(sizes, w)
    none = torch.empty(0)
    native.deep_reuse_output(
        _kernel(w),
        none if bias is None else bias.detach().float().contiguous(),
        none if z is None else z.detach().contiguous(),
        torch.empty(0, dtype=torch.int64) if first is None else first.contiguous(),
        torch.tensor(sizes), *_plain(found), _line(y.permute(0, 2, 3, 1)), w.dtype == torch.bfloat16, threads(),
    )  # fmt: skip
    return y


def _plain(found: Clusters) -> tuple[Tensor, ...]:
    return tuple(t.detach().contiguous() for t in found)


@torch.library.custom_op("hasten::deep_reuse_gradients", mutates_args=())
def deep_reuse_gradients(
    grad_output: Tensor,
    clusters: Sequence[Tensor],
    w: Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (grad_input (B, C, H, W), grad_weight (O, C, kh, kw)), in channels_last; (0,) where not wanted.

    The sums of grad_output over the clusters serve both, so that asking for both costs little more than one.
    """
    found = Clusters(*clusters)
    return _gradients_by_reference(grad_output, found, w, shape, stride, padding, to_input, to_weight)


def _gradients_by_reference(
    grad_output: Tensor,
    found: Clusters,
    w: Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    gx, gw = reference.pixel_gradients(grad_output, found, w, _triple(shape), _pair(stride), _pair(padding))
    last = torch.channels_last
    return (
        gx.to(w.dtype, memory_format=last, copy=True) if to_input else w.new_empty(0),
        gw.to(w.dtype, memory_format=last, copy=True) if to_weight else w.new_empty(0),
    )


def _empty_gradients(w: Tensor, shape: list[int], to_input: bool, to_weight: bool) -> tuple[Tensor, Tensor]:
    b, h, width = shape
    o, c, kh, kw = w.shape
    return (
        w.new_empty(b, h, width, c).permute(0, 3, 1, 2) if to_input else w.new_empty(0),
        w.new_empty(o, kh, kw, c).permute(0, 3, 1, 2) if to_weight else w.new_empty(0),
    )


@deep_reuse_gradients.register_fake
def _(
    grad_output: Tensor,
    clusters: Sequence[Tensor],
    w: Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(w, shape, to_input, to_weight)


@deep_reuse_gradients.register_kernel("cpu")
def _(
    grad_output: Tensor,
    clusters: Sequence[Tensor],
    w: Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    native = extension()
    found = Clusters(*clusters)
    fits = (
        w.dtype in _NATIVE
        and grad_output.dtype == w.dtype
        and found.means.dtype == torch.float32
        and found.ids.numel()
    )
    if native is None or not fits:
        return _gradients_by_reference(grad_output, found, w, shape, stride, padding, to_input, to_weight)
    sizes = torch.tensor(_sizes(shape, w, stride, padding, found))
    grad_x, grad_w = _empty_gradients(w, shape, to_input, to_weight)
    into = grad_w.permute(0, 2, 3, 1).view(-1) if to_weight else grad_w
    floats = into if into.dtype == torch.float32 else torch.empty(into.shape, dtype=torch.float32)
    native.deep_reuse_gradients(
        _line(grad_output.permute(0, 2, 3, 1)), w.dtype == torch.bfloat16, _kernel(w), sizes, *_plain(found),
        _line(grad_x.permute(0, 2, 3, 1) if to_input else grad_x), floats,
        _scratch(native.deep_reuse_scratch(sizes)), threads(),
    )  # fmt: skip
    if floats is not into:
        into.copy_(floats)
    return grad_x, grad_w


@deep_reuse_cluster.register_kernel("cuda")
def _(x: Tensor, v: Tensor, shift: Tensor | None, groups: int, norm: bool) -> Six:
    _check(x, v, groups)
    if x.dtype not in _NATIVE or not x.numel() or not v.shape[1]:
        return _by_reference(x, v, shift, groups, norm)
    from hasten.kernels.gpu import deep_reuse as gpu

    if not bool(x.isfinite().all()):
        raise NonFiniteError(_NON_FINITE)
    found = gpu.cluster(x, v, shift, groups, norm)
    return found


@deep_reuse_output.register_kernel("cuda")
def _(
    clusters: Sequence[Tensor],
    w: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    first: Tensor | None,
    shape: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    found = Clusters(*clusters)
    if w.dtype not in _NATIVE or found.means.dtype != torch.float32 or not found.ids.numel():
        return _output_by_reference(found, w, bias, z, first, shape, stride, padding)
    from hasten.kernels.gpu import deep_reuse as gpu

    if z is None or first is None:
        z, first = reference.pixel_products(found, w)
    y = _empty_output(_sizes(shape, w, stride, padding, found), w)
    gpu.output(found, z, first, w, bias, _triple(shape), _pair(stride), _pair(padding), y)
    return y


@deep_reuse_gradients.register_kernel("cuda")
def _(
    grad_output: Tensor,
    clusters: Sequence[Tensor],
    w: Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    found = Clusters(*clusters)
    if w.dtype not in _NATIVE or found.means.dtype != torch.float32 or not found.ids.numel():
        return _gradients_by_reference(grad_output, found, w, shape, stride, padding, to_input, to_weight)
    from hasten.kernels.gpu import deep_reuse as gpu

    return gpu.gradients(
        grad_output, found, w, _triple(shape), _pair(stride), _pair(padding), to_input, to_weight
    )
