"""What the methods did, in words: layers touched and skipped with the reasons, and what was counted."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hasten.report.schema import Arm, MethodEffect
from hasten.report.words import called, count, listed, plain, visible

_LAYERS_SHOWN = 24
_REASONS_SHOWN = 12


def effects(arms: list[Arm]) -> list[dict[str, Any]]:
    """Return the effects: one entry for all arms in which a method did the same, layers grouped by reason."""
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        for effect in arm["effects"]:
            entry = found.setdefault(repr(effect), _effect(effect))
            entry["in"].append(visible(arm["label"]))
    return [{**entry, "arms": listed(entry["in"], 12)} for entry in found.values()]


def counted(arm: Arm) -> str:
    """Return the witnesses of an arm as words: "layers frozen 9, samples not back-propagated 147,600"."""
    return ", ".join(f"{plain(name)} {count(value)}" for name, value in arm["witness"].items())


def _effect(effect: MethodEffect) -> dict[str, Any]:
    touched, skipped = defaultdict(list), defaultdict(list)
    for hit in effect["touched"]:
        touched[hit["note"]].append(hit["layer"])
    for miss in effect["skipped"]:
        skipped[miss["reason"]].append(miss["layer"])
    return {
        "in": [],
        "method": called(effect["method"]),
        "saves": plain(effect["saves"]),
        "n_touched": len(effect["touched"]),
        "n_skipped": len(effect["skipped"]),
        "touched": _groups(touched),
        "skipped": _groups(skipped),
    }


def _groups(layers: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (note, layers) of the most common notes; the layers of all others share one last line."""
    order = sorted(layers.items(), key=lambda item: -len(item[1]))
    kept = order if len(order) <= _REASONS_SHOWN else order[: _REASONS_SHOWN - 1]
    shown = [
        (plain(note), listed(names, _LAYERS_SHOWN)) for note, names in layers.items() if (note, names) in kept
    ]
    rest = sum(len(names) for _, names in order) - sum(len(names) for _, names in kept)
    return (
        [*shown, (f"{len(order) - len(kept)} other notes, see report.json", f"{rest} more")]
        if rest
        else shown
    )
