"""Weights from elsewhere as the start of a run: what fits is loaded, and everything that does not is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hasten.errors import SettingsError

# prefixes that wrappers put before every name: DDP and DataParallel, torch.compile, Lightning and others
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
# keys under which training programs keep the weights in a larger file
_INSIDE = ("state_dict", "model_state_dict", "model", "ema", "model_ema", "state_dict_ema", "net", "weights")


@dataclass
class Loaded:
    """What ``load_weights`` did: names of the network's tensors that were loaded, that stay as they were, each with the
    reason, and names of the source that nothing took."""

    loaded: list[str] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"initial weights: {len(self.loaded)} tensors loaded"
        text += f" of {len(self.loaded) + len(self.fresh)}"
        if self.fresh:
            text += "; left fresh: " + _few([f"{name} ({reason})" for name, reason in self.fresh.items()])
        if self.unused:
            text += "; not used: " + _few(self.unused)
        return text


def _few(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file, or of a PyTorch file that holds nothing but data.

    Raises SettingsError for a file that is missing, damaged, of another kind, or that would have to run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise SettingsError(f"init: there is no file {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise SettingsError(f"init: {path} cannot be read as safetensors: {error}.") from error
    if path.suffix not in (".pt", ".pth", ".bin", ".tar", ".ckpt"):
        raise SettingsError(
            f"init: {path.name} is of no known kind; give .safetensors, .pt, .pth, .bin or .ckpt."
        )
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise SettingsError(
                f"init: {path} holds more than tensors and plain data, and loading that could run code. Save "
                f"model.state_dict() alone, or as .safetensors."
            ) from error
        said = str(error).splitlines()
        raise SettingsError(
            f"init: {path} cannot be read: {said[0] if said else type(error).__name__}."
        ) from error
    return tensors_in(held, str(path))


def tensors_in(held: Any, what: str) -> dict[str, Tensor]:
    """Return the state dict in ``held``, itself or under one of the usual keys. Raises SettingsError if there is none."""
    if isinstance(held, Mapping):
        flat = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
        if flat:
            return flat
        for key in _INSIDE:
            if isinstance(held.get(key), Mapping):
                return tensors_in(held[key], what)
    raise SettingsError(
        f"init: {what} holds no state dict (names with tensors), but a {type(held).__name__}."
    )


@torch.no_grad()
def load_weights(net: nn.Module, source: str | Path | Mapping[str, Tensor]) -> Loaded:
    """Copy into ``net`` every tensor of ``source`` that has its name and shape, and return what came of each.

    source: a file (see ``read_weights``) or a state dict. Prefixes of wrappers (``module.``, ``_orig_mod.``, ...) are taken
    off where that makes names fit. What has another shape, such as the head for another number of classes, stays as
    it is in ``net``. Raises SettingsError if less than a quarter of what is trained fits.
    """
    given = (
        read_weights(source) if isinstance(source, str | Path) else tensors_in(source, "the dictionary given")
    )
    own = net.state_dict()
    given = _stripped(given, set(own))
    result = Loaded(unused=[name for name in given if name not in own])
    for name, value in own.items():
        if name not in given:
            result.fresh[name] = "not in the weights"
        elif given[name].shape != value.shape:
            there, here = ("x".join(map(str, t.shape)) or "a number" for t in (given[name], value))
            result.fresh[name] = f"{there} in the weights, {here} here"
        else:
            value.copy_(given[name])
            result.loaded.append(name)
    trained = {name for name, _ in net.named_parameters()}
    if 4 * len(set(result.loaded) & trained) < len(trained):
        raise SettingsError(
            f"init: {len(set(result.loaded) & trained) or 'no'} weights of {len(trained)} fit this network, which has {', '.join(list(own)[:3])}, ...; the weights have "
            f"{', '.join(list(given)[:3])}, ... They are of another network."
        )
    return result


def _stripped(given: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Take prefixes off the names while that lets more of them fit."""
    while True:
        fits = len(wanted & given.keys())
        for prefix in _PREFIXES:
            shorter = {name.removeprefix(prefix): value for name, value in given.items()}
            if (
                len(shorter) == len(given)
                and any(n.startswith(prefix) for n in given)
                and (
                    len(wanted & shorter.keys()) > fits
                    or (not fits and all(n.startswith(prefix) for n in given))
                )
            ):
                given = shorter
                break
        else:
            return given
