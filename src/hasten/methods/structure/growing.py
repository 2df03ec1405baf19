"""Wider by copies (Net2WiderNet): which layers can grow, how copies are drawn, their noise, and the rates after it.

`Net2Net` calls these functions inside a run. Between two runs a program calls them itself::

    surgeon = Surgeon(model, [optimizer], images)
    widen(surgeon, target_widths(surgeon, 2.0))  # every layer twice as wide, the outputs as they were
    lower_rates([optimizer], 0.1)  # the paper's advice for training on
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten import keyed
from hasten.errors import SettingsError, UnsupportedSurgeryError, unknown
from hasten.surgery import Change, RemoveChannels, Surgeon, Widen
from hasten.surgery.reshape import widening

Mapped = Literal["random", "balanced"]
Side = Literal["outgoing", "incoming"]
Targets = float | Mapping[str, float | int]
Flags = NDArray[np.bool_]


# -- which layers grow together
@dataclass(frozen=True)
class Group:
    """Layers that share their output channels (by additions, depthwise convolutions) and so one width.

    layer: the one by which the group is widened. even: something takes statistics over these channels (LayerNorm),
    so that every channel must get equally many copies.
    """

    layer: str
    layers: tuple[str, ...]
    width: int
    even: bool


def width_groups(surgeon: Surgeon) -> tuple[list[Group], dict[str, str]]:
    """Return the groups of layers that can be widened, in the order of the network, and why each other layer cannot.

    Raises UnsupportedSurgeryError if the network cannot be traced.
    """
    channels = surgeon.channels
    members: dict[frozenset[int], list[str]] = {}
    for name, role in channels.slots:
        if role == "out":
            members.setdefault(frozenset(channels.outputs(name).tolist()), []).append(name)
    found: list[Group] = []
    left_out: dict[str, str] = {}
    for classes, layers in members.items():
        first = next((name for name in layers if len(channels.outputs(name)) == len(classes)), None)
        reason = "it repeats channels of another layer" if first is None else _fixed(surgeon, first, layers)
        if first is None or reason is not None:
            left_out |= dict.fromkeys(layers, str(reason))
            continue
        even = any(slot.module in channels.warnings and classes & set(channels.classes[slot.labels].tolist())
                   for slot in channels.slots.values())  # fmt: skip
        found.append(Group(first, tuple(layers), len(classes), even))
    return found, left_out


def _fixed(surgeon: Surgeon, first: str, layers: Sequence[str]) -> str | None:
    """Return why the group of ``first`` keeps its width, or None."""
    for name in layers:
        if any(not p.requires_grad for p in surgeon.model.get_submodule(name).parameters(recurse=False)):
            return f"the weights of {name} are frozen"
    n = len(surgeon.channels.outputs(first))
    try:
        widening(surgeon.channels, surgeon.model, Widen(first, (*range(n), *range(n))))
    except UnsupportedSurgeryError as error:
        return str(error).rpartition("cannot be widened: ")[2].rstrip(".")
    return None


# -- how wide
def rounded(width: float, round_to: int) -> int:
    """Return ``width`` rounded up to a multiple of ``round_to``."""
    return math.ceil(width / round_to - 1e-9) * round_to


def stages(start: int, final: int, count: int, round_to: int) -> list[int]:
    """Return the widths of ``count`` growths from ``start`` to ``final``, both included: equal factors, rounded up."""
    between = [start * (final / start) ** (k / count) for k in range(1, count)]
    return [start, *(min(final, rounded(width, round_to)) for width in between), final]


def target_widths(surgeon: Surgeon, widen: Targets, round_to: int = 8) -> dict[str, int]:
    """Return the width that each group of layers shall have, by the group's `Group.layer`.

    widen: a factor from 1.0 for all layers that can be widened, or factors (float, rounded up to a multiple of
    ``round_to``) and widths (int) by layer name or pattern; of several patterns that name a layer the last one counts.

    Raises SettingsError for a name that fits no layer or a width below the present one, UnsupportedSurgeryError for a
    layer that cannot be widened, or if layers of one group shall get different widths.
    """
    known, left_out = width_groups(surgeon)
    if not isinstance(widen, Mapping):
        return {group.layer: _target(group, float(widen), round_to) for group in known}
    for pattern in widen:
        if any(fnmatchcase(name, pattern) for group in known for name in group.layers):
            continue
        fixed = next((name for name in left_out if fnmatchcase(name, pattern)), None)
        if fixed is None:
            names = [name for group in known for name in group.layers]
            raise unknown("layer to widen", pattern, names, SettingsError)
        raise UnsupportedSurgeryError(f"layer {fixed!r} cannot be widened: {left_out[fixed]}. Leave it out.")
    result: dict[str, int] = {}
    for group in known:
        asked: dict[int, str] = {}
        for name in group.layers:
            fits = [target for pattern, target in widen.items() if fnmatchcase(name, pattern)]
            if fits:
                asked.setdefault(_target(group, fits[-1], round_to), name)
        if len(asked) > 1:
            given = ", ".join(f"{name!r} {width}" for width, name in asked.items())
            raise UnsupportedSurgeryError(
                f"layers that are added to each other grow to one width, but were given {given}; name one of them, or "
                f"give all the same."
            )
        if asked:
            result[group.layer] = next(iter(asked))
    return result


def _target(group: Group, target: float | int, round_to: int) -> int:
    if isinstance(target, int):
        if target < group.width:
            raise SettingsError(
                f"layer {group.layer!r} has {group.width} channels, and widening to {target} would take some away; "
                f"give a width from {group.width}, or a factor with a decimal point ({float(target)})."
            )
        return target
    return group.width if target == 1.0 else rounded(group.width * target, round_to)


# -- the mapping g
def copies(n: int, width: int, mapping: Mapped, *key: keyed.Key) -> tuple[int, ...]:
    """Return g, which says of each of ``width`` channels which of the n old ones it copies: g(j) = j for j < n.

    "random" draws the others uniformly (from the paper), keyed by ``key``; "balanced" copies each old channel equally
    often, or once more for some that are evenly spaced (our choice). Raises ValueError unless width > n.
    """
    if width <= n:
        raise ValueError(f"a widening needs more than the {n} channels there are, not {width}.")
    extra = width - n
    if mapping == "balanced":
        rounds, rest = divmod(extra, n)
        return (*range(n), *list(range(n)) * rounds, *(i * n // rest for i in range(rest)))
    drawn: list[int] = torch.randint(n, (extra,), generator=keyed.generator(*key)).tolist()
    return (*range(n), *drawn)


def widen_edits(
    sizes: Mapping[str, tuple[int, int]], mapping: Mapped = "random", *, seed: int = 0, number: int = 0
) -> list[Widen]:
    """Return the edits that give each layer, by name, (width now, width then). ``number`` counts the growths of a run."""
    return [Widen(name, copies(now, then, mapping, seed, "net2net", number, "copies", name))
            for name, (now, then) in sizes.items()]  # fmt: skip


def widen(
    surgeon: Surgeon,
    widths: Mapping[str, int],
    *,
    mapping: Mapped = "random",
    noise: float = 0.05,
    noise_on: Side = "outgoing",
    seed: int = 0,
    number: int = 0,
) -> Change | None:
    """Give each layer, by name, this many output channels, with the function kept up to the noise; return the change.

    What makes a copied channel is repeated, batch norm's vectors too, and what reads it is divided by the number of
    copies, the original included. Optimizer state follows by the chain rule. ``noise``: see `perturb`. Of layers that
    share their channels one is enough.

    Raises ValueError for a width that is not more than the present one, UnsupportedSurgeryError for a layer that cannot
    be widened and for different widths of layers that share their channels; the network is then as it was.
    """
    channels = surgeon.channels
    first: dict[frozenset[int], str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, width in widths.items():
        made = channels.outputs(name)
        other = first.setdefault(frozenset(made.tolist()), name)
        if other == name:
            sizes[name] = (len(made), width)
        elif widths[other] != width:
            raise UnsupportedSurgeryError(
                f"layers {other!r} and {name!r} are added to each other and cannot have {widths[other]} and {width} "
                f"channels; give one of them, or both the same."
            )
    change = surgeon.apply(widen_edits(sizes, mapping, seed=seed, number=number))
    if change is not None and noise:
        perturb(surgeon.model, change, noise, noise_on, seed, "net2net", number, "noise")
    return change


# -- noise that lets copies part
def perturb(model: nn.Module, change: Change, noise: float, where: Side, *key: keyed.Key) -> int:
    """Add normal noise to the weights of copied channels and return how many weights it touched.

    Without it, or dropout, copies get equal gradients and stay equal for ever. where: "outgoing", the weights that read
    the copies, or "incoming", those that make them; the first of each set of equal channels keeps its weights. The
    noise has ``noise`` times the standard deviation of the weights it is added to (0.05 on outgoing weights in the
    Keras example), or of ``noise / sqrt(fan_in)`` where those are all equal (our choice). Drawn by ``key``.
    """
    role = "in" if where == "outgoing" else "out"
    copied: dict[str, Flags] = {}
    for step in change.steps:
        for (name, part), index in step.slots.items():
            if part == role:
                before = copied.get(name)
                again = _repeats(index.ravel())
                copied[name] = again if before is None else again | before[index.ravel()]
    touched = 0
    for name, flags in copied.items():
        module = model.get_submodule(name)
        dense = isinstance(module, nn.Linear) or (
            isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
        )
        if dense and flags.any():
            axis = 1 if (role == "in") != isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
            touched += _add_noise(module.weight, axis, flags, noise, keyed.generator(*key, name))  # type: ignore[arg-type]
    return touched


def _repeats(index: NDArray[np.int64]) -> Flags:
    """Return which entries have occurred before."""
    flags = np.ones(len(index), dtype=bool)
    flags[np.unique(index, return_index=True)[1]] = False
    return flags


@torch.no_grad()
def _add_noise(weight: Tensor, axis: int, flags: Flags, noise: float, random: torch.Generator) -> int:
    at = torch.from_numpy(np.flatnonzero(flags)).to(weight.device)
    part = weight.index_select(axis, at)
    wide = part if part.dtype == torch.float64 else part.float()
    spread = float(wide.std(correction=0)) or 1.0 / math.sqrt(weight[0].numel())
    drawn = torch.randn(part.shape, generator=random).to(wide.device, wide.dtype)
    weight.index_add_(axis, at, (noise * spread * drawn).to(weight.dtype))
    return part.numel()


# -- the small network to begin with
def narrow(surgeon: Surgeon, widths: Mapping[str, int]) -> Change | None:
    """Keep the first channels of each layer, by name, this many of them; for a network with fresh weights.

    Weights that read fewer channels than before grow by sqrt(before / now), so that outputs keep their size, as they
    would in a network drawn at this width (our choice). Raises UnsupportedSurgeryError, OverPruneError.
    """
    model, channels = surgeon.model, surgeon.channels
    before = {module: _reads(module) for module in model.modules()}
    change = surgeon.apply([RemoveChannels(name, tuple(range(width, len(channels.outputs(name)))))
                            for name, width in widths.items()])  # fmt: skip
    with torch.no_grad():
        for module, count in before.items():
            if count != (now := _reads(module)):
                module.weight.mul_(math.sqrt(count / now))  # type: ignore[operator]
    return change


def _reads(module: nn.Module) -> int:
    """Return how many channels one output of ``module`` sums over; 0 if it has no such weights."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.weight.shape[0]
    return module.weight.shape[1] if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) else 0


# -- learning rates after growth
@contextmanager
def rates_at_most(optimizers: Sequence[Optimizer], limits: Sequence[Sequence[float]]) -> Iterator[int]:
    """Hold each group's rate at its limit inside the block, and give every rate back after it.

    Yields how many groups are held. The rate is what an optimizer multiplies its step by: momentum and the moments of
    Adam are as without it.
    """
    kept = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    held = 0
    for (group, rate), limit in zip(kept, (x for row in limits for x in row), strict=True):
        if limit < float(rate):
            group["lr"] = torch.full_like(rate, limit) if isinstance(rate, Tensor) else limit
            held += 1
    try:
        yield held
    finally:
        for group, rate in kept:
            group["lr"] = rate


def lower_rates(optimizers: Sequence[Optimizer], scale: float) -> None:
    """Multiply every learning rate, and the initial one that schedulers start from, by ``scale``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr"):
                if name in group:
                    group[name] = group[name] * scale
