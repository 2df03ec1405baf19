"""MNIST's IDX files: header (0, 0, type, dimensions), big-endian sizes, then the values. Plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from hasten.data.images import Images, blame, numbered
from hasten.errors import DataError

DIGITS = numbered(10)
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# No file of the format comes near this; a header that asks for more is damaged or hostile.
LIMIT = 1 << 32
# What reading a damaged or truncated (gzipped) file raises.
DAMAGE = (EOFError, OSError, zlib.error)


def open_maybe_gz(path: Path) -> IO[bytes]:
    """Open a file for reading, through gzip where it starts as gzip does (whatever its name)."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path, "rb")) if zipped else path.open("rb")


def read_exactly(file: IO[bytes], size: int, limit: int = LIMIT) -> bytearray:
    """Read the last ``size`` bytes of a file, no more and no fewer; memory grows only with what is there."""
    if size > limit:
        raise DataError(f"the header asks for {size:,} bytes, more than the {limit:,} that are allowed.")
    data = bytearray()
    try:
        while len(data) < size and (part := file.read(min(1 << 22, size - len(data)))):
            data += part
        more = len(file.read(1))
    except DAMAGE as error:
        raise DataError(f"the file is truncated or its compression is damaged ({error}).") from error
    if len(data) < size:
        raise DataError(f"the file is truncated: {len(data):,} of {size:,} bytes after the header.")
    if more:
        raise DataError(f"the file goes on after the {size:,} bytes that its header tells of.")
    return data


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of one IDX file of unsigned bytes. Raises DataError, naming the file, where it is
    damaged.
    """
    with blame(path), open_maybe_gz(path) as file:
        try:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0":
                raise DataError(f"not an IDX file: it starts with {magic.hex() or 'nothing'}, not 0000.")
            if magic[2] != 8:
                raise DataError(f"IDX type 0x{magic[2]:02x} is not read; images and labels are bytes (0x08).")
            if not 1 <= magic[3] <= 4:
                raise DataError(f"an IDX file of {magic[3]} dimensions is not read; 1 to 4 are.")
            sizes = file.read(4 * magic[3])
        except DAMAGE as error:
            raise DataError(f"the file is truncated or its compression is damaged ({error}).") from error
        if len(sizes) < 4 * magic[3]:
            raise DataError("the file is truncated in its header.")
        shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
        count = 1
        for size in shape:
            count *= size
        return np.frombuffer(read_exactly(file, count), np.uint8).reshape(shape)


def read_idx_pair(images: Path, labels: Path, classes: tuple[str, ...] = DIGITS) -> Images:
    """Return the images of an images file (N, H, W) and a labels file (N,)."""
    x, y = read_idx(images), read_idx(labels)
    with blame(images):
        if x.ndim not in (3, 4):
            raise DataError(f"images need 3 dimensions (or 4 with channels last), got {x.ndim}.")
        return Images(x if x.ndim == 4 else x[..., None], y.astype(np.int64), classes)
