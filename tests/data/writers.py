"""Tiny data sets in every format, written byte by byte from the formats' descriptions."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def pixels(n: int, height: int, width: int, channels: int, seed: int = 0) -> Pixels:
    """Return random images (n, height, width, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def cycle(n: int, classes: int) -> NDArray[np.int64]:
    """Return the labels 0, 1, ..., classes - 1, 0, 1, ..."""
    return np.arange(n) % classes


def idx(path: Path, values: NDArray[np.uint8], zipped: bool = False) -> None:
    """Write an IDX file."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = header + values.tobytes()
    path.write_bytes(gzip.compress(data) if zipped else data)


def cifar_bin(path: Path, x: Pixels, *labels: NDArray[np.int64]) -> None:
    """Write records of label bytes and channel planes."""
    with path.open("wb") as file:
        for i, image in enumerate(x):
            file.write(bytes(int(y[i]) for y in labels) + image.transpose(2, 0, 1).tobytes())


def python2_pickle(content: dict[bytes, object]) -> bytes:
    """Return a dictionary as Python 2 pickled it: protocol 2, byte strings, arrays through _reconstruct."""
    out = [b"\x80\x02}q\x01("]
    memo = 2
    for key, value in content.items():
        out.append(_string(key))
        if isinstance(value, np.ndarray):
            out.append(
                b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01"
            )
            out.append(b"".join(b"M" + struct.pack("<H", n) for n in value.shape) + b"\x86q\x06")
            out.append(
                b"cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87Rq\x08(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            raw = value.tobytes()
            out.append(b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb")
        elif isinstance(value, list):
            items = (b"K" + bytes([item]) if isinstance(item, int) else _string(item) for item in value)
            out.append(b"](" + b"".join(items) + b"e")
        else:
            assert isinstance(value, bytes)
            out.append(_string(value))
        memo += 1
    return b"".join(out) + b"u."


def _string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def planes(x: Pixels) -> Pixels:
    """Return (n, 3072): channel by channel."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), -1)


def cifar10_folder(folder: Path, form: str, n: int = 10) -> tuple[Pixels, NDArray[np.int64]]:
    """Write CIFAR-10 of n images a file, in 'bin', 'python2' or 'python3' form; return all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = pixels(6 * n, 32, 32, 3), cycle(6 * n, 10)
    for k, stem in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(k * n, (k + 1) * n)
        content: dict[bytes, object] = {
            b"batch_label": b"one",
            b"labels": y[part].tolist(),
            b"data": planes(x[part]),
        }
        if form == "bin":
            cifar_bin(folder / f"{stem}.bin", x[part], y[part])
        elif form == "python2":
            (folder / stem).write_bytes(python2_pickle(content))
        else:
            (folder / stem).write_bytes(pickle.dumps(content, protocol=2))
    return x, y


def norb_matrix(path: Path, values: NDArray[np.generic]) -> None:
    """Write a small NORB matrix; shapes of fewer than three dimensions are filled up with ones."""
    magic = 0x1E3D4C55 if values.dtype == np.uint8 else 0x1E3D4C54
    shape = (*values.shape, 1, 1)[: max(values.ndim, 3)]
    path.write_bytes(struct.pack(f"<{2 + len(shape)}I", magic, values.ndim, *shape) + values.tobytes())


def tar(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    """Write a gzipped tar of (name, type, content or link target)."""
    with tarfile.open(path, "w:gz") as bundle:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = content.decode()
            else:
                info.size = len(content)
            bundle.addfile(info, io.BytesIO(content[: info.size]))
    return path


def zip_archive(path: Path, *members: tuple[str, int, bytes]) -> Path:
    """Write a zip of (name, file mode, content)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, mode, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            bundle.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path
