"""Labelled images in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

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

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every label, every pixel and the class names: other data has another one."""
        digest = hashlib.sha256(repr((self.pixels.shape, self.classes, self.stats)).encode())
        digest.update(self.labels.data)
        digest.update(self.pixels.data)
        return digest.hexdigest()[:16]

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

    def cut(self, fraction: float, seed: int = 0) -> tuple[Images, Images]:
        """Return (the rest, a part of ``fraction`` of the images), each in its present order.

        Every class gives the same fraction, rounded, at least one image; which ones is keyed by (seed, image
        number). Raises DataError where a class has one image only, and so cannot be in both.
        """
        held = held_out(self.labels, self.classes, fraction, seed)
        return self.take(np.setdiff1d(np.arange(len(self)), held)), self.take(held)

    def _by_class(self, counts: NDArray[np.int64], extra: int, seed: int) -> list[NDArray[np.int64]]:
        """Pick counts[c] images of each class c, one more for the first ``extra`` of a keyed order."""
        counts = counts.copy()
        counts[keyed.permutation(len(counts), seed, "stratified classes")[:extra]] += 1
        sizes = np.bincount(self.labels, minlength=len(counts))
        if len(short := np.flatnonzero(counts > sizes)):
            name, size, count = self.classes[short[0]], sizes[short[0]], counts[short[0]]
            raise DataError(f"class {name!r} has {size} images, but equal shares need {count}.")
        return _chosen(self.labels, counts, seed)


def held_out(
    labels: NDArray[np.int64], classes: tuple[str, ...], fraction: float, seed: int
) -> NDArray[np.int64]:
    """Return the sorted numbers of a stratified part of ``labels``; see ``Images.cut``."""
    if not 0 < fraction < 1:
        raise DataError(f"the fraction to hold out must lie between 0 and 1, got {fraction}.")
    sizes = np.bincount(labels, minlength=len(classes))
    if single := [repr(classes[label]) for label in np.flatnonzero(sizes == 1)]:
        raise DataError(
            f"one training image of class {', '.join(single[:5])}{', ...' if len(single) > 5 else ''} is too few to be "
            "in two parts: add images, or give a test part of your own."
        )
    counts = np.clip(
        np.rint(sizes * fraction).astype(np.int64), np.minimum(sizes, 1), np.maximum(sizes - 1, 0)
    )
    return np.sort(np.concatenate(_chosen(labels, counts, seed)))


def _chosen(labels: NDArray[np.int64], counts: NDArray[np.int64], seed: int) -> list[NDArray[np.int64]]:
    """Return counts[c] numbers of each class c, keyed by (seed, number)."""
    draw = keyed.uniform(np.arange(len(labels)), 1, seed, "stratified")[:, 0]
    members = [np.flatnonzero(labels == label) for label in range(len(counts))]
    return [
        own[np.argsort(draw[own], kind="stable")[:count]] for own, count in zip(members, counts, strict=True)
    ]


def as_labels(key: str, labels: NDArray[Any]) -> NDArray[np.int64]:
    """Return ``labels`` ((N,) or (N, 1), any integers) as int64 (N,). Raises DataError, naming them ``key``."""
    if labels.dtype.kind not in "iu":
        hint = "; class names go into classes" if labels.dtype.kind in "US" else ""
        hint = (
            f"; give one-hot labels as {key}.argmax(1)" if labels.ndim == 2 and labels.shape[1] > 1 else hint
        )
        raise DataError(f"{key} must be integers, got {labels.dtype}{hint}.")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            f"{key} must have shape (images,), got {labels.shape}; give one-hot labels as {key}.argmax(1)."
        )
    if labels.dtype == np.uint64 and len(labels) and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{key} has the label {labels.max()}.")
    if len(labels) and labels.max() >= 1_000_000:
        raise DataError(
            f"{key} has the label {labels.max()}: more than a million classes are not believable."
        )
    return labels.astype(np.int64)


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
