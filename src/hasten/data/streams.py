"""Data that a user's own Datasets and DataLoaders make: transforms and normalisation are theirs, not hasten's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Subset

from hasten.data.augment import Transform
from hasten.data.images import held_out
from hasten.data.stream_loaders import GivenLoader, KeyedLoader, keyed_item
from hasten.data.torch_dataset import length
from hasten.errors import DataError, UnsupportedError


@dataclass(frozen=True, eq=False)
class Samples:
    """A part made of a map-style Dataset; labels: int64 (N,), of every sample."""

    dataset: Dataset[Any]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def sampled(self) -> bytes:
        """Return up to 4 inputs as the seed 0 makes them; nothing where that is not the same twice."""
        spread = np.unique(np.linspace(0, len(self) - 1, min(4, len(self))).astype(np.int64)).tolist()
        once, again = (
            b"".join(keyed_item(self.dataset, number, 0, 0)[0].numpy().tobytes() for number in spread)
            for _ in range(2)
        )
        return once if once == again else b""

    def take(self, numbers: NDArray[np.int64]) -> Samples:
        """Return the samples ``numbers`` of this part."""
        return Samples(Subset(self.dataset, numbers.tolist()), self.labels[numbers])


@dataclass(frozen=True, eq=False)
class Batches:
    """A part made of a DataLoader. labels: those of all samples where they could be read, else None."""

    loader: DataLoader[Any]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return GivenLoader(self.loader, 1).samples

    def sampled(self) -> bytes:
        """Return nothing: which inputs a DataLoader gives first is its own affair."""
        return b""


@dataclass(frozen=True, eq=False)
class Streams:
    """Training and test data from Datasets with transforms of their own, or from DataLoaders.

    Inputs come as the transforms make them (8-bit pixels are scaled to [0, 1]); hasten neither normalises nor
    augments them, apart from mixup and cutmix, which act on whole batches.

    Of a Dataset, hasten keys the order by (seed, epoch), and PyTorch's, NumPy's and Python's global generators by
    (seed, epoch, sample) before each item, so random transforms repeat exactly and a run resumes anywhere. That
    cannot be promised of a dataset that draws from a generator of its own, from the time or from other items.

    Of a DataLoader, order, batch size and augmentation are its own. The global generators are keyed by
    (seed, epoch), so a loader that draws from them alone repeats exactly, and resumes by drawing and dropping the
    batches that are done; one with a ``generator`` of its own or persistent workers does not. Samples have no
    numbers (``Batch.index`` is None).

    shape: (height, width, channels) of an input. flip_ok is not used. workers: processes that read items of a
    Dataset (0: none but this one); what they read does not depend on their number.
    """

    name: str
    train: Samples | Batches
    test: Samples | Batches
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    validation: Samples | Batches | None = None
    workers: int = 0
    notes: tuple[str, ...] = ()

    owns_augmentation = True
    flip_ok = False

    def __post_init__(self) -> None:
        for part, own in self._parts().items():
            if own.labels is not None and not 0 <= own.labels.min() <= own.labels.max() < len(self.classes):
                raise DataError(
                    f"{part} has labels from {own.labels.min()} to {own.labels.max()}; with {len(self.classes)} "
                    f"classes they must lie in 0..{len(self.classes) - 1}."
                )
        if len(self.classes) < 2 or (self.train.labels is not None and len(np.unique(self.train.labels)) < 2):
            raise DataError(f"{self.name}: all training samples are of one class; at least two are needed.")

    def _parts(self) -> dict[str, Samples | Batches]:
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def train_count(self) -> int:
        """Return the number of training samples of an epoch."""
        return len(self.train)

    @property
    def test_count(self) -> int:
        """Return the number of test samples."""
        return len(self.test)

    @property
    def has_validation(self) -> bool:
        """Return whether there is a validation part."""
        return self.validation is not None

    def training(
        self,
        batch_size: int,
        *,
        seed: int,
        augment: Sequence[Transform] = (),
        device: torch.device | str = "cpu",
        drop_last: bool = True,
    ) -> KeyedLoader | GivenLoader:
        """Return a loader of training batches.

        Of ``augment`` only mixup and cutmix act. A DataLoader keeps its own batch size and last batch.
        """
        if isinstance(self.train, Batches):
            return GivenLoader(
                self.train.loader, len(self.classes), seed=seed, augment=augment, device=device
            )
        return KeyedLoader(
            self.train.dataset, len(self.train), len(self.classes), batch_size, seed=seed, augment=augment,
            device=device, drop_last=drop_last, workers=self.workers,
        )  # fmt: skip

    def evaluation(
        self, part: str = "test", *, device: torch.device | str = "cpu"
    ) -> KeyedLoader | GivenLoader:
        """Return a loader of all samples of ``part``, the same in every epoch. Raises DataError without that part."""
        own = self._parts().get(part)
        if own is None:
            raise DataError(f"{self.name} has no part {part!r}; it has {', '.join(self._parts())}.")
        if isinstance(own, Batches):
            return GivenLoader(own.loader, len(self.classes), device=device, training=False)
        most = max(1, min(500, len(own), 2**25 // int(np.prod(self.shape))))
        return KeyedLoader(own.dataset, len(own), len(self.classes), most, shuffle=False, drop_last=False,
                           device=device, workers=self.workers)  # fmt: skip

    def hold_out(self, fraction: float = 0.1, seed: int = 0) -> Streams:
        """Return the same data with a validation part cut from the training samples, keyed and stratified.

        The samples held out still pass the training set's own transforms, random ones with the same draws in every
        evaluation. Raises UnsupportedError for a DataLoader.
        """
        if self.validation is not None:
            raise DataError(f"{self.name} has a validation part already: {len(self.validation)} samples.")
        if isinstance(self.train, Batches):
            raise UnsupportedError(
                "a DataLoader cannot be split into training and validation samples, since its order is its own: give "
                "its Dataset instead, and hasten makes the batches."
            )
        held = held_out(self.train.labels, self.classes, fraction, seed)
        rest = np.setdiff1d(np.arange(len(self.train)), held)
        return replace(self, train=self.train.take(rest), validation=self.train.take(held))

    def identity(self) -> dict[str, Any]:
        """Return, for JSON, what can be told of the data: counts, shape, classes, digests of labels and of some
        inputs (of Datasets whose transforms repeat under one seed).
        """
        return {
            "name": self.name, "counts": {name: len(part) for name, part in self._parts().items()},
            "shape": list(self.shape), "classes": list(self.classes), "size": None,
            "content": {name: _digest(part) for name, part in self._parts().items()},
        }  # fmt: skip

    def preprocessing(self) -> dict[str, Any]:
        """Return what ``DataSet.preprocessing`` does, with mean and std None: they are the loader's own."""
        height, width, channels = self.shape
        return {"classes": list(self.classes), "size": [height, width], "channels": channels, "mean": None,
                "std": None, "resize": None}  # fmt: skip


def _digest(part: Samples | Batches) -> str:
    digest = hashlib.sha256(b"" if part.labels is None else part.labels.tobytes())
    digest.update(part.sampled())
    return digest.hexdigest()[:16]


def labels_of(dataset: Dataset[Any]) -> NDArray[np.int64]:
    """Return the label of every item of a map-style dataset, int64 (N,).

    They come from its ``targets`` or ``labels`` where these agree with the first and last item, else from reading
    every item once.
    """
    count = length(dataset)
    quick = _listed(dataset)
    if isinstance(dataset, Subset) and (whole := _listed(dataset.dataset)) is not None:
        quick = np.asarray(whole[np.asarray(dataset.indices)])
    ends = {0, count - 1}
    if (
        quick is not None
        and len(quick) == count
        and all(keyed_item(dataset, n, 0, 0)[1] == quick[n] for n in ends)
    ):
        return quick
    return np.array([keyed_item(dataset, number, 0, 0)[1] for number in range(count)], np.int64)


def _listed(dataset: Any) -> NDArray[np.int64] | None:
    tensors = getattr(dataset, "tensors", None)
    found = tensors[1] if isinstance(tensors, tuple) and len(tensors) == 2 else None
    for name in ("targets", "labels"):
        found = getattr(dataset, name, None) if found is None else found
    try:
        labels = None if found is None else np.asarray(found)
    except (TypeError, ValueError):
        return None
    good = labels is not None and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    return np.asarray(labels, np.int64) if good else None


def shape_of(part: Dataset[Any] | DataLoader[Any]) -> tuple[int, int, int]:
    """Return (H, W, C) of the first input."""
    if isinstance(part, DataLoader):
        batch = next(iter(GivenLoader(part, None).epoch(0)))
        _, channels, height, width = batch.inputs.shape
    else:
        channels, height, width = keyed_item(part, 0, 0, 0)[0].shape
    return height, width, channels
