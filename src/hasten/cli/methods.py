"""``hasten methods``: what there is, what each saves, and its settings."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from hasten.cli.output import say, say_json


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the methods, or show one with its settings."""
    from hasten import registry

    chosen = [name] if name else registry.available()
    rows = [describe(one) for one in chosen]
    if json:
        say_json(rows)
    elif name:
        row = rows[0]
        say(f"{row['name']}: {row['title']}")
        say(f"  saves   {row['saves']}; {row['acts']}")
        say(f"  paper   {row['paper']}")
        say(f"  acts at {', '.join(row['writes'])}")
        if row["slower_when"]:
            say(f"  slower  {row['slower_when']}")
        say("  settings")
        for setting, value in row["settings"].items():
            say(f"    {setting} = {value!r}")
        say(f"Next   hasten compare --method {name}")
    else:
        for row in rows:
            say(f"{row['name']:26} {row['saves']:15} {row['title']}")
        say("Next   hasten methods NAME")


def describe(name: str) -> dict[str, Any]:
    """Return all that a method says of itself, as plain JSON."""
    from hasten import registry

    cls = registry.method_class(name)
    spec = cls.spec
    row: dict[str, Any] = {
        f.name: sorted(v) if isinstance(v := getattr(spec, f.name), frozenset) else v
        for f in dataclasses.fields(spec)
    }
    defaults = registry.method(name)
    return row | {"settings": defaults.settings(), "repr": repr(defaults), "doc": (cls.__doc__ or "").strip()}


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(methods)
