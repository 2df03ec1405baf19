"""``hasten predict``: what a trained network sees in image files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.output import note, program_output, say, say_json, starting

if TYPE_CHECKING:
    from hasten.exporting import Trained

AT_ONCE = 64  # files decoded before the network runs on them
TOP = 3


def predict(
    run: Annotated[
        Path, typer.Argument(help="Folder of a `hasten train` run, or of a comparison that kept its network.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; the accelerator if there is one where not given.")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option(help="Import the model's own file or package, named in the run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print the class of each image, with its probability, and the three most probable ones."""
    starting(f"Reading {run}")
    with program_output(json):
        from hasten.errors import DataError
        from hasten.exporting import load
        from hasten.exporting.read import image_files

        trained = load(run, trust_code=trust_code, device=device)
        files = list(image_files(images))
        if not files:
            raise DataError(f"there are no files in {', '.join(map(str, images))}.")
    rows: list[dict[str, Any]] = []
    bad: dict[str, str] = {}
    for first in range(0, len(files), AT_ONCE):
        with program_output(json):
            seen, unread = _predicted(trained, files[first : first + AT_ONCE])
        for file, reason in unread.items():
            note(f"{file}: {reason}")
        bad |= unread
        rows += seen
        if not json:
            for row in seen:
                say(f"{row['file']}  {_shown(row['top'])}")
    if json:
        say_json({"images": rows, "unread": bad})
    if bad:
        note(f"{len(bad)} of {len(files)} files could not be used")
        raise typer.Exit(1)


def _predicted(trained: Trained, files: list[Path]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for each image, and the reason for each file that is none."""
    import numpy as np

    from hasten.exporting.read import read_one

    pixels: dict[Path, Any] = {}
    bad: dict[str, str] = {}
    for file in files:
        found = read_one(file, trained.known)
        if isinstance(found, str):
            bad[str(file)] = found
        else:
            pixels[file] = found
    rows: dict[Path, dict[str, Any]] = {}
    for shape in {p.shape for p in pixels.values()}:
        same = [file for file, p in pixels.items() if p.shape == shape]
        chances = trained.predict(np.stack([pixels[file] for file in same])).probabilities
        best = chances.topk(min(TOP, chances.shape[1]))
        for file, values, places in zip(same, best.values.tolist(), best.indices.tolist(), strict=True):
            top = [
                {"class": trained.classes[i], "probability": p} for p, i in zip(values, places, strict=True)
            ]
            rows[file] = {"file": str(file), "class": top[0]["class"], "probability": values[0], "top": top}
    return [rows[file] for file in files if file in rows], bad


def _shown(top: list[dict[str, Any]]) -> str:
    first, *others = [f"{one['class']} {100 * one['probability']:.1f}%" for one in top]
    return first + (f"  ({', '.join(others)})" if others else "")


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(predict)
