"""CIFAR-10 and CIFAR-100, in the authors' binary and Python versions.

Binary: records of label byte(s) and 3,072 pixel bytes, channel by channel. Python: pickles, read by
safe_pickle only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hasten.data.images import Images, blame
from hasten.data.safe_pickle import load_pickle
from hasten.errors import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE
CLASSES10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN10 = tuple(f"data_batch_{k}" for k in range(1, 6))
LIMIT = 1 << 28


def read_cifar10(folder: Path) -> tuple[Images, Images]:
    """Return train and test of a folder of CIFAR-10: data_batch_1..5 and test_batch, all .bin or all without
    suffix.
    """
    suffix = ".bin" if (folder / "test_batch.bin").exists() else ""
    names = (
        read_names(folder / "batches.meta.txt") or _meta(folder / "batches.meta", b"label_names") or CLASSES10
    )
    parts = [
        _read(folder / f"{stem}{suffix}", names, labels=1, key=b"labels") for stem in (*TRAIN10, "test_batch")
    ]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return Images(pixels, labels, names), Images(*parts[-1], names)


def read_cifar100(folder: Path) -> tuple[Images, Images]:
    """Return train and test of a folder of CIFAR-100 (the 100 fine classes): train and test, .bin or no
    suffix.
    """
    suffix = ".bin" if (folder / "test.bin").exists() else ""
    names = read_names(folder / "fine_label_names.txt") or _meta(folder / "meta", b"fine_label_names")
    names = names or tuple(f"class {label}" for label in range(100))
    parts = [
        _read(folder / f"{stem}{suffix}", names, labels=2, key=b"fine_labels") for stem in ("train", "test")
    ]
    return Images(*parts[0], names), Images(*parts[1], names)


def read_names(path: Path) -> tuple[str, ...]:
    """Return the class names of a text file, one a line, or () where there is no such file."""
    if not path.exists():
        return ()
    if path.stat().st_size > 1 << 16:
        raise DataError(f"{path}: class names of {path.stat().st_size:,} bytes are not believable.")
    return tuple(line.strip() for line in path.read_text("utf-8", "replace").splitlines() if line.strip())


def _read(
    path: Path, names: tuple[str, ...], labels: int, key: bytes
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if not path.exists():
        raise DataError(f"{path} is missing; the other files of the set lie in {path.parent}.")
    with blame(path):
        if path.stat().st_size > LIMIT:
            raise DataError(
                f"the file has {path.stat().st_size:,} bytes; CIFAR files have fewer than {LIMIT:,}."
            )
        planes, y = _binary(path, labels) if path.suffix == ".bin" else _python(path, key)
        pixels = np.ascontiguousarray(planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        checked = Images(pixels, y, names)
        return checked.pixels, checked.labels


def _binary(path: Path, labels: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    data = np.fromfile(path, np.uint8)
    record = labels + PIXELS
    if data.size == 0 or data.size % record:
        raise DataError(
            f"{data.size:,} bytes are not a whole number of records of {record} bytes: truncated?"
        )
    records = data.reshape(-1, record)
    # CIFAR-100 has the coarse label first; the fine one is the last byte before the pixels.
    return records[:, labels:], records[:, labels - 1].astype(np.int64)


def _python(path: Path, key: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = load_pickle(path.read_bytes())
    planes, labels = content.get(b"data"), content.get(key)
    if not isinstance(planes, np.ndarray) or planes.ndim != 2 or planes.shape[1] != PIXELS:
        raise DataError(f"no pixels of shape (images, {PIXELS}) under {b'data'!r}.")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"no list of small integers under {key!r}.")
    return planes, np.array(labels, np.int64)


def _meta(path: Path, key: bytes) -> tuple[str, ...]:
    if not path.exists():
        return ()
    with blame(path):
        if path.stat().st_size > 1 << 16:
            raise DataError(f"class names of {path.stat().st_size:,} bytes are not believable.")
        names = load_pickle(path.read_bytes()).get(key)
        if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
            raise DataError(f"no list of class names under {key!r}.")
        return tuple(name.decode("utf-8", "replace") for name in names)
