"""STL-10's binary files: train and test images of 96 x 96 x 3 (columns first, as MATLAB stores them), labels
1 to 10.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hasten.data.cifar import read_names
from hasten.data.images import Images, blame
from hasten.errors import DataError

SIDE = 96
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def read_stl10(folder: Path) -> tuple[Images, Images]:
    """Return train and test of a folder with train_X.bin, train_y.bin, test_X.bin and test_y.bin."""
    names = read_names(folder / "class_names.txt") or CLASSES
    return _read(folder, "train", names), _read(folder, "test", names)


def _read(folder: Path, part: str, names: tuple[str, ...]) -> Images:
    images, labels = folder / f"{part}_X.bin", folder / f"{part}_y.bin"
    for path in (images, labels):
        if not path.exists():
            raise DataError(f"{path} is missing.")
    record = 3 * SIDE * SIDE
    with blame(images):
        if images.stat().st_size % record or images.stat().st_size > 100_000 * record:
            size = images.stat().st_size
            raise DataError(
                f"{size:,} bytes are not up to 100,000 whole images of {record:,} bytes: truncated?"
            )
        planes = np.fromfile(images, np.uint8).reshape(-1, 3, SIDE, SIDE)
    with blame(labels):
        if labels.stat().st_size != len(planes):
            raise DataError(f"{labels.stat().st_size:,} labels for {len(planes):,} images.")
        y = np.fromfile(labels, np.uint8).astype(np.int64)
        if len(y) and (y.min() < 1 or y.max() > len(names)):
            first = int(np.flatnonzero((y < 1) | (y > len(names)))[0])
            raise DataError(f"labels must lie in 1..{len(names)}, image {first} has {y[first]}.")
    with blame(images):
        return Images(np.ascontiguousarray(planes.transpose(0, 3, 2, 1)), y - 1, names)
