"""The changes a network's structure can undergo, as data: what a log, a checkpoint and a report hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten.errors import SettingsError, unknown


@dataclass(frozen=True)
class RemoveChannels:
    """Remove output channels of ``layer`` (numbers as of now), with all that is tied to them."""

    layer: str
    channels: tuple[int, ...]

    def __str__(self) -> str:
        return f"remove {len(self.channels)} channels of {self.layer}"


@dataclass(frozen=True)
class Widen:
    """Give ``layer`` more output channels: new channel j is a copy of channel ``mapping[j]``.

    ``mapping`` is g of Net2WiderNet: as long as the new width, and g(j) = j for the old channels. Readers of the copies
    get their weights divided by the number of copies, so that the function stays the same.
    """

    layer: str
    mapping: tuple[int, ...]

    def __str__(self) -> str:
        return f"widen {self.layer} to {len(self.mapping)} channels"


@dataclass(frozen=True)
class DropBlock:
    """Remove the branch of the residual block ``block``; what remains is its shortcut."""

    block: str

    def __str__(self) -> str:
        return f"drop the branch of {self.block}"


@dataclass(frozen=True)
class Insert:
    """Put a new module of a known ``kind`` behind the module ``after``, an element of an ``nn.Sequential``."""

    after: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"insert {self.kind} after {self.after}"


@dataclass(frozen=True)
class Replace:
    """Put a new module of a known ``kind`` in the place of the module ``name``."""

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"replace {self.name} by {self.kind}"


@dataclass(frozen=True)
class Gate:
    """Have the convolution ``layer`` read ("in") or make ("out") only ``channels`` of those that it does now.

    The channels around it stay. Those it no longer reads are left out by an index, those it no longer makes are zeros,
    also behind a batch norm that follows it: what that norm added to them is gone.
    """

    layer: str
    role: str
    channels: tuple[int, ...]

    def __str__(self) -> str:
        return f"gate {self.layer} ({self.role}) to {len(self.channels)} channels"


Edit = RemoveChannels | Widen | DropBlock | Insert | Replace | Gate
KINDS: dict[str, type[Edit]] = {
    "remove_channels": RemoveChannels, "widen": Widen, "drop_block": DropBlock, "insert": Insert, "replace": Replace,
    "gate": Gate,
}  # fmt: skip


def to_json(edit: Edit) -> dict[str, Any]:
    """Return ``edit`` as plain values."""
    kind = next(name for name, cls in KINDS.items() if type(edit) is cls)
    values = {f.name: getattr(edit, f.name) for f in dataclasses.fields(edit)}
    return {"edit": kind, **{k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
                             for k, v in values.items()}}  # fmt: skip


def from_json(record: Mapping[str, Any]) -> Edit:
    """Return the edit that ``to_json`` wrote. Raises SettingsError for a kind or field that does not exist."""
    values = dict(record)
    kind = str(values.pop("edit", ""))
    if kind not in KINDS:
        raise unknown("edit", kind, KINDS, SettingsError)
    cls: Callable[..., Edit] = KINDS[kind]
    names = {f.name for f in dataclasses.fields(KINDS[kind])}
    if set(values) != names:
        raise SettingsError(f"edit {kind!r} holds {sorted(values)}, it needs {sorted(names)}.")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
