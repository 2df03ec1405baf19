"""A data set in memory: training, test and perhaps validation images that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hasten.data.augment import Transform
from hasten.data.images import Images
from hasten.data.loader import Loader
from hasten.errors import DataError


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set: its training and test images, which share classes and image shape.

    flip_ok: whether a horizontal flip keeps the label (not so for digits). validation: images for choosing
    settings and targets, where there are any (see ``hold_out``). resize: the length in pixels that the shorter
    side of every file was brought to before the centre was cut out (see ``load_folder``), or None. notes: what a
    user should know of how it was read. Test and validation images are normalised by the mean and std of the
    training images. Raises DataError where the parts do not fit or training has one class only.
    """

    name: str
    train: Images
    test: Images
    flip_ok: bool
    validation: Images | None = None
    resize: int | None = None
    notes: tuple[str, ...] = ()

    owns_augmentation = False

    def __post_init__(self) -> None:
        problems = []
        for part, images in self._others().items():
            if self.train.classes != images.classes:
                problems.append(
                    f"train and {part} differ in classes: {self.train.classes} and {images.classes}"
                )
            if self.train.shape != images.shape:
                problems.append(
                    f"train images are {self.train.shape}, {part} images {images.shape}; they must be alike"
                )
        if len(np.unique(self.train.labels)) < 2:
            only = self.train.classes[int(self.train.labels[0])]
            problems.append(
                f"all training images are of one class, {only!r}; at least two classes are needed"
            )
        if problems:
            raise DataError(f"data set {self.name!r}: " + "; ".join(problems) + ".")
        std = tuple(max(value, 1 / 255) for value in self.train.std)
        for part, images in self._others().items():
            object.__setattr__(self, part, replace(images, stats=(self.train.mean, std)))

    def _others(self) -> dict[str, Images]:
        parts = {"test": self.test, "validation": self.validation}
        return {name: images for name, images in parts.items() if images is not None}

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names."""
        return self.train.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (height, width, channels) of every image."""
        return self.train.shape

    @property
    def train_count(self) -> int:
        """Return the number of training images."""
        return len(self.train)

    @property
    def test_count(self) -> int:
        """Return the number of test images."""
        return len(self.test)

    @property
    def has_validation(self) -> bool:
        """Return whether there is a validation part."""
        return self.validation is not None

    def training(
        self,
        batch_size: int,
        *,
        seed: int,
        augment: Sequence[Transform] = (),
        device: torch.device | str = "cpu",
        drop_last: bool = True,
    ) -> Loader:
        """Return a loader of shuffled, augmented, normalised training batches."""
        return Loader(self.train, batch_size, seed=seed, augment=augment, device=device, drop_last=drop_last)

    def evaluation(self, part: str = "test", *, device: torch.device | str = "cpu") -> Loader:
        """Return a loader of all images of ``part`` ("test", "validation" or "train"), in order, normalised.

        Batches hold up to 500 images, fewer where these are large. Raises DataError for a part that is not there.
        """
        images = (self._others() | {"train": self.train}).get(part)
        if images is None:
            raise DataError(
                f"data set {self.name!r} has no part {part!r}; it has train, {', '.join(self._others())}."
            )
        most = max(1, min(500, len(images), 2**25 // int(np.prod(images.shape))))
        return Loader(images, most, shuffle=False, drop_last=False, device=device)

    def stratified(self, train: int | None = None, test: int | None = None, seed: int = 0) -> DataSet:
        """Return a smaller set with equal class shares: ``train`` and ``test`` images (None keeps all)."""
        return replace(
            self,
            train=self.train if train is None else self.train.stratified(train, seed),
            test=self.test if test is None else self.test.stratified(test, seed),
        )

    def hold_out(self, fraction: float = 0.1, seed: int = 0) -> DataSet:
        """Return the same set with a validation part cut from the training images; the test images stay.

        Each class gives the same fraction (see ``Images.cut``). Raises DataError where there is a validation part
        already.
        """
        if self.validation is not None:
            raise DataError(
                f"data set {self.name!r} has a validation part already: {len(self.validation)} images."
            )
        train, validation = self.train.cut(fraction, seed)
        return replace(self, train=train, validation=validation)

    def identity(self) -> dict[str, Any]:
        """Return, for JSON, what makes this set the same data: counts, shape, classes, digests of all content."""
        parts = {"train": self.train} | self._others()
        return {
            "name": self.name, "counts": {name: len(images) for name, images in parts.items()},
            "shape": list(self.shape), "classes": list(self.classes), "size": self.resize,
            "content": {name: images.fingerprint for name, images in parts.items()},
        }  # fmt: skip

    def preprocessing(self) -> dict[str, Any]:
        """Return, for JSON, what a network trained on this set expects of an image.

        classes; size [H, W] in pixels; channels; mean and std of each channel over [0, 1] pixels; resize: None, or
        how images of other sizes are brought to ``size``: the shorter side to "shorter_side" pixels (antialiased
        bilinear), then the centre is cut out.
        """
        height, width, channels = self.shape
        how = {"shorter_side": self.resize, "interpolation": "bilinear", "antialias": True}
        return {
            "classes": list(self.classes), "size": [height, width], "channels": channels,
            "mean": list(self.train.mean), "std": [max(value, 1 / 255) for value in self.train.std],
            "resize": None if self.resize is None else how,
        }  # fmt: skip
