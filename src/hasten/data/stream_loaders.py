"""Loaders over a user's own Dataset or DataLoader, with the interface of ``Loader``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hasten import keyed
from hasten.data.augment import Transform
from hasten.data.loader import Batch, check_position
from hasten.data.mix import Mix, mixed
from hasten.data.randomness import Lent, seed_globals
from hasten.data.torch_dataset import read
from hasten.errors import DataError, HastenError, SettingsError, UnsupportedError


def as_input(array: NDArray[Any]) -> Tensor:
    """Return an image (H, W, C) as float32 (C, H, W); 8-bit pixels are scaled to [0, 1], floats stay as they are."""
    image = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    return image.to(torch.float32).div_(255) if image.dtype == torch.uint8 else image.to(torch.float32)


def keyed_item(dataset: Dataset[Any], number: int, seed: int, epoch: int) -> tuple[Tensor, int]:
    """Return (input (C, H, W), label) of item ``number`` as it looks in ``epoch``: its transforms draw from global
    generators keyed by (seed, epoch, number).
    """
    with Lent(seed, epoch, number, "item")():
        array, label = read(dataset, number)
    return as_input(array), label


class _Keyed(Dataset[Any]):
    """The items of one epoch, read batch by batch; a worker process can do it too."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitems__(self, numbers: list[int]) -> tuple[list[Tensor], list[int], list[int]]:
        inputs, labels = [], []
        with Lent(self.seed, self.epoch)():
            for number in numbers:
                seed_globals(self.seed, self.epoch, number, "item")
                array, label = read(self.dataset, number)
                inputs.append(as_input(array))
                labels.append(label)
        for number, image in zip(numbers, inputs, strict=True):
            if image.shape != inputs[0].shape:
                raise DataError(
                    f"item {numbers[0]} is {tuple(inputs[0].shape)}, item {number} {tuple(image.shape)} (C, H, W): "
                    "give the dataset a transform that brings all to one size."
                )
        return inputs, labels, numbers


def _stacked(items: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, labels, numbers = items
    return torch.stack(inputs), torch.tensor(labels), torch.tensor(numbers)


class KeyedLoader:
    """Batches of a map-style Dataset: order and every transform keyed, any step can be the first.

    Sample n of epoch e and seed s is the same on every run, whatever the batch size, the step it is reached by and
    the number of ``workers``, as far as the dataset draws from global generators alone (see Streams).
    Raises DataError for a batch larger than the data (with drop_last), and in the epoch for items that cannot be
    read, differ in shape or have a label out of range.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        samples: int,
        classes: int,
        batch_size: int,
        *,
        seed: int = 0,
        augment: Sequence[Transform] = (),
        drop_last: bool = True,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise SettingsError(f"batch_size must be 1 or more, got {batch_size}.")
        if drop_last and batch_size > samples:
            raise DataError(
                f"batch_size {batch_size} is larger than the data ({samples} images): take {samples} or fewer."
            )
        self.dataset, self.samples, self.classes, self.batch_size = dataset, samples, classes, batch_size
        self.seed, self.drop_last, self.shuffle, self.workers = seed, drop_last, shuffle, workers
        self.device = torch.device(device)
        self.mixes = [step for step in augment if isinstance(step, Mix)]

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step ``start`` on; start = len(loader) yields none."""
        check_position(epoch, start, len(self))
        n, size = self.samples, self.batch_size
        order = keyed.permutation(n, self.seed, epoch, "order") if self.shuffle else np.arange(n)
        steps = [order[step * size : (step + 1) * size].tolist() for step in range(start, len(self))]
        return self._batches(steps, epoch)

    def _batches(self, steps: list[list[int]], epoch: int) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            # The generator is for the workers' seeds, which would come from PyTorch's global generator.
            _Keyed(self.dataset, self.seed, epoch), batch_sampler=steps, collate_fn=_stacked,
            num_workers=self.workers, generator=torch.Generator(),
        )  # fmt: skip
        for inputs, labels, index in loader:
            _check_labels(labels, self.classes)
            yield _finished(inputs, labels, index.numpy(), index, self, epoch)


class GivenLoader:
    """The batches of a user's DataLoader, in its own order and size; ``start`` draws and drops those before it.

    The global generators are keyed by (seed, epoch) while it works. Batches are pairs: inputs (B, C, H, W),
    floating point or uint8 (scaled to [0, 1]), and integer labels (B,), or soft ones (B, classes) in training.
    classes None leaves labels unchecked. Raises UnsupportedError for a loader without length, and in the epoch
    DataError for batches that are no such pairs or when fewer come than its length said.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        classes: int | None,
        *,
        seed: int = 0,
        augment: Sequence[Transform] = (),
        device: torch.device | str = "cpu",
        training: bool = True,
    ) -> None:
        try:
            self._steps = len(loader)
        except TypeError as error:
            raise UnsupportedError(
                "the DataLoader has no length (its IterableDataset has none), so nobody knows how long an epoch is: "
                "give the IterableDataset a __len__."
            ) from error
        if self._steps == 0:
            raise DataError("the DataLoader has no batches.")
        self.loader, self.classes, self.seed, self.training = loader, classes, seed, training
        self.device = torch.device(device)
        self.mixes = [step for step in augment if isinstance(step, Mix)]
        sampler: Any = loader.batch_sampler
        self.batch_size = int(loader.batch_size or getattr(sampler, "batch_size", None) or 1)
        whole = self._steps * self.batch_size
        self.samples = whole if loader.drop_last else min(whole, _sampled(loader, whole))

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return self._steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step ``start`` on; start = len(loader) yields none."""
        check_position(epoch, start, len(self))
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        if start == len(self):
            return
        lent = Lent(self.seed, epoch, "loader")
        with lent():
            if hasattr(self.loader.sampler, "set_epoch"):
                self.loader.sampler.set_epoch(epoch)
            batches = iter(self.loader)
        seen = 0
        for step in range(len(self)):
            with lent():
                batch = _next(batches, step, len(self))
            inputs, targets = _pair(batch, step)
            if step >= start:
                if self.classes is not None:
                    _check_labels(targets, self.classes, soft=self.training)
                yield _finished(inputs, targets, np.arange(seen, seen + len(inputs)), None, self, epoch)
            seen += len(inputs)


def _sampled(loader: DataLoader[Any], default: int) -> int:
    for counted in (loader.sampler, loader.dataset):  # The sampler of an IterableDataset is endless.
        try:
            return len(counted)  # type: ignore[arg-type]
        except TypeError:
            continue
    return default


def _next(batches: Iterator[Any], step: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise DataError(f"the DataLoader ended after {step} batches; its length says {steps}.") from None
    except HastenError:
        raise
    except Exception as error:
        raise DataError(
            f"the DataLoader failed at batch {step} ({type(error).__name__}: {error})."
        ) from error


def _pair(batch: Any, step: int) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}"
        raise DataError(f"batch {step} of the DataLoader is a {found}, not a pair (inputs, targets).")
    inputs, targets = (torch.as_tensor(part) if isinstance(part, np.ndarray) else part for part in batch)
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise DataError(
            f"batch {step} of the DataLoader holds {type(inputs).__name__} and {type(targets).__name__}; tensors are "
            "needed."
        )
    inputs = inputs[:, None] if inputs.ndim == 3 else inputs
    if inputs.ndim != 4 or len(inputs) != len(targets) or targets.ndim not in (1, 2):
        raise DataError(
            f"batch {step} of the DataLoader has inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}; "
            "(B, C, H, W) and (B,) are needed."
        )
    if inputs.dtype == torch.uint8:
        inputs = inputs.to(torch.float32) / 255
    elif not inputs.is_floating_point():
        raise DataError(f"batch {step} has inputs of type {inputs.dtype}; floating point or uint8 is needed.")
    if targets.ndim == 1 and targets.is_floating_point():
        raise DataError(f"batch {step} has labels of type {targets.dtype}; integers are needed.")
    return inputs.to(torch.float32), targets if targets.is_floating_point() else targets.to(torch.int64)


def _check_labels(targets: Tensor, classes: int, *, soft: bool = False) -> None:
    if targets.ndim == 2:
        if not soft or targets.shape[1] != classes or not targets.is_floating_point():
            raise DataError(
                f"targets have shape {tuple(targets.shape)} and type {targets.dtype}; integers (B,) are needed"
                + (f", or soft labels (B, {classes}), floating point." if soft else " for evaluation.")
            )
    elif int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise DataError(
            f"labels from {int(targets.min())} to {int(targets.max())} lie outside the {classes} classes "
            f"(0..{classes - 1})."
        )


def _finished(
    inputs: Tensor, targets: Tensor, numbers: NDArray[np.int64], index: Tensor | None,
    loader: KeyedLoader | GivenLoader, epoch: int,
) -> Batch:  # fmt: skip
    inputs = inputs.to(loader.device)
    targets = targets.to(loader.device)
    if loader.mixes and loader.classes is not None:
        if targets.ndim == 2:
            raise UnsupportedError("mixup and cutmix need integer labels; the DataLoader's are soft already.")
        x, targets = mixed(
            loader.mixes, inputs.permute(0, 2, 3, 1), targets, loader.classes, numbers, epoch, loader.seed
        )
        inputs = x.permute(0, 3, 1, 2)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    return Batch(inputs, targets, None if index is None else index.to(loader.device))
