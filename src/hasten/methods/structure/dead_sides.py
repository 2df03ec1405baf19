"""Channels that are zero on one side: made by filters of zeros, or read by columns of zeros only.

Structured sparsity learning kills filters and channels of a layer each for itself, while surgery takes a channel out of
all layers at once. `settle` makes such a channel zero on its other side as well, so that `lasso.dead_channels` finds it:

- nothing reads it: what it carries does not matter, its filters become zero;
- its filters are zero: it carries a constant (a bias, or a batch norm's, behind the activation). Where that is 0 its
  readers' weights become zero. Where it is not, what a reader makes of it is added to its bias, or taken off the running
  mean of the batch norm behind it: exact, but where the reader's map is padded with zeros, whose border sees less of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.methods.structure.compactor import silent_reads
from hasten.methods.structure.lasso import Flags, axis_of, is_ordinary, largest, removable, weight_of
from hasten.surgery import Channels


@dataclass
class Settled:
    """How many channels nothing read, how many carried 0, and how many a constant that was absorbed."""

    unread: int = 0
    zero: int = 0
    absorbed: int = 0


def sides(channels: Channels, model: nn.Module) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the largest absolute weight that makes each class of channels, and that reads it; -infinity for none."""
    made, read = (np.full(len(channels.classes), -np.inf) for _ in range(2))
    for (name, role), slot in channels.slots.items():
        layer = model.get_submodule(name) if role in ("out", "in") else None
        if layer is not None and is_ordinary(layer):
            values = largest(layer).amax(1 if role == "out" else 0).cpu().double().numpy()
            np.maximum.at(made if role == "out" else read, channels.classes[slot.labels], values)
    return made, read


@torch.no_grad()
def settle(channels: Channels, model: nn.Module, x: Tensor, *, absorb: bool) -> Settled:
    """Make channels that are zero on one side zero on both, one layer after another until nothing changes.

    x: a few inputs, to see which constant a channel carries in evaluation. absorb: also where it is not 0. What the
    network computes stays the same, up to the borders named above. Channels of norms over several channels, and those
    that surgery cannot take out, are left alone.
    """
    done = Settled()
    free = removable(channels, model) & ~_mixed(channels, model)
    left_alone = np.zeros(len(channels.classes), dtype=bool)
    while True:
        made, read = sides(channels, model)
        unread = free & (read == 0) & (made > 0)
        if unread.any():
            done.unread += int(unread.sum())
            _zero(channels, model, unread, "out")
            continue
        silent = free & (made == 0) & (read > 0) & ~left_alone
        if not silent.any():
            return done
        zero, absorbed = _constants(channels, model, x, silent, absorb)
        done.zero, done.absorbed = done.zero + int(zero.sum()), done.absorbed + int(absorbed.sum())
        _zero(channels, model, zero | absorbed, "in")
        left_alone |= silent


def _mixed(channels: Channels, model: nn.Module) -> Flags:
    """Return the classes whose statistics a norm takes together with others'."""
    found = np.zeros(len(channels.classes), dtype=bool)
    for (name, role), slot in channels.slots.items():
        if role == "norm" and isinstance(model.get_submodule(name), nn.GroupNorm | nn.LayerNorm):
            found[channels.classes[slot.labels]] = True
    return found


def _zero(channels: Channels, model: nn.Module, which: Flags, role: str) -> None:
    """Set the weights that make ("out") or read ("in") the classes ``which`` to 0."""
    for name, at in _held(channels, model, which, role).items():
        layer = model.get_submodule(name)
        weight_of(layer).index_fill_(axis_of(layer, role), at.to(weight_of(layer).device), 0.0)


def _held(channels: Channels, model: nn.Module, which: Flags, role: str) -> dict[str, Tensor]:
    """Return the positions of the classes ``which`` in every ordinary layer that has some of them on this side."""
    found = {}
    for (name, own), slot in channels.slots.items():
        if own == role and is_ordinary(model.get_submodule(name)):
            at = np.flatnonzero(which[channels.classes[slot.labels]])
            if len(at):
                found[name] = torch.from_numpy(at)
    return found


def _constants(
    channels: Channels, model: nn.Module, x: Tensor, silent: Flags, absorb: bool
) -> tuple[Flags, Flags]:
    """Return which of the classes ``silent`` carry 0 to all readers, and which a constant, which is absorbed here."""
    reads = silent_reads(model, x, {})
    readers = _held(channels, model, silent, "in")
    zero, steady = silent.copy(), silent.copy()
    for name, at in readers.items():
        layer = model.get_submodule(name)
        classes = channels.inputs(name)[at.numpy()]
        for given in reads.get(layer, [x.new_full((2, 1), torch.nan)]):
            part = given.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)
            if isinstance(layer, nn.Conv2d | nn.Linear) and len(part) > int(at.max()):
                rows = part[at.to(part.device)].flatten(1)
                same = torch.isclose(rows, rows[:, :1], rtol=1e-4, atol=1e-6).all(1)
                empty = (rows == 0).all(1)
            else:  # a layer that was not seen
                same = empty = torch.zeros(len(at), dtype=torch.bool)
            np.logical_and.at(zero, classes, empty.cpu().numpy())
            np.logical_and.at(steady, classes, same.cpu().numpy())
        if len(reads.get(layer, [])) != 1 or _sink(channels, model, name) is None:
            steady[classes] = False
    absorbed = steady & ~zero & absorb
    for name, at in _held(channels, model, absorbed, "in").items():
        layer = model.get_submodule(name)
        _absorb(channels, model, name, _made_of(layer, reads[layer][0], at))
    return zero, absorbed


def _made_of(layer: nn.Module, given: Tensor, at: Tensor) -> Tensor:
    """Return what a reader makes of its inputs ``at``, (O,): the mean over images and pixels."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    at = at.to(given.device)
    alone = torch.zeros_like(given).index_copy_(axis, at, given.index_select(axis, at))
    if isinstance(layer, nn.Conv2d):
        made: Tensor = layer._conv_forward(alone, layer.weight, None).mean((0, 2, 3))
        return made
    return nn.functional.linear(alone, weight_of(layer)).flatten(0, -2).mean(0)


def _absorb(channels: Channels, model: nn.Module, name: str, constant: Tensor) -> None:
    """Add ``constant`` (O,) to what the layer ``name`` gives."""
    sink = _sink(channels, model, name)
    if isinstance(sink, nn.BatchNorm2d | nn.BatchNorm1d):
        assert sink.running_mean is not None
        sink.running_mean.sub_(constant)
    elif sink is not None:
        bias = sink.bias
        assert isinstance(bias, Tensor)
        bias.add_(constant)


def _sink(channels: Channels, model: nn.Module, name: str) -> nn.Module | None:
    """Return what can take a constant that the layer ``name`` gives: a batch norm that alone reads it, or itself."""
    calls = [n for n in channels.graph.nodes if n.op == "call_module" and str(n.target) == name]
    layer = model.get_submodule(name)
    if len(calls) != 1:
        return None
    users = list(calls[0].users)
    if len(users) == 1 and users[0].op == "call_module":
        norm = model.get_submodule(str(users[0].target))
        own = sum(n.op == "call_module" and n.target == users[0].target for n in channels.graph.nodes)
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) and norm.running_mean is not None and own == 1:
            return norm
    return layer if isinstance(getattr(layer, "bias", None), Tensor) else None
