"""What gates stand for: the size of what they close, which channels can go together, and how hard to pull.

g_c,i = g_c * p_i / mean(p)      p_i: parameters (or MACs) that only channel i needs; blocks likewise with g_b
g <- g * exp(k * (P / P0 - target(t)))      P: the size without all that is closed, P0: at the start; once an epoch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.measure.macs import macs
from hasten.methods.structure.gates import Flags, Gates, Site
from hasten.methods.structure.lasso import LAYERS, families, reaches
from hasten.surgery import Channels, Surgeon
from hasten.surgery.blocks import Branch, branches
from hasten.surgery.labels import Array
from hasten.surgery.trace import empty, twin

Unit = Literal["params", "macs"]


# -- how large
@dataclass(frozen=True, eq=False)
class Term:
    """A tensor's numbers, or a layer's MACs: ``unit`` times the channels along each axis, which are ``axes`` by class."""

    module: str
    unit: int
    axes: tuple[Array, ...]


class Size:
    """The parameters, or the forward MACs per image, of a network without some channels and modules."""

    def __init__(self, terms: Sequence[Term], classes: int) -> None:
        self.terms, self._classes = tuple(terms), classes

    @classmethod
    def of(cls, model: nn.Module, channels: Channels, x: Tensor, unit: Unit) -> Size:
        """Return the size of ``model`` as it is, traced in ``channels``; x: images like those of training."""
        held = {key: channels.classes[slot.labels] for key, slot in channels.slots.items()}
        terms = _parameters(model, held) if unit == "params" else _macs(model, held, x)
        return cls(terms, len(channels.classes))

    def __call__(self, gone: Flags | None = None, without: Collection[str] = ()) -> int:
        """Return the size without the classes of channels ``gone`` and without the modules named."""
        total = 0
        for term in self.terms:
            if term.module not in without:
                left = [len(a) - (0 if gone is None else int(gone[a].sum())) for a in term.axes]
                total += term.unit * math.prod(left)
        return total

    def of_classes(self) -> NDArray[np.float64]:
        """Return by how much the network shrinks when one class of channels goes and all others stay."""
        found = np.zeros(self._classes)
        for term in self.terms:
            counts = [np.bincount(axis, minlength=self._classes) for axis in term.axes]
            if len(counts) == 1:
                found += term.unit * counts[0]
            elif len(counts) == 2:
                (a, b), (m, n) = counts, map(len, term.axes)
                found += term.unit * (a * n + m * b - a * b)
        return found

    def of_modules(self, names: Collection[str]) -> int:
        """Return the size of these modules."""
        return self() - self(without=names)


def _parameters(model: nn.Module, held: dict[tuple[str, str], Array]) -> list[Term]:
    terms, seen = [], set()
    for name, module in model.named_modules():
        for attribute, tensor in module._parameters.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, LAYERS):
                reads = attribute == "weight" and getattr(module, "groups", 1) == 1
                keys = [(name, "out"), *([(name, "in")] if reads else [])]
            else:
                full = f"{name}.{attribute}" if name else attribute
                keys = [(name, "norm"), *((full, f"axis{d}") for d in range(tensor.dim()))]
            axes = tuple(held[key] for key in keys if key in held)
            terms.append(Term(name, tensor.numel() // math.prod(map(len, axes)), axes))
    return terms


def _macs(model: nn.Module, held: dict[tuple[str, str], Array], x: Tensor) -> list[Term]:
    terms = []
    for name, layer in macs(twin(model), empty(x[:1])).layers.items():
        whole = getattr(model.get_submodule(name), "groups", 1) == 1
        keys = [(name, "out"), *([(name, "in")] if whole else [])]
        axes = tuple(held[key] for key in keys if key in held)
        terms.append(Term(name, layer.output // math.prod(map(len, axes)), axes))
    return terms


def shares(cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p / mean(p), or ones where nothing costs anything."""
    mean = cost.mean() if len(cost) else 0.0
    return cost / mean if mean > 0 else np.ones_like(cost)


# -- how hard to pull
def wanted(progress: float, target: float, until: float) -> float:
    """Return the share of the size to have come down to at ``progress`` of the run: linear from 1 to ``target``."""
    return 1 + (target - 1) * min(1.0, progress / until)


def adjusted(g: float, k: float, share: float, aim: float) -> float:
    """Return ``g * exp(k * (share - aim))``: harder while the network is larger than wanted."""
    return g * math.exp(k * (share - aim))


# -- what may go
class Rules:
    """Which channels can go together: widths in multiples, a least width, equal parts where parts must be equal."""

    def __init__(self, channels: Channels, round_to: int, least: int) -> None:
        self._round_to, self._least = round_to, least
        self._slots = {key: np.unique(channels.classes[slot.labels]) for key, slot in channels.slots.items()}
        self._alike = families(list(self._slots.values()))
        self._parts = [
            [np.unique(part) for part in channels.classes[tie.labels].reshape(tie.parts, -1)]
            for tie in channels.ties
        ]

    def spare(self, gone: Flags, late: NDArray[np.float64]) -> Flags:
        """Return which classes of ``gone`` go by the rules; of the others those with the largest ``late`` stay first."""
        if not gone.any():
            return gone
        keep = ~gone

        def grow(among: Array, target: int) -> bool:
            missing = min(target, len(among)) - int(keep[among].sum())
            if missing <= 0:
                return False
            waiting = among[~keep[among]]
            keep[waiting[np.argsort(-late[waiting], kind="stable")[:missing]]] = True
            return True

        alike = [one for one in self._alike if gone[one].any()]
        slots = [one for one in self._slots.values() if gone[one].any()]
        growing = True
        while growing:  # what stays for one reason counts for the others; it only grows, so this ends
            grown = [grow(one, -(-int(keep[one].sum()) // self._round_to) * self._round_to) for one in alike]
            for tied in self._parts:
                most = max(int(keep[part].sum()) for part in tied)
                grown += [grow(part, most) for part in tied]
            grown += [grow(one, self._least) for one in slots]
            growing = any(grown)
        return ~keep

    def emptied(self, gone: Flags) -> str | None:
        """Return the module, and its side, that would be left without channels."""
        bare = (key for key, classes in self._slots.items() if gone[classes].all())
        return next((f"{module or 'the network'} ({role})" for module, role in bare), None)

    def floors(self, gate: Array, inner: Flags) -> list[Floor]:
        """Return how many gates must stay open for each layer; gate: the number of each class's gate or -1.

        Layers of ``inner`` classes alone have none: they may be closed whole, and their block goes with them.
        """
        found: dict[tuple[int, ...], Floor] = {}
        for classes in self._slots.values():
            members = gate[classes][gate[classes] >= 0]
            if len(members) and self._least and not inner[classes].all():
                least = min(self._least, len(classes)) - (len(classes) - len(members))
                found[tuple(members.tolist())] = Floor(members, least)
        return [floor for floor in found.values() if floor.least > 0]


@dataclass(frozen=True, eq=False)
class Floor:
    """At least ``least`` of the gates ``members`` stay open."""

    members: Array
    least: int


def refused(
    old: NDArray[np.float64],
    died: Flags,
    open_now: Flags,
    excess: Callable[[Flags], float] | None,
    floors: Sequence[Floor],
) -> Flags:
    """Return which of the gates that ``died`` in a step must not, all (n,): the strongest before it, ``old``, first.

    open_now: gates that are open after the step. excess: by how much the network without the gates given is larger than
    wanted; a death that would make it miss that size by more than it does without is refused. A floor is kept anyway.
    """
    back = np.zeros_like(died)
    if excess is not None and excess(~open_now) < 0:
        closed = ~open_now & ~died
        now = excess(closed)
        for one in np.flatnonzero(died)[np.argsort(np.abs(old[died]), kind="stable")]:
            closed[one] = True
            then = excess(closed) if now > 0 else -math.inf
            back[one] = -then > now
            if back[one]:
                closed[one] = False
            else:
                now = then
    for floor in floors:
        missing = floor.least - int((open_now | back)[floor.members].sum())
        if missing > 0:
            waiting = floor.members[died[floor.members] & ~back[floor.members]]
            back[waiting[np.argsort(-np.abs(old[waiting]), kind="stable")[:missing]]] = True
    return back


# -- what gates stand for
class Frame:
    """What gates mean in the network as it is: of each its class of channels or its branch, its cost, its layer's rate.

    cost: p (n,), in ``unit``; weights: p / mean(p) (n,), channels and blocks each among themselves. Made anew for every
    structure, from that alone. keep_stages: whether every stage keeps a block.
    """

    def __init__(
        self,
        surgeon: Surgeon,
        sites: Sequence[Site],
        gates: Gates,
        unit: Unit,
        rules: Rules,
        *,
        keep_stages: bool,
    ) -> None:
        self.channels, self.rules, self._surgeon, count = surgeon.channels, rules, surgeon, gates.channels
        model, graph = surgeon.model, self.channels.graph
        self._all = branches(graph, model)
        self._sites, self._graph = sites, graph
        self.classes = np.zeros(count, np.int64)
        for site in sites:
            at, number = site.members()
            if len(at):
                slot = self.channels.slots[site.name, site.role]
                self.classes[number] = self.channels.classes[slot.labels][at]
        ends = {branch.end: branch for branch in self._all.values()}
        doors = sorted((site.block, site.name) for site in sites if site.block is not None)
        self.branches: list[Branch | None] = [ends.get(name) for _, name in doors]
        self.size = Size.of(model, self.channels, surgeon.sample, unit)
        gate = np.full(len(self.channels.classes), -1, np.int64)
        gate[self.classes] = np.arange(count)
        self._stages = self._find_stages() if keep_stages else []
        self.floors = rules.floors(gate, self._inner()) + self._stage_floors()
        of_branch = [0 if one is None else self.size.of_modules(one.modules) for one in self.branches]
        parts = self.size.of_classes()[self.classes], np.array(of_branch, np.float64)
        self.cost = np.concatenate(parts)
        device, dtype = gates.values.device, gates.values.dtype
        self.weights = torch.from_numpy(np.concatenate([shares(part) for part in parts])).to(device, dtype)
        self._groups, self._at = self._owners(len(gates), device)

    def _inner(self) -> Flags:
        """Return which classes of channels lie within one gated branch."""
        inner = np.zeros(len(self.channels.classes), bool)
        for branch in self.branches:
            inside, outside = np.zeros_like(inner), np.zeros_like(inner)
            for slot in self.channels.slots.values() if branch is not None else ():
                assert branch is not None
                where = inside if slot.module in branch.modules else outside
                where[self.channels.classes[slot.labels]] = True
            inner |= inside & ~outside
        return inner

    def _owners(self, count: int, device: torch.device) -> tuple[list[tuple[int, int]], Tensor]:
        """Return the parameter groups, as (optimizer, group), that hold the gates' layers, and which is each gate's."""
        held = {
            id(parameter): (o, g)
            for o, optimizer in enumerate(self._surgeon.optimizers)
            for g, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        groups: dict[tuple[int, int], int] = {}
        at = np.full(count, -1, np.int64)
        for site in self._sites:
            number = groups.setdefault(held[id(site.weight)], len(groups))
            mine = site.members()[1]
            at[mine[at[mine] < 0]] = number
            if site.block is not None:
                at[site.block] = number
        return list(groups), torch.from_numpy(at).to(device)

    def rates(self, like: Tensor) -> Tensor:
        """Return the present learning rate of each gate's layer (n,)."""
        optimizers = self._surgeon.optimizers
        rates = [float(optimizers[o].param_groups[g]["lr"]) for o, g in self._groups]
        return torch.tensor(rates, dtype=like.dtype, device=like.device)[self._at]

    def gone(self, closed: Flags) -> Flags:
        """Return the classes of channels whose gates are ``closed``."""
        flags = np.zeros(len(self.channels.classes), bool)
        flags[self.classes[closed[: len(self.classes)]]] = True
        return flags

    def going(self, closed: Flags, gates: Gates) -> Flags:
        """Return which classes of channels go by the rules; those stay first that were closed last."""
        late = np.zeros(len(self.channels.classes))
        late[self.classes] = -gates.still[: len(self.classes)].cpu().numpy()
        return self.rules.spare(self.gone(closed), late)

    def left(self, closed: Flags, gates: Gates) -> int:
        """Return the size of the network without all that is ``closed``."""
        doors = [one for one, shut in zip(self.branches, closed[gates.channels :], strict=True) if shut]
        without = {name for one in doors if one is not None for name in one.modules}
        return self.size(self.going(closed, gates), without)

    def dead_blocks(self, closed: Flags) -> list[str]:
        """Return the blocks whose branch is closed, or cut by a layer with all its gates closed; outermost only.

        The last block of a stage that must keep one does not go for being cut: it stays, with its gates closed.
        """
        silent = {
            site.name
            for site in self._sites
            if site.channel is not None and (site.channel >= 0).all() and closed[site.channel].all()
        }
        found, cut = [], set()
        for branch, shut in zip(self.branches, closed[len(self.classes) :], strict=True):
            if branch is not None:
                inside = silent & set(branch.modules)
                if inside and not shut and not reaches(self._graph, branch.end, inside):
                    cut.add(branch.block)
                if shut or branch.block in cut:
                    found.append(branch.block)
        while waiting := cut.intersection(self.empty_stage(found)):
            found.remove(min(waiting))
            cut.remove(min(waiting))
        return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]

    def empty_stage(self, blocks: Collection[str]) -> list[str]:
        """Return the blocks of a stage that would be left without one, if that must not be; or none."""
        return next((names for names in self._stages if all(name in blocks for name in names)), [])

    def _find_stages(self) -> list[list[str]]:
        """Return the blocks by stage: those that add to the same channels."""
        stages: dict[frozenset[int], list[str]] = {}
        for name, branch in self._all.items():
            slot = next(
                (
                    self.channels.slots[branch.end, role]
                    for role in ("norm", "out")
                    if (branch.end, role) in self.channels.slots
                ),
                None,
            )
            if slot is not None:
                stages.setdefault(frozenset(self.channels.classes[slot.labels].tolist()), []).append(name)
        return list(stages.values())

    def _stage_floors(self) -> list[Floor]:
        """Return for each stage whose blocks all have gates that one of these must stay open."""
        number = {one.block: i for i, one in enumerate(self.branches) if one is not None}
        return [
            Floor(np.array([len(self.classes) + number[name] for name in names], np.int64), 1)
            for names in self._stages
            if all(name in number for name in names)
        ]
