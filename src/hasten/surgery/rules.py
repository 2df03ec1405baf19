"""What each operation does with the channels of its inputs: passes them on, joins, lays side by side, or hides them.

A rule gets the follower, the node and the layouts of its tensor inputs, and returns the layout of its output (a list of
layouts for an operation that returns several tensors). ``None`` stands for a value without channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, fx, nn

from hasten.surgery.labels import Layout

if TYPE_CHECKING:
    from hasten.surgery.trace import Follower

Found = Layout | list[Layout | None] | None
Rule = Callable[["Follower", fx.Node, list[Layout | None]], Found]

PASSING = frozenset(
    [
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "softplus",
        "softsign",
        "logsigmoid",
        "sigmoid",
        "tanh",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "threshold",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "lp_pool2d",
        "interpolate",
        "upsample",
        "clamp",
        "clip",
        "abs",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "square",
        "neg",
        "pos",
        "clone",
        "detach",
        "contiguous",
        "to",
        "type",
        "float",
        "double",
        "half",
        "bfloat16",
        "cpu",
        "cuda",
        "type_as",
        "requires_grad",
        "fake_quantize",
        "nan_to_num",
        "reciprocal",
    ]
)
BINARY = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "pow",
        "maximum",
        "minimum",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "radd",
        "rsub",
        "rmul",
    ]
)
REDUCING = frozenset(["mean", "sum", "amax", "amin", "max_over", "std", "var"])
SCALAR = frozenset(["size", "shape", "dim", "numel", "getattr", "ndim", "len", "device", "dtype"])
PASSING_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Sigmoid, nn.Tanh, nn.Threshold, nn.Identity, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.MaxPool2d, nn.AvgPool2d,
    nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.FractionalMaxPool2d, nn.Upsample, nn.ZeroPad2d,
    nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d,
)  # fmt: skip


def op_name(node: fx.Node) -> str:
    """Return the bare name of what a node calls, without the underscores of in-place and operator forms."""
    target = node.target
    if isinstance(target, str):
        return target.strip("_")
    module = getattr(target, "__module__", None) or "torch"
    if module.split(".")[0] not in ("torch", "_operator", "operator", "builtins", "math"):
        return f"{module}.{getattr(target, '__name__', target)}"
    return str(getattr(target, "__name__", target)).strip("_")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return what a node was called with at a position or by a name."""
    return (
        node.kwargs[name]
        if name in node.kwargs
        else node.args[position]
        if len(node.args) > position
        else default
    )


# -- functions and tensor methods


def call(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    """Return the layout of the result of a function or tensor method."""
    name = op_name(node)
    if name in SCALAR or not isinstance(follow.value(node), Tensor | tuple | list):
        return None
    if name in PASSING:
        return _first(layouts)
    if name in BINARY:
        return _joined(follow, node, layouts)
    rule = FUNCTIONS.get(name)
    if rule is not None:
        return rule(follow, node, layouts)
    if name in REDUCING:
        return _reduced(follow, node, layouts)
    return hidden(follow, node, layouts, f"{name} has no rule")


def hidden(follow: Follower, node: fx.Node, layouts: list[Layout | None], why: str) -> Found:
    """Protect all that goes in; what comes out is new and protected as well."""
    for layout in layouts:
        if layout is not None:
            follow.labels.protect(layout.labels, f"{node.name}: {why}")
    value = follow.value(node)
    if isinstance(value, Tensor) and value.dim() >= 2:
        return Layout(follow.labels.fresh(value.shape[1], node.name, f"{node.name}: {why}"), 1)
    return None


def _first(layouts: list[Layout | None]) -> Layout | None:
    return next((layout for layout in layouts if layout is not None), None)


def _joined(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    """Join the operands of an elementwise operation; a loose parameter that spans the channels becomes a slot."""
    result = follow.value(node)
    known = [
        (arg, layout) for arg, layout in zip(node.all_input_nodes, layouts, strict=True) if layout is not None
    ]
    if not known:
        return None
    from_right = {result.dim() - follow.value(arg).dim() + layout.axis for arg, layout in known}
    if len(from_right) > 1:
        return hidden(follow, node, layouts, "its operands hold their channels on different axes")
    axis = from_right.pop()
    wide = [layout for _, layout in known if len(layout.labels) == result.shape[axis]]
    if any(len(layout.labels) not in (1, result.shape[axis]) for _, layout in known):
        return hidden(follow, node, layouts, "its operands have different numbers of channels")
    if not wide:
        return hidden(follow, node, layouts, "it repeats one channel")
    for layout in wide[1:]:
        follow.labels.join(wide[0].labels, layout.labels)
    for arg, own_layout in zip(node.all_input_nodes, layouts, strict=True):
        value = follow.value(arg)
        if own_layout is None and isinstance(value, Tensor):
            own = axis - (result.dim() - value.dim())
            if own >= 0 and value.shape[own] == result.shape[axis] > 1:
                if arg.op != "get_attr":
                    return hidden(follow, node, layouts, f"{arg.name} spans the channels and is not followed")
                follow.slot(str(arg.target), f"axis{own}", wide[0].labels)
    return Layout(wide[0].labels, axis)


def _concatenated(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    dim = int(argument(node, 1, "dim", 0))
    result = follow.value(node)
    dim %= result.dim()
    parts = [follow.layouts.get(arg) for arg in argument(node, 0, "tensors")]
    if any(not isinstance(part, Layout) for part in parts):
        return hidden(follow, node, layouts, "one of its operands is not followed")
    whole: list[Layout] = [part for part in parts if isinstance(part, Layout)]
    if all(part.axis == dim for part in whole):
        return Layout(np.concatenate([part.labels for part in whole]), dim)
    if all(part.axis == whole[0].axis and len(part.labels) == len(whole[0].labels) for part in whole):
        for part in whole[1:]:
            follow.labels.join(whole[0].labels, part.labels)
        return whole[0]
    return hidden(follow, node, layouts, "its operands hold their channels on different axes")


def _flattened(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    layout = _first(layouts)
    if layout is None:
        return None
    shape = follow.value(node.all_input_nodes[0]).shape
    start = int(argument(node, 1, "start_dim", 0))
    end = int(argument(node, 2, "end_dim", -1))
    return flatten(layout, tuple(shape), start % len(shape), end % len(shape))


def flatten(layout: Layout, shape: tuple[int, ...], start: int, end: int) -> Layout:
    """Return the layout after dimensions ``start`` to ``end`` of ``shape`` became one."""
    labels, axis = layout
    if axis < start:
        return layout
    if axis > end:
        return Layout(labels, axis - (end - start))
    inner, outer = math.prod(shape[axis + 1 : end + 1]), math.prod(shape[start:axis])
    return Layout(np.tile(np.repeat(labels, inner), outer), start)


def _viewed(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    """``view`` and ``reshape``: what flattens or keeps the channel axis; a number written in the code protects."""
    layout = _first(layouts)
    if layout is None:
        return None
    before, after = tuple(follow.value(node.all_input_nodes[0]).shape), tuple(follow.value(node).shape)
    given = node.args[1:] or tuple(node.kwargs.values())
    sizes: tuple[Any, ...] = (
        tuple(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else given
    )
    if len(sizes) != len(after):
        return hidden(follow, node, layouts, "its sizes are computed in a way that is not followed")
    axis = layout.axis
    if after[:axis] == before[:axis] and len(after) > axis and after[axis] == before[axis]:
        found, at = layout, axis
    elif axis == 1 and len(after) == 2 and after[0] == before[0]:
        found, at = flatten(layout, before, 1, len(before) - 1), 1
    else:
        return hidden(follow, node, layouts, f"it reshapes {before} to {after}")
    if isinstance(sizes[at], int) and sizes[at] != -1:
        follow.labels.protect(
            layout.labels, f"{node.name}: the code fixes {sizes[at]} channels in {op_name(node)}"
        )
    return found


def _reduced(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    layout = _first(layouts)
    if layout is None:
        return None
    rank = follow.value(node.all_input_nodes[0]).dim()
    given = argument(node, 1, "dim")
    if given is None:
        return hidden(follow, node, layouts, "it reduces over the channels")
    dims = {int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])}
    if layout.axis in dims:
        return hidden(follow, node, layouts, "it reduces over the channels")
    kept = follow.value(node).dim() == rank
    return Layout(layout.labels, layout.axis - (0 if kept else sum(d < layout.axis for d in dims)))


def _moved(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    """``permute`` and ``transpose``: the channel axis moves."""
    layout = _first(layouts)
    if layout is None:
        return None
    rank = follow.value(node.all_input_nodes[0]).dim()
    given: tuple[Any, ...] = node.args[1:] or tuple(node.kwargs.values())
    flat = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    dims = [int(d) % rank for d in flat]
    if op_name(node) == "permute":
        return Layout(layout.labels, dims.index(layout.axis))
    swap = {dims[0]: dims[1], dims[1]: dims[0]}
    return Layout(layout.labels, swap.get(layout.axis, layout.axis))


def _squeezed(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    layout = _first(layouts)
    if layout is None or len(node.args) < 2 or not isinstance(node.args[1], int):
        return hidden(follow, node, layouts, "it drops dimensions that are not named")
    value = follow.value(node.all_input_nodes[0])
    rank = value.dim() + (op_name(node) == "unsqueeze")
    dim = node.args[1] % rank
    if op_name(node) == "unsqueeze":
        return Layout(layout.labels, layout.axis + (dim <= layout.axis))
    if dim == layout.axis:
        return hidden(follow, node, layouts, "it drops the channels")
    gone = value.shape[dim] == 1
    return Layout(layout.labels, layout.axis - (gone and dim < layout.axis))


def _chunked(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    layout = _first(layouts)
    if layout is None:
        return None
    pieces = follow.value(node)
    dim = int(argument(node, 2, "dim", 0))
    rank = follow.value(node.all_input_nodes[0]).dim()
    if dim % rank != layout.axis:
        return [layout] * len(pieces)
    if op_name(node) != "chunk":
        follow.labels.protect(layout.labels, f"{node.name}: the code fixes the sizes of a split")
    sizes = [piece.shape[layout.axis] for piece in pieces]
    if len(set(sizes)) == 1:
        follow.tie(node.name, layout.labels, len(sizes))
    else:
        follow.labels.protect(layout.labels, f"{node.name}: it splits into parts of different size")
    ends = np.cumsum(sizes)[:-1]
    return [Layout(part, layout.axis) for part in np.split(layout.labels, ends)]


def _item(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    source, index = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    found: Found = follow.layouts.get(source)
    if isinstance(found, list):
        return found[int(index)]  # type: ignore[arg-type]
    if found is None:
        return None
    parts = index if isinstance(index, tuple) else (index,)
    if any(not (p is None or isinstance(p, slice | int)) for p in parts):
        return hidden(follow, node, layouts, "it is indexed in a way that is not followed")
    before = axis = 0  # axes of the input that are passed, and of the result
    for part in parts:
        if before == found.axis and part is not None:
            break
        before += part is not None
        axis += not isinstance(part, int)
    else:
        return Layout(found.labels, axis + found.axis - before)
    if part != slice(None, None, None):
        return hidden(follow, node, layouts, "the code picks channels by their number")
    return Layout(found.labels, axis)


def _padded(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    layout = _first(layouts)
    if layout is None:
        return None
    value = follow.value(node.all_input_nodes[0])
    if value.shape[layout.axis] != follow.value(node).shape[layout.axis]:
        return hidden(follow, node, layouts, "the code pads channels")
    return layout


FUNCTIONS: dict[str, Rule] = {
    "cat": _concatenated, "concat": _concatenated, "concatenate": _concatenated, "flatten": _flattened,
    "view": _viewed, "reshape": _viewed, "permute": _moved, "transpose": _moved, "squeeze": _squeezed,
    "unsqueeze": _squeezed, "chunk": _chunked, "split": _chunked, "getitem": _item, "pad": _padded,
}  # fmt: skip


# -- modules


def module(follow: Follower, node: fx.Node, layouts: list[Layout | None]) -> Found:
    """Return the layout of a module's output, noting which of its tensors hold which channels."""
    name, own = str(node.target), follow.layer(str(node.target))
    layout = _first(layouts)
    if layout is None:
        return hidden(follow, node, layouts, "its input is not followed")
    if (rule := getattr(own, "follow_channels", None)) is not None:
        return Layout(rule(follow, name, layout.labels), layout.axis)
    if isinstance(own, PASSING_MODULES) or getattr(own, "passes_channels", False):
        return layout
    if isinstance(own, nn.Flatten):
        shape = tuple(follow.value(node.all_input_nodes[0]).shape)
        return flatten(layout, shape, own.start_dim % len(shape), own.end_dim % len(shape))
    if isinstance(own, nn.Conv2d | nn.Conv1d | nn.Conv3d | nn.ConvTranspose2d):
        return _convolved(follow, node, name, own, layout)
    if isinstance(own, nn.Linear):
        if layout.axis != follow.value(node).dim() - 1:
            return hidden(follow, node, layouts, "its input holds channels on another axis than the last")
        follow.slot(name, "in", layout.labels)
        return Layout(follow.outputs(name, own.out_features), layout.axis)
    if isinstance(own, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.InstanceNorm2d):
        follow.slot(name, "norm", layout.labels)
        return layout
    if isinstance(own, nn.GroupNorm):
        follow.slot(name, "norm", layout.labels)
        follow.tie(name, layout.labels, own.num_groups)
        return layout
    if isinstance(own, nn.PReLU):
        if own.num_parameters > 1:
            follow.slot(name, "norm", layout.labels)
        return layout
    over_last = layout.axis == follow.value(node).dim() - 1
    if isinstance(own, nn.LayerNorm) and over_last and tuple(own.normalized_shape) == (len(layout.labels),):
        follow.slot(name, "norm", layout.labels)
        follow.warn(name, "a LayerNorm over channels changes its statistics when channels go")
        return layout
    return hidden(follow, node, layouts, f"a {type(own).__name__} has no rule")


def _convolved(follow: Follower, node: fx.Node, name: str, own: Any, layout: Layout) -> Found:
    if layout.axis != follow.value(node).dim() - 1 - len(own.kernel_size):
        return hidden(follow, node, [layout], "its input holds channels on another axis")
    if own.groups == 1:
        follow.slot(name, "in", layout.labels)
        return Layout(follow.outputs(name, own.out_channels), layout.axis)
    if isinstance(own, nn.ConvTranspose2d):
        return hidden(follow, node, [layout], "a grouped transposed convolution has no rule")
    if own.groups == own.in_channels:  # depthwise: each output belongs to one input
        labels = np.repeat(layout.labels, own.out_channels // own.in_channels)
        follow.slot(name, "in", layout.labels)
        follow.slot(name, "out", labels)
        return Layout(labels, layout.axis)
    follow.slot(name, "in", layout.labels)
    labels = follow.outputs(name, own.out_channels)
    follow.tie(name, layout.labels, own.groups)
    follow.tie(name, labels, own.groups)
    return Layout(labels, layout.axis)
