"""``hasten train``: train one network, with or without methods, and stop and continue at will."""

from __future__ import annotations

import dataclasses
import hashlib
import json as json_
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.config import Config, method_from, recipe_from, resolved
from hasten.cli.output import header, note, program_output, say, say_json, visible
from hasten.errors import NoEffectError, SettingsError

if TYPE_CHECKING:
    from hasten.loop import Result
    from hasten.progress import Progress


def train(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Name, file.py:factory, pkg.mod:factory, torchvision:NAME or timm:NAME.")
    ] = "resnet8",
    data: Annotated[
        str, typer.Option(help="Name of a data set, folder of class folders, or .npz file.")
    ] = "fashion-mnist-12k",
    root: Annotated[str | None, typer.Option(help="Folder that holds the data set's files.")] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Bring images of any size to SIZE x SIZE pixels.")
    ] = None,
    download: Annotated[bool, typer.Option(help="Fetch the data set if it is not there.")] = False,
    method: Annotated[
        list[str] | None, typer.Option(help="Method, as name or name:setting=value,...; repeatable.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe to start from: strong (with mixed_precision), plain, record or record-small."
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="The same as --recipe plain.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change of the recipe, as epochs=5; repeatable. --set help lists all settings."
        ),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, adamw, rmsprop or muon.")] = None,
    init: Annotated[
        str | None, typer.Option(help="File of weights to begin from, .safetensors or .pt.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Key of all randomness.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores where not given.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; the accelerator if there is one where not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; the same call again continues what is there.")
    ] = None,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 60.0,
    allow_no_effect: Annotated[bool, typer.Option(help="Go on where a method changes nothing.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard logs into the run's folder.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    config: Config = None,
) -> None:
    """Train a network. The same command again continues a run that was stopped, at the very step."""
    preset = _preset(recipe, plain)
    if "help" in (set_ or []):
        _list_settings(preset)
        return
    if not json:
        _first_line(model, data)
    given = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "optimizer": optimizer}
    # the optimizer first: it brings a learning rate that --lr and --set may change
    changes = [*([f"optimizer={optimizer}"] if optimizer else []), *(set_ or []),
               *(f"{name}={value}" for name, value in given.items() if value is not None and name != "optimizer")]  # fmt: skip
    with program_output(json):
        result, out = _run(
            context, model, data, method or [], preset, recipe_from(preset, changes), root=root, size=size,
            download=download, init=init, seed=seed, threads=threads, device=device, out=out,
            save_every=save_every, allow_no_effect=allow_no_effect, tensorboard=tensorboard, json=json,
        )  # fmt: skip
    if json and not result.stopped:
        say_json(_summary(result, out))
    if not json and not result.stopped:
        for name, effect in result.effects.items():
            say(f"Effect {name}: {len(effect.touched)} touched, {len(effect.skipped)} skipped"
                + "".join(f"; {what} {count:g}" for what, count in result.witness[name].items()))  # fmt: skip
        held = f", {100 * result.validation:.2f}% on validation" if result.validation is not None else ""
        say(f"Result accuracy {100 * result.accuracy:.2f}%{held} in {result.seconds_train:.1f} s of training (one run, no interval)")  # fmt: skip
    if not result.saved:
        note(
            f"error: the state of step {result.steps} is not saved; make room in {out} and give the same command"
        )
        raise typer.Exit(1)
    if result.stopped:
        note(f"stopped at step {result.steps} and saved; the same command continues from there")
        raise typer.Exit(128 + result.stopped)
    if not json:
        say(f"Next   {next_command(context)}")
        say(
            f"       hasten export {shlex.quote(str(out))} {shlex.quote(_file_name(model))}.pt2{_trust(model)}"
        )


def _preset(recipe: str | None, plain: bool) -> str:
    if plain and recipe not in (None, "plain"):
        raise SettingsError(f"--plain and --recipe {recipe}: give one of them.")
    return "plain" if plain else recipe or "strong"


def _first_line(model: str, data: str) -> None:
    """Say what begins, before the imports that take a second or two."""
    from hasten import __version__

    say(f"hasten {__version__}  ·  training {model} on {data}")


def _run(
    context: typer.Context,
    model: str,
    data: str,
    names: list[str],
    preset: str,
    recipe: Any,
    *,
    root: str | None,
    size: int | None,
    download: bool,
    init: str | None,
    seed: int,
    threads: int | None,
    device: str | None,
    out: Path | None,
    save_every: float,
    allow_no_effect: bool,
    tensorboard: bool,
    json: bool,
) -> tuple[Result, Path]:
    """Train, and return the result and the run's folder."""
    import torch

    from hasten.data import as_data
    from hasten.devices import training_device
    from hasten.loop import fit
    from hasten.progress import Messages, for_terminal

    if threads and threads > (os.cpu_count() or threads):
        raise SettingsError(
            f"threads is {threads}, and this machine has {os.cpu_count()} cores: give 1 to {os.cpu_count()}."
        )
    if threads:
        torch.set_num_threads(threads)
    device = training_device(device)
    asked = [method_from(text) for text in names]
    added, without = _added(preset, asked)
    if out is None:
        out = _folder(model, data, [*added, *asked], recipe, seed, [size, root, init])
    progress: Progress = Messages() if json else for_terminal()
    try:
        images = as_data(data, root=root, size=size, download=download)
        if tensorboard:
            from hasten.tensorboard import TensorBoard

            progress = TensorBoard(out / "tensorboard", progress)
        if not json:
            say(f"{header()}  ·  {device}  ·  run: {out}")
            height, width = images.shape[:2]
            say(
                f"Data   {images.name}, {images.train_count:,} train / {images.test_count:,} test, {height}×{width}"
            )
            say(_recipe_line(preset, recipe, [*added, *asked], device) + without)
            for m in asked:
                say(f"Method {m}")
        keep = _Settings(out, context)

        def run(methods: list[Any]) -> Result:
            return fit(model, images, methods, recipe=recipe, seed=seed, out=out, save_every=save_every, device=device,
                       progress=progress, allow_no_effect=allow_no_effect, init=init, on_step=keep.write)  # fmt: skip

        try:
            result = run([*added, *asked])
        except NoEffectError as error:
            if not added or not str(error).startswith(added[0].spec.name):
                raise
            progress.message(
                f"{added[0].spec.name} does nothing for this network on this machine and is left out"
            )
            result = run(asked)
        keep.write(result.steps)
    finally:
        progress.close()
    return result, out


class _Settings:
    """Writes ``config.toml`` into the run's folder once it is this process's: at the first step."""

    def __init__(self, folder: Path, context: typer.Context) -> None:
        self.file, self.text, self.done = folder / "config.toml", resolved(context), False

    def write(self, step: int) -> None:
        if not self.done:
            self.done = True
            with suppress(OSError):  # a full disk is told where a checkpoint does not fit
                self.file.write_text(self.text, encoding="utf-8")


def _added(preset: str, asked: list[Any]) -> tuple[list[Any], str]:
    """Return the methods that the recipe brings, and what to say where one of them is left out for those asked for."""
    from hasten.places import clash

    if preset != "strong" or any(m.spec.name == "mixed_precision" for m in asked):
        return [], ""
    usual = method_from("mixed_precision")
    if others := [m.spec.name for m in asked if clash(usual, m)]:
        return [], f"; without mixed_precision, which {', '.join(others)} rules out"
    return [usual], ""


def _recipe_line(preset: str, recipe: Any, methods: list[Any], device: str) -> str:
    """Return "Recipe strong: SGD lr 0.1, bf16, batch 128, 10 epochs"."""
    import torch

    from hasten.methods.forward.machine_dtype import choose_dtype

    precision = "fp32"
    for m in methods:
        if m.spec.name == "mixed_precision":
            dtype = choose_dtype(m.dtype, torch.device(device), m.channels_last, m.force)[0]
            precision = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    optimizer, _, rest = recipe.describe().partition(", ")
    return f"Recipe {preset}: {optimizer}, {precision}, {rest}"


def _folder(model: str, data: str, methods: list[Any], recipe: Any, seed: int, more: list[Any]) -> Path:
    """Return the folder that follows from what defines the run."""
    identity = json_.dumps(
        [model, data, [repr(m) for m in methods], dataclasses.asdict(recipe), seed, *map(str, more)],
        sort_keys=True,
    )
    name = "-".join(_file_name(part) for part in (data, model))
    return Path("runs") / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}"


def _file_name(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text)[-24:].strip("-") or "net"


def _list_settings(preset: str) -> None:
    """Print every setting of the recipe, its value in ``preset``, what is allowed and what it means."""
    from hasten.recipe import MEANING, RECIPES, Recipe
    from hasten.settings import hints_of, said

    recipe = recipe_from(preset, [])
    assert recipe is RECIPES[preset] or recipe == RECIPES[preset]
    say(f"Settings of the recipe {preset}, for --set name=value:")
    for name, hint in hints_of(Recipe).items():
        value = getattr(recipe, name)
        shown = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else value
        say(f"  {f'{name}={shown}':<28} {MEANING[name]} ({said(hint)})")


def _trust(model: str) -> str:
    """Return the flag with which a network of the user's own code is built again."""
    return " --trust-code" if ":" in model and not model.startswith(("torchvision:", "timm:")) else ""


def next_command(context: typer.Context) -> str:
    """Return the `hasten compare` that asks how much sooner this run could be had, with this run's flags, quoted."""
    given, parts = context.params, ["hasten", "compare", "--model", given_text(context, "model"), "--data",
                                    given_text(context, "data")]  # fmt: skip
    for name in ("root", "size", "epochs", "lr", "batch_size", "optimizer", "init", "device", "threads"):
        if given[name] is not None:
            parts += [f"--{name.replace('_', '-')}", str(given[name])]
    for flag, name in (("--set", "set_"), ("--method", "method")):
        for text in given[name] or ():
            parts += [flag, text]
    return visible(shlex.join(parts))


def given_text(context: typer.Context, name: str) -> str:
    """Return the parameter ``name`` of the command as text."""
    return str(context.params[name])


def _summary(result: Result, out: Path) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy, "validation": result.validation, "seconds_train": result.seconds_train,
        "seconds_attach": result.seconds_attach, "steps": result.steps, "spans": result.spans, "device": result.device,
        "recipe": dataclasses.asdict(result.recipe) if result.recipe is not None else None,
        "counters": result.counters, "witness": result.witness, "out": str(out), "curve": result.curve,
        "effects": {name: dataclasses.asdict(effect) for name, effect in result.effects.items()},
        "messages": result.messages, "saved": result.saved,
    }  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(train)
