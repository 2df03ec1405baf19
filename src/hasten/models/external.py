"""torchvision's and timm's networks by name, through their extras, imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hasten import errors
from hasten.errors import UnsupportedError


def _missing(library: str, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"{library}:NAME needs {library}, which cannot be imported here ({error}): "
        f"pip install 'hasten[{library}]', or use a name from hasten's own list"
    )


def torchvision_model(name: str, *, num_classes: int, in_channels: int) -> Callable[[], nn.Module]:
    """Return a factory of torchvision's ``name`` with fresh weights.

    Raises UnsupportedError (not installed, or in_channels other than 3) and UnknownName.
    """
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # a build for another torch fails with RuntimeError
        raise _missing("torchvision", error) from error
    known: list[str] = models.list_models(module=models)
    if name not in known:
        raise errors.unknown("torchvision model", name, known)
    if in_channels != 3:
        raise UnsupportedError(
            f"torchvision:{name} takes 3 channels, the data have {in_channels}: use timm or your own"
        )

    def factory() -> nn.Module:
        model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
        return model

    return factory


def timm_model(name: str, *, num_classes: int, in_channels: int) -> Callable[[], nn.Module]:
    """Return a factory of timm's ``name`` with fresh weights.

    Only names of timm's own list are accepted: its ``hf-hub:`` and ``local-dir:`` forms would fetch or load
    files. Raises UnsupportedError (not installed) and UnknownName.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise _missing("timm", error) from error
    known: list[str] = timm.list_models()
    if name not in known:
        raise errors.unknown("timm model", name, known)
    settings: dict[str, Any] = dict(pretrained=False, num_classes=num_classes, in_chans=in_channels)

    def factory() -> nn.Module:
        model: nn.Module = timm.create_model(name, **settings)
        return model

    return factory
