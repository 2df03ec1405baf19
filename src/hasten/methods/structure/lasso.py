"""Group lasso on the weights of convolutions and linear layers, and the search for what it drove to zero.

G     = sum over groups of scale * n,          n = sqrt(sum of w^2 over the group + eps)
dG/dw = w * sum over the groups that hold w of scale / n

`Groups` says what a group is by the dimensions that number them: of a convolution's weight (O, C, kh, kw) these are
(0,) for filters, (1,) for input channels, (1, 2, 3) for the columns of its matrix form, () for the whole layer. The
functions below it are about filters and input channels, which is what surgery can take out of a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.optim import SGD, Optimizer

from hasten.errors import OverPruneError, SettingsError
from hasten.surgery import Channels, RemoveChannels
from hasten.surgery.blocks import branches, shortcut_of
from hasten.surgery.gates import GATES
from hasten.surgery.labels import Array

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
"""The layers whose weights make and read channels."""

Flags = NDArray[np.bool_]


# -- the penalty
@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of one weight: one for each position along the dimensions ``keep``, over all the others.

    ``scale`` multiplies each group's norm: one number, or a tensor that has the weight's size along ``keep`` and 1
    elsewhere, with 0 for groups that are left out.
    """

    weight: nn.Parameter
    keep: tuple[int, ...]
    scale: float | Tensor = 1.0

    @property
    def others(self) -> tuple[int, ...]:
        """The dimensions a group spans."""
        return tuple(d for d in range(self.weight.dim()) if d not in self.keep)

    @property
    def count(self) -> int:
        """The number of groups that count."""
        if isinstance(self.scale, Tensor):
            return int((self.scale > 0).sum())
        return math.prod(self.weight.shape[d] for d in self.keep)


class GroupLasso:
    """G over ``groups``, and what it does to weights. Groups may overlap: a weight can lie in one of each kind.

    eps: under the root, so that the gradient is finite at zero. Sums are taken in float32, of wider weights in theirs.
    Shapes are those of the moment; make a new one when the network has changed. Raises SettingsError for eps <= 0.
    """

    def __init__(self, groups: Iterable[Groups], eps: float = 1e-8) -> None:
        if not eps > 0:
            raise SettingsError(f"group lasso: eps must be above 0, not {eps}.")
        of: dict[int, list[Groups]] = {}
        for group in groups:
            of.setdefault(id(group.weight), []).append(group)
        self.kinds = list(of.values())
        self.weights = [kinds[0].weight for kinds in self.kinds]
        self.eps = eps
        # what all kinds of a weight sum over is summed once; the rest is a matrix or less
        self._shared = [
            tuple(d for d in kinds[0].others if all(d in k.others for k in kinds)) for kinds in self.kinds
        ]
        self._rest = [
            [tuple(d for d in kind.others if d not in shared) for kind in kinds]
            for kinds, shared in zip(self.kinds, self._shared, strict=True)
        ]

    def __len__(self) -> int:
        return sum(kind.count for kinds in self.kinds for kind in kinds)

    @torch.no_grad()
    def penalty(self) -> float:
        """Return G."""
        if not self.weights:
            return 0.0
        every = range(len(self.weights))
        norms = self._norms([wide(w) for w in self.weights], every)
        scales = [kind.scale for i in every for kind in self.kinds[i]]
        return math.fsum(float((norm * scale).sum()) for norm, scale in zip(norms, scales, strict=True))

    @torch.no_grad()
    def add_gradient(self, strength: float) -> None:
        """Add ``strength`` * dG/dw to the gradient of every weight that has one."""
        which = [i for i, w in enumerate(self.weights) if w.grad is not None]
        if not which:
            return
        weights = [wide(self.weights[i]) for i in which]
        inverse = iter(torch._foreach_reciprocal(self._norms(weights, which)))
        factors = []
        for i in which:
            parts = [_scaled(next(inverse), kind.scale) for kind in self.kinds[i]]
            factors.append(sum(parts[1:], parts[0]))
        grads = [g for i in which if (g := self.weights[i].grad) is not None]
        torch._foreach_addcmul_(grads, weights, factors, value=strength)

    @torch.no_grad()
    def shrink(self, steps: Sequence[float]) -> None:
        """Take the proximal step of length ``steps[i]`` on weight i: group norms fall by it, to exactly 0.

        The kinds of a weight, which overlap, take their steps one after the other.
        """
        for turn in range(max((len(kinds) for kinds in self.kinds), default=0)):
            which = [i for i, kinds in enumerate(self.kinds) if len(kinds) > turn]
            weights = [wide(self.weights[i]) for i in which]
            sums = []
            for square, i in zip(torch._foreach_mul(weights, weights), which, strict=True):
                others = self.kinds[i][turn].others
                sums.append(square.sum(others, keepdim=True) if others else square)
            torch._foreach_sqrt_(sums)
            torch._foreach_clamp_min_(sums, torch.finfo(torch.float32).tiny)
            factors = [
                _scaled(inverse, self.kinds[i][turn].scale)
                for inverse, i in zip(torch._foreach_reciprocal(sums), which, strict=True)
            ]
            factors = list(torch._foreach_mul(factors, [-steps[i] for i in which]))
            torch._foreach_add_(factors, 1.0)
            torch._foreach_clamp_min_(factors, 0.0)
            torch._foreach_mul_([self.weights[i] for i in which], factors)

    def _norms(self, weights: list[Tensor], which: Iterable[int]) -> list[Tensor]:
        """Return the norms of the groups of ``weights``, those of one weight after another, with all dimensions kept."""
        sums = []
        for square, i in zip(torch._foreach_mul(weights, weights), which, strict=True):
            small = square.sum(self._shared[i], keepdim=True) if self._shared[i] else square
            sums += [small.sum(rest, keepdim=True) if rest else small for rest in self._rest[i]]
        norms = list(torch._foreach_add(sums, self.eps))
        torch._foreach_sqrt_(norms)
        return norms


def wide(weight: Tensor) -> Tensor:
    """Return the values of ``weight`` in float32, or as they are if they are wider."""
    data = weight.detach()
    return data if data.dtype in (torch.float32, torch.float64) else data.float()


def _scaled(inverse: Tensor, scale: float | Tensor) -> Tensor:
    return inverse if isinstance(scale, float) and scale == 1.0 else inverse * scale


def rates(optimizers: Iterable[Optimizer]) -> dict[int, float]:
    """Return how far a gradient of 1 moves each parameter in the long run, in one step, by its id."""
    found: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = float(group["lr"])
            if isinstance(optimizer, SGD) and group["momentum"]:
                rate *= (1 - float(group["dampening"])) / (1 - float(group["momentum"]))
            found |= {id(p): rate for p in group["params"]}
    return found


# -- the groups that are channels
def is_grouped(layer: nn.Module) -> bool:
    """Return whether ``layer`` is a convolution in groups; a depthwise one is no such, its channels are its input's."""
    groups = getattr(layer, "groups", 1)
    return isinstance(layer, LAYERS) and groups > 1 and groups != getattr(layer, "in_channels", 0)


def is_ordinary(layer: nn.Module) -> bool:
    """Return whether every output of ``layer`` reads every input, so that each side has groups."""
    return isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1


def axis_of(layer: nn.Module, role: str) -> int:
    """Return the dimension of the weight along which the channels of ``role`` ("out" or "in") lie."""
    return int((role == "out") == isinstance(layer, nn.ConvTranspose2d))


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a layer of `LAYERS`."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def removable(channels: Channels, model: nn.Module) -> Flags:
    """Return, for each class of channels, whether surgery may take it out; not where grouped convolutions hold it."""
    free = np.zeros(len(channels.classes), dtype=bool)
    held = np.zeros(len(channels.classes), dtype=bool)
    for (name, role), slot in channels.slots.items():
        if role == "out":
            free[channels.classes[slot.labels]] = True
        if role in ("out", "in") and is_grouped(model.get_submodule(name)):
            held[channels.classes[slot.labels]] = True
    free[list(channels.protected)] = False
    return free & ~held


def channel_groups(
    channels: Channels, name: str, layer: nn.Module, free: Flags, *, size_weighted: bool = False
) -> dict[str, Groups]:
    """Return the groups of an ordinary layer by role, "out" and "in": one for each channel (input feature) in ``free``.

    A role without one is left out. size_weighted: scale each norm by the root of the number of its weights.
    """
    found = {}
    for role in ("out", "in"):
        slot = channels.slots.get((name, role))
        if slot is None:
            continue
        weight, axis = weight_of(layer), axis_of(layer, role)
        mask = free[channels.classes[slot.labels]]
        scale = math.sqrt(weight.numel() / weight.shape[axis]) if size_weighted else 1.0
        if mask.all():
            found[role] = Groups(weight, (axis,), scale)
        elif mask.any():
            shape = [1] * weight.dim()
            shape[axis] = -1
            kept = torch.from_numpy(mask * scale).to(weight.device, wide(weight).dtype).view(shape)
            found[role] = Groups(weight, (axis,), kept)
    return found


def why_no_groups(channels: Channels, name: str, layer: nn.Module, free: Flags) -> str | None:
    """Return why a layer of `LAYERS` has no groups, or None."""
    if is_grouped(layer):
        return f"its groups={layer.groups} hold channels in parts, which stay as they are"
    if not is_ordinary(layer):
        return "it is depthwise: its channels follow those of its neighbours"
    if not weight_of(layer).requires_grad:
        return "its weight is frozen"
    slots = [slot for role in ("out", "in") if (slot := channels.slots.get((name, role))) is not None]
    if not slots:
        return "the forward pass does not run it as a module, or its channels are not followed"
    if channel_groups(channels, name, layer, free):
        return None
    classes = [one for slot in slots for one in channels.classes[slot.labels].tolist()]
    reasons = dict.fromkeys(
        channels.protected.get(one, "a grouped convolution holds them, or no layer makes them")
        for one in classes
    )
    return f"none of its channels can go: {'; '.join(reasons)}"


# -- what is dead
def largest(layer: nn.Module) -> Tensor:
    """Return the largest absolute weight between each output and input of an ordinary layer, (O, C)."""
    size = weight_of(layer).detach().abs()
    size = size.amax(tuple(range(2, size.dim()))) if size.dim() > 2 else size
    return size.transpose(0, 1) if axis_of(layer, "out") else size


def strengths(channels: Channels, model: nn.Module) -> NDArray[np.float64]:
    """Return, for each class of channels, the largest absolute weight that makes or reads it.

    Ordinary layers decide, all positions of a flattened channel together; infinity where there is none.
    """
    found = np.full(len(channels.classes), -np.inf)
    for (name, role), slot in channels.slots.items():
        if role not in ("out", "in"):
            continue
        layer = model.get_submodule(name)
        if is_ordinary(layer):
            values = largest(layer).amax(1 if role == "out" else 0).cpu().double().numpy()
            np.maximum.at(found, channels.classes[slot.labels], values)
    found[np.isneginf(found)] = np.inf
    return found


def dead_channels(
    channels: Channels, model: nn.Module, tau: float, *, round_to: int, min_channels: int | None, advice: str
) -> Flags:
    """Return which classes of channels can go: every weight that makes or reads one is at most ``tau``.

    A class lies in every layer that its channels reach, so this is the union rule of chains and of residual stages.
    Of the dead the strongest stay, until the number kept is a multiple of ``round_to`` among channels that lie in the
    same layers, until the parts of a group norm or of a split are equal, and until each layer has ``min_channels``.

    Raises OverPruneError, with ``advice``, if a layer would be left with none and ``min_channels`` is None.
    """
    strength = strengths(channels, model)
    keep = ~(removable(channels, model) & (strength <= tau))

    def grow(among: Array, target: int) -> bool:
        missing = min(target, len(among)) - int(keep[among].sum())
        if missing <= 0:
            return False
        waiting = among[~keep[among]]
        keep[waiting[np.argsort(-strength[waiting], kind="stable")[:missing]]] = True
        return True

    slots = [(slot, np.unique(channels.classes[slot.labels])) for slot in channels.slots.values()]
    alike = families(_whole([(slot.role, classes) for slot, classes in slots]))
    parts = [
        [np.unique(part) for part in channels.classes[tie.labels].reshape(tie.parts, -1)]
        for tie in channels.ties
    ]
    growing = True
    while growing:  # what is kept for one reason counts for the others; it only grows, so this ends
        grown = [grow(classes, -(-int(keep[classes].sum()) // round_to) * round_to) for classes in alike]
        for tied in parts:
            most = max(int(keep[part].sum()) for part in tied)
            grown += [grow(part, most) for part in tied]
        grown += [grow(classes, min_channels or 0) for _, classes in slots]
        growing = any(grown)
    for slot, classes in slots:
        if not keep[classes].any():
            raise OverPruneError(
                f"{slot.module or 'the network'} would lose all {len(classes)} of its channels ({slot.role}): every "
                f"weight that makes or reads them is at most {tau:g}. {advice}"
            )
    return ~keep


def _whole(slots: Sequence[tuple[str, Array]]) -> list[Array]:
    """Return the classes of each slot, but not of those that a gate leaves a part of: its layers round by themselves."""
    gated = [classes for role, classes in slots if role in GATES]
    return [
        classes
        for _, classes in slots
        if not any(len(classes) < len(g) and np.isin(classes, g, assume_unique=True).all() for g in gated)
    ]


def families(slots: Sequence[Array]) -> list[Array]:
    """Return the classes that lie in the same slots, one array each."""
    where: dict[int, list[int]] = {}
    for number, classes in enumerate(slots):
        for one in classes.tolist():
            where.setdefault(one, []).append(number)
    families: dict[tuple[int, ...], list[int]] = {}
    for one, numbers in where.items():
        families.setdefault(tuple(numbers), []).append(one)
    return [np.asarray(family, dtype=np.int64) for family in families.values()]


def removals(channels: Channels, gone: Flags) -> list[RemoveChannels]:
    """Return the edits that take out the classes ``gone``, each class by the first layer that makes it."""
    edits: list[RemoveChannels] = []
    done: set[int] = set()
    for (name, role), slot in channels.slots.items():
        if role != "out":
            continue
        classes = channels.classes[slot.labels]
        lost = np.flatnonzero(gone[classes])
        if not set(classes[lost].tolist()) <= done:
            edits.append(RemoveChannels(name, tuple(lost.tolist())))
            done |= set(classes[lost].tolist())
    return edits


def dead_branches(channels: Channels, model: nn.Module, tau: float) -> list[str]:
    """Return the residual blocks whose branch is cut by a layer without a weight above ``tau``, outermost only.

    A dead layer beside another path, such as that of a squeeze-and-excite gate, does not cut a branch. Blocks whose
    branch surgery cannot drop are left out.
    """
    found: list[str] = []
    for block, branch in branches(channels.graph, model).items():
        layers = [n for n in branch.modules if is_ordinary(model.get_submodule(n))]
        dead = {n for n in layers if float(weight_of(model.get_submodule(n)).detach().abs().max()) <= tau}
        can_go = branch.identity or shortcut_of(model.get_submodule(block)) is not None
        if dead and can_go and not reaches(channels.graph, branch.end, dead):
            found.append(block)
    return [block for block in found if not any(block.startswith(f"{other}.") for other in found)]


def reaches(graph: fx.Graph, end: str, dead: set[str]) -> bool:
    """Return whether the input still reaches the module ``end`` on a path that no module of ``dead`` lies on."""
    live: dict[fx.Node, bool] = {}
    result = False
    for node in graph.nodes:
        cut = node.op == "call_module" and str(node.target) in dead
        live[node] = not cut and (node.op == "placeholder" or any(live[a] for a in node.all_input_nodes))
        if node.op == "call_module" and str(node.target) == end:
            result = live[node]
    return result
