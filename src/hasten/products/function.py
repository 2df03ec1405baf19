"""The autograd function that runs a layer's three products as its recipe says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten import errors
from hasten.products import arithmetic, backward
from hasten.products.arithmetic import Geometry
from hasten.products.gather import take
from hasten.products.pieces import Selection, Transform
from hasten.products.plan import Recipe


class _StraightThrough(torch.autograd.Function):
    """Applies one transform; its gradient is passed through unchanged."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, transform: Transform) -> Tensor:
        result = transform(tensor)
        return tensor.view_as(tensor) if result is tensor else result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def _not_a_view(y: Tensor) -> Tensor:
    """Return y, a view of memory that nothing else sees, as a tensor of its own: modules after it may work in place."""
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.size(), y.stride())


class _ThreeProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, w, bias, recipe, geometry = args
        dim = geometry.channel_dim
        width = x.shape[dim]
        chosen = recipe.in_channels(x, w) if recipe.in_channels is not None else None
        if chosen is not None:
            x = backward.scaled(take(x, dim, chosen.index, chosen.block), chosen.scale, dim)
            w = take(w, 1, chosen.index, chosen.block)
        extras: tuple[Tensor, ...] = ()
        if recipe.output_kernel is None:
            y = arithmetic.output(x, w, bias, geometry)
        else:
            y, extras = recipe.output_kernel(x, w, bias, geometry)
            if y._is_view() and not torch.compiler.is_compiling():
                y = _not_a_view(y)

        kernel = recipe.grad_weight_kernel
        stored: tuple[Tensor, ...] = ()
        ctx.meta = None
        if ctx.needs_input_grad[1] and (kernel is None or kernel.needs_x or recipe.batch is not None):
            if recipe.codec is None:
                stored = (x,)
            else:
                stored, ctx.meta = recipe.codec.encode(x)
        where: tuple[Tensor, ...] = ()
        ctx.selection = None
        if chosen is not None:
            where = (chosen.index,) if chosen.scale is None else (chosen.index, chosen.scale)
            ctx.selection = (chosen.block, chosen.repeats)
        ctx.save_for_backward(w, *stored, *where, *extras)
        ctx.counts = (len(stored), len(where))
        ctx.sizes = (x.shape, x.stride(), width)
        ctx.recipe = recipe
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_output: Tensor = grads[0]
        recipe: Recipe = ctx.recipe
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise errors.UnsupportedError(
                "a gradient of a gradient (create_graph=True) was asked for through a layer whose products "
                "follow a plan; they have first gradients only. Deactivate the methods for that pass."
            )
        stored, where = ctx.counts
        w, *rest = ctx.saved_tensors
        shape, stride, width = ctx.sizes
        if not stored:
            # The op asks for an x where only its shape and strides matter. Untouched memory costs no traffic.
            x = torch.empty_strided(shape, stride, dtype=w.dtype, device=w.device)
        elif recipe.codec is None:
            x = rest[0]
        else:
            recipe.codec.observe(grad_output)
            x = recipe.codec.decode(tuple(rest[:stored]), ctx.meta)
        chosen = None
        if ctx.selection is not None:
            scale = rest[stored + 1] if where == 2 else None
            chosen = Selection(rest[stored], scale, ctx.selection[0], ctx.selection[1])
        kept = backward.Kept(x, w, width, chosen, tuple(rest[stored + where :]))
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        gradients = backward.gradients(grad_output, kept, recipe, ctx.geometry, needed)
        return (*gradients, None, None)


def three_products(x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe, geometry: Geometry) -> Tensor:
    """Return the layer's output, x (N, C, H, W) or (..., C), whose backward pass follows ``recipe`` too.

    Raises `UnsupportedError` in a backward pass with ``create_graph=True``.
    """
    x, w = _transform(recipe.x, x), _transform(recipe.w, w)
    y: Tensor = _ThreeProducts.apply(x, w, bias, recipe, geometry)  # type: ignore[no-untyped-call]
    return _transform(recipe.output, y)


def _transform(transforms: tuple[Transform, ...], tensor: Tensor) -> Tensor:
    for transform in transforms:
        if getattr(transform, "differentiable", False):
            tensor = transform(tensor)
        else:
            tensor = _StraightThrough.apply(tensor, transform)  # type: ignore[no-untyped-call]
    return tensor
