"""Small NORB's matrix files: little-endian magic, number of dimensions, sizes (at least three), then the
values.

An image is a stereo pair, so it has two channels: the left and the right camera, 96 x 96 each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.data.idx import DAMAGE, open_maybe_gz, read_exactly
from hasten.data.images import Images, blame
from hasten.errors import DataError

CLASSES = ("animal", "human", "plane", "truck", "car")
STEMS = ("smallnorb-5x46789x9x18x6x2x96x96-training", "smallnorb-5x01235x9x18x6x2x96x96-testing")
_TYPES: dict[int, np.dtype[Any]] = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}


def read_norb(folder: Path) -> tuple[Images, Images]:
    """Return train and test of a folder with the -dat.mat and -cat.mat files, plain or gzipped."""
    train, test = (_read(folder, stem) for stem in STEMS)
    return train, test


def read_matrix(path: Path) -> NDArray[Any]:
    """Return the array of one file of the format. Raises DataError, naming the file, where it is damaged."""
    with blame(path), open_maybe_gz(path) as file:
        try:
            start = file.read(8)
            magic, dims = (int.from_bytes(start[i : i + 4], "little") for i in (0, 4))
            if len(start) < 8 or magic not in _TYPES:
                raise DataError(
                    f"not a NORB matrix of bytes or integers: it starts with {start[:4].hex() or 'nothing'}."
                )
            if not 1 <= dims <= 4:
                raise DataError(f"a NORB matrix of {dims} dimensions is not read; 1 to 4 are.")
            sizes = file.read(4 * max(dims, 3))
        except DAMAGE as error:
            raise DataError(f"the file is truncated or its compression is damaged ({error}).") from error
        if len(sizes) < 4 * max(dims, 3):
            raise DataError("the file is truncated in its header.")
        shape = tuple(int.from_bytes(sizes[4 * i : 4 * i + 4], "little") for i in range(dims))
        count = _TYPES[magic].itemsize
        for size in shape:
            count *= size
        return np.frombuffer(read_exactly(file, count), _TYPES[magic]).reshape(shape)


def _read(folder: Path, stem: str) -> Images:
    arrays = []
    for kind in ("dat", "cat"):
        plain = folder / f"{stem}-{kind}.mat"
        path = plain if plain.exists() else plain.with_name(plain.name + ".gz")
        if not path.exists():
            raise DataError(f"{plain} is missing (nor is there {path.name}).")
        arrays.append(read_matrix(path))
    pairs, labels = arrays
    with blame(folder / f"{stem}-dat.mat"):
        if pairs.ndim != 4 or pairs.dtype != np.uint8:
            raise DataError(
                f"pixels must be bytes (images, 2, height, width), got {pairs.dtype} {pairs.shape}."
            )
        return Images(np.ascontiguousarray(pairs.transpose(0, 2, 3, 1)), labels.astype(np.int64), CLASSES)
