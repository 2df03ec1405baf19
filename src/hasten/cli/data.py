"""``hasten data``: what data sets there are, and whether one is whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.output import say, say_json


def listing(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the data sets that are known by name."""
    from hasten.data import available

    sets = available()
    if json:
        say_json(sets)
        return
    for name, line in sets.items():
        say(f"{name:20} {line}")


def check(
    data: Annotated[str, typer.Argument(help="Name, folder or .npz file.")],
    root: Annotated[str | None, typer.Option(help="Folder that holds the data set's files.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Read a data set whole: counts by class, and every bad file by name."""
    import numpy as np

    from hasten.data import check_folder, load

    if Path(data).is_dir():
        report = check_folder(Path(data))
        if json:
            say_json(dataclasses.asdict(report))
        else:
            say(str(report))
        raise typer.Exit(1 if report.bad else 0)
    images = load(data, root)
    counts = {part: dict(zip(images.classes, np.bincount(i.labels, minlength=len(images.classes)).tolist(), strict=True))
              for part, i in (("train", images.train), ("test", images.test))}  # fmt: skip
    if json:
        say_json({"name": images.name, "shape": images.train.shape, "counts": counts})
        return
    say(f"{images.name}: {len(images.train):,} train / {len(images.test):,} test, shape {images.train.shape}")
    for name in images.classes:
        say(f"  {name:20} {counts['train'][name]:>7} {counts['test'][name]:>7}")


def add_to(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    group = typer.Typer(help="Data sets: list them, check one.", no_args_is_help=True)
    group.command("list")(listing)
    group.command("check")(check)
    app.add_typer(group, name="data")
