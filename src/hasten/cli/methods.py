"""``hasten methods``: what there is, what each saves, what it was measured to gain, and its settings."""

from __future__ import annotations

import dataclasses
import json as json_
import textwrap
from importlib.resources import files
from typing import Annotated, Any

import typer

from hasten.cli.output import say, say_json, starting

WIDTH = 80
NOT_MEASURED = "not measured here"


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the methods with what each saves and gains, or show one in full."""
    starting("Reading the methods")
    from hasten import registry

    chosen = [name] if name else registry.available()
    rows = [describe(one) for one in chosen]
    if json:
        say_json(rows)
    elif name:
        for line in in_full(rows[0]):
            say(line)
    else:
        for line in table(rows):
            say(line)
        say("Next   hasten methods NAME")


def describe(name: str) -> dict[str, Any]:
    """Return all that a method says of itself, and what was measured, as plain JSON."""
    from hasten import registry

    cls = registry.method_class(name)
    spec = cls.spec
    row: dict[str, Any] = {
        f.name: sorted(v) if isinstance(v := getattr(spec, f.name), frozenset) else v
        for f in dataclasses.fields(spec)
    }
    defaults = registry.method(name)
    return row | {
        "settings": defaults.settings(), "repr": repr(defaults), "doc": (cls.__doc__ or "").strip(),
        "measured": measured().get(name, {}),
    }  # fmt: skip


def measured() -> dict[str, dict[str, str]]:
    """Return what ``scripts/make_cards.py`` wrote of each method: gain, paper, use_when, not_when, machine."""
    file = files("hasten") / "measured.json"
    if not file.is_file():
        return {}
    found: dict[str, dict[str, str]] = json_.loads(file.read_text(encoding="utf-8"))["methods"]
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table that fits into ``WIDTH`` columns."""
    heads = ("method", "saves", "measured here")
    cells = [(row["name"], row["saves"], shortly(row["measured"].get("gain", NOT_MEASURED))) for row in rows]
    wide = [max(len(line[column]) for line in [heads, *cells]) for column in (0, 1)]
    rest = WIDTH - sum(wide) - 4
    lines = []
    for name, saves, gain in [heads, *cells]:
        for number, part in enumerate(textwrap.wrap(gain, rest) or [""]):
            left = (name, saves) if number == 0 else ("", "")
            lines.append(f"{left[0]:{wide[0]}}  {left[1]:{wide[1]}}  {part}".rstrip())
    return lines


def shortly(gain: str) -> str:
    """Return the first figure of a measured gain and what it is a figure of: "1.41x [1.39, 1.43]: step of vgg16"."""
    depth, ends, opened = 0, [], []
    for place, letter in enumerate(gain):
        if letter == "(" and depth == 0:
            opened.append(place)
        if letter == ";" and depth == 0:
            ends.append(place)
        depth += (letter == "(") - (letter == ")")
    if not opened or not gain.endswith(")"):
        return gain
    figure = gain[: min([*ends, opened[-1]])].strip().removesuffix(": faster").replace(": ", ", ")
    return f"{figure}: {gain[opened[-1] + 1 : -1]}"  # the last parenthesis says what was measured


def in_full(row: dict[str, Any]) -> list[str]:
    """Return the lines that show one method."""
    found = row["measured"]
    parts = [
        ("saves", f"{row['saves']}; {row['acts']}"),
        ("source", row["paper"]),
        ("paper", found.get("paper", "")),
        ("here", found.get("gain", NOT_MEASURED)),
        ("on", found.get("machine", "")),
        ("use it", f"when {found['use_when']}" if found.get("use_when") else ""),
        ("not", f"when {found['not_when']}" if found.get("not_when") else ""),
        ("slower", f"when {row['slower_when']}" if row["slower_when"] else ""),
        ("acts at", ", ".join(row["writes"])),
    ]
    lines = [f"{row['name']}: {row['title']}"]
    for head, text in parts:
        if text:
            lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {head:8}", subsequent_indent=" " * 10)
    lines.append("  settings")
    lines += [f"    {setting} = {value!r}" for setting, value in row["settings"].items()]
    return [*lines, f"Next   hasten compare --method {row['name']}"]


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(methods)
