"""NumPy archives with x_train, y_train, x_test, y_test (Keras's keys) and, if wanted, the class names under
classes.

Headers are read and checked before any array is, so neither an object array (a pickle) nor a false size does
harm.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.data.dataset import DataSet
from hasten.data.images import Images, as_labels, blame, numbered
from hasten.data.memory import check_memory
from hasten.errors import DataError

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path) -> DataSet:
    """Return the data set of an .npz file. Flips are taken as changing the label, since nothing says
    otherwise.

    Pixels: uint8, (N, H, W) or (N, H, W, C). Labels: integers, (N,) or (N, 1). Raises DataError, naming the
    file.
    """
    with blame(path):
        arrays = _arrays(path)
        labels = {key: as_labels(key, arrays[key]) for key in ("y_train", "y_test")}
        if "classes" in arrays:
            names = _names(arrays["classes"])
        else:
            names = numbered(int(max(0, *(y.max() for y in labels.values() if len(y)), -1)) + 1)
        parts = []
        for part in ("train", "test"):
            pixels = arrays[f"x_{part}"]
            with blame(part):
                parts.append(
                    Images(pixels[..., None] if pixels.ndim == 3 else pixels, labels[f"y_{part}"], names)
                )
        for images in parts:
            if images.shape[2] > 4 and images.shape[0] in (1, 3):
                raise DataError(
                    f"images of shape {images.shape} have their channels first; channels come last here."
                )
        return DataSet(path.stem, parts[0], parts[1], flip_ok=False)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if missing := [key for key in KEYS if key not in members]:
                raise DataError(
                    f"{', '.join(missing)} missing; it holds {', '.join(sorted(members)) or 'nothing'}."
                )
            wanted = [key for key in (*KEYS, "classes") if key in members]
            total = sum(_checked_size(archive, members[key], key) for key in wanted)
            check_memory(total, "the archive")
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in wanted}
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise DataError(f"the archive is damaged or truncated ({error}).") from error


def _checked_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str) -> int:
    """Return an array's bytes as its header tells them, if they agree with the archive's own record."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise DataError(f"{key} is stored in .npy version {version}, which is not read.")
        shape, _, dtype = readers[version](file)
        header = file.tell()
    if dtype.hasobject or dtype.kind not in ("iuU" if key != "classes" else "US"):
        raise DataError(f"{key} is of type {dtype}; pixels are uint8, labels integers and classes text.")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or header + size != info.file_size:
        raise DataError(
            f"{key} should take {size:,} bytes by its header; the archive has {info.file_size - header:,}."
        )
    return size


def _names(classes: NDArray[Any]) -> tuple[str, ...]:
    try:
        return tuple(
            name.decode() if isinstance(name, bytes) else str(name) for name in np.atleast_1d(classes)
        )
    except UnicodeDecodeError as error:
        raise DataError(f"classes holds a name that is not UTF-8 text: {error.object!r}.") from error
