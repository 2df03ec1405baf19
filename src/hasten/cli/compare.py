"""``hasten compare``: how much sooner do methods reach the same accuracy, here?"""

from __future__ import annotations

import hashlib
import json as json_
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli.config import Config, method_from, recipe_from, resolved
from hasten.cli.output import header, note, program_output, say, starting, visible
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
    size: Annotated[int | None, typer.Option(help="Bring images of any size to SIZE x SIZE pixels.")] = None,
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
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change of both recipes, as batch_size=64; repeatable.")
    ] = None,
    plain: Annotated[
        list[str] | None, typer.Option(help="Change of the plain recipe, as epochs=5; repeatable.")
    ] = None,
    strong: Annotated[
        list[str] | None, typer.Option(help="Change of the strong recipe, as epochs=5; repeatable.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of both recipes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of both recipes.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Batch size of both recipes.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Optimizer of both recipes: sgd, adamw, ...")] = None,
    init: Annotated[
        str | None, typer.Option(help="File of weights to begin from, .safetensors or .pt.")
    ] = None,
    budgets: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the epochs to run every arm at, as 0.5; repeatable. Found by a first pass where not given."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each arm at each budget; 3 where not given.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Accuracy to reach, such as 0.9; the highest that all arms reach where not given."),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            help="Time that all of it may take, such as 20m: epochs, images and seeds are fitted into it."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; the accelerator if there is one.")
    ] = None,
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
    """Train plainly, with the strong baseline and with methods at several budgets; say what reaches an accuracy sooner.

    Stopped with Ctrl-C or killed, the same command goes on where it was.
    """
    import sys

    if (quick or thorough) and (not demo or (quick and thorough)):
        raise SettingsError("--quick and --thorough are two forms of --demo; give --demo with one of them.")
    starting("hasten compare")
    from hasten.cli.compare_told import Lines
    from hasten.comparison import Arm, demo_arms, usual
    from hasten.comparison import compare as run

    extra: dict[str, Any]
    if demo:
        arms, extra = demo_arms("quick" if quick else "thorough" if thorough else "usual")
        title = "hasten demo"
    else:
        given = (("epochs", epochs), ("lr", lr), ("batch_size", batch_size))
        # the optimizer first: it brings a learning rate that --lr and --set may change
        shared = [
            *([f"optimizer={optimizer}"] if optimizer else []),
            *(set_ or []),
            *(f"{key}={value}" for key, value in given if value is not None),
        ]
        arms = usual([method_from(text) for text in method or []], recipe_from("plain", [*shared, *(plain or [])]),
                     recipe_from("strong", [*shared, *(strong or [])]), leave_one_out=leave_one_out)  # fmt: skip
        base = next(arm for arm in arms if arm.kind == "strong")
        for text in stack or []:
            chosen = tuple(method_from(part) for part in text.split("+"))
            names = [m.spec.name for m in chosen]
            arms.append(
                Arm("+".join(names), base.recipe, (*base.methods, *chosen), "stack", "+ " + " + ".join(names))
            )
        extra = {"model": model, "data": data, "root": root, "train": train, "test": test, "seeds": seeds, "size": size,
                 "budgets": budgets, "init": init, "limit": limit, "target": None if target is None else _number(target)}  # fmt: skip
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
    tell(
        f"Ask    how much sooner is the same accuracy reached?  model {extra['model']}, data {extra['data']}"
    )
    command = " ".join(
        ["hasten", "compare", *(_demo_flags(quick, thorough) if demo else ("--config", "config.toml"))]
    )
    with program_output(quiet):
        finished = run(**extra, arms=arms, threads=threads, device=device, out=out, title=title, command=command,
                       config_toml=resolved(context), told=Lines(tell))  # fmt: skip
    assert finished.folder is not None
    for line in finished.lines():
        tell(line)
    tell(f"Report {finished.folder / 'report.html'}   (open it)")
    for line in _next(finished, demo, model, data, root, size):
        tell(line)
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
    if all(
        run["failure"] for arm in finished.data["arms"] for point in arm["points"] for run in point["runs"]
    ):
        raise typer.Exit(1)


def _next(finished: Any, demo: bool, model: str, data: str, root: str | None, size: int | None) -> list[str]:
    """Return what to do with the answer, as commands that can be pasted."""
    lines = []
    if finished.data["network"]:
        kept = finished.folder / finished.data["network"]
        lines.append(
            f"Keep   hasten export {shlex.quote(str(kept))} net.pt2{_trust(model)}      (the network of {_whose(finished.data)})"
        )
    if demo:
        return [*lines, "Next   hasten compare --data FOLDER --model resnet18 --limit 20m"]
    claim = finished.data["verdict"]["claim"]
    row = next((arm for arm in finished.data["arms"] if arm["name"] == claim), None)
    if row is None:
        return [*lines, "Next   the same command with --seeds 5 and a longer --limit narrows the intervals"]
    words = ["hasten", "train", "--model", model, "--data", data]
    words += [
        part
        for flag, value in (("--root", root), ("--size", size))
        if value is not None
        for part in (flag, str(value))
    ]
    if row["kind"] == "baseline":
        words += ["--recipe", "plain"]
    for text in row["methods"]:
        words += ["--method", text] if "mixed_precision" not in text else []
    return [*lines, f"Next   {shlex.join(words)}"]


def _trust(model: str) -> str:
    """Return the flag with which a network of the user's own code is built again."""
    return " --trust-code" if ":" in model and not model.startswith(("torchvision:", "timm:")) else ""


def _whose(data: Any) -> str:
    claim = data["verdict"]["claim"]
    rows = {arm["name"]: arm for arm in data["arms"]}
    best = claim or max(rows, key=lambda name: rows[name]["accuracy"]["mean"] or 0.0)
    return str(rows[best]["label"])


def _demo_flags(quick: bool, thorough: bool) -> tuple[str, ...]:
    return ("--demo", *(("--quick",) if quick else ()), *(("--thorough",) if thorough else ()))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SettingsError(f"target must be an accuracy such as 0.9, got {text!r}.") from error


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(compare)
