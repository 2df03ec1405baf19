"""Batch norm, ReLU, pooling and dropout that keep for the backward pass only what it needs.

Lossy: the input of batch norm, by a codec; its statistics are exact. Exact: ReLU and dropout keep one bit for each element,
max pooling the place in its window as one byte for each output, average pooling nothing. Each computes what PyTorch's
module computes, bit for bit, forward and (but for batch norm's rounded input) backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from hasten.kernels.bit_mask import bit_mask, masked, relu_mask, relu_mask_
from hasten.kernels.native import dense
from hasten.methods.products.compressed_codec import GroupCodec, first_order_only

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
EXACT = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout)


class Compressed:
    """The forward of one module, set on the instance: the class stays what it was, for whoever asks for it.

    Outside training, without gradients, and wherever the class has changed since, the class's own forward runs.
    """

    def __init__(self, module: nn.Module, codec: GroupCodec | None) -> None:
        self.module, self.kind, self.codec = module, type(module), codec

    def __call__(self, input: Tensor) -> Tensor:
        """Return what the module's class returns."""
        module = self.module
        plain: Callable[[nn.Module, Tensor], Tensor] = type(module).forward
        if (
            not (module.training and torch.is_grad_enabled())
            or input.is_meta
            or type(module) is not self.kind
        ):
            return plain(module, input)
        run = _RUNS[self.kind]
        result = run(module, input, self.codec)
        return plain(module, input) if result is None else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Compressed:
        """Return the forward of the copied module; the codec belongs to the method and is shared."""
        twin = Compressed(copy.deepcopy(self.module, memo), self.codec)
        twin.kind = self.kind
        return twin


def compress(module: nn.Module, codec: GroupCodec | None = None) -> None:
    """Have ``module``, exactly one of `BATCH_NORMS` or `EXACT`, keep less. `restore` takes it back."""
    module.forward = Compressed(module, codec)


def restore(module: nn.Module) -> None:
    """Give ``module`` its class's forward again, if it was changed by `compress`."""
    if isinstance(module.__dict__.get("forward"), Compressed):
        del module.forward


def why_plain(module: nn.Module) -> str | None:
    """Return why ``module`` cannot be changed by `compress`, or None."""
    if type(module) not in _RUNS:
        return f"a {type(module).__name__} is none of {', '.join(k.__name__ for k in _RUNS)}"
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Compressed):
        return "its forward was replaced on the instance"
    if isinstance(module, nn.MaxPool2d):
        if module.return_indices:
            return "it returns its indices"
        kernel = _pair(module.kernel_size)
        if kernel[0] * kernel[1] > 128:
            return f"a place in its window of {kernel[0]}x{kernel[1]} does not fit into one byte"
    if isinstance(module, nn.Dropout) and not 0 < module.p < 1:
        return f"p={module.p} draws nothing"
    return None


# -- batch norm
class _BatchNorm(Function):
    """Keeps codes of the normalised input (our choice; the authors keep the input's).

    A group of codes may span channels whose variances differ by far. The input's rounding error, which is that of the
    largest, would then be multiplied by the inverse deviation of the smallest, and gradients would grow from layer to
    layer; normalised channels have one scale.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, mean, var, momentum, eps, codec = args
        y, batch_mean, inverse_std = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        if any(ctx.needs_input_grad[:3]):
            stored, ctx.meta = codec.encode(x, inverse_std.float(), (-batch_mean * inverse_std).float())
            ctx.save_for_backward(weight, batch_mean, inverse_std, *stored)
        ctx.codec, ctx.eps = codec, eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first_order_only()
        weight, mean, inverse_std, *stored = ctx.saved_tensors
        x = ctx.codec.decode(tuple(stored), ctx.meta)
        needed = ctx.needs_input_grad[:3]
        if ctx.meta is not None:
            # the same as a batch norm whose input has mean 0 and deviation 1, and whose weight holds the true deviation
            weight = inverse_std if weight is None else weight * inverse_std
            mean, inverse_std = torch.zeros_like(mean), torch.ones_like(inverse_std)
        found = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, None, None, mean, inverse_std, True, ctx.eps, needed
        )
        gradients = [g if wanted else None for g, wanted in zip(found, needed, strict=True)]
        return (*gradients, None, None, None, None, None)


def _batch_norm(module: nn.Module, x: Tensor, codec: GroupCodec | None) -> Tensor | None:
    assert isinstance(module, BATCH_NORMS)
    assert codec is not None
    norm: nn.BatchNorm2d = module  # type: ignore[assignment]
    trains = x.requires_grad or (norm.weight is not None and norm.weight.requires_grad)
    if not trains or x.dim() < 3 or x.numel() == len(x[0]) or codec.why_exact(x) is not None:
        return None
    norm._check_input_dim(x)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    result: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum, norm.eps, codec
    )
    return result


# -- ReLU and dropout: one bit for each element
def _order(x: Tensor) -> tuple[int, ...]:
    """Return the strides of ``x``, or those of its contiguous copy where its memory has gaps."""
    return dense(x).stride()


def _in_order(g: Tensor, stride: tuple[int, ...]) -> Tensor:
    if g.stride() == stride:
        return g
    return torch.empty_strided(g.shape, stride, dtype=g.dtype, device=g.device).copy_(g)


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, inplace = args
        ctx.stride = _order(x)
        y: Tensor
        if inplace:
            mask = relu_mask_(x)
            ctx.mark_dirty(x)
            y = x
        else:
            y, mask = relu_mask(x)
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first_order_only()
        return masked(ctx.saved_tensors[0], _in_order(grads[0], ctx.stride)), None


def _relu(module: nn.Module, x: Tensor, codec: GroupCodec | None) -> Tensor | None:
    assert isinstance(module, nn.ReLU)
    # a view that is changed in place has a history of its own, which autograd alone can write
    if not x.requires_grad or not x.is_floating_point() or (module.inplace and (x._is_view() or x.is_leaf)):
        return None
    result: Tensor = _ReLU.apply(x, module.inplace)  # type: ignore[no-untyped-call]
    return result


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, p = args
        # the same draws from the same generator as PyTorch's own
        if x.is_cuda:
            y, kept = torch.native_dropout(x, p, True)
            noise, ctx.scale = kept.to(x.dtype), 1.0 / (1.0 - p)
        else:
            noise = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
            y, ctx.scale = x * noise, torch.ones((), dtype=x.dtype).div_(1 - p).item()
        ctx.stride = _order(noise)
        ctx.save_for_backward(bit_mask(noise))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first_order_only()
        return masked(ctx.saved_tensors[0], _in_order(grads[0], ctx.stride), ctx.scale), None


def _dropout(module: nn.Module, x: Tensor, codec: GroupCodec | None) -> Tensor | None:
    assert isinstance(module, nn.Dropout)
    if not x.requires_grad or module.inplace or not 0 < module.p < 1:
        return None
    result: Tensor = _Dropout.apply(x, module.p)  # type: ignore[no-untyped-call]
    return result


# -- pooling
def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], bool]


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, window = args
        y, index = F.max_pool2d_with_indices(x, *window)
        first, offsets = _window_indices(x.shape, y.shape, window, x.device)
        places = torch.zeros(int(offsets[-1]) + 1, dtype=torch.int8, device=x.device)
        places[offsets] = torch.arange(len(offsets), dtype=torch.int8, device=x.device)
        ctx.save_for_backward(_taken(places, index.sub_(first)))
        ctx.like = (x.shape, x.stride(), x.dtype, window)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first_order_only()
        shape, stride, dtype, window = ctx.like
        place, g = ctx.saved_tensors[0], grads[0]
        first, offsets = _window_indices(shape, place.shape, window, g.device)
        index = _taken(offsets, place).add_(first)
        # only the shape and the format of this matter, so its memory is not touched
        like = torch.empty_strided(shape, stride, dtype=g.dtype, device=g.device)
        found = torch.ops.aten.max_pool2d_with_indices_backward(g, like, *window, index)
        return found.to(dtype), None


def _taken(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table[index]`` with the strides of dense ``index``, which ``take`` would make contiguous."""
    result = torch.empty_like(index, dtype=table.dtype)
    n = index.numel()
    result.as_strided((n,), (1,)).copy_(table.take(index.as_strided((n,), (1,)).long()))
    return result


def _window_indices(
    given: torch.Size, output: torch.Size, window: Window, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the index in the input's map of the first place of each window, (OH, OW), and those of all, (K,), from it."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = window
    width = given[-1]

    def line(n: int) -> Tensor:
        return torch.arange(n, device=device)

    first = ((line(output[-2]) * sh - ph) * width)[:, None] + (line(output[-1]) * sw - pw)
    offsets = (line(kh) * dh * width)[:, None] + line(kw) * dw
    return first, offsets.flatten()


def _max_pool(module: nn.Module, x: Tensor, codec: GroupCodec | None) -> Tensor | None:
    assert isinstance(module, nn.MaxPool2d)
    kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
    window = (kernel, _pair(module.stride), _pair(module.padding), dilation, module.ceil_mode)
    if not x.requires_grad or x.dim() != 4 or (kernel[1] - 1) * dilation[1] >= x.shape[-1]:
        return None  # of a window wider than the map, two places would share an index
    result: Tensor = _MaxPool.apply(x, window)  # type: ignore[no-untyped-call]
    return result


class _AvgPool(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, settings = args
        ctx.like = (x.shape, x.stride(), x.dtype, settings)
        return F.avg_pool2d(x, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first_order_only()
        shape, stride, dtype, settings = ctx.like
        like = torch.empty_strided(shape, stride, dtype=grads[0].dtype, device=grads[0].device)
        return torch.ops.aten.avg_pool2d_backward(grads[0], like, *settings).to(dtype), None


def _avg_pool(module: nn.Module, x: Tensor, codec: GroupCodec | None) -> Tensor | None:
    assert isinstance(module, nn.AvgPool2d)
    if not x.requires_grad or x.dim() != 4:
        return None
    sizes = [_pair(v) for v in (module.kernel_size, module.stride, module.padding)]
    settings = (*sizes, module.ceil_mode, module.count_include_pad, module.divisor_override)
    result: Tensor = _AvgPool.apply(x, settings)  # type: ignore[no-untyped-call]
    return result


_RUNS: dict[type[nn.Module], Callable[[nn.Module, Tensor, GroupCodec | None], Tensor | None]] = {
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    nn.ReLU: _relu,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.Dropout: _dropout,
}
