"""Images in memory and the pair of train and test images that every reader returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hasten import keyed
from hasten.errors import DataError

Stats = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, checked once, here.

    pixels: uint8, (N, H, W, C). labels: int64, (N,), each a position in ``classes``. classes: the class
    names. stats: optional (mean, std) of each channel over [0, 1] pixels; taken from the pixels where not
    given.

    Raises DataError, listing every problem, where these do not fit together.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    stats: Stats | None = None

    def __post_init__(self) -> None:
        pixels, labels, classes = np.asarray(self.pixels), np.asarray(self.labels), tuple(self.classes)
        problems = [*_pixel_problems(pixels), *_label_problems(labels, classes)]
        if pixels.ndim > 0 and labels.ndim == 1 and len(pixels) != len(labels):
            problems.append(f"{len(pixels)} images but {len(labels)} labels")
        if self.stats is not None and pixels.ndim == 4:
            mean, std = self.stats
            if not len(mean) == len(std) == pixels.shape[3]:
                problems.append(
                    f"stats need one mean and std for each of {pixels.shape[3]} channels, got {self.stats}"
                )
            elif not all(np.isfinite([*mean, *std])) or min(std) <= 0:
                problems.append(f"stats must be finite with std > 0, got {self.stats}")
        if problems:
            raise DataError("; ".join(problems) + ".")
        # Writable, because PyTorch shares this memory and has no read-only tensors.
        object.__setattr__(self, "pixels", np.require(pixels, np.uint8, ["C", "W"]))
        object.__setattr__(self, "labels", np.require(labels, np.int64, ["C", "W"]))
        object.__setattr__(self, "classes", classes)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (height, width, channels)."""
        _, height, width, channels = self.pixels.shape
        return height, width, channels

    @cached_property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, pixels scaled to [0, 1]."""
        return (self.stats or self._moments)[0]

    @cached_property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, pixels scaled to [0, 1]."""
        return (self.stats or self._moments)[1]

    @cached_property
    def _moments(self) -> Stats:
        # A histogram of the 256 values makes both moments exact, whatever the number of images.
        counts = np.zeros((self.shape[2], 256), np.int64)
        for first in range(0, len(self), 1024):
            for channel in range(self.shape[2]):
                values = self.pixels[first : first + 1024, :, :, channel].ravel()
                counts[channel] += np.bincount(values, minlength=256)
        value = np.arange(256) / 255
        share = counts / counts.sum(1, keepdims=True)
        mean = share @ value
        std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
        return tuple(map(float, mean)), tuple(map(float, std))

    def take(self, index: NDArray[np.int64]) -> Images:
        """Return the images at ``index`` (int64, any order), as a copy. Given stats stay."""
        index = np.asarray(index)
        if not np.issubdtype(index.dtype, np.integer):
            raise DataError(f"image numbers must be integers, got {index.dtype}.")
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise DataError(
                f"image numbers must lie in 0..{len(self) - 1}, got {index.min()}..{index.max()}."
            )
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def stratified(self, n: int, seed: int = 0) -> Images:
        """Return ``n`` images with equal class shares (they differ by at most one), in their present order.

        The choice is keyed by (seed, image number), and a smaller choice is part of a larger one with the
        same seed.
        """
        classes = len(self.classes)
        if not classes <= n <= len(self):
            raise DataError(
                f"a stratified choice needs {classes} (one a class) to {len(self)} images, got {n}."
            )
        return self.take(
            np.sort(np.concatenate(self._by_class(np.full(classes, n // classes), n % classes, seed)))
        )

    def _by_class(self, counts: NDArray[np.int64], extra: int, seed: int) -> list[NDArray[np.int64]]:
        """Pick counts[c] images of each class c, one more for the first ``extra`` of a keyed order."""
        draw = keyed.uniform(np.arange(len(self)), 1, seed, "stratified")[:, 0]
        counts = counts.copy()
        counts[keyed.permutation(len(counts), seed, "stratified classes")[:extra]] += 1
        chosen = []
        for label, count in enumerate(counts):
            members = np.flatnonzero(self.labels == label)
            if count > len(members):
                raise DataError(
                    f"class {self.classes[label]!r} has {len(members)} images, but equal shares need {count}."
                )
            chosen.append(members[np.argsort(draw[members], kind="stable")[:count]])
        return chosen


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set: its training and test images, which share classes and image shape.

    flip_ok says whether a horizontal flip keeps the label (not so for digits). The test images are normalised
    by the mean and std of the training images. Raises DataError where the two do not fit or training has one
    class only.
    """

    name: str
    train: Images
    test: Images
    flip_ok: bool

    def __post_init__(self) -> None:
        problems = []
        if self.train.classes != self.test.classes:
            problems.append(f"train and test differ in classes: {self.train.classes} and {self.test.classes}")
        if self.train.shape != self.test.shape:
            problems.append(
                f"train images are {self.train.shape}, test images {self.test.shape}; they must be alike"
            )
        if len(np.unique(self.train.labels)) < 2:
            only = self.train.classes[int(self.train.labels[0])]
            problems.append(
                f"all training images are of one class, {only!r}; at least two classes are needed"
            )
        if problems:
            raise DataError(f"data set {self.name!r}: " + "; ".join(problems) + ".")
        std = tuple(max(value, 1 / 255) for value in self.train.std)
        object.__setattr__(self, "test", replace(self.test, stats=(self.train.mean, std)))

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names."""
        return self.train.classes

    def stratified(self, train: int | None = None, test: int | None = None, seed: int = 0) -> DataSet:
        """Return a smaller set with equal class shares: ``train`` and ``test`` images (None keeps all)."""
        return replace(
            self,
            train=self.train if train is None else self.train.stratified(train, seed),
            test=self.test if test is None else self.test.stratified(test, seed),
        )

    def split_validation(self, fraction: float = 0.1, seed: int = 0) -> DataSet:
        """Return a set for tuning: a share of the training images becomes its test images; the true test is
        gone.

        Each class gives the same fraction (rounded, at least one image). The name says that it is a split.
        """
        if not 0 < fraction < 1:
            raise DataError(f"the validation fraction must lie between 0 and 1, got {fraction}.")
        sizes = np.bincount(self.train.labels, minlength=len(self.classes))
        if sizes[sizes > 0].min() < 2:
            small = self.classes[int(np.argmin(np.where(sizes > 0, sizes, sizes.max())))]
            raise DataError(f"class {small!r} has one training image, so it cannot be in both parts.")
        counts = np.clip(
            np.rint(sizes * fraction).astype(np.int64), np.minimum(sizes, 1), np.maximum(sizes - 1, 0)
        )
        held = np.sort(np.concatenate(self.train._by_class(counts, 0, seed)))
        rest = np.setdiff1d(np.arange(len(self.train)), held)
        return DataSet(f"{self.name}:validation", self.train.take(rest), self.train.take(held), self.flip_ok)


@contextmanager
def blame(source: object) -> Iterator[None]:
    """Put the source's name in front of a DataError raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def numbered(count: int) -> tuple[str, ...]:
    """Return the class names '0', '1', ... for sets that name none."""
    return tuple(str(label) for label in range(count))


def _pixel_problems(pixels: NDArray[np.uint8]) -> Iterator[str]:
    if pixels.dtype != np.uint8:
        yield f"pixels must be uint8, got {pixels.dtype}; convert with (255 * x).round().astype(np.uint8)"
    if pixels.ndim != 4:
        yield f"pixels must have shape (images, height, width, channels), got {pixels.shape}"
    elif pixels.shape[0] == 0:
        yield "there are no images"
    elif 0 in pixels.shape:
        yield f"images are empty: shape {pixels.shape}"


def _label_problems(labels: NDArray[np.int64], classes: tuple[str, ...]) -> Iterator[str]:
    if len(classes) < 2:
        yield f"at least two classes are needed, got {len(classes)}: {classes}"
    if len(set(classes)) < len(classes):
        yield f"class names repeat: {sorted({name for name in classes if classes.count(name) > 1})}"
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        yield f"labels must be integers of shape (images,), got {labels.dtype} of shape {labels.shape}"
        return
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        first = ", ".join(f"{labels[i]} at image {i}" for i in outside[:3])
        yield f"{len(outside)} labels lie outside the {len(classes)} classes (0..{len(classes) - 1}): {first}"
