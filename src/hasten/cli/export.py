"""``hasten export``: the trained network of a run as a file that is used without hasten."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.output import program_output, say, say_json, starting
from hasten.errors import SettingsError

ENDINGS = (".pt2", ".safetensors", ".onnx")


def export(
    run: Annotated[
        Path, typer.Argument(help="Folder of a `hasten train` run, or of a comparison that kept its network.")
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="File to write: .pt2 (torch.export program), .onnx, or .safetensors (weights alone)."
        ),
    ],
    raw: Annotated[
        bool, typer.Option("--raw", help="Take normalised images of the network's size instead of pixels.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option(help="Import the model's own file or package, named in the run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Write the network, with resize and normalisation inside, and its labels beside it; print how to use it."""
    if out.suffix not in ENDINGS:
        raise SettingsError(f"cannot tell what to write from {out.name!r}: end it in {', '.join(ENDINGS)}.")
    starting(f"Reading {run}")
    with program_output(json):
        from hasten.exporting import export as write

        done = write(run, out, raw, trust_code=trust_code)
    if json:
        say_json({"file": str(out), "bytes": out.stat().st_size, "labels_file": str(done.labels_path), "error": done.error,
                  "labels": done.labels, "snippet": done.snippet, "notes": done.notes})  # fmt: skip
        return
    checked = (
        f"; largest difference from the network's outputs {done.error:.2g}" if done.error is not None else ""
    )
    say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB) and {done.labels_path}{checked}")
    for line in done.notes:
        say(f"Note   {line}")
    say("Use it, in Python:")
    for line in done.snippet.rstrip().splitlines():
        say(f"  {line}")


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(export)
