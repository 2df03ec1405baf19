"""Where a run trains: the accelerator if there is one, and a clear word where a device cannot train."""

from __future__ import annotations

import torch

from hasten.errors import SettingsError


def default_device() -> str:
    """Return the type of this machine's accelerator as PyTorch names it, or "cpu"."""
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        if found is not None:
            return found.type
    return "cpu"


def training_device(name: str | torch.device | None) -> str:
    """Return the device called ``name``, the default one for None. Raises SettingsError if it cannot train here."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds shapes and no numbers")
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise SettingsError(
            f"device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}. This machine has: "
            f"{', '.join(dict.fromkeys((default_device(), 'cpu')))}."
        ) from error
    return str(device)
