"""The built-in default: 10,000 + 2,000 images of Fashion-MNIST (MIT licence, see embedded/NOTICE).

Made from the full set by scripts/make_embedded.py. The file is xz of: the 12,000 images sorted by class
(which packs better), their labels (bytes), and their numbers in the full train and test files (uint16,
little-endian), by which they are put back into their first order. The 10,000 come from the train file, the
2,000 from the test file.
"""

from __future__ import annotations

import hashlib
import lzma
from importlib.resources import files

import numpy as np

from hasten.data.dataset import DataSet
from hasten.data.idx import CLOTHES
from hasten.data.images import Images
from hasten.errors import DataError

NAME = "fashion-mnist-12k"
TRAIN, TEST, SIZE = 10_000, 2_000, 28
FILE = "fashion-mnist-12k.xz"
SHA256 = "20031aebc2f358592b063dc9c85adf596cd52f9aa40802757041cda39b83cba2"


def load_embedded() -> DataSet:
    """Return the built-in data set. Raises DataError where its file is missing or changed."""
    try:
        packed = files("hasten.data").joinpath("embedded", FILE).read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"the built-in data set is missing ({error.filename}): install hasten anew."
        ) from error
    digest = hashlib.sha256(packed).hexdigest()
    if digest != SHA256:
        raise DataError(
            f"the built-in data set is damaged: SHA-256 {digest}, not {SHA256}. Install hasten anew."
        )
    data = np.frombuffer(bytearray(lzma.decompress(packed)), np.uint8)
    parts = []
    for count in (TRAIN, TEST):
        pixels, data = np.split(data, [count * SIZE * SIZE])
        labels, data = np.split(data, [count])
        numbers, data = np.split(data, [2 * count])
        order = np.argsort(numbers.view("<u2"), kind="stable")
        shaped = pixels.reshape(count, SIZE, SIZE, 1)[order]
        parts.append(Images(shaped, labels[order].astype(np.int64), CLOTHES))
    return DataSet(NAME, parts[0], parts[1], flip_ok=True)
