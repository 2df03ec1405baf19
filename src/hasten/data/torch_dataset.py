"""Items of map-style torch Datasets, and a Dataset of 8-bit (image, label) pairs as Images in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hasten.data.images import Images, numbered
from hasten.data.memory import check_memory
from hasten.errors import DataError, HastenError


class NotEightBit(DataError):
    """An item holds values that are no 8-bit pixels: the dataset normalises, or computes."""


def from_torch(dataset: Dataset[Any]) -> Images:
    """Return the images and labels of ``dataset``, each item read once.

    An image may be a PIL image, a NumPy array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W): uint8, or
    floating point in [0, 1] that came from 8 bits. Class names are ``dataset.classes`` where it has them.
    Raises DataError, naming the item, for anything that uint8 cannot hold without loss (NotEightBit where only
    the values do not fit): give the dataset no augmentation or normalisation, the Loader does both.
    """
    pixels, labels = read_all(dataset)
    return Images(pixels, labels, class_names(dataset) or numbered(int(labels.max()) + 1))


def read_all(dataset: Dataset[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return pixels (N, H, W, C) and labels (N,) of ``dataset``; see ``from_torch``."""
    count = length(dataset)
    first = eight_bit(0, read(dataset, 0)[0])
    check_memory(count * first.size, f"{count:,} images of {first.shape}")
    pixels = np.empty((count, *first.shape), np.uint8)
    labels = np.empty(count, np.int64)
    for number in range(count):
        array, labels[number] = read(dataset, number)
        image = eight_bit(number, array)
        if image.shape != first.shape:
            raise DataError(
                f"item 0 has shape {first.shape}, item {number} {image.shape}: bring all to one size."
            )
        pixels[number] = image
    return pixels, labels


def length(dataset: Dataset[Any]) -> int:
    """Return the number of items. Raises DataError where there are none or none can be told."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(f"{type(dataset).__name__} has no length; only map-style datasets can be read.")
    count = len(dataset)
    if count == 0:
        raise DataError(f"{type(dataset).__name__} is empty.")
    return count


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Return ``dataset.classes``, or those of the dataset that it is a part of, or None."""
    names = getattr(dataset, "classes", None) or getattr(getattr(dataset, "dataset", None), "classes", None)
    return tuple(map(str, names)) if names else None


def read(dataset: Dataset[Any], number: int) -> tuple[NDArray[Any], int]:
    """Return item ``number`` as (image (H, W, C) of the item's own type and range, label).

    Raises DataError, naming the item, where reading it fails or it is no such pair.
    """
    try:
        item = dataset[number]
    except HastenError:
        raise
    except Exception as error:
        what = f"item {number} of {type(dataset).__name__} cannot be read"
        raise DataError(f"{what} ({type(error).__name__}: {error}).") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        found = f"{type(item).__name__}{f' of {len(item)}' if isinstance(item, tuple | list) else ''}"
        raise DataError(f"item {number} is a {found}, not a pair (image, label).")
    image, label = item
    single = isinstance(label, Tensor | np.generic | np.ndarray) and label.ndim == 0
    value = label.item() if single else label
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"item {number} has the label {value!r}; labels must be integers.")
    if isinstance(image, Tensor):
        # NumPy has no bfloat16.
        array = (image.detach().float() if image.dtype == torch.bfloat16 else image.detach()).cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    else:
        array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        hint = " (a PIL image or an array is needed)" if array.dtype == object else ""
        raise DataError(
            f"item {number} is an image of shape {array.shape}{hint}; 2 or 3 dimensions are needed."
        )
    if array.dtype not in (bool, np.uint8) and not np.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"item {number} is of type {array.dtype}; uint8 or floating point in [0, 1] is needed."
        )
    return array, value


def eight_bit(number: int, array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the image of item ``number`` as uint8. Raises NotEightBit where that would lose anything."""
    if np.issubdtype(array.dtype, np.floating):
        exact = array.astype(np.float64) * 255
        levels = np.rint(exact)
        close = np.abs(exact - levels) <= (0.1 if array.dtype == np.float16 else 1e-3)
        if not close.all() or levels.min() < 0 or levels.max() > 255:
            raise NotEightBit(
                f"item {number} has values from {array.min():.4g} to {array.max():.4g} that are not 8-bit "
                "pixels over 255; read the dataset without normalisation and augmentation."
            )
        array = levels
    return (array * np.uint8(255) if array.dtype == bool else array).astype(np.uint8)
