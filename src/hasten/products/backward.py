"""The backward pass of a planned layer: which operands meet in which gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hasten.products import arithmetic
from hasten.products.arithmetic import Geometry, Saved
from hasten.products.gather import put, take
from hasten.products.pieces import Selection, Transform
from hasten.products.plan import Recipe

Needed = tuple[bool, bool, bool]  # grad_input, grad_weight, bias gradient
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Kept(NamedTuple):
    """What the forward pass left: x and w as they entered the output product.

    They are shrunk to the ``chosen`` in_channels; ``width`` is their number before the selection. The
    values of x are undefined where nothing needs them.
    """

    x: Tensor
    w: Tensor
    width: int
    chosen: Selection | None = None
    extras: tuple[Tensor, ...] = ()


def gradients(
    grad_output: Tensor, kept: Kept, recipe: Recipe, geometry: Geometry, needed: Needed
) -> Gradients:
    """Return the gradients of x, w and bias, each where ``needed``, in the shapes before any selection."""
    work = _together if recipe.joint else _apart
    grad_input, grad_weight, grad_bias = work(grad_output, kept, recipe, geometry, needed)
    if grad_input is not None:
        grad_input = _through(recipe.grad_input, grad_input)
    if grad_weight is not None:
        grad_weight = _through(recipe.grad_weight, grad_weight)
    chosen = kept.chosen
    if chosen is not None:
        dim, index = geometry.channel_dim, chosen.index
        if grad_input is not None:
            grad_input = scaled(grad_input, chosen.scale, dim)
            grad_input = put(grad_input, dim, index, kept.width, block=chosen.block, repeats=chosen.repeats)
        if grad_weight is not None:
            grad_weight = put(grad_weight, 1, index, kept.width, block=chosen.block, repeats=chosen.repeats)
    return grad_input, grad_weight, grad_bias


def scaled(tensor: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    """Return ``tensor`` with its slices along ``dim`` multiplied by ``scale``."""
    if scale is None:
        return tensor
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return tensor * scale.to(tensor.dtype).view(shape)


def _together(
    grad_output: Tensor, kept: Kept, recipe: Recipe, geometry: Geometry, needed: Needed
) -> Gradients:
    """Compute all gradients from one set of operands, in one call, as PyTorch does."""
    to_input, to_weight, to_bias = needed
    seen = _transformed(grad_output, recipe, 1)
    rows = recipe.out_input(seen, kept.w) if recipe.out_input is not None else None
    operand = _rows(seen, rows, geometry)
    if not (to_input or to_weight):
        return None, None, _spread(arithmetic.grad_bias(operand, geometry), rows, kept) if to_bias else None
    w = kept.w if rows is None else take(kept.w, 0, rows.index)
    with_bias = to_bias and to_weight  # without to_weight x may be undefined, and the op reads it for both
    mask = (to_input, to_weight, with_bias)
    grad_input, grad_weight, grad_bias = arithmetic.gradients(operand, kept.x, w, geometry, mask)
    if to_bias and not with_bias:
        grad_bias = arithmetic.grad_bias(operand, geometry)
    return grad_input, _spread(grad_weight, rows, kept), _spread(grad_bias, rows, kept)


def _apart(grad_output: Tensor, kept: Kept, recipe: Recipe, geometry: Geometry, needed: Needed) -> Gradients:
    """Compute each gradient from its own operands, by its own kernel."""
    to_input, to_weight, to_bias = needed
    grad_input = grad_weight = grad_bias = None
    rows = None
    if to_input or recipe.out_shared:
        seen = _transformed(grad_output, recipe, 1)
        rows = recipe.out_input(seen, kept.w) if recipe.out_input is not None else None
        if to_input:
            w = kept.w if rows is None else take(kept.w, 0, rows.index)
            kernel = recipe.grad_input_kernel or arithmetic.grad_input
            saved = Saved(kept.x, w, kept.extras)
            grad_input = kernel(_rows(seen, rows, geometry), w, geometry, saved)
    if to_weight or to_bias:
        seen = _transformed(grad_output, recipe, 2)
        if not recipe.out_shared:
            rows = recipe.out_weight(seen, kept.w) if recipe.out_weight is not None else None
        operand = _rows(seen, rows, geometry)
        if to_weight:
            w = kept.w if rows is None else take(kept.w, 0, rows.index)
            grad_weight, grad_bias = _weight(operand, w, kept, recipe, geometry, to_bias=to_bias)
        if to_bias and grad_bias is None:
            grad_bias = arithmetic.grad_bias(operand, geometry)
    return grad_input, _spread(grad_weight, rows, kept), _spread(grad_bias, rows, kept)


def _weight(
    operand: Tensor, w_like: Tensor, kept: Kept, recipe: Recipe, geometry: Geometry, *, to_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the computed rows of grad_weight, and of the bias gradient where the same op yields it."""
    x = kept.x
    batch = recipe.batch(x, operand) if recipe.batch is not None else None
    if batch is not None:
        x = scaled(take(x, 0, batch.index), batch.scale, 0)
        operand = take(operand, 0, batch.index)
    if recipe.grad_weight_kernel is not None:
        return recipe.grad_weight_kernel(operand, x, geometry, Saved(x, w_like, kept.extras)), None
    mask = (False, True, to_bias and batch is None)  # the bias gradient sums over all examples
    _, grad_weight, grad_bias = arithmetic.gradients(operand, x, w_like, geometry, mask)
    assert grad_weight is not None
    return grad_weight, grad_bias


def _through(transforms: tuple[Transform, ...], tensor: Tensor) -> Tensor:
    for transform in transforms:
        tensor = transform(tensor)
    return tensor


def _transformed(grad_output: Tensor, recipe: Recipe, side: int) -> Tensor:
    """Return grad_output as grad_input (side 1) or grad_weight (side 2) sees it."""
    for entry in recipe.grad_output:
        if entry[side]:
            grad_output = entry[0](grad_output)
    return grad_output


def _rows(grad_output: Tensor, rows: Selection | None, geometry: Geometry) -> Tensor:
    if rows is None:
        return grad_output
    dim = geometry.channel_dim
    return scaled(take(grad_output, dim, rows.index, rows.block), rows.scale, dim)


def _spread(gradient: Tensor | None, rows: Selection | None, kept: Kept) -> Tensor | None:
    """Put the computed rows of the weight or bias gradient among rows of zeros."""
    if gradient is None or rows is None:
        return gradient
    return put(gradient, 0, rows.index, kept.w.shape[0], repeats=rows.repeats)
