"""``hasten check``: run the conformance suite on a method."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from hasten.cli.config import settings_from
from hasten.cli.output import program_output, say, say_json, starting


def check(
    name: Annotated[str, typer.Argument(help="Method to check.")],
    settings: Annotated[str, typer.Option(help="Settings to check it with, as a=1,b=2.")] = "",
    pairs: Annotated[bool, typer.Option(help="Also train it with every other method.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Check that a method keeps the contract: it acts, resumes bit for bit, exports plain, and more."""
    starting(f"Checking {name}")
    with program_output(json):
        from hasten import registry
        from hasten.conformance import check_pair, run_checks, subject

        chosen = settings_from(settings, name) if settings else None
        report = run_checks(name, chosen)
        outcomes = {}
        for other in registry.available() if pairs else ():
            if other != name:
                try:
                    outcomes[other] = check_pair(subject(name, chosen), subject(other))
                except AssertionError as error:
                    report.failed[f"pair with {other}"] = str(error)
    if json:
        say_json(dataclasses.asdict(report) | {"pairs": outcomes})
    else:
        for passed in report.passed:
            say(f"  pass  {passed}")
        for check_name, reason in report.left_out.items():
            say(f"  none  {check_name}: {reason}")
        for other, outcome in outcomes.items():
            say(f"  pair  {other}: {outcome}")
        for check_name, reason in report.failed.items():
            say(f"  FAIL  {check_name}: {reason}")
        say(f"{name}: {len(report.passed)} passed, {len(report.failed)} failed")
    if report.failed:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(check)
