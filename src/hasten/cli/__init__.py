"""The command line: one file a command. Torch is imported by the commands that need it, not by ``hasten --help``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hasten.cli.endings import BROKEN_PIPE, closed_pipe, crashed, interruption, plain_warnings, stopped, stops
from hasten.cli.output import note, say
from hasten.errors import HastenError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    A HastenError is one message on standard error and code 2; Ctrl-C, SIGTERM and SIGHUP are 128 + the signal; a fault is
    one line and code 70.
    """
    given = sys.argv[1:] if arguments is None else arguments
    with stops() as seen, plain_warnings():
        try:
            application()(arguments, prog_name="hasten")
        except SystemExit as end:
            if interruption(end):
                stopped(given, seen)
            raise
        except KeyboardInterrupt:
            stopped(given, seen)
        except BrokenPipeError:
            closed_pipe()
            sys.exit(BROKEN_PIPE)
        except (HastenError, OSError) as error:
            note(f"error: {error}")
            sys.exit(2)
        except Exception as error:
            sys.exit(crashed(error))


def application() -> typer.Typer:
    """Return the application with all its commands."""
    from hasten.cli import check, compare, data, evaluate, export, methods, predict, report, train

    app = typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip

    app.callback()(common)
    for module in (train, compare, methods, check, report, export, predict, evaluate, data):
        module.add_to(app)
    return app


def _version(asked: bool) -> None:
    if asked:
        from hasten import __version__

        say(f"hasten {__version__}")
        raise typer.Exit


def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train convolutional networks in less time, and measure by how much."""
