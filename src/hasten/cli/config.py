"""Settings from the command line and from TOML: every flag is also a key, and a flag wins over its key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.errors import SettingsError, unknown
from hasten.settings import method_from, settings_from

__all__ = ["Config", "method_from", "recipe_from", "resolved", "settings_from"]


def _read(context: typer.Context, path: Path | None) -> Path | None:
    if path is None or context.resilient_parsing:
        return path
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the settings in {path}: {error}.") from error
    flags = _flags(context)
    defaults = {}
    for key, value in values.items():
        parameter = flags.get(key.replace("_", "-"))
        if parameter is None:
            raise unknown(f"setting in {path}:", key, flags, SettingsError)
        defaults[str(parameter.name)] = _value(parameter, key, value, path)
    context.default_map = defaults
    return path


def _flags(context: typer.Context) -> dict[str, Any]:
    """Return the parameters of the command that a file can set, by the name of their flag."""
    return {
        option.removeprefix("--"): parameter
        for parameter in context.command.params
        for option in parameter.opts
        if option.startswith("--") and parameter.name != "config"
    }


def _value(parameter: Any, key: str, value: Any, path: Path) -> Any:
    """Return ``value`` as click takes it, one or a list of texts, numbers or truth values, or raise SettingsError."""
    several = bool(getattr(parameter, "multiple", False))
    items = value if several and isinstance(value, list) else [value]
    flag = bool(getattr(parameter, "is_flag", False))
    for item in items:
        if not isinstance(item, str | int | float) or isinstance(item, bool) != flag:
            wanted = (
                "true or false" if flag else "text or a number" + (", or a list of them" if several else "")
            )
            raise SettingsError(f"{path}: {key} must be {wanted}, got {item!r}.")
    return items if several else value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=_read, is_eager=True, help="TOML file whose keys are this command's flags."
    ),
]


def recipe_from(preset: str, settings: list[str]) -> Any:
    """Return the preset recipe with ``setting=value`` changes."""
    from hasten.recipe import RECIPES, Recipe

    if preset not in RECIPES:
        raise unknown("recipe", preset, RECIPES)
    changes = {k: v for text in settings for k, v in settings_from(text, "recipe", Recipe).items()}
    return RECIPES[preset].with_(**changes)


def resolved(context: typer.Context) -> str:
    """Return the settings that this call ran with, as TOML that ``--config`` reads back."""
    import tomli_w

    values = {}
    for key, parameter in _flags(context).items():
        value = context.params.get(str(parameter.name))
        if key == "json" or value is None or value in ((), []):
            continue
        if isinstance(value, list | tuple):
            value = [item if isinstance(item, int | float) else str(item) for item in value]
        values[key] = str(value) if isinstance(value, Path) else value
    return tomli_w.dumps(values)
