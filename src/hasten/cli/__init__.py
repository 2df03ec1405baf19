"""The command line: one file a command. Torch is imported by the commands that need it, not by ``hasten --help``."""

from __future__ import annotations

import sys

from hasten.cli.output import note
from hasten.errors import HastenError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a HastenError is one message on standard error and exit code 2."""
    import typer

    from hasten.cli import check, compare, data, export, methods, report, train

    app = typer.Typer(
        help="Train convolutional networks in less time, and measure by how much.",
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    )  # fmt: skip
    for module in (train, compare, methods, check, report, export, data):
        module.add_to(app)
    try:
        app(arguments, standalone_mode=True)
    except (HastenError, OSError) as error:
        note(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        note("stopped")
        sys.exit(130)
