"""A trained network with all that is needed to use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hasten
from hasten.errors import DataError, UnsupportedError
from hasten.exporting.pixels import WRONG_PIXELS, Pixels

MOST_AT_ONCE = 2**25  # numbers in a batch


class Predictions(NamedTuple):
    """classes: the most probable class of each image. probabilities: float32 (N, classes), in the order of
    ``Trained.classes``."""

    classes: list[str]
    probabilities: Tensor


@dataclass(eq=False)
class Trained:
    """What a run came to.

    network: plain PyTorch modules in eval mode, for normalised images; averaged weights are in it where the recipe
    averages. preprocessing: classes, size, mean, std and so on (``DataSet.preprocessing``), or None in runs of older
    versions. shape: (C, H, W) of its input. accuracy: on the test images, in [0, 1], or None. precision: the number
    format that was evaluated. model, methods, recipe, structure, data: what was trained, how, what changed its shape, and
    what identifies the data.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    preprocessing: dict[str, Any] | None = None
    accuracy: float | None = None
    precision: str = "float32"
    model: dict[str, Any] = field(default_factory=dict)
    methods: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    structure: list[Any] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names. Raises UnsupportedError where the run did not keep them."""
        return tuple(self.known["classes"])

    @property
    def known(self) -> dict[str, Any]:
        """Return the preprocessing. Raises UnsupportedError where the run did not keep it."""
        if not self.preprocessing:
            raise UnsupportedError(
                "this run was made by an older version, which kept neither class names nor normalisation; export it "
                "with --raw (raw=True), or train again."
            )
        return self.preprocessing

    @cached_property
    def pixels(self) -> Pixels:
        """The network that takes pixels. Raises UnsupportedError where the normalisation is not known."""
        return Pixels(self.network, self.known, self.precision).to(self.device).eval()

    def sample(self, count: int = 2) -> Tensor:
        """Return normalised zeros of the input's shape."""
        return torch.zeros(count, *self.shape)

    def labels(self) -> dict[str, Any]:
        """Return, for JSON, what a user of the network must know."""
        return labels(self.preprocessing, self.accuracy, self.model, self.precision)

    def predict(self, images: Tensor | NDArray[Any] | Sequence[str | Path]) -> Predictions:
        """Return the classes of ``images``: pixels (N, C, H, W), uint8 or floating point in [0, 1], or image files.

        Raises DataError for anything else, naming the files that cannot be used.
        """
        if isinstance(images, Tensor | np.ndarray):
            pixels = images
        else:
            from hasten.exporting.read import read_images

            pixels = read_images([Path(file) for file in images], self.known)
        probabilities = self.logits(pixels).softmax(1)
        return Predictions([self.classes[i] for i in probabilities.argmax(1).tolist()], probabilities)

    def logits(self, images: Tensor | NDArray[Any]) -> Tensor:
        """Return the outputs for pixels (N, C, H, W), float32 (N, classes) on the CPU. Raises DataError."""
        x = _checked(torch.as_tensor(images), self.shape[0])
        with torch.no_grad():
            return torch.cat([self.pixels(part.to(self.device)).cpu() for part in _parts(x)])


def labels(
    preprocessing: dict[str, Any] | None, accuracy: float | None, model: dict[str, Any], precision: str
) -> dict[str, Any]:
    """Return, for JSON, what a user of a network must know: classes, input, accuracy, and where it comes from."""
    known = preprocessing or {}
    return {
        **{key: known.get(key) for key in ("classes", "size", "channels", "mean", "std", "resize")},
        "accuracy": accuracy, "precision": precision, "output": "logits", "model": _public(model), "hasten": hasten.__version__,
    }  # fmt: skip


def _public(model: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a model without the folders of the machine it was trained on."""
    kept = {key: value for key, value in model.items() if key not in ("path", "seed")}
    if "target" in kept:
        where, _, name = str(kept["target"]).rpartition(":")
        kept["target"] = f"{Path(where).name}:{name}"
    return kept


def _checked(x: Tensor, channels: int) -> Tensor:
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape or 1 in x.shape[2:]:
        turned = x.dim() == 4 and x.shape[3] == channels
        hint = "; give images.transpose(0, 3, 1, 2)" if turned else ""
        raise DataError(
            f"images must have shape (N, {channels}, H, W) with sides of at least 2 pixels, got {tuple(x.shape)}{hint}."
        )
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise DataError(f"{WRONG_PIXELS}; got {str(x.dtype).removeprefix('torch.')}.")
    if x.is_floating_point() and not bool(((x >= 0) & (x <= 1)).all()):
        raise DataError(f"{WRONG_PIXELS}; got values from {float(x.min()):.3g} to {float(x.max()):.3g}.")
    return x


def _parts(x: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(x, max(1, min(500, MOST_AT_ONCE // x[0].numel()))))
