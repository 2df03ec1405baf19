"""Follow every channel of a network from the layer that makes it to all that hold or read it.

The network is traced by torch.fx on a copy without data (the meta device), so the network in training is only read.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from hasten.errors import UnsupportedSurgeryError
from hasten.products import uninstall
from hasten.surgery import rules
from hasten.surgery.labels import Array, Labels, Layout


@dataclass(eq=False)
class Slot:
    """One channel dimension of a module or loose parameter: ``labels[i]`` lies at position i.

    role: "out" and "in" of a convolution or linear layer, "norm" of what has one entry a channel, "axisN" of a loose
    parameter, or a name that the module itself understands in ``cut_channels(role, index)``.
    """

    module: str
    role: str
    labels: Array


@dataclass(eq=False)
class Tie:
    """Channels that lie in ``parts`` equal parts, each of which must keep the same number."""

    name: str
    labels: Array
    parts: int


@dataclass(eq=False)
class Channels:
    """What a trace found. ``classes[label]`` is the class of a label: what must come and go together."""

    slots: dict[tuple[str, str], Slot]
    classes: Array
    maker: list[str]
    protected: dict[int, str]
    ties: list[Tie]
    graph: fx.Graph
    warnings: dict[str, str] = field(default_factory=dict)

    def outputs(self, layer: str) -> Array:
        """Return the class of each output channel of ``layer``. Raises UnsupportedSurgeryError if it has none."""
        slot = self.slots.get((layer, "out"))
        if slot is None:
            made = sorted(name for name, role in self.slots if role == "out")
            raise UnsupportedSurgeryError(
                f"layer {layer!r} makes no channels that can be changed; layers that do: {', '.join(made) or 'none'}."
            )
        return self.classes[slot.labels]

    def inputs(self, layer: str) -> Array:
        """Return the class of each input channel of ``layer`` (of each input feature of a linear layer)."""
        slot = self.slots.get((layer, "in"))
        if slot is None:
            raise UnsupportedSurgeryError(f"layer {layer!r} reads no channels that are followed.")
        return self.classes[slot.labels]

    def why_not(self, layer: str) -> str | None:
        """Return why no output channel of ``layer`` can be removed, or None."""
        if (layer, "out") not in self.slots:
            return "it makes no channels that are followed"
        return next((self.protected[c] for c in self.outputs(layer).tolist() if c in self.protected), None)

    def groups(self) -> list[list[Slot]]:
        """Return the slots that share a class, directly or through others: one list a group, in trace order."""
        of: dict[int, list[Slot]] = {}
        for slot in self.slots.values():
            merged: list[Slot] = []
            for known in np.unique(self.classes[slot.labels]).tolist():
                for other in of.get(known, []):
                    if other not in merged:
                        merged.append(other)
            merged.append(slot)
            for member in merged:
                for known in np.unique(self.classes[member.labels]).tolist():
                    of[known] = merged
        unique = {id(group): group for group in of.values()}
        return list(unique.values())


class Tracer(fx.Tracer):
    """Traces down to PyTorch's layers and to modules that say themselves how channels pass."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether to stop at ``m``."""
        own = (
            isinstance(m, nn.Conv2d | nn.Linear)
            or hasattr(m, "follow_channels")
            or hasattr(m, "passes_channels")
        )
        return own or super().is_leaf_module(m, module_qualified_name)


class Follower(fx.Interpreter):
    """Runs a traced network on tensors without data and applies the rule of every operation."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net, garbage_collect_values=False)
        self.labels = Labels()
        self.layouts: dict[fx.Node, Any] = {}
        self.slots: dict[tuple[str, str], Slot] = {}
        self.ties: list[Tie] = []
        self.warnings: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note the layout of what it returns."""
        value = super().run_node(n)
        self.env[n] = value
        layouts: list[Layout | None] = [
            found if isinstance(found := self.layouts.get(arg), Layout) else None for arg in n.all_input_nodes
        ]
        self.layouts[n] = self._layout(n, value, layouts)
        return value

    def _layout(self, n: fx.Node, value: Any, layouts: list[Layout | None]) -> Any:
        if n.op == "placeholder":
            if isinstance(value, Tensor) and value.dim() >= 2:
                return Layout(self.labels.fresh(value.shape[1], n.name, "it is the network's input"), 1)
            return None
        if n.op == "output":
            for layout in layouts:
                if layout is not None:
                    self.labels.protect(layout.labels, "it is the network's output")
            return None
        if n.op == "get_attr":
            return None
        if n.op == "call_module":
            return rules.module(self, n, layouts)
        return rules.call(self, n, layouts)

    # -- what rules use
    def value(self, node: fx.Node) -> Any:
        """Return the value (without data) of a node that has run."""
        return self.env[node]

    def layer(self, name: str) -> nn.Module:
        """Return the module called ``name``."""
        found: nn.Module = self.submodules[name]
        return found

    def slot(self, name: str, role: str, labels: Array) -> None:
        """Note that ``labels`` lie along a dimension of ``name``; a module that runs twice joins them."""
        known = self.slots.get((name, role))
        if known is None:
            self.slots[name, role] = Slot(name, role, labels)
        else:
            self.labels.join(known.labels, labels)

    def outputs(self, name: str, count: int) -> Array:
        """Return the labels of what ``name`` makes, the same ones whenever it runs."""
        if (name, "out") not in self.slots:
            self.slots[name, "out"] = Slot(name, "out", self.labels.fresh(count, name))
        return self.slots[name, "out"].labels

    def tie(self, name: str, labels: Array, parts: int) -> None:
        """Note that ``labels`` lie in equal parts that must stay equal."""
        self.ties.append(Tie(name, labels, parts))

    def warn(self, name: str, text: str) -> None:
        """Note something the user should know before channels of ``name`` go."""
        self.warnings[name] = text


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose tensors have no data (meta device), without plans and hooks.

    Shared parameters and buffers stay shared in it.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(empty(parameter), parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = empty(buffer)
    made: nn.Module = copy.deepcopy(model, memo)
    for module in made.modules():
        uninstall(module)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    return made


def empty(tensor: Tensor) -> Tensor:
    """Return a tensor like this one on the meta device."""
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def follow(model: nn.Module, sample: Tensor) -> Channels:
    """Trace ``model`` for inputs like ``sample`` (N, C, H, W); both may be on the meta device.

    Raises UnsupportedSurgeryError that says where tracing stopped and what still works.
    """
    copied = twin(model).eval()
    try:
        net = fx.GraphModule(copied, Tracer().trace(copied))
        follower = Follower(net)
        with torch.no_grad():
            follower.run(empty(sample[:1]))
    except UnsupportedSurgeryError:
        raise
    except Exception as error:  # anything the user's forward can do
        raise UnsupportedSurgeryError(
            f"the channels of {type(model).__name__} cannot be followed: {_where(error)}{type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}. Its shape stays as it is; methods that do "
            f"not change it still work. Decisions in forward that depend on data, and sizes read from it, must go."
        ) from error
    _guard(copied, follower)
    classes = follower.labels.classes()
    return Channels(follower.slots, classes, follower.labels.maker, follower.labels.protected(), follower.ties,
                    net.graph, follower.warnings)  # fmt: skip


def _where(error: Exception) -> str:
    """Return the innermost line of the model's own code in the traceback, as text."""
    place, step = "", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if code.co_name == "forward" and "/torch/" not in code.co_filename:
            place = f"at {code.co_filename.rsplit('/', 1)[-1]}:{step.tb_lineno}, "
        step = step.tb_next
    return place


def _guard(model: nn.Module, follower: Follower) -> None:
    """Protect the channels of tensors that two modules share, and of modules with parameters nobody followed."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        if len(names) > 1:
            for (module_name, _), slot in follower.slots.items():
                if module_name in names:
                    follower.labels.protect(slot.labels, f"a parameter is shared by {' and '.join(names)}")
