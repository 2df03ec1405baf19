"""Image folders: train/CLASS/file and val/CLASS/file (or test/), or CLASS/file alone, read as ImageFolder reads them."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hasten.data.dataset import DataSet
from hasten.data.folder_layout import Layout, layout
from hasten.data.folder_scan import HIDDEN, Found, Named, refuse, shown
from hasten.data.held import HELD, held_name, held_note
from hasten.data.image_file import decode, pillow, quiet
from hasten.data.images import Images, blame
from hasten.data.memory import check_memory
from hasten.errors import DataError

T = TypeVar("T")
_PART = 16


def load_folder(path: Path, size: int | None = None) -> DataSet:
    """Return the data set of an image folder as RGB; see ``layout`` for the parts and ``read_image`` for the files.

    size: where given, each image's shorter side is brought to ``size`` and the centre size x size is cut out.
    Without it all images must have one size. Without a test part a keyed, stratified tenth of the images becomes it,
    and the name says so. What was left out is told in ``notes``.
    Raises DataError naming the files that cannot be used or differ; UnsupportedError without Pillow.
    """
    check_size(size)
    pillow()
    found = layout(path)
    parts = found.parts()
    if bad := unusable(found):
        raise refuse(path, bad)
    classes = found.train.classes
    shape = _first_shape(found.train.files, size)
    count = sum(len(part.files) for part in parts.values())
    check_memory(count * math.prod(shape), f"{count:,} images of {shape[0]}x{shape[1]} (give a smaller size)")
    pixels = {role: _decoded(part, shape, size, bad) for role, part in parts.items()}
    if bad:
        raise refuse(path, bad)
    images = {}
    for role, part in parts.items():
        labels = [classes.index(part.classes[label]) for label in part.labels]
        with blame(shown(part.folder)):
            images[role] = Images(pixels[role], np.array(labels, np.int64), classes)
    name, notes, train, test = path.resolve().name, remarks(found), images["train"], images.get("test")
    if test is None:
        with blame(shown(path)):
            train, test = train.cut(HELD)
        name, notes = held_name(name), [*notes, held_note(len(test))]
    # Photographs of things keep their label in the mirror, which is what such folders hold as a rule.
    signs = all(len(label) == 1 for label in classes)
    if signs:
        notes.append("the classes are named by single letters or digits, so flips are left out (replace(data, flip_ok=True) "
                     "allows them)")  # fmt: skip
    return DataSet(name, train, test, not signs, images.get("validation"), size, tuple(notes))


def check_size(size: int | None) -> None:
    """Raise DataError for a size that no image can have."""
    if size is not None and not 1 <= size <= 4096:
        raise DataError(f"size must be between 1 and 4096 pixels, got {size}.")


def in_parallel(work: Callable[[Path], T], files: Sequence[Path]) -> Iterator[T | str]:
    """Yield ``work(file)`` of each file in order, from a thread for each core; of a DataError the text."""

    def attempts(part: Sequence[Path]) -> list[T | str]:
        return [_attempt(work, file) for file in part]

    cores = os.cpu_count() or 1
    waiting: deque[Future[list[T | str]]] = deque()
    with quiet(), ThreadPoolExecutor(cores) as pool:
        for start in range(0, len(files), _PART):
            waiting.append(pool.submit(attempts, files[start : start + _PART]))
            if len(waiting) > 2 * cores:  # So that few decoded images wait at any time.
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _attempt(work: Callable[[Path], T], file: Path) -> T | str:
    try:
        return work(file)
    except DataError as error:
        return str(error)


def remarks(found: Layout) -> list[str]:
    """Return a line on each kind of thing that is not read."""
    parts = found.parts().values()
    hidden = [file.name for part in parts for file, reason in part.left_out if reason == HIDDEN]
    again = [file.name for part in parts for file, reason in part.left_out if reason != HIDDEN]
    other = [file.name for part in parts for file in part.ignored]
    test = found.test
    without = [name for name in found.train.classes if test is not None and not test.counts().get(name)]
    told = (
        (hidden, "hidden files and folders left out"), (again, "folders that links lead to again, left out"),
        (other, "files that are no images, left out"), (without, "classes without test images"),
    )  # fmt: skip
    return [f"{what} ({len(names):,}): {_some(names)}" for names, what in told if names]


def _some(names: list[str]) -> str:
    distinct = list(dict.fromkeys(shown(Path(name)) for name in names))
    return ", ".join(distinct[:5]) + (", ..." if len(distinct) > 5 else "")


def unusable(found: Layout) -> Named:
    """Return the files and class folders that cannot be used, with the reason, as far as their names tell."""
    bad = [entry for part in found.parts().values() for entry in part.bad]
    bad += [(found.train.folder / name, "no images in this class: fill or remove the folder")
            for name, count in found.train.counts().items() if count == 0]  # fmt: skip
    for role, part in found.parts().items():
        bad += [(part.folder / name, "a class that the training images have not")
                for name in part.classes if name not in found.train.classes]  # fmt: skip
        if not part.files:
            bad.append((part.folder, f"no images in class folders: the {role} part is empty"))
    return bad


def _first_shape(files: Sequence[Path], size: int | None) -> tuple[int, int, int]:
    if size is not None:
        return size, size, 3
    # Where the first is bad the others are still tried, so that the error lists every bad file.
    for result in in_parallel(lambda file: decode(file, None), files[:64]):
        if not isinstance(result, str):
            return result.shape[0], result.shape[1], 3
    return 0, 0, 3


def _decoded(part: Found, shape: tuple[int, int, int], size: int | None, bad: Named) -> NDArray[np.uint8]:
    pixels = np.empty((len(part.files), *shape), np.uint8)
    like: Path | None = None
    other: tuple[Path, tuple[int, ...]] | None = None
    for number, result in enumerate(in_parallel(lambda file: decode(file, size), part.files)):
        file = part.files[number]
        if isinstance(result, str):
            bad.append((file, result))
        elif result.shape == shape:
            pixels[number], like = result, like or file
        else:
            other = other or (file, result.shape)
    if other is not None and not bad:
        first = f"{shown(like)} is" if like is not None else "the training images are"
        raise DataError(
            f"{shown(part.folder)} has images of mixed size: {first} {shape[0]}x{shape[1]} and {shown(other[0])} is "
            f"{other[1][0]}x{other[1][1]}. Give --size N (in Python size=N) to bring the shorter side of each to N "
            "pixels and cut out the centre."
        )
    return pixels
