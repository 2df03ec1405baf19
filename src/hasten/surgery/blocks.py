"""Residual blocks: which there are, what lies in their branch, and what remains when the branch goes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from hasten.models.resnet import BasicBlock, Bottleneck
from hasten.models.wrn import PreActBlock
from hasten.surgery.rules import op_name

PRODUCTS = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Branch:
    """The branch of one residual addition.

    block: name of the module around it. modules: its modules in order. end: the last of them, whose output is added.
    identity: whether the shortcut beside it has no convolution of its own.
    """

    block: str
    modules: tuple[str, ...]
    end: str
    identity: bool


def _sequence(**parts: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, part) for name, part in parts.items() if part is not None))


def _post_activation(block: nn.Module) -> nn.Module:
    """Return the shortcut and the activation of a He block; not in place, for its input is the output of another."""
    relu: Any = copy.copy(block.relu)
    if hasattr(relu, "inplace"):
        relu.inplace = False
    return _sequence(downsample=block.downsample, relu=relu)  # type: ignore[arg-type]


def _pre_activation(block: nn.Module) -> nn.Module:
    """Return the shortcut of a pre-activation block: nothing, or the 1x1 convolution of the first activation."""
    if block.downsample is None:
        return nn.Identity()
    return _sequence(bn1=block.bn1, relu=block.relu, downsample=block.downsample)  # type: ignore[arg-type]


SHORTCUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    f"{BasicBlock.__module__}.BasicBlock": _post_activation,
    f"{Bottleneck.__module__}.Bottleneck": _post_activation,
    f"{PreActBlock.__module__}.PreActBlock": _pre_activation,
    "torchvision.models.resnet.BasicBlock": _post_activation,
    "torchvision.models.resnet.Bottleneck": _post_activation,
}
"""What remains of a block of a known class when its branch goes, by the class's full name."""


def shortcut_of(block: nn.Module) -> nn.Module | None:
    """Return the module that takes the place of ``block`` when its branch goes, or None for an unknown class."""
    kind = type(block)
    make = SHORTCUTS.get(f"{kind.__module__}.{kind.__qualname__}")
    return None if make is None else make(block)


def branches(graph: fx.Graph, model: nn.Module) -> dict[str, Branch]:
    """Return the residual branches of a traced network by the name of the block around each.

    A branch is what only one operand of an addition depends on, where the other operand has fewer convolutions and
    both come from one tensor. Additions with both sides alike have none.
    """
    before: dict[fx.Node, set[fx.Node]] = {}
    found: dict[str, Branch] = {}
    called = [n for n in graph.nodes if n.op == "call_module"]
    for node in graph.nodes:
        before[node] = {node}.union(*(before[arg] for arg in node.all_input_nodes))
        if node.op not in ("call_function", "call_method") or op_name(node) not in ("add", "iadd"):
            continue
        if len(node.all_input_nodes) != 2:
            continue
        a, b = node.all_input_nodes
        sides = [(before[a] - before[b], a), (before[b] - before[a], b)]
        weigh = [sum(_is_product(model, n) for n in side) for side, _ in sides]
        if weigh[0] == weigh[1] or not (before[a] & before[b]):
            continue
        side, end = sides[weigh[1] > weigh[0]]
        shared = {n.target for n in called if n not in side}  # such as a ReLU that also follows the addition
        names = [str(n.target) for n in called if n in side and n.target not in shared]
        block = _common([n for n in names if isinstance(model.get_submodule(n), PRODUCTS)])
        if end.op == "call_module" and block is not None:
            found[block] = Branch(block, tuple(names), str(end.target), min(weigh) == 0)
    return found


def _is_product(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), PRODUCTS)


def _common(names: list[str]) -> str | None:
    """Return the innermost module that holds all of ``names``."""
    if not names:
        return None
    split = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def dropped(model: nn.Module, branch: Branch) -> dict[str, nn.Module]:
    """Return the new modules, by name, with which the branch is gone.

    A block of a known class becomes its shortcut. Of any other the branch's modules become identities, and its end a
    module that gives zeros; that needs a shortcut without convolutions, so that shapes agree.
    """
    block = model.get_submodule(branch.block)
    whole = shortcut_of(block)
    if whole is not None:
        return {branch.block: whole}
    made: dict[str, nn.Module] = {name: nn.Identity() for name in branch.modules}
    # the threshold is never exceeded, so every element becomes the value
    made[branch.end] = nn.Threshold(float("inf"), 0.0)
    return made
