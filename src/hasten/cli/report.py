"""``hasten report``: write the HTML report again from a report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.output import say
from hasten.errors import DataError


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison, or its report.json.")],
    csv: Annotated[bool, typer.Option("--csv", help="Print the result table as CSV instead.")] = False,
) -> None:
    """Make report.html again from report.json, or print its table."""
    from hasten.report import csv_rows, from_json, summary_lines, write

    source = folder / "report.json" if folder.is_dir() else folder
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {source}: {error}; give the folder of a finished comparison."
        ) from error
    data = from_json(text)
    if csv:
        import csv as csv_
        import sys

        csv_.writer(sys.stdout, lineterminator="\n").writerows(csv_rows(data))
        return
    write(source.parent, data)
    for line in summary_lines(data):
        say(line)
    say(f"Report {source.parent / 'report.html'}   (open it)")


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(report)
