"""The one place where a network's structure changes: checked before, carried out whole or not at all, and logged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten.errors import HastenError, SurgeryDesyncError, UnsupportedSurgeryError, unknown
from hasten.surgery import apply
from hasten.surgery.blocks import branches, dropped
from hasten.surgery.builders import build
from hasten.surgery.change import Change, Step, names, reshape_step, swap_step
from hasten.surgery.edits import (
    DropBlock,
    Edit,
    Gate,
    Insert,
    RemoveChannels,
    Replace,
    Widen,
    from_json,
    to_json,
)
from hasten.surgery.gates import gating
from hasten.surgery.parameters import check_training_state
from hasten.surgery.reshape import Reshape, removal, widening
from hasten.surgery.trace import Channels, Slot, Tie, empty, follow, twin

Part = tuple[Edit, ...]


class Surgeon:
    """Changes the structure of ``model`` while it trains, with all state that hangs on it.

    sample: a batch of inputs as training sees it, for shapes. optimizers: those that train the model. ``followers`` are
    called with the `Change` after each one, for whatever else keeps tensors by channel. ``log`` holds every transaction
    so far; `replay` repeats one on a fresh network.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], sample: Tensor) -> None:
        self.model, self.optimizers = model, tuple(optimizers)
        self.sample = empty(sample[:2]) if len(sample) > 1 else empty(sample[:1].expand(2, *sample.shape[1:]))
        self.followers: list[Callable[[Change], None]] = []
        self.log: list[tuple[Edit, ...]] = []
        self._channels: Channels | None = None
        self._stand_in: nn.Module | None = (
            None  # a copy without data in the present structure, kept for the next
        )

    @property
    def channels(self) -> Channels:
        """The channels of the network as it is now. Raises UnsupportedSurgeryError if it cannot be traced."""
        if self._channels is None:
            self._channels = follow(self.model, self.sample)
        return self._channels

    def forget(self) -> None:
        """Trace anew when asked next: to be called when modules were changed by other hands."""
        self._channels = self._stand_in = None

    def blocks(self) -> list[str]:
        """Return the names of the residual blocks whose branch can be dropped."""
        return list(branches(self.channels.graph, self.model))

    def plan(self, edits: Iterable[Edit]) -> list[str]:
        """Return in words what ``edits`` would do, tensor by tensor, without doing it. Raises as `apply` does."""
        lines: list[str] = []
        for part, new, _ in self._rehearse(tuple(edits), dry_run=True).steps:
            lines += [*(str(edit) for edit in part), *([] if new is None else new.lines())]
        return lines

    def apply(self, edits: Iterable[Edit], *, dry_run: bool = True) -> Change | None:
        """Carry out ``edits`` as one transaction and return what it did; None if there is nothing to do.

        Channel numbers of successive removals refer to the network before the first of them. ``dry_run``: first run
        forward and backward of the changed network on tensors without data. To be called between two steps.

        Raises UnsupportedSurgeryError, OverPruneError or SurgeryDesyncError with the network, the optimizers and their
        state bit for bit as they were.
        """
        wanted = tuple(e for e in edits if not (isinstance(e, RemoveChannels) and not e.channels))
        if not wanted:
            return None
        self._agree(wanted)
        done = self._rehearse(wanted, dry_run=dry_run)
        kept = apply.Snapshot(self.model, self.optimizers)
        change = Change(wanted)
        try:
            for part, new, channels in done.steps:
                change.steps.append(self._carry_out(self.model, self.optimizers, part, new, channels))
            if self.optimizers:
                check_training_state(self.model, self.optimizers)
        except BaseException:
            kept.restore()
            raise
        self._channels, self._stand_in = done.channels, done.stand_in
        self.log.append(wanted)
        for follower in self.followers:
            follower(change)
        return change

    # -- the log
    def records(self) -> list[list[dict[str, Any]]]:
        """Return the log as plain values: a list of edits for each transaction."""
        return [[to_json(edit) for edit in edits] for edits in self.log]

    def replay(self, records: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Bring the network to the structure of ``records``, which must begin with what was done here already.

        Weights become those of a fresh network of that shape, to be loaded over. Raises HastenError.
        """
        done = json.loads(json.dumps(self.records()))
        wanted = json.loads(json.dumps(records))
        if wanted[: len(done)] != done:
            raise HastenError(
                f"the saved network was changed {len(wanted)} times, and its first {len(done)} changes are not those "
                f"of this one; start from the network as it was built."
            )
        for transaction in wanted[len(done) :]:
            self.apply([from_json(record) for record in transaction], dry_run=False)

    # -- inside
    def _rehearse(self, edits: Part, *, dry_run: bool) -> Rehearsal:
        """Carry out ``edits`` on a copy without data, and run it."""
        channels = self.channels
        stand_in = twin(self.model) if self._stand_in is None else self._stand_in
        self._stand_in = None  # it is ahead of the model from here on
        steps: list[tuple[Part, Reshape | None, Channels]] = []
        for part in _parts(edits):
            new = _reshape(channels, stand_in, part)
            self._carry_out(stand_in, (), part, new, channels)
            steps.append((part, new, channels))
            if new is not None and isinstance(part[0], RemoveChannels):
                channels = after_removal(channels, new)
            else:
                channels = follow(stand_in, self.sample)
        if dry_run:
            self._run_dry(stand_in)
        return Rehearsal(steps, channels, stand_in)

    def _run_dry(self, model: nn.Module) -> None:
        model.train()
        plain = nn.modules.batchnorm._BatchNorm
        norms = [m for m in model.modules() if isinstance(m, plain) and type(m).forward is plain.forward]
        for norm in norms:
            norm.forward = partial(_passed_on, norm)  # type: ignore[method-assign]
        before = self.sample.shape
        try:
            with torch.enable_grad():
                result = model(self.sample)
                result.float().sum().backward()
            model.zero_grad()
        except Exception as error:  # anything the user's forward can do
            raise UnsupportedSurgeryError(
                f"the changed network does not run on inputs of shape {tuple(before)}: {error}. A size written in "
                f"forward is the usual reason; write it from the tensor's shape, or leave these layers out."
            ) from error
        finally:
            for norm in norms:
                del norm.forward

    def _carry_out(self, model: nn.Module, optimizers: Sequence[Optimizer], part: Part, new: Reshape | None,
                   channels: Channels) -> Step:  # fmt: skip
        """Change ``model``, traced as ``channels``, by one part of a transaction; ``new`` if it is one of widths."""
        if new is not None:
            apply.reshape(model, optimizers, new)
            return reshape_step(new)
        first, was = part[0], names(model)
        if isinstance(first, DropBlock):
            known = branches(channels.graph, model)
            if first.block not in known:
                raise unknown("residual block", first.block, known, UnsupportedSurgeryError)
            branch = known[first.block]
            made = dropped(model, branch)
            if first.block not in made and not branch.identity:
                kind = type(model.get_submodule(first.block)).__name__
                raise UnsupportedSurgeryError(
                    f"the branch of {first.block!r} cannot be dropped: its class {kind} is not known, and its shortcut "
                    f"changes the shape. Only branches beside a plain shortcut can go."
                )
            apply.swap(model, optimizers, made)
        elif isinstance(first, Insert):
            self._module_of(model, first.after)
            apply.insert(model, optimizers, first.after, self._made(model, first))
        elif isinstance(first, Replace):
            self._module_of(model, first.name)
            apply.swap(model, optimizers, {first.name: self._made(model, first)})
        return swap_step(was, names(model))

    @staticmethod
    def _module_of(model: nn.Module, name: str) -> nn.Module:
        known = dict(model.named_modules())
        if name not in known:
            raise unknown("module", name, known, UnsupportedSurgeryError)
        found: nn.Module = known[name]
        return found

    @staticmethod
    def _made(model: nn.Module, edit: Insert | Replace) -> nn.Module:
        like = next(model.parameters())
        made: nn.Module = build(edit.kind, edit.settings).to(device=like.device, dtype=like.dtype)
        maps = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        if maps and all(not p.is_contiguous() for p in maps):  # as the others are laid out
            made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return made

    def _agree(self, edits: Part) -> None:
        """Raise SurgeryDesyncError unless all ranks ask for the same edits."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        text = json.dumps([to_json(edit) for edit in edits], sort_keys=True)
        mine = hashlib.sha256(text.encode()).digest()
        ours = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(next(self.model.parameters()).device)
        theirs = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, ours)
        if any(not torch.equal(ours, other) for other in theirs):
            raise SurgeryDesyncError(
                f"rank {dist.get_rank()} wants to change the network in another way than other ranks: {text[:200]}. "
                f"Decide from what all ranks share (weights after the update, the seed), not from local data."
            )


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What a transaction will do: its parts with their changes of widths and the trace before each, and the end."""

    steps: list[tuple[Part, Reshape | None, Channels]]
    channels: Channels
    stand_in: nn.Module


def _passed_on(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """Return a tensor of the shape that batch norm gives ``x``, or fail where it would.

    On tensors without data PyTorch takes batch norm apart in Python, which is most of a dry run's time.
    """
    if x.shape[1] != norm.num_features:
        raise RuntimeError(f"a batch norm of {norm.num_features} channels was given {x.shape[1]}")
    return x.clone()  # what follows may write into it


def _reshape(channels: Channels, model: nn.Module, part: Part) -> Reshape | None:
    """Return the change of widths that ``part`` is, or None if it changes modules."""
    if isinstance(part[0], Widen):
        return widening(channels, model, part[0])
    if isinstance(part[0], RemoveChannels):
        return removal(channels, model, [e for e in part if isinstance(e, RemoveChannels)])
    if isinstance(part[0], Gate):
        return gating(channels, model, part[0])
    return None


def _parts(edits: Sequence[Edit]) -> list[Part]:
    """Return edits in groups that are carried out at once: successive removals together, all others alone."""
    parts: list[list[Edit]] = []
    for edit in edits:
        if isinstance(edit, RemoveChannels) and parts and isinstance(parts[-1][0], RemoveChannels):
            parts[-1].append(edit)
        else:
            parts.append([edit])
    return [tuple(part) for part in parts]


def after_removal(channels: Channels, change: Reshape) -> Channels:
    """Return what a new trace would find after a removal, without tracing."""
    slots = {
        key: Slot(slot.module, slot.role, slot.labels[change.slots[key]]) if key in change.slots else slot
        for key, slot in channels.slots.items()
    }
    present = np.unique(np.concatenate([slot.labels for slot in slots.values()]))
    here = np.unique(channels.classes[present])
    ties = []
    for tie in channels.ties:
        stays = np.isin(channels.classes[tie.labels], here)
        parts = int(stays.reshape(tie.parts, -1).any(1).sum())  # a grouped convolution may lose whole groups
        ties.append(Tie(tie.name, tie.labels[stays], parts))
    return Channels(slots, channels.classes, channels.maker, channels.protected, ties, channels.graph,
                    channels.warnings)  # fmt: skip
