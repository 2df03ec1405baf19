"""Settings from the command line and from TOML: every flag is also a key, and a flag wins over its key."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.errors import SettingsError, unknown


def _read(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    if path is None or context.resilient_parsing:
        return path
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the settings in {path}: {error}.") from error
    allowed = [p.name for p in context.command.params if p.name and p.name != "config"]
    for key in values:
        if key.replace("-", "_") not in allowed:
            raise unknown(f"setting in {path}:", key, allowed, SettingsError)
    context.default_map = {key.replace("-", "_"): value for key, value in values.items()}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=_read, is_eager=True, help="TOML file whose keys are this command's flags."
    ),
]


def method_from(text: str) -> Any:
    """Return the method of ``name`` or ``name:setting=value,setting=value``; values are written as in TOML."""
    from hasten.registry import method

    name, _, rest = text.partition(":")
    return method(name.strip(), **settings_from(rest, f"method {name}"))


def settings_from(text: str, what: str) -> dict[str, Any]:
    """Return ``a=1,b=[2,3]`` as a dict. A bare word is a string. Raises SettingsError for anything else."""
    if not text.strip():
        return {}
    settings: dict[str, Any] = {}
    for part in _split(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise SettingsError(
                f"{what}: {part.strip()!r} is not setting=value; write name:setting=value,setting=value."
            )
        try:
            settings[key.strip()] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = {"None": None, "True": True, "False": False}.get(
                value.strip(), value.strip()
            )
        if isinstance(settings[key.strip()], list):
            settings[key.strip()] = tuple(settings[key.strip()])
    return settings


def _split(text: str) -> Iterable[str]:
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "[(") - (c in "])")
        if c == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def recipe_from(preset: str, settings: list[str]) -> Any:
    """Return the preset recipe with ``setting=value`` changes."""
    from hasten.recipe import RECIPES

    if preset not in RECIPES:
        raise unknown("recipe", preset, RECIPES)
    changes = {k: v for text in settings for k, v in settings_from(text, "recipe").items()}
    return RECIPES[preset].with_(**changes)


def resolved(context: typer.Context) -> str:
    """Return the settings that this call ran with, as TOML that ``--config`` reads back."""
    import tomli_w

    skip = {"config", "json"}
    values = {k: [str(i) for i in v] if isinstance(v, list | tuple) else str(v) if isinstance(v, Path) else v
              for k, v in context.params.items() if k not in skip and v is not None and v != ()}  # fmt: skip
    return tomli_w.dumps(values)
