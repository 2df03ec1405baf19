"""Settings and their types: fields checked against their annotations, and settings read from text."""

from __future__ import annotations

import dataclasses
import math
import numbers
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hasten.errors import SettingsError

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_PLAIN = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "None",
}


def hints_of(cls: type) -> dict[str, Any]:
    """Return the annotation of every field of the dataclass ``cls``; empty where they cannot be resolved."""
    try:
        hints = get_type_hints(cls)
    except (NameError, TypeError):  # a class defined inside a function, whose names are gone
        return {}
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name in hints}


def wrong_types(instance: Any, *, words: bool = False) -> list[str]:
    """Return a sentence for every field of the dataclass ``instance`` whose value is not of its annotation's type.

    Whole numbers pass as float, lists as tuples; True and False are no numbers, NaN and infinity no float (unless one is
    the default). The values of a Literal are compared only with ``words``, otherwise their type is enough.
    """
    found = []
    defaults = {f.name: f.default for f in dataclasses.fields(instance)}
    for name, hint in hints_of(type(instance)).items():
        value = getattr(instance, name)
        if value is not defaults[name] and not _fits(value, hint, words):
            found.append(f"{name} (={value!r}) must be {said(hint)}.")
    return found


def said(hint: Any) -> str:
    """Return what values an annotation allows, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(said(part) for part in parts)
    if origin is tuple:
        if len(parts) == 2 and parts[1] is Ellipsis:
            return f"a list, each {said(parts[0])}"
        return f"{len(parts)} values, each {' or '.join(dict.fromkeys(map(said, parts)))}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a dictionary of {said(parts[0])} to {said(parts[1])}" if parts else "a dictionary"
    return getattr(hint, "__name__", str(hint))


def _fits(value: Any, hint: Any, words: bool) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is type(None) or hint is None:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if origin is Literal:
        return value in parts if words else any(type(value) is type(part) for part in parts)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part, words) for part in parts)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(item, parts[0], words) for item in value)
        return len(value) == len(parts) and all(map(lambda v, h: _fits(v, h, words), value, parts))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and (
            not parts
            or all(_fits(k, parts[0], words) and _fits(v, parts[1], words) for k, v in value.items())
        )
    return isinstance(value, hint) if isinstance(hint, type) else True


# -- settings as text


def settings_from(text: str, what: str, cls: type | None = None) -> dict[str, Any]:
    """Return ``a=1,b=[2,3]`` as a dict; values are written as in TOML, and a bare word is a string.

    For the fields of the dataclass ``cls`` that are True or False the words true, false, yes, no, on and off are
    understood in any case. Raises SettingsError for anything that is not setting=value.
    """
    hints = hints_of(cls) if cls is not None else {}
    settings: dict[str, Any] = {}
    for part in _split(text) if text.strip() else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise SettingsError(
                f"{what}: {part.strip()!r} is not setting=value; write name:setting=value,setting=value."
            )
        settings[key] = _value(value, hints.get(key))
    return settings


def _value(text: str, hint: Any) -> Any:
    if hint is not None and bool in (hint, *get_args(hint)) and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return {"None": None, "none": None, "True": True, "False": False}.get(text, text)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _split(text: str) -> Iterable[str]:
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "[({") - (c in "])}")
        if c == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def method_from(text: str) -> Any:
    """Return the method of ``name`` or ``name:setting=value,setting=value``."""
    from hasten.registry import method, method_class

    name, _, rest = text.partition(":")
    cls = method_class(name.strip())
    return method(name.strip(), **settings_from(rest, f"method {name.strip()}", cls))


def methods_from(given: Any) -> list[Any]:
    """Return ``given``, a method, its name as ``method_from`` reads it, or several of these, as a list of methods.

    Raises SettingsError, saying what was given, for anything else, such as the class instead of an object.
    """
    from hasten.contract import Method

    found = []
    for item in (
        [given] if isinstance(given, str | Method | type) or not isinstance(given, Iterable) else given
    ):
        if isinstance(item, Method):
            found.append(item)
        elif isinstance(item, str):
            found.append(method_from(item))
        elif isinstance(item, type) and issubclass(item, Method):
            raise SettingsError(
                f"methods: {item.__name__} is the class; give {item.__name__}() or {item.spec.name!r}."
            )
        else:
            raise SettingsError(
                f"methods: {item!r} is a {type(item).__name__}; give methods or their names, such as ['mixed_precision']."
            )
    return found
