"""From the folder of a finished run to a file with the plain network in it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import SGD

from hasten import models, registry
from hasten.checkpoint import Loaded, Store
from hasten.errors import CheckpointError, HastenError, UnsupportedError
from hasten.optim.ema import EMA
from hasten.places import PLACES
from hasten.session import Session


def load_run(folder: Path, *, trust_code: bool = False) -> tuple[nn.Module, Tensor]:
    """Return the plain trained network of a run and a batch of its input shape, from the run's newest checkpoint.

    The averaged weights are taken where the recipe has them. Raises CheckpointError if there is no good checkpoint, and
    UnsupportedError if the model is code of the user's and ``trust_code`` is not given.
    """
    store = Store(folder / "checkpoints")
    loaded = store.load() if (folder / "checkpoints").is_dir() else None
    if loaded is None:
        raise CheckpointError(f"{folder} holds no good checkpoint; give the folder of a `hasten train` run.")
    try:
        return _rebuilt(loaded, trust_code)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, HastenError):
            raise
        raise CheckpointError(
            f"{loaded.path} does not describe a run ({type(error).__name__}: {error})."
        ) from error


def _rebuilt(loaded: Loaded, trust_code: bool) -> tuple[nn.Module, Tensor]:
    identity = loaded.recipe
    if "object" in identity["model"]:
        raise UnsupportedError(
            f"the model of this run was an object ({identity['model']['object']}) without a name or factory, so it "
            f"cannot be built again here; export from the program that made it: fit(...).model."
        )
    net = models.from_recipe(identity["model"], trust_code=trust_code).make()
    channels, size = identity["model"]["in_channels"], identity["model"]["image_size"]
    sample = torch.zeros(2, channels, size, size)
    # methods that act only on the batch, the loss or the update have left nothing in the network
    methods = [m for m in map(method_from_json, identity["methods"])
               if any(PLACES[p].stage not in ("batch", "loss", "update") for p in m.writes)]  # fmt: skip
    trainable = [p for p in net.parameters() if p.requires_grad]
    session = Session(
        net, SGD(trainable, lr=0.0), methods,
        sample=(sample, torch.zeros(2, dtype=torch.int64)), seed=identity["seed"], total_samples=1, allow_no_effect=True,
    )  # fmt: skip
    session.surgery.replay(loaded.parts["state"].get("structure", []))
    session.model.load_state_dict(loaded.parts["model"])
    for method in session.methods:
        method.load_state_dict(loaded.parts[f"method-{method.spec.name}"])
    if "ema" in loaded.parts["regimen"]:
        ema = EMA(session.model)
        ema.load_state_dict(loaded.parts["regimen"]["ema"])
        ema.copy_to(session.model)
    return session.export(), sample


def method_from_json(row: dict[str, Any]) -> Any:
    """Return the method that ``loop`` stored as ``{"name": ..., "settings": {...}}``."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in row["settings"].items()}
    return registry.method(row["name"], **settings)


def export_run(folder: Path, out: Path, *, trust_code: bool = False) -> tuple[int, float | None]:
    """Write the network of a run to ``out``: ``.safetensors`` for weights, ``.pt2`` for a torch.export program.

    Returns the size in bytes and, for a program, the largest difference between its outputs and the network's.
    """
    net, sample = load_run(folder, trust_code=trust_code)
    aside = out.with_name(f".{out.name}.aside{out.suffix}")
    error = None
    try:
        aside.touch()  # where this fails, the reason is plain; the writers below wrap theirs
        error = _write(net, sample, aside)
        os.replace(aside, out)
    except OSError as failure:
        raise UnsupportedError(f"cannot write {out}: {failure.strerror or failure}.") from failure
    except SafetensorError as failure:
        raise UnsupportedError(f"cannot write {out}: {failure}.") from failure
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return out.stat().st_size, error


def _write(net: nn.Module, sample: Tensor, file: Path) -> float | None:
    error = None
    if file.suffix == ".safetensors":
        # cloned, because the format refuses tensors that share memory, as tied weights do
        save_file({name: value.clone().contiguous() for name, value in net.state_dict().items()}, file)
    else:
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.export.export(net, (sample,), dynamic_shapes=({0: batch},))
        torch.export.save(program, file)
        x = torch.rand(8, *sample.shape[1:], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            error = float((torch.export.load(file).module()(x) - net(x)).abs().max())
    return error
