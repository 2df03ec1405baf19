"""From "these channels go" or "this layer widens" to what happens to every tensor: one index map for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.errors import OverPruneError, UnsupportedSurgeryError
from hasten.surgery.edits import RemoveChannels, Widen
from hasten.surgery.labels import Array
from hasten.surgery.trace import Channels, Slot


@dataclass(frozen=True, eq=False)
class Move:
    """New positions along one axis of a tensor: position i takes what lay at ``index[i]``.

    A 2-D index (groups, kept) is that of a grouped convolution's inputs, which differ from group to group. ``copies``
    are, at each new position, how many channels now share the old one, or None where none was copied; ``reads``: the
    tensor reads these channels, so that a copied weight is divided by them (else its gradient is).
    """

    axis: int
    index: Array
    copies: Array | None = None
    reads: bool = False


@dataclass(frozen=True, eq=False)
class GateChange:
    """``module`` keeps the positions ``kept`` of its ``width`` inner ones; ``maker`` is the layer that is narrowed."""

    module: str
    role: str
    kept: Array
    width: int
    maker: str


@dataclass(eq=False)
class Reshape:
    """What one change of widths does: index maps by tensor name, sizes of modules, and the maps by (module, role)."""

    moves: dict[str, list[Move]] = field(default_factory=dict)
    sizes: dict[str, dict[str, int | tuple[int, ...]]] = field(default_factory=dict)
    slots: dict[tuple[str, str], Array] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    gates: list[GateChange] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the change as text, a line for each tensor dimension."""
        return [f"  {module or 'the network'}.{role}: now {index.size} positions"
                for (module, role), index in self.slots.items()]  # fmt: skip


def removal(channels: Channels, model: nn.Module, edits: Sequence[RemoveChannels]) -> Reshape:
    """Return what removing the channels of ``edits`` does to ``model``.

    Raises UnsupportedSurgeryError if one of them must stay, if two edits disagree on channels that are added to each
    other, or if the parts of a grouped layer would differ; OverPruneError if a layer would be left with none.
    """
    gone: set[int] = set()
    asked: list[tuple[RemoveChannels, set[int], set[int]]] = []
    for edit in edits:
        made = channels.outputs(edit.layer)
        wrong = [c for c in edit.channels if not 0 <= c < len(made)]
        if wrong:
            raise UnsupportedSurgeryError(
                f"layer {edit.layer!r} has channels 0 to {len(made) - 1}, not {', '.join(map(str, wrong[:5]))}."
            )
        mine = set(made[list(edit.channels)].tolist())
        for other, span, theirs in asked:
            both = span & set(made.tolist())
            if both and mine & both != theirs & both:
                raise UnsupportedSurgeryError(
                    f"layers {other.layer!r} and {edit.layer!r} are added to each other, so they must lose the same "
                    f"channels; remove them by one edit of either layer."
                )
        asked.append((edit, set(made.tolist()), mine))
        for label in sorted(mine):
            if label in channels.protected:
                raise UnsupportedSurgeryError(
                    f"channels of layer {edit.layer!r} cannot go: {channels.protected[label]}. Leave this layer out."
                )
        gone |= mine
    lost = np.zeros(len(channels.classes) + 1, dtype=bool)
    lost[list(gone)] = True
    result = Reshape()
    for slot in channels.slots.values():
        stays = ~lost[channels.classes[slot.labels]]
        if stays.all():
            continue
        if not stays.any():
            raise OverPruneError(
                f"{slot.module or 'the network'} would be left without {slot.role} channels; keep at least one, or "
                f"remove its whole block."
            )
        note(result, model, slot, np.flatnonzero(stays))
        if slot.module in channels.warnings:
            result.warnings[slot.module] = channels.warnings[slot.module]
    _check_parts(channels, model, lost)
    return result


def _check_parts(channels: Channels, model: nn.Module, lost: NDArray[np.bool_]) -> None:
    """Raise UnsupportedSurgeryError where parts would differ; a grouped convolution may lose a group whole."""
    modules = dict(model.named_modules())
    empty: dict[str, NDArray[np.bool_]] = {}
    for tie in channels.ties:
        left = (~lost[channels.classes[tie.labels]]).reshape(tie.parts, -1).sum(1)
        whole = isinstance(modules.get(tie.name), nn.modules.conv._ConvNd)
        if len(set(left[left > 0].tolist() if whole else left.tolist())) > 1:
            raise UnsupportedSurgeryError(
                f"{tie.name!r} holds its channels in {tie.parts} parts that must stay equal; they would have "
                f"{', '.join(map(str, left[:8].tolist()))} left. Remove the same number in each part"
                f"{', or a group with all it reads and makes' if whole else ''}."
            )
        if whole and (empty.setdefault(tie.name, left == 0) != (left == 0)).any():
            raise UnsupportedSurgeryError(
                f"a group of {tie.name!r} would lose all that it reads or all that it makes, but not both. Remove both "
                f"in one transaction, or the same number in each group."
            )


def widening(channels: Channels, model: nn.Module, edit: Widen) -> Reshape:
    """Return what giving a layer more channels does to ``model``. Raises UnsupportedSurgeryError, ValueError."""
    made, mapping = channels.outputs(edit.layer), np.asarray(edit.mapping, dtype=np.int64)
    n = len(made)
    if len(mapping) <= n:
        raise ValueError(f"{edit}: layer {edit.layer!r} has {n} channels; a widening needs more than that.")
    if (mapping[:n] != np.arange(n)).any() or mapping.min() < 0 or mapping.max() >= n:
        raise ValueError(f"{edit}: mapping must be 0..{n - 1} and then numbers below {n}.")
    if reason := channels.why_not(edit.layer):
        raise UnsupportedSurgeryError(f"layer {edit.layer!r} cannot be widened: {reason}.")
    counts = np.bincount(mapping, minlength=n)
    mine = {int(c): k for k, c in enumerate(made)}
    for tie in channels.ties:
        if any(int(c) in mine for c in channels.classes[tie.labels]):
            raise UnsupportedSurgeryError(
                f"layer {edit.layer!r} cannot be widened: {tie.name!r} holds its channels in parts."
            )
    result = Reshape()
    for slot in channels.slots.values():
        classes = channels.classes[slot.labels]
        inside = np.fromiter((int(c) in mine for c in classes), bool, len(classes))
        if not inside.any():
            continue
        known = slot.role in ("in", "out", "norm") or slot.role.startswith("axis")
        if not known:
            raise UnsupportedSurgeryError(
                f"layer {edit.layer!r} cannot be widened: {slot.module!r} puts zeros among its channels or picks some, "
                f"which copies would not fit. Give the network projection shortcuts (option B), and no gates."
            )
        index = _spread(classes, inside, made, mapping[n:], edit.layer, slot)
        copies = np.fromiter((counts[mine[int(c)]] if int(c) in mine else 1 for c in classes[index]), np.int64,
                             len(index))  # fmt: skip
        if slot.module in channels.warnings and len(set(counts.tolist())) > 1:
            raise UnsupportedSurgeryError(
                f"layer {edit.layer!r} cannot be widened: {slot.module!r} takes statistics over channels, which only "
                f"equal numbers of copies leave alone."
            )
        note(result, model, slot, index, copies)
    return result


def _spread(classes: Array, inside: Array, made: Array, sources: Array, layer: str, slot: Slot) -> Array:
    """Return positions with the copies put behind every full run of the widened channels."""
    n, at, parts = len(made), 0, []
    while at < len(classes):
        if not inside[at]:
            parts.append(np.asarray([at]))
            at += 1
            continue
        repeat = 1
        while n > 1 and at + repeat < len(classes) and classes[at + repeat] == classes[at]:
            repeat += 1
        if n == 1:
            while at + repeat < len(classes) and classes[at + repeat] == classes[at]:
                repeat += 1
        unit = np.arange(at, min(at + n * repeat, len(classes)))
        if len(unit) < n * repeat or (classes[unit] != np.repeat(made, repeat)).any():
            raise UnsupportedSurgeryError(
                f"layer {layer!r} cannot be widened: at {slot.module!r} its channels are mixed with those of others."
            )
        parts += [unit, (at + sources[:, None] * repeat + np.arange(repeat)).ravel()]
        at += n * repeat
    return np.concatenate(parts)


def note(result: Reshape, model: nn.Module, slot: Slot, index: Array, copies: Array | None = None) -> None:
    """Write down what the new positions ``index`` of ``slot`` do to tensors and sizes."""
    result.slots[slot.module, slot.role] = index
    if slot.role.startswith("axis"):
        result.moves.setdefault(slot.module, []).append(Move(int(slot.role[4:]), index, copies))
        return
    if slot.role not in ("in", "out", "norm"):
        return  # the module's own ``cut_channels`` knows
    module, prefix = model.get_submodule(slot.module), f"{slot.module}." if slot.module else ""

    def move(tensor: str, axis: int, *, reads: bool = False, where: Array = index) -> None:
        if getattr(module, tensor, None) is not None:
            result.moves.setdefault(prefix + tensor, []).append(Move(axis, where, copies, reads))

    def size(**values: int | tuple[int, ...]) -> None:
        result.sizes.setdefault(slot.module, {}).update(values)

    count = len(index)
    if isinstance(module, nn.Linear):
        move("weight", 0 if slot.role == "out" else 1, reads=slot.role == "in")
        size(**{f"{slot.role}_features": count})
    elif isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.ConvTranspose2d)
        size(**{f"{slot.role}_channels": count})
        if slot.role == "out":
            move("weight", 1 if transposed else 0)
        elif module.groups == 1:
            move("weight", 0 if transposed else 1, reads=True)
        elif module.groups == module.in_channels:
            size(groups=count)
        else:
            each = module.in_channels // module.groups
            groups = len(np.unique(index // each))  # fewer where whole groups go
            size(groups=groups)
            if len(index) % groups == 0:  # else the parts differ, which is refused
                move("weight", 1, where=index.reshape(groups, -1) % each)
    elif slot.role == "norm":
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            move(tensor, 0)
        for attribute in ("num_features", "num_channels", "num_parameters"):
            if hasattr(module, attribute):
                size(**{attribute: count})
        if isinstance(module, nn.LayerNorm):
            size(normalized_shape=(count,))
    if slot.role == "out":
        move("bias", 0)


def moved(tensor: Tensor, moves: Sequence[Move], *, state_power: int | None = None) -> Tensor:
    """Return ``tensor`` after ``moves``, in its memory format. ``state_power`` p says that it is optimizer state.

    A copied channel that is read has its weights divided by the number of copies; the state of one that is made is
    divided by that number to the power p (1 for a mean of gradients, 2 for a mean of their squares).
    """
    result = tensor.detach()
    grouped = [m for m in moves if m.index.ndim == 2]
    for move in sorted((m for m in moves if m.index.ndim == 1), key=lambda m: m.axis):
        if result.shape[move.axis] == 1 and state_power is not None:
            continue  # a factored state (Adafactor) has nothing along this axis
        at = torch.from_numpy(move.index).to(result.device)
        result = result.index_select(move.axis, at)
        if move.copies is not None and result.is_floating_point():
            power = (1 if move.reads else 0) if state_power is None else (0 if move.reads else state_power)
            if power and tensor.dim() >= 1:
                shape = [1] * result.dim()
                shape[move.axis] = -1
                by = torch.from_numpy(move.copies).to(result.device, result.dtype).view(shape)
                result = result / by**power
    for move in grouped:
        parts = result.chunk(len(move.index))
        result = torch.cat([part.index_select(1, torch.from_numpy(at).to(part.device))
                            for part, at in zip(parts, move.index, strict=True)])  # fmt: skip
    return laid_out(result, tensor)


def laid_out(new: Tensor, old: Tensor) -> Tensor:
    """Return ``new`` in the memory format of ``old``."""
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        return new.contiguous(memory_format=torch.channels_last)
    return new.contiguous()
