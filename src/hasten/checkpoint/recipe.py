"""What differs between the recipe of a checkpoint and the one asked for."""

from __future__ import annotations

import math
from typing import Any

ABSENT = object()


def differences(saved: Any, given: Any, where: str = "") -> list[str]:
    """Return one line for each setting that differs, with both values; an empty list means the same recipe.

    Lists and tuples count as equal if their items are (configuration files know no tuples), 1 and 1.0 too,
    but not 1 and True; nan equals nan.
    """
    if isinstance(saved, dict) and isinstance(given, dict):
        keys = [*saved, *(key for key in given if key not in saved)]
        return [
            line
            for key in keys
            for line in differences(
                saved.get(key, ABSENT), given.get(key, ABSENT), f"{where}.{key}" if where else str(key)
            )
        ]
    if isinstance(saved, list | tuple) and isinstance(given, list | tuple) and len(saved) == len(given):
        pairs = enumerate(zip(saved, given, strict=True))
        return [line for i, (old, new) in pairs for line in differences(old, new, f"{where}[{i}]")]
    if _same(saved, given):
        return []
    return [f"{where or 'recipe'}: checkpoint {_show(saved)}, given {_show(given)}"]


def _same(saved: Any, given: Any) -> bool:
    if isinstance(saved, bool) or isinstance(given, bool):
        return saved is given
    if isinstance(saved, float) and isinstance(given, float) and math.isnan(saved):
        return math.isnan(given)
    return bool(saved == given)


def _show(value: Any) -> str:
    if value is ABSENT:
        return "(absent)"
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
