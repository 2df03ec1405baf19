"""Any map-style torch Dataset of (image, label) as Images in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hasten.data.images import Images, numbered
from hasten.data.memory import check_memory
from hasten.errors import DataError


def from_torch(dataset: Dataset[Any]) -> Images:
    """Return the images and labels of ``dataset``, each item read once.

    An image may be a PIL image, a NumPy array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W): uint8, or
    floating point in [0, 1] that came from 8 bits. Class names are ``dataset.classes`` where it has them.
    Raises DataError, naming the item, for anything that uint8 cannot hold without loss: give the dataset no
    augmentation or normalisation, the Loader does both.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(f"{type(dataset).__name__} has no length; only map-style datasets can be read.")
    count = len(dataset)
    if count == 0:
        raise DataError(f"{type(dataset).__name__} is empty.")
    first, _ = _item(dataset, 0)
    check_memory(count * first.size, f"{count:,} images of {first.shape}")
    pixels = np.empty((count, *first.shape), np.uint8)
    labels = np.empty(count, np.int64)
    for number in range(count):
        image, labels[number] = _item(dataset, number)
        if image.shape != first.shape:
            raise DataError(
                f"item 0 has shape {first.shape}, item {number} {image.shape}: bring all to one size."
            )
        pixels[number] = image
    names = getattr(dataset, "classes", None) or getattr(getattr(dataset, "dataset", None), "classes", None)
    return Images(pixels, labels, tuple(map(str, names)) if names else numbered(int(labels.max()) + 1))


def _item(dataset: Dataset[Any], number: int) -> tuple[NDArray[np.uint8], int]:
    item = dataset[number]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"item {number} is a {type(item).__name__}, not a pair (image, label).")
    image, label = item
    single = isinstance(label, Tensor | np.generic | np.ndarray) and label.ndim == 0
    value = label.item() if single else label
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"item {number} has the label {value!r}; labels must be integers.")
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if isinstance(image, Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise DataError(f"item {number} is an image of shape {array.shape}; 2 or 3 dimensions are needed.")
    if np.issubdtype(array.dtype, np.floating):
        exact = array.astype(np.float64) * 255
        levels = np.rint(exact)
        tolerance = (
            1e-3 if array.dtype != np.float16 and getattr(image, "dtype", None) != torch.bfloat16 else 0.1
        )
        if not (np.abs(exact - levels) <= tolerance).all() or levels.min() < 0 or levels.max() > 255:
            raise DataError(
                f"item {number} has values from {array.min():.4g} to {array.max():.4g} that are not 8-bit "
                "pixels over 255; read the dataset without normalisation and augmentation."
            )
        array = levels
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        raise DataError(
            f"item {number} is of type {array.dtype}; uint8 or floating point in [0, 1] is needed."
        )
    return array.astype(np.uint8), value
