"""Image folders: train/CLASS/file and val/CLASS/file (or test/), classes and files in sorted order as in
ImageFolder.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hasten.data.dataset import DataSet
from hasten.data.images import Images, blame
from hasten.data.memory import check_memory
from hasten.errors import DataError, UnsupportedError

READ = (".jpg", ".jpeg", ".png")
# Images that this reader leaves to others: an error rather than a class that is quietly smaller.
UNREAD = (".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp", ".jp2", ".avif", ".heic")
TEST_NAMES = ("val", "test", "validation", "valid")
MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class FolderReport:
    """What lies in an image folder.

    counts: images of each class, by split. sizes: how many images have each (height, width). bad: every file
    that cannot be used, with the reason. ignored: files that are no images.
    """

    path: Path
    counts: dict[str, dict[str, int]]
    sizes: dict[tuple[int, int], int]
    bad: tuple[tuple[Path, str], ...]
    ignored: tuple[Path, ...]

    @property
    def ok(self) -> bool:
        """Return whether every image can be read and all have one size."""
        return not self.bad and len(self.sizes) == 1

    def __str__(self) -> str:
        lines = [str(self.path)]
        for split, counts in self.counts.items():
            n = counts.values()
            lines.append(
                f"  {split}: {sum(n):,} images in {len(n)} classes, {min(n):,} to {max(n):,} a class"
            )
        common = Counter(self.sizes).most_common(5)
        shown = ", ".join(f"{h}x{w} ({n:,})" for (h, w), n in common)
        lines.append(f"  sizes: {len(self.sizes)}: {shown}{', ...' if len(self.sizes) > 5 else ''}")
        lines += [f"  bad: {file}: {reason}" for file, reason in self.bad]
        lines += [f"  not an image: {file}" for file in self.ignored[:10]]
        return "\n".join(lines)


def check_folder(path: str | Path) -> FolderReport:
    """Decode every image below ``path`` and report counts, sizes and every bad file. Raises DataError without
    splits.
    """
    path = Path(path)
    counts, bad, ignored, sizes = {}, [], [], Counter[tuple[int, int]]()
    for split in _splits(path):
        files, labels, classes, other, unread = _scan(split)
        numbers = Counter(labels)
        counts[split.name] = {name: numbers[label] for label, name in enumerate(classes)}
        ignored += other
        bad += [(file, f"{file.suffix} images are not read") for file in unread]
        bad += [(split / name, "no images in this class") for name, n in counts[split.name].items() if n == 0]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for file, result in zip(files, pool.map(lambda file: _attempt(file, None), files), strict=True):
                if isinstance(result, str):
                    bad.append((file, result))
                else:
                    sizes[result.shape[0], result.shape[1]] += 1
    return FolderReport(path, counts, dict(sizes), tuple(bad), tuple(ignored))


def load_folder(path: Path, size: int | None = None) -> DataSet:
    """Return the data set of an image folder as RGB.

    size: where given, each image's shorter side is brought to ``size`` and the centre size x size is cut out
    (antialiased bilinear, as in the usual evaluation of ImageNet). Without it all images must have one size.
    Raises DataError naming the files that are damaged or differ; UnsupportedError without Pillow.
    """
    if size is not None and size < 1:
        raise DataError(f"size must be 1 pixel or more, got {size}.")
    train_dir, test_dir = _splits(path)
    train = _read(train_dir, size, None)
    test = _read(test_dir, size, train.classes)
    # Photographs of things keep their label in the mirror, which is what such folders hold as a rule.
    return DataSet(path.resolve().name, train, test, flip_ok=True)


def _splits(path: Path) -> tuple[Path, Path]:
    if not path.is_dir():
        raise DataError(f"there is no folder {path}.")
    test = next((path / name for name in TEST_NAMES if (path / name).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{path} must hold train/CLASS/image files and val/CLASS/image files (or test/); it has: {found}."
        )
    return path / "train", test


def _scan(split: Path) -> tuple[list[Path], list[int], tuple[str, ...], list[Path], list[Path]]:
    """Return image files, their labels, the classes, other files, and images of kinds that are not read."""
    classes = tuple(sorted(entry.name for entry in os.scandir(split) if entry.is_dir()))
    files: list[Path] = []
    labels: list[int] = []
    other = [Path(entry.path) for entry in os.scandir(split) if not entry.is_dir()]
    unread = []
    for label, name in enumerate(classes):
        for where, _, names in sorted(os.walk(split / name)):
            for file in sorted(names):
                full, kind = Path(where, file), Path(file).suffix.lower()
                if kind in READ:
                    files.append(full)
                    labels.append(label)
                elif kind in UNREAD:
                    unread.append(full)
                else:
                    other.append(full)
    return files, labels, classes, other, unread


def _read(split: Path, size: int | None, expected: tuple[str, ...] | None) -> Images:
    files, labels, classes, _, unread = _scan(split)
    if unread:
        _refuse(split, [(file, f"{file.suffix} images are not read (only JPEG and PNG)") for file in unread])
    if not files:
        raise DataError(f"{split} has no JPEG or PNG images in class folders.")
    if expected is not None:
        if outside := sorted(set(classes) - set(expected)):
            raise DataError(f"{split} has classes that the training images have not: {', '.join(outside)}.")
        labels = [expected.index(classes[label]) for label in labels]
    elif empty := [name for label, name in enumerate(classes) if label not in set(labels)]:
        raise DataError(f"{split} has no images for {', '.join(empty)}: fill or remove these folders.")
    pixels = _decode(split, files, size)
    with blame(split):
        return Images(pixels, np.array(labels, np.int64), expected or classes)


def _decode(split: Path, files: Sequence[Path], size: int | None) -> NDArray[np.uint8]:
    first = _attempt(files[0], size)
    # Where even the first is bad the others are still tried, so that the error lists every bad file.
    shape = (0, 0, 3) if isinstance(first, str) else first.shape
    check_memory(len(files) * math.prod(shape), f"{len(files):,} images of {shape[0]}x{shape[1]} in {split}")
    pixels = np.empty((len(files), *shape), np.uint8)
    bad: list[tuple[Path, str]] = []
    other: tuple[Path, tuple[int, ...]] | None = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), 1024):  # Small parts, so that few decoded images wait at any time.
            part = files[start : start + 1024]
            for number, result in enumerate(pool.map(lambda file: _attempt(file, size), part), start):
                if isinstance(result, str):
                    bad.append((files[number], result))
                elif result.shape != shape:
                    other = other or (files[number], result.shape)
                else:
                    pixels[number] = result
    if bad:
        _refuse(split, bad)
    if other is not None:
        raise DataError(
            f"{split} has images of mixed size: {files[0]} is {shape[0]}x{shape[1]} and {other[0]} is "
            f"{other[1][0]}x{other[1][1]}. Give size=N to bring the shorter side of each to N pixels and "
            "cut out the centre."
        )
    return pixels


def _refuse(split: Path, bad: Sequence[tuple[Path, str]]) -> None:
    lines = [f"{file}: {reason}" for file, reason in bad[:20]]
    more = [f"and {len(bad) - 20} more"] if len(bad) > 20 else []
    raise DataError(f"{split}: {len(bad)} of its files cannot be used:\n  " + "\n  ".join(lines + more))


def _attempt(file: Path, size: int | None) -> NDArray[np.uint8] | str:
    """Return the pixels (H, W, 3) of a file, or why there are none."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError("image folders need Pillow: pip install 'hasten[images]'.") from error
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                return f"{width}x{height} pixels are more than the {MOST_PIXELS:,} that are allowed"
            if image.mode.startswith(("I", "F")):
                return f"pixels of mode {image.mode} do not fit into 8 bits"
            rgb = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except (
        Exception
    ) as error:  # A decoder raises nearly anything on a damaged file; all of it is about this file.
        return f"damaged or truncated ({type(error).__name__}: {error})"
    if size is not None:
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        left, top = (width - size) // 2, (height - size) // 2
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR).crop(
            (left, top, left + size, top + size)
        )
    return np.asarray(rgb)
