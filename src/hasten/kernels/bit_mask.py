"""ReLU and dropout with one bit kept for each element."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import dense, extension, flat, line, threads
from hasten.kernels.reference import bit_mask as reference

NATIVE = (torch.float32, torch.bfloat16)


def _checked(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise UnsupportedError(f"bit_mask got {x.dtype}; allowed: real floating point. Convert it first.")
    return dense(x)


def _mask(x: Tensor) -> Tensor:
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


@torch.library.custom_op("hasten::bit_mask", mutates_args=())
def bit_mask(x: Tensor) -> Tensor:
    """Return one bit for each element of ``x`` in the order of memory, packed in uint8: not (x <= 0).

    Raises UnsupportedError for what is not floating point.
    """
    return reference.bit_mask(line(_checked(x)))


@bit_mask.register_fake
def _(x: Tensor) -> Tensor:
    return _mask(_checked(x))


@bit_mask.register_kernel("cpu")
def _(x: Tensor) -> Tensor:
    x = _checked(x)
    native = extension()
    if native is None or x.dtype not in NATIVE:
        return reference.bit_mask(line(x))
    mask = _mask(x)
    native.bit_mask(flat(x), mask, threads())
    return mask


@bit_mask.register_kernel("cuda")
def _(x: Tensor) -> Tensor:
    from hasten.kernels.gpu.bit_mask import bit_mask as on_gpu

    x = _checked(x)
    mask = _mask(x)
    on_gpu(line(x), None, mask)
    return mask


@torch.library.custom_op("hasten::relu_mask", mutates_args=())
def relu_mask(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (relu(x), its `bit_mask`), in one pass; a NaN stays one."""
    x = _checked(x)
    return x.relu(), reference.bit_mask(line(x))


@relu_mask.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _checked(x)
    return torch.empty_like(x), _mask(x)


@relu_mask.register_kernel("cpu")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _checked(x)
    native = extension()
    if native is None or x.dtype not in NATIVE:
        return x.relu(), reference.bit_mask(line(x))
    y, mask = torch.empty_like(x), _mask(x)
    native.relu_mask(flat(x), flat(y), mask, threads())
    return y, mask


@relu_mask.register_kernel("cuda")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    from hasten.kernels.gpu.bit_mask import bit_mask as on_gpu

    x = _checked(x)
    y, mask = torch.empty_like(x), _mask(x)
    on_gpu(line(x), line(y), mask)
    return y, mask


@torch.library.custom_op("hasten::relu_mask_", mutates_args=("x",))
def relu_mask_(x: Tensor) -> Tensor:
    """Apply ReLU to ``x`` in place and return its `bit_mask`. Memory with gaps is taken too, by a copy of it."""
    mask: Tensor = bit_mask(x)
    x.relu_()
    return mask


@relu_mask_.register_fake
def _(x: Tensor) -> Tensor:
    return _mask(_checked(x))


@relu_mask_.register_kernel("cpu")
def _(x: Tensor) -> Tensor:
    native = extension()
    if native is None or x.dtype not in NATIVE or dense(x) is not x:
        mask: Tensor = bit_mask(x)
        x.relu_()
        return mask
    mask = _mask(x)
    native.relu_mask(flat(x), flat(x), mask, threads())
    return mask


@relu_mask_.register_kernel("cuda")
def _(x: Tensor) -> Tensor:
    from hasten.kernels.gpu.bit_mask import bit_mask as on_gpu

    if dense(x) is not x:
        mask: Tensor = bit_mask(x)
        x.relu_()
        return mask
    mask = _mask(x)
    on_gpu(line(x), line(x), mask)
    return mask


@torch.library.custom_op("hasten::masked", mutates_args=())
def masked(mask: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale * g`` where its bit of ``mask`` is set, else 0, with the strides of `dense` ``g``.

    g must lie in memory as the tensor did that the mask was made of. Raises UnsupportedError if the sizes differ.
    """
    return _by_reference(mask, _fitting(mask, g), scale)


def _fitting(mask: Tensor, g: Tensor) -> Tensor:
    g = _checked(g)
    if mask.dtype != torch.uint8 or mask.shape != ((g.numel() + 7) // 8,):
        raise UnsupportedError(
            f"masked got a mask of {mask.dtype} {tuple(mask.shape)} for {g.numel()} elements; allowed: uint8 "
            f"({(g.numel() + 7) // 8},)."
        )
    return g


def _by_reference(mask: Tensor, g: Tensor, scale: float) -> Tensor:
    y = torch.empty_like(g)
    line(y).copy_(reference.masked(mask, line(g), scale))
    return y


@masked.register_fake
def _(mask: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    return torch.empty_like(_checked(g))


@masked.register_kernel("cpu")
def _(mask: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    g = _fitting(mask, g)
    native = extension()
    if native is None or g.dtype not in NATIVE:
        return _by_reference(mask, g, scale)
    y = torch.empty_like(g)
    native.masked(mask, flat(g), flat(y), scale, threads())
    return y


@masked.register_kernel("cuda")
def _(mask: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    from hasten.kernels.gpu.bit_mask import masked as on_gpu

    g = _fitting(mask, g)
    y = torch.empty_like(g)
    on_gpu(mask, line(g), line(y), scale)
    return y
