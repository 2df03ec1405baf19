"""The test part of data that come without one: a keyed, stratified tenth of the training samples."""

from __future__ import annotations

HELD = 0.1


def held_name(name: str) -> str:
    """Return the name of a set whose test part was cut from its training samples."""
    return f"{name} ({HELD:.0%} held out)"


def held_note(count: int) -> str:
    """Return the note on it."""
    return f"there is no test part: {count:,} samples ({HELD:.0%} of each class) were held out as one"
