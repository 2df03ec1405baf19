"""Methods by name: those of this package, and those that other packages offer through entry points."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from hasten.contract import Method
from hasten.errors import HastenError, SettingsError, unknown
from hasten.table import METHODS

GROUP = "hasten.methods"


@cache
def _third_party() -> dict[str, str]:
    return {entry.name: entry.value for entry in entry_points(group=GROUP) if entry.name not in METHODS}


def available() -> list[str]:
    """Return the names of all methods that can be used in a session."""
    return sorted({*METHODS, *_third_party()})


@cache
def method_class(name: str) -> type[Method]:
    """Return the class of the method called ``name``. Raises UnknownName with the nearest known name."""
    known = {**_third_party(), **{key: row.where for key, row in METHODS.items()}}
    if name not in known:
        raise unknown("method", name, known)
    module, _, attribute = known[name].partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise HastenError(
            f"method {name!r} cannot be imported from {known[name]} ({error}); install the package that offers it again."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method) and dataclasses.is_dataclass(cls)):
        raise HastenError(f"method {name!r} ({known[name]}) must be a dataclass derived from hasten.Method.")
    if cls.spec.name != name:
        raise HastenError(
            f"method {name!r} ({known[name]}) calls itself {cls.spec.name!r}; the two must agree."
        )
    return cls


def method(name: str, **settings: Any) -> Method:
    """Return the method called ``name`` with these settings and its defaults for the rest.

    Raises UnknownName for an unknown method and SettingsError for a setting that is unknown or out of range.
    """
    cls = method_class(name)
    allowed = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in allowed:
            raise unknown(f"setting of {name}", setting, allowed, SettingsError)
    try:
        return cls(**settings)
    except TypeError as error:
        raise SettingsError(
            f"{name}: a setting has the wrong type ({error}); see `hasten methods {name}`."
        ) from error
