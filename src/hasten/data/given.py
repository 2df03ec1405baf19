"""What users give as data: names, paths, arrays, Datasets and DataLoaders, each turned into a DataSet or Streams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from hasten.data.dataset import DataSet
from hasten.data.held import HELD, held_name, held_note
from hasten.data.images import Images, as_labels, blame, numbered
from hasten.data.randomness import globals_state, set_globals
from hasten.data.registry import load
from hasten.data.stream_loaders import GivenLoader
from hasten.data.streams import Batches, Samples, Streams, labels_of, shape_of
from hasten.data.torch_dataset import NotEightBit, class_names, eight_bit, length, read, read_all
from hasten.errors import DataError, UnsupportedError

ALLOWED = (
    "a name or path; a DataSet; arrays (x, y) or ((x, y), (x_test, y_test)); a map-style torch Dataset of (image, label) "
    "or (train, test) of them; or two DataLoaders (train, test)"
)
NO_FLIPS = "flips are left out: nothing says that a mirrored image keeps its label (replace(data, flip_ok=True) does)"


def as_data(
    data: Any,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    download: bool = False,
    workers: int = 0,
) -> DataSet | Streams:
    """Return ``data`` as a DataSet (pixels in memory) or Streams (transforms and order of the user's own).

    data: a name or path (root, size and download as in ``load``); a DataSet or Streams; arrays ``(x, y)`` or
    ``((x, y), (x_test, y_test))``, NumPy's or PyTorch's: x uint8, or floating point in [0, 1] (rounded to 8 bits),
    of shape (N, H, W), (N, H, W, C) or (N, C, H, W), y integers (N,); a map-style Dataset or ``(train, test)``; a
    pair of DataLoaders. A Dataset of 8-bit images that are the same whenever they are read becomes a DataSet, one
    with float, normalised or random items Streams, read by ``workers`` processes. Without a test part a keyed,
    stratified tenth of the training samples becomes it, and the name says so.

    Raises DataError for what is no such data, UnsupportedError for an IterableDataset outside of a DataLoader, or
    one without length.
    """
    if isinstance(data, str | Path):
        return load(data, root, download=download, size=size)
    if root is not None or size is not None or download:
        raise DataError(
            "root, size and download are for names and paths; bring the images to one size yourself."
        )
    if isinstance(data, DataSet | Streams):
        return data
    parts = list(data) if isinstance(data, tuple | list) else [data]
    if isinstance(data, Tensor | np.ndarray):
        raise DataError(f"the labels are missing: give (x, y), got one array of shape {tuple(data.shape)}.")
    if all(_is_dataset(part) for part in parts) and len(parts) in (1, 2):
        return _of_datasets(parts, workers)
    if len(parts) == 2 and any(isinstance(part, DataLoader) for part in parts):
        if other := [part for part in parts if not isinstance(part, DataLoader) and not _is_dataset(part)]:
            raise DataError(f"beside a DataLoader stands a {_kind(other[0])}; data may be {ALLOWED}.")
        return _of_loaders(parts, workers)
    if isinstance(data, DataLoader):
        raise DataError("a DataLoader alone has no test part: give (train_loader, test_loader).")
    if len(parts) == 2 and all(_is_pair(part) for part in parts):
        return _of_arrays(parts[0], parts[1])
    if _is_pair(parts):
        return _of_arrays(parts, None)
    raise DataError(f"data is a {_kind(data)}; it may be {ALLOWED}.")


def _is_dataset(part: Any) -> bool:
    if isinstance(part, IterableDataset):
        raise UnsupportedError(
            f"{type(part).__name__} is an IterableDataset, which has no numbered samples: give it in a DataLoader, with "
            "a __len__, so that an epoch has a length."
        )
    sized = hasattr(part, "__len__") and hasattr(part, "__getitem__")
    plain = isinstance(
        part, str | bytes | dict | tuple | list | np.ndarray | Tensor | DataLoader | DataSet | Streams
    )
    return sized and not plain


def _is_pair(part: Any) -> bool:
    return (
        isinstance(part, tuple | list)
        and len(part) == 2
        and all(isinstance(a, Tensor | np.ndarray) for a in part)
    )


def _kind(data: Any) -> str:
    if isinstance(data, tuple | list):
        inner = ", ".join(_kind(part) for part in data[:4])
        return f"{type(data).__name__} of {len(data)} ({inner}{', ...' if len(data) > 4 else ''})"
    return type(data).__name__


# -- arrays


def _of_arrays(train: Any, test: Any) -> DataSet:
    notes = [NO_FLIPS]
    pairs = {"train": train} | ({} if test is None else {"test": test})
    labels = {part: as_labels(f"y_{part}", _array(pair[1])) for part, pair in pairs.items()}
    lowest = {part: int(y.min()) for part, y in labels.items() if len(y)}
    if min(lowest.values(), default=0) < 0:
        raise DataError(f"labels must count from 0, got {min(lowest.values())}.")
    classes = numbered(max((int(y.max()) for y in labels.values() if len(y)), default=-1) + 1)
    if missing := sorted(set(range(len(classes))) - set(labels["train"].tolist())):
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        notes.append(f"no training image has the label {shown} of 0..{len(classes) - 1}")
    images = {}
    for part, (x, _) in pairs.items():
        with blame(part):
            images[part] = Images(_pixels(x, notes), labels[part], classes)
    return _with_test("arrays", images["train"], images.get("test"), notes)


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def _pixels(x: Any, notes: list[str]) -> NDArray[np.uint8]:
    array = _array(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x)
    array = array[..., None] if array.ndim == 3 else array
    if array.ndim != 4 or 0 in array.shape:
        raise DataError(f"x must have shape (N, H, W), (N, H, W, C) or (N, C, H, W), got {tuple(x.shape)}.")
    first, last = array.shape[1] <= 4, array.shape[3] <= 4
    if (first and not last) or (first and last and isinstance(x, Tensor)):
        array = array.transpose(0, 2, 3, 1)
    if not np.issubdtype(array.dtype, np.floating):
        return array  # Images refuses what is not uint8.
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"x is floating point with values from {low:.4g} to {high:.4g}; it must lie in [0, 1] (or be uint8). Give "
            "normalised images as a TensorDataset: then the normalisation is your own."
        )
    out = np.empty(array.shape, np.uint8)
    off = 0.0
    for begin in range(0, len(array), 1024):
        exact = array[begin : begin + 1024].astype(np.float32) * 255
        out[begin : begin + 1024] = np.rint(exact)
        off = max(off, float(np.abs(exact - out[begin : begin + 1024]).max()))
    if off > 1e-3 and not any("rounded" in note for note in notes):
        notes.append("the images were rounded to 8 bits")
    return out


def _with_test(name: str, train: Images, test: Images | None, notes: list[str]) -> DataSet:
    if test is None:
        train, test = train.cut(HELD)
        name, notes = held_name(name), [*notes, held_note(len(test))]
    return DataSet(name, train, test, flip_ok=False, notes=tuple(notes))


# -- datasets and loaders


def _of_datasets(parts: list[Any], workers: int) -> DataSet | Streams:
    for part in parts:
        length(part)
    name = _name(parts[0])
    if all(_repeats(part) for part in parts):
        try:
            content = [read_all(part) for part in parts]
        except NotEightBit:
            pass
        else:
            classes = class_names(parts[0]) or numbered(1 + max(int(labels.max()) for _, labels in content))
            images = [Images(pixels, labels, classes) for pixels, labels in content]
            return _with_test(name, images[0], images[1] if len(images) == 2 else None, [NO_FLIPS])
    samples = [Samples(part, labels_of(part)) for part in parts]
    return _streams(name, parts, samples, workers)


def _of_loaders(parts: list[Any], workers: int) -> Streams:
    made: list[Samples | Batches] = []
    for part in parts:
        if _is_loader(part):
            GivenLoader(part, None)  # Refuses what has no length before anything is read.
            iterable = isinstance(part.dataset, IterableDataset)
            made.append(Batches(part, _streamed_labels(part) if iterable else labels_of(part.dataset)))
        else:
            made.append(Samples(part, labels_of(part)))
    return _streams(_name(parts[0]), parts, made, workers)


def _is_loader(part: Any) -> bool:
    return isinstance(part, DataLoader)


def _streams(name: str, parts: list[Any], made: Any, workers: int) -> Streams:
    names = class_names(parts[0].dataset if _is_loader(parts[0]) else parts[0])
    highest = max(int(part.labels.max()) for part in made if part.labels is not None)
    shapes = [shape_of(part) for part in parts]
    if shapes[0] != shapes[-1]:
        raise DataError(
            f"training inputs are {shapes[0]}, test inputs {shapes[1]} (H, W, C); they must be alike."
        )
    streams = Streams(name, made[0], made[-1], names or numbered(highest + 1), shapes[0], workers=workers)
    if len(parts) == 2:
        return streams
    cut = streams.hold_out(HELD)
    assert cut.validation is not None
    notes = (held_note(len(cut.validation)), "its samples pass the training set's own transforms")
    return replace(cut, name=held_name(name), test=cut.validation, validation=None, notes=notes)


def _name(part: Any) -> str:
    owner: Any = part.dataset if _is_loader(part) else part
    inner: Any = owner.dataset if isinstance(owner, Subset) else owner
    return type(inner).__name__ + (f", {len(owner)} of {len(inner)}" if isinstance(owner, Subset) else "")


def _streamed_labels(loader: Any) -> NDArray[np.int64] | None:
    batches = [batch.targets for batch in GivenLoader(loader, None).epoch(0)]
    if any(targets.ndim == 2 for targets in batches):
        raise DataError(
            "the DataLoader gives soft labels, so its dataset must name its classes (an attribute classes)."
        )
    return np.concatenate([targets.numpy() for targets in batches])


def _repeats(dataset: Any) -> bool:
    """Return whether items are 8-bit and reading them draws no random number and gives the same each time."""
    outside = globals_state()
    try:
        for number in np.unique(np.linspace(0, len(dataset) - 1, min(4, len(dataset))).astype(int)).tolist():
            before = _comparable()
            first = eight_bit(number, read(dataset, number)[0])
            if _comparable() != before or not np.array_equal(
                first, eight_bit(number, read(dataset, number)[0])
            ):
                return False
    except NotEightBit:
        return False
    finally:
        set_globals(outside)
    return True


def _comparable() -> tuple[bytes, bytes, int, object]:
    torch_state, numpy_state, python_state = globals_state()
    return torch_state.numpy().tobytes(), numpy_state[1].tobytes(), numpy_state[2], python_state
