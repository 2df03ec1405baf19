"""``hasten compare``: how much sooner do methods reach an accuracy, here?"""

from __future__ import annotations

import hashlib
import json as json_
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli.config import Config, method_from, recipe_from, resolved
from hasten.cli.output import header, note, say, visible
from hasten.errors import SettingsError


def compare(
    context: typer.Context,
    demo: Annotated[bool, typer.Option(help="Compare on built-in images in about two minutes.")] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="The demo with one run of each arm, in about 40 seconds: no claims."),
    ] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="The demo with five runs of each arm, in about three minutes.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="Name, file.py:factory, pkg.mod:factory, torchvision:NAME or timm:NAME.")
    ] = "resnet8",
    data: Annotated[
        str, typer.Option(help="Name of a data set, folder of class folders, or .npz file.")
    ] = "fashion-mnist-12k",
    root: Annotated[str | None, typer.Option(help="Folder that holds the data set's files.")] = None,
    train: Annotated[
        int | None, typer.Option(help="Stratified number of training images; all where not given.")
    ] = None,
    test: Annotated[
        int | None, typer.Option(help="Stratified number of test images; all where not given.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method to add to the strong baseline, as name or name:setting=value,...; repeatable."
        ),
    ] = None,
    stack: Annotated[
        list[str] | None, typer.Option(help="Methods to run together, as name:a=1+name; repeatable.")
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option(help="Also run the stack of all methods less each one.")
    ] = True,
    plain: Annotated[
        list[str] | None, typer.Option(help="Change of the plain recipe, as epochs=5; repeatable.")
    ] = None,
    strong: Annotated[
        list[str] | None, typer.Option(help="Change of the strong recipe, as epochs=5; repeatable.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of both recipes.")] = None,
    budgets: Annotated[
        list[float] | None,
        typer.Option(help="Shares of the strong baseline's epochs to run as controls; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each arm.")] = 3,
    target: Annotated[
        str, typer.Option(help="Accuracy such as 0.9, or plain or strong for that baseline's median.")
    ] = "plain",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores where not given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; the same call again runs what is missing.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the report's data to this file; - for standard output."),
    ] = None,
    config: Config = None,
) -> None:
    """Run baselines, methods and stacks in interleaved blocks and write a report. Stopped, it goes on where it was."""
    import sys

    from hasten.comparison import Arm, baselines, controls, demo_arms
    from hasten.comparison import compare as run
    from hasten.comparison.arms import stacks

    changed = [f"epochs={epochs}"] if epochs is not None else []
    extra: dict[str, Any] = {}
    if (quick or thorough) and (not demo or (quick and thorough)):
        raise SettingsError("--quick and --thorough are two forms of --demo; give --demo with one of them.")
    if demo:
        arms, extra = demo_arms()
        extra["seeds"] = range(1 if quick else 5 if thorough else 3)
        title = "hasten demo"
    else:
        both = baselines(
            recipe_from("plain", [*changed, *(plain or [])]),
            recipe_from("strong", [*changed, *(strong or [])]),
        )
        arms = [*both, *controls(both[1], budgets or (0.5, 0.65, 0.8))]
        arms += stacks(both[1], [method_from(text) for text in method or []], leave_one_out=leave_one_out)
        for text in stack or []:
            chosen = tuple(method_from(part) for part in text.split("+"))
            name = "+".join(m.spec.name for m in chosen)
            arms.append(Arm(name, both[1].recipe, (*both[1].methods, *chosen), "stack", f"+ {' + '.join(m.spec.name for m in chosen)}"))  # fmt: skip
        extra = {"model": model, "data": data, "root": root, "train": train, "test": test, "seeds": range(seeds),
                 "target": target if target in ("plain", "strong") else _number(target)}  # fmt: skip
        title = ""
    if out is None:
        identity = json_.dumps(
            [arm.describe() for arm in arms] + [str(v) for v in extra.values()], sort_keys=True
        )
        name = "demo" if demo else "compare"
        out = Path("runs") / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}"
    quiet = json is not None and str(json) == "-"
    printed: list[str] = []

    def tell(line: str) -> None:
        printed.append(line)
        (note if quiet else say)(line)

    tell(f"{header()}  ·  run: {out}")
    total = len(arms) * len(extra.get("seeds", range(3)))
    tell(f"Plan   {len(arms)} arms × {len(extra['seeds'])} seeds = {total} runs, interleaved; "
         f"model {extra['model']}, data {extra['data']}")  # fmt: skip
    for arm in arms:
        tell(f"         {arm.name:24} {arm.recipe.epochs:g} epochs, batch {arm.recipe.batch_size}"
             + "".join(f", {m}" for m in arm.methods))  # fmt: skip
    command = " ".join(
        ["hasten", "compare", *(_demo_flags(quick, thorough) if demo else ("--config", "config.toml"))]
    )
    finished = run(**extra, arms=arms, threads=threads, out=out, title=title, command=command,
                   config_toml=resolved(context), tell=_Told(tell))  # fmt: skip
    assert finished.folder is not None
    for line in finished.lines():
        tell(line)
    tell(
        f"Report {finished.folder / 'report.html'}   (open it)      Next: hasten compare --data FOLDER --model resnet18"
    )
    for file, text in (
        ("config.toml", resolved(context)),
        ("env.json", json_.dumps(finished.data["environment"], indent=2) + "\n"),
        ("log.txt", visible("\n".join(printed)) + "\n"),
    ):
        (finished.folder / file).write_text(text, encoding="utf-8")
    if json is not None:
        text = (finished.folder / "report.json").read_text(encoding="utf-8")
        if quiet:
            sys.stdout.write(text)
        else:
            json.write_text(text, encoding="utf-8")
    if all(run["failure"] for arm in finished.data["arms"] for run in arm["runs"]):
        raise typer.Exit(1)


def _demo_flags(quick: bool, thorough: bool) -> tuple[str, ...]:
    return ("--demo", *(("--quick",) if quick else ()), *(("--thorough",) if thorough else ()))


class _Told:
    """Prints a line for each finished run, with the time that is left."""

    def __init__(self, tell: Any) -> None:
        import time

        self._tell, self._now, self._begun, self._ran = tell, time.monotonic, time.monotonic(), 0
        self._first = -1

    def __call__(self, done: int, total: int, record: dict[str, Any]) -> None:
        if self._first < 0:
            self._first = done - 1
        spent = self._now() - self._begun
        left = spent / max(1, done - self._first) * (total - done)
        what = f"failed: {record['failure']}" if record["failure"] else (
            f"{100 * record['accuracy']:5.2f}% in {record['seconds_train']:6.1f} s")  # fmt: skip
        self._tell(
            f"Train  {done:>3}/{total}  {record['arm']:24} seed {record['seed']}  {what}   left {left:4.0f} s"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SettingsError(
            f"target must be an accuracy such as 0.9, or plain or strong, got {text!r}."
        ) from error


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(compare)
