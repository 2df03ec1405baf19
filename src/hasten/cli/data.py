"""``hasten data``: what data sets there are, and whether one is whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.output import note, say, say_json

# Seconds between two lines on a long check.
EVERY = 5.0


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
    data: Annotated[str, typer.Argument(help="Name, image folder or .npz file.")],
    root: Annotated[str | None, typer.Option(help="Folder that holds the data set's files.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Image folders: the size in pixels that images will be brought to.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Read a data set whole: counts by class, image sizes, and every bad or left-out file by name.

    Ends with code 1 where the data cannot be trained on as they are.
    """
    import numpy as np

    from hasten.data import available, check_folder, load
    from hasten.data.folder_report import class_table

    if root is None and data not in available() and Path(data).expanduser().is_dir():
        last = time.monotonic()

        def told(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY:
                last = time.monotonic()
                note(f"{done:,} of {total:,} images read")

        report = check_folder(Path(data).expanduser(), size, told=told)
        if json:
            say_json(report.as_json())
        else:
            say(str(report))
        raise typer.Exit(0 if report.ok else 1)
    found = load(data, root, size=size)
    counts = {part: dict(zip(found.classes, np.bincount(i.labels, minlength=len(found.classes)).tolist(), strict=True))
              for part, i in (("train", found.train), ("test", found.test))}  # fmt: skip
    if json:
        say_json({"name": found.name, "ok": True, "shape": found.shape, "classes": found.classes, "counts": counts,
                  "notes": found.notes})  # fmt: skip
        return
    say(f"{found.name}: {found.train_count:,} train / {found.test_count:,} test, shape {found.shape}")
    for line in [*class_table(found.classes, counts), *(f"  note: {line}" for line in found.notes)]:
        say(line)


def add_to(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    group = typer.Typer(help="Data sets: list them, check one.", no_args_is_help=True)
    group.command("list")(listing)
    group.command("check")(check)
    app.add_typer(group, name="data")
