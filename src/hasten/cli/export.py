"""``hasten export``: the trained network of a run as a file that loads without hasten."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.output import say
from hasten.errors import SettingsError


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `hasten train` run.")],
    out: Annotated[
        Path, typer.Argument(help="File to write: .safetensors (weights) or .pt2 (torch.export program).")
    ],
    trust_code: Annotated[
        bool, typer.Option(help="Import the model's own file or package, named in the run.")
    ] = False,
) -> None:
    """Write the weights, or the whole network as a torch.export program."""
    from hasten.exporting import export_run

    if out.suffix not in (".safetensors", ".pt2"):
        raise SettingsError(f"cannot tell what to write from {out.name!r}: end it in .safetensors or .pt2.")
    size, error = export_run(run, out, trust_code=trust_code)
    say(
        f"wrote {out} ({size / 1e6:.1f} MB)"
        + (f"; largest output difference {error:.2g}" if error is not None else "")
    )


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(export)
