"""Batches from images in memory: keyed order, augmentation, normalisation; any step can be the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten import keyed
from hasten.data.augment import Transform
from hasten.data.geometric import Geometric, OnPixels, gather, moved
from hasten.data.images import Images
from hasten.data.mix import Mix, mixed
from hasten.errors import DataError, SettingsError


class Batch(NamedTuple):
    """One batch, all of it on the loader's device.

    inputs: (B, C, H, W) of the loader's dtype, in channels_last memory. targets: int64 (B,). index: int64
    (B,), the samples' numbers in their part of the data, or None where a DataLoader of the user's keeps them to
    itself. After mixup or cutmix, targets are soft: floating point (B, classes).
    """

    inputs: Tensor
    targets: Tensor
    index: Tensor | None  # type: ignore[assignment]  # The field's name for it; hides tuple.index.


class Loader:
    """Cuts Images into batches; epoch e of seed s is the same on every run and machine.

    The order is a permutation keyed by (seed, epoch), so ``epoch(e, start=k)`` begins at step k without
    replaying the k steps before it. ``augment`` holds transforms: first those of uint8 pixels (crops, flips,
    RandAugment, TrivialAugmentWide), then those that get the normalised (B, H, W, C) batch (Cutout, RandomErasing,
    your own), last Mixup and Cutmix, which make the targets soft. With ``normalise`` each channel has mean 0 and std 1 over the images, otherwise pixels
    lie in [0, 1].

    The uint8 images are kept on ``device``. Raises DataError for a batch larger than the data (with
    drop_last) and SettingsError for settings out of range.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int = 0,
        augment: Sequence[Transform] = (),
        drop_last: bool = True,
        shuffle: bool = True,
        normalise: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1:
            raise SettingsError(f"batch_size must be 1 or more, got {batch_size}.")
        if not dtype.is_floating_point:
            raise SettingsError(f"dtype must be a floating-point type, got {dtype}.")
        if drop_last and batch_size > len(images):
            raise DataError(
                f"batch_size {batch_size} is larger than the data ({len(images)} images): "
                f"take {len(images)} or fewer."
            )
        on_pixels = [step for step in augment if isinstance(step, OnPixels)]
        self.other = [step for step in augment if not isinstance(step, OnPixels | Mix)]
        self.mixes = [step for step in augment if isinstance(step, Mix)]
        if [*on_pixels, *self.other, *self.mixes] != list(augment):
            raise SettingsError(
                "put crops, flips, randaugment and trivialaugment before the other transforms, and mixup and cutmix "
                f"last, got {list(augment)}."
            )
        # The first crops and flips are part of taking the batch's images: one gather for all of them.
        self.first: list[Geometric] = []
        for move in takewhile(lambda step: isinstance(step, Geometric), on_pixels):
            self.first += [move] if isinstance(move, Geometric) else []
        self.later = on_pixels[len(self.first) :]
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.device = torch.device(device)
        self.dtype = dtype
        self._pixels = torch.from_numpy(images.pixels).to(self.device)
        self._labels = torch.from_numpy(images.labels).to(self.device)
        mean = np.array(images.mean) if normalise else np.zeros(images.shape[2])
        # A channel without variation would divide by zero; one grey level is the least visible spread.
        std = np.maximum(images.std, 1 / 255) if normalise else np.ones(images.shape[2])
        self._scale = torch.tensor(1 / (255 * std), dtype=torch.float32, device=self.device)
        self._shift = torch.tensor(-mean / std, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    @property
    def samples(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample numbers of an epoch in their order, int64 (N,)."""
        n = len(self.images)
        return keyed.permutation(n, self.seed, epoch, "order") if self.shuffle else np.arange(n)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step ``start`` on; start = len(loader) yields none."""
        check_position(epoch, start, len(self))
        return self._steps(epoch, start)

    def _steps(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self.order(epoch)
        for step in range(start, len(self)):
            yield self.batch(order[step * self.batch_size : (step + 1) * self.batch_size], epoch)

    def batch(self, index: NDArray[np.int64], epoch: int) -> Batch:
        """Return the batch of the samples ``index`` (int64, (B,)) as they look in ``epoch``."""
        height, width, _ = self.images.shape
        where = torch.from_numpy(np.ascontiguousarray(index)).to(self.device)
        if self.first:
            moves = moved(self.first, (height, width), index, epoch, self.seed)
            pixels = gather(self._pixels, index, *moves)
        else:
            pixels = self._pixels.index_select(0, where)
        for step in self.later:
            pixels = step(pixels, index, epoch, self.seed)
        x = pixels.to(torch.float32).mul_(self._scale).add_(self._shift)
        for transform in self.other:
            x = transform(x, index, epoch, self.seed)
        targets = self._labels.index_select(0, where)
        if self.mixes:
            x, targets = mixed(self.mixes, x, targets, len(self.images.classes), index, epoch, self.seed)
        return Batch(x.permute(0, 3, 1, 2).to(self.dtype), targets, where)


def check_position(epoch: int, start: int, steps: int) -> None:
    """Raise SettingsError where there is no such epoch, or no step ``start`` among its ``steps``."""
    if epoch < 0:
        raise SettingsError(f"epoch must be 0 or more, got {epoch}.")
    if not 0 <= start <= steps:
        raise SettingsError(f"start must lie in 0..{steps} (the steps of an epoch), got {start}.")
