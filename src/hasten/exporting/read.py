"""Image files as pixels for a trained network, read as the images of an image folder are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.data.image_file import decode, quiet
from hasten.errors import DataError, UnsupportedError


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files among ``paths``, and all below the folders among them, in sorted order; hidden ones are left out."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for where, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(where, name) for name in sorted(files) if not name.startswith("."))


def read_one(file: Path, known: dict[str, Any]) -> NDArray[np.uint8] | str:
    """Return the pixels (C, H, W) of a file, brought to size as in training, or why there are none.

    Where the images of training had one size as they were, the file keeps its own.
    """
    channels, resize = known["channels"], known.get("resize")
    if channels not in (1, 3):
        raise UnsupportedError(
            f"this network takes {channels} channels, and image files have 1 or 3; give pixels in Python: "
            f"hasten.load(run).predict(images)."
        )
    try:
        with quiet():
            pixels = decode(file, None if resize is None else known["size"][0])
    except DataError as error:
        return str(error)
    if min(pixels.shape[:2]) < 2:
        return f"{pixels.shape[1]}x{pixels.shape[0]} pixels are too few; each side needs 2"
    return np.ascontiguousarray((pixels if channels == 3 else _grey(pixels)).transpose(2, 0, 1))


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (H, W, 1), by the weights of ITU-R 601 in Pillow's arithmetic; grey images stay as they are."""
    weighed = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighed + 0x8000) >> 16)[..., None].astype(np.uint8)


def read_images(files: list[Path], known: dict[str, Any]) -> Tensor:
    """Return the pixels (N, C, H, W) of ``files``. Raises DataError, naming every file that cannot be used."""
    found = {file: read_one(file, known) for file in files}
    if not found:
        raise DataError("there are no images to predict.")
    if bad := {file: reason for file, reason in found.items() if isinstance(reason, str)}:
        raise DataError("; ".join(f"{file}: {reason}" for file, reason in bad.items()) + ".")
    pixels = [torch.from_numpy(found[file]) for file in files]
    if len(sizes := {tuple(p.shape) for p in pixels}) > 1:
        raise DataError(
            f"the images have {len(sizes)} sizes, and one array has one; predict those of each size apart."
        )
    return torch.stack(pixels)
