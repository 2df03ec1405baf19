"""Make the built-in data set from the full Fashion-MNIST: `python scripts/make_embedded.py [FOLDER]`.

FOLDER holds the four IDX files (default: the Debian package dataset-fashion-mnist). The choice is stratified
and keyed by seed 0, so the same full set gives the same file. Prints the SHA-256 to put into
hasten.data.embedded_set.
"""

from __future__ import annotations

import hashlib
import lzma
import sys
from pathlib import Path

import numpy as np

from hasten.data.embedded_set import FILE, TEST, TRAIN
from hasten.data.idx import CLOTHES, read_idx_pair
from hasten.data.images import Images

OUT = Path(__file__).parents[1] / "src/hasten/data/embedded" / FILE


def packed(images: Images, count: int) -> bytes:
    """Return the bytes of a stratified choice: pixels, labels and image numbers, sorted by class."""
    numbers = np.arange(len(images))
    tagged = Images(numbers.view(np.uint8).reshape(-1, 1, 1, 8), images.labels, images.classes)
    chosen = tagged.stratified(count, seed=0).pixels.reshape(-1, 8).view(np.int64)[:, 0]
    chosen = chosen[np.argsort(images.labels[chosen], kind="stable")]
    labels = images.labels[chosen].astype(np.uint8)
    return images.pixels[chosen].tobytes() + labels.tobytes() + chosen.astype("<u2").tobytes()


def main(folder: Path) -> None:
    """Write the file and print its size and SHA-256."""
    data = b""
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        images, labels = (folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        data += packed(read_idx_pair(images, labels, CLOTHES), count)
    out = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    OUT.write_bytes(out)
    print(f"{OUT}: {len(out):,} bytes, SHA-256 {hashlib.sha256(out).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist"))
