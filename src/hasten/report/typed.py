"""Checking plain JSON-like values against annotations: TypedDict, list, dict, Literal, unions and scalars."""

from __future__ import annotations

import math
import types
from functools import cache
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict


def mismatches(value: object, hint: Any, path: str) -> list[str]:
    """Return every way in which ``value`` is not a ``hint``, as lines "path: what is wrong"."""
    problems: list[str] = []
    _walk(value, hint, path, problems)
    return problems


@cache
def _fields(cls: Any) -> dict[str, tuple[Any, bool]]:
    """Return name -> (type, required) of a TypedDict."""
    fields = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        fields[name] = (get_args(hint)[0] if optional else hint, not optional)
    return fields


def _name(hint: Any) -> str:
    """Return a type as a reader of the error would say it."""
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(arg) for arg in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    words = {float: "a finite number", int: "an integer", str: "a string", bool: "true or false"}
    if hint in words:
        return words[hint]
    return "a list" if get_origin(hint) is list else "an object"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_scalar(value: Any, hint: Any) -> bool:
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) < 1e300 and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _walk(value: Any, hint: Any, path: str, problems: list[str]) -> None:
    """Append to ``problems`` every way in which ``value`` is not a ``hint``."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        trials: list[list[str]] = []
        for arg in get_args(hint):
            trials.append([])
            _walk(value, arg, path, trials[-1])
            if not trials[-1]:
                return
        # An object that is almost right should be told what is wrong inside it, not that it is no object.
        inside = [trial for trial in trials if not any(line.startswith(f"{path}: ") for line in trial)]
        problems.extend(inside[0] if inside else [f"{path}: must be {_name(hint)}, not {_shown(value)}"])
    elif is_typeddict(hint) and isinstance(value, dict):
        fields = _fields(hint)
        problems.extend(
            f"{path}.{key}: missing" for key, (_, req) in fields.items() if req and key not in value
        )
        problems.extend(f"{path}.{key}: unknown field" for key in value if key not in fields)
        for key, (inner, _) in fields.items():
            if key in value:
                _walk(value[key], inner, f"{path}.{key}", problems)
    elif origin is list and isinstance(value, list):
        for i, item in enumerate(value):
            _walk(item, get_args(hint)[0], f"{path}[{i}]", problems)
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                problems.append(f"{path}[{_shown(key)}]: the name must be a string")
            _walk(item, get_args(hint)[1], f"{path}[{_shown(key)}]", problems)
    elif origin is Literal:
        if value not in get_args(hint):
            problems.append(f"{path}: must be {_name(hint)}, not {_shown(value)}")
    elif is_typeddict(hint) or origin in (list, dict) or not _is_scalar(value, hint):
        problems.append(f"{path}: must be {_name(hint)}, not {_shown(value)}")
