"""``hasten train``: train one network, with or without methods, and stop and continue at will."""

from __future__ import annotations

import dataclasses
import hashlib
import json as json_
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.config import Config, method_from, recipe_from, resolved
from hasten.cli.output import header, note, say, say_json
from hasten.errors import SettingsError


def train(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Name, file.py:factory, pkg.mod:factory, torchvision:NAME or timm:NAME.")
    ] = "resnet8",
    data: Annotated[
        str, typer.Option(help="Name of a data set, folder of class folders, or .npz file.")
    ] = "fashion-mnist-12k",
    root: Annotated[str | None, typer.Option(help="Folder that holds the data set's files.")] = None,
    download: Annotated[bool, typer.Option(help="Fetch the data set if it is not there.")] = False,
    method: Annotated[
        list[str] | None, typer.Option(help="Method, as name or name:setting=value,...; repeatable.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe to start from: plain or strong.")] = "strong",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change of the recipe, as epochs=5; repeatable.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data; the same as --set epochs=N.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Key of all randomness.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores where not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; the same call again continues what is there.")
    ] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    allow_no_effect: Annotated[bool, typer.Option(help="Go on where a method changes nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    config: Config = None,
) -> None:
    """Train a network. The same command again continues a run that was stopped, at the very step."""
    import torch

    from hasten.data import load
    from hasten.loop import fit
    from hasten.progress import for_terminal, silent

    if threads:
        torch.set_num_threads(threads)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    methods = [method_from(text) for text in method or []]
    chosen = recipe_from(recipe, [*(set_ or []), *([f"epochs={epochs}"] if epochs is not None else [])])
    if out is None:
        identity = json_.dumps(
            [model, data, [repr(m) for m in methods], dataclasses.asdict(chosen), seed], sort_keys=True
        )
        name = "-".join(
            "".join(c if c.isalnum() else "-" for c in part)[-24:].strip("-") for part in (data, model)
        )
        out = Path("runs") / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}"
    images = load(data, root, download=download)
    if not json:
        say(f"{header()}  ·  run: {out}")
        say(f"Data   {images.name}, {len(images.train):,} train / {len(images.test):,} test, "
            f"{images.train.shape[0]}×{images.train.shape[1]}")  # fmt: skip
        for m in methods:
            say(f"Method {m}")
    progress = silent if json else for_terminal()
    try:
        result = fit(model, images, methods, recipe=chosen, seed=seed, out=out, save_every=save_every, device=device,
                     progress=progress, allow_no_effect=allow_no_effect)  # fmt: skip
    finally:
        progress.close()
    (out / "config.toml").write_text(resolved(context), encoding="utf-8")
    for message in result.messages:
        note(message)
    if not result.saved:
        note(
            f"error: the state of step {result.steps} is not saved; make room in {out} and give the same command"
        )
        raise typer.Exit(1)
    if result.stopped:
        note(f"stopped at step {result.steps} and saved; the same command continues from there")
        raise typer.Exit(128 + result.stopped)
    summary = {
        "accuracy": result.accuracy, "seconds_train": result.seconds_train, "steps": result.steps, "spans": result.spans,
        "counters": result.counters, "witness": result.witness, "out": str(out), "curve": result.curve,
        "effects": {name: dataclasses.asdict(effect) for name, effect in result.effects.items()},
        "messages": result.messages,
    }  # fmt: skip
    if json:
        say_json(summary)
        return
    for name, effect in result.effects.items():
        say(f"Effect {name}: {len(effect.touched)} touched, {len(effect.skipped)} skipped"
            + "".join(f"; {what} {count:g}" for what, count in result.witness[name].items()))  # fmt: skip
    say(
        f"Result accuracy {100 * result.accuracy:.2f}% in {result.seconds_train:.1f} s of training (one run, no interval)"
    )
    say(
        f"Next   hasten compare --model {model} --data {data}"
        + "".join(f" --method {m}" for m in method or [])
    )


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(train)
