"""Gates: a layer that reads only some of the channels added together around it, or makes only some of them.

A gated convolution selects its input channels before it multiplies; a gated end of a residual branch puts zeros where
it makes nothing. Weights and names stay those of the plain layer, so that optimizers and checkpoints need no rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from hasten.errors import UnsupportedSurgeryError
from hasten.surgery.edits import Gate
from hasten.surgery.labels import Array
from hasten.surgery.reshape import GateChange, Reshape, note
from hasten.surgery.trace import Channels, Slot

if TYPE_CHECKING:
    from hasten.surgery.trace import Follower


GATES = ("select", "spread")
"""The roles of the channels around a gated layer, of which it reads or makes a part."""


class _Spread:
    """Positions among the channels around a layer: ``kept`` of ``width``. Never changed, only replaced."""

    def __init__(self, kept: Array, width: int) -> None:
        self.kept, self.width = kept, width

    def at(self, device: torch.device) -> Tensor:
        return torch.from_numpy(self.kept).to(device)

    def cut(self, index: Array) -> _Spread:
        """Return this with the positions ``index`` (ascending) of those around."""
        return _Spread(np.searchsorted(index, self.kept[np.isin(self.kept, index)]), len(index))

    def spread(self, y: Tensor) -> Tensor:
        """Return ``y`` (N, kept, H, W) among zeros, (N, width, H, W), in its memory format."""
        layout = (
            torch.channels_last
            if y.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        shape = (y.shape[0], self.width, *y.shape[2:])
        whole = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=layout).zero_()
        return whole.index_copy(1, self.at(y.device), y)

    def __repr__(self) -> str:
        return f"{len(self.kept)} of {self.width}"


class GatedConv2d(nn.Conv2d):
    """A convolution that reads the positions ``reads``, and whose outputs lie at the positions ``makes``; None for all.

    Made by `put`, never by its constructor.
    """

    reads: _Spread | None
    makes: _Spread | None

    def forward(self, input: Tensor) -> Tensor:
        """Return the output (N, width of ``makes`` or O, H', W') of ``input`` (N, width of ``reads`` or C, H, W)."""
        if self.reads is not None:
            input = input.index_select(1, self.reads.at(input.device))
        output = super().forward(input)
        return output if self.makes is None else self.makes.spread(output)

    def follow_channels(self, follow: Follower, name: str, labels: Array) -> Array:
        """Say how channels pass: those selected go in, and what comes out lies among new ones (zeros)."""
        if self.reads is not None:
            follow.slot(name, "select", labels)
            labels = labels[self.reads.kept]
        follow.slot(name, "in", labels)
        return _among(follow, name, follow.outputs(name, self.out_channels), self.makes)

    def cut_channels(self, role: str, index: Array) -> None:
        """Keep the positions ``index`` of the channels around."""
        if role == "select" and self.reads is not None:
            self.reads = self.reads.cut(index)
        if role == "spread" and self.makes is not None:
            self.makes = self.makes.cut(index)

    def extra_repr(self) -> str:
        """Show the convolution and what it reads and makes."""
        gates = [
            f"{word} {gate}"
            for word, gate in (("reads", self.reads), ("makes", self.makes))
            if gate is not None
        ]
        return ", ".join([super().extra_repr(), *gates])  # type: ignore[no-untyped-call]


class GatedBatchNorm2d(nn.BatchNorm2d):
    """The batch norm at the end of a branch whose channels lie at the positions ``makes``; ``maker`` is its layer.

    Made by `put`, never by its constructor.
    """

    makes: _Spread
    maker: str

    def forward(self, input: Tensor) -> Tensor:
        """Return the norm of ``input`` (N, C, H, W) among zeros, (N, width, H, W)."""
        return self.makes.spread(super().forward(input))

    def follow_channels(self, follow: Follower, name: str, labels: Array) -> Array:
        """Say how channels pass: they lie among new ones (zeros)."""
        follow.slot(name, "norm", labels)
        return _among(follow, name, labels, self.makes)

    def cut_channels(self, role: str, index: Array) -> None:
        """Keep the positions ``index`` of the channels around."""
        if role == "spread":
            self.makes = self.makes.cut(index)

    def extra_repr(self) -> str:
        """Show the norm and what it makes."""
        return f"{super().extra_repr()}, makes {self.makes}"  # type: ignore[no-untyped-call]


def _among(follow: Follower, name: str, labels: Array, makes: _Spread | None) -> Array:
    if makes is None:
        return labels
    whole = follow.labels.fresh(makes.width, name)
    whole[makes.kept] = labels
    follow.slot(name, "spread", whole)
    return whole


def is_open(module: nn.Module) -> bool:
    """Return whether ``module`` is a convolution that a gate can be put on: PyTorch's own, not grouped, or gated."""
    return type(module) in (nn.Conv2d, GatedConv2d) and cast(nn.Conv2d, module).groups == 1


def end_of(graph: fx.Graph, model: nn.Module, layer: str) -> str:
    """Return the batch norm that alone reads ``layer``, or ``layer`` itself: behind it its channels join others."""
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == layer]
    readers = list(calls[0].users) if len(calls) == 1 else []
    if len(readers) == 1 and readers[0].op == "call_module":
        norm = model.get_submodule(str(readers[0].target))
        if type(norm) in (nn.BatchNorm2d, GatedBatchNorm2d):
            return str(readers[0].target)
    return layer


def gating(channels: Channels, model: nn.Module, edit: Gate) -> Reshape:
    """Return what ``edit`` does to ``model``: the layer's own weights narrow, what lies around it stays.

    Raises UnsupportedSurgeryError if the layer cannot carry a gate or the positions are not its own.
    """
    slot = channels.slots.get((edit.layer, edit.role))
    if edit.role not in ("in", "out") or slot is None:
        raise UnsupportedSurgeryError(
            f"{edit}: {edit.layer!r} has no channels of the role {edit.role!r} to gate."
        )
    layer = model.get_submodule(edit.layer)
    if not is_open(layer):
        raise UnsupportedSurgeryError(
            f"{edit}: a {type(layer).__name__} cannot be gated; allowed: nn.Conv2d with groups=1, without a plan."
        )
    kept = np.asarray(edit.channels, dtype=np.int64)
    if not len(kept) or (np.diff(kept) <= 0).any() or kept[0] < 0 or kept[-1] >= len(slot.labels):
        raise UnsupportedSurgeryError(
            f"{edit}: channels must be ascending numbers from 0 to {len(slot.labels) - 1}, at least one."
        )
    result = Reshape()
    note(result, model, slot, kept)
    end = edit.layer
    if edit.role == "out":
        end = end_of(channels.graph, model, edit.layer)
        if len([n for n in channels.graph.nodes if n.op == "call_module" and n.target == edit.layer]) != 1:
            raise UnsupportedSurgeryError(
                f"{edit}: {edit.layer!r} runs more than once, a gate needs one place."
            )
        if end != edit.layer:
            note(result, model, Slot(end, "norm", slot.labels), kept)
    result.gates.append(GateChange(end, edit.role, kept, len(slot.labels), edit.layer))
    return result


def put(model: nn.Module, change: GateChange) -> None:
    """Make the module of ``change`` a gated one, or narrow the gate it has."""
    module = model.get_submodule(change.module)
    if isinstance(module, nn.BatchNorm2d):
        if not isinstance(module, GatedBatchNorm2d):
            module.__class__ = GatedBatchNorm2d
            module.makes = _Spread(np.arange(change.width), change.width)  # type: ignore[assignment]
            module.maker = change.maker  # type: ignore[assignment]
        norm = cast(GatedBatchNorm2d, module)
        norm.makes = _Spread(norm.makes.kept[change.kept], norm.makes.width)
        return
    if not isinstance(module, GatedConv2d):
        module.__class__ = GatedConv2d
        module.reads = module.makes = None  # type: ignore[assignment]
    conv = cast(GatedConv2d, module)
    gate = "reads" if change.role == "in" else "makes"
    old: _Spread | None = getattr(conv, gate)
    whole = old if old is not None else _Spread(np.arange(change.width), change.width)
    setattr(conv, gate, _Spread(whole.kept[change.kept], whole.width))


@torch.no_grad()
def dissolve(model: nn.Module) -> None:
    """Make gated layers of ``model`` plain ones that compute the same: weights that were gated away are zeros."""
    for module in list(model.modules()):
        if isinstance(module, GatedBatchNorm2d):
            _widen_norm(module)
            _widen_conv(cast(nn.Conv2d, model.get_submodule(module.maker)), 0, module.makes)
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
            del module.makes, module.maker
    for module in list(model.modules()):
        if isinstance(module, GatedConv2d):
            if module.reads is not None:
                _widen_conv(module, 1, module.reads)
            if module.makes is not None:
                _widen_conv(module, 0, module.makes)
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
            del module.reads, module.makes


def _whole(values: Tensor, axis: int, gate: _Spread, rest: float = 0.0) -> Tensor:
    shape = list(values.shape)
    shape[axis] = gate.width
    return values.new_full(shape, rest).index_copy(axis, gate.at(values.device), values)


def _widen_conv(conv: nn.Conv2d, axis: int, gate: _Spread) -> None:
    conv.weight = nn.Parameter(_whole(conv.weight, axis, gate), conv.weight.requires_grad)
    if axis == 1:
        conv.in_channels = gate.width
        return
    conv.out_channels = gate.width
    if conv.bias is not None:
        conv.bias = nn.Parameter(_whole(conv.bias, 0, gate), conv.bias.requires_grad)


def _widen_norm(norm: GatedBatchNorm2d) -> None:
    gate = norm.makes
    norm.num_features = gate.width
    for name in ("weight", "bias"):
        if (old := norm._parameters[name]) is not None:
            norm._parameters[name] = nn.Parameter(_whole(old, 0, gate), old.requires_grad)
    for name, rest in (("running_mean", 0.0), ("running_var", 1.0)):
        if (buffer := norm._buffers[name]) is not None:
            norm._buffers[name] = _whole(buffer, 0, gate, rest)
