"""mixup and cutmix: each sample is mixed with the one before it in its batch, and so are their labels.

The share of a sample is keyed by (seed, epoch, sample) and does not depend on its batch; its partner does: it is the
sample before it (the first's is the last), as in torchvision, where the batch is rolled by one. With a keyed order
of the batches both repeat exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from hasten import keyed
from hasten.errors import SettingsError

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class Mix:
    """A transform of a batch's images and labels; alpha: parameter of Beta(alpha, alpha), the share's distribution."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise SettingsError(f"{type(self).__name__} alpha must be above 0, got {self.alpha}.")

    def shares(
        self, size: tuple[int, int], index: NDArray[np.int64], epoch: int, seed: int
    ) -> tuple[Shares, Shares]:
        """Return what each sample keeps of its own: of each pixel, broadcastable to (B, H, W), and of its label (B,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mixup(Mix):
    """lam * own + (1 - lam) * partner, lam from Beta(alpha, alpha) (Zhang et al., arXiv 1710.09412)."""

    alpha: float = 0.2

    def shares(
        self, size: tuple[int, int], index: NDArray[np.int64], epoch: int, seed: int
    ) -> tuple[Shares, Shares]:
        """Return lam for all pixels and the label."""
        lam = betaincinv(self.alpha, self.alpha, keyed.uniform(index, 1, seed, epoch, "mixup")[:, 0])
        return lam[:, None, None], lam


@dataclass(frozen=True)
class Cutmix(Mix):
    """A rectangle of the partner's pixels, lam of the area left, lam from Beta(alpha, alpha) (Yun et al.,
    arXiv 1905.04899).

    Its centre lies anywhere in the image and it is cut at the border; labels are mixed by the area that remains.
    """

    def shares(
        self, size: tuple[int, int], index: NDArray[np.int64], epoch: int, seed: int
    ) -> tuple[Shares, Shares]:
        """Return 0 inside the rectangle and 1 outside, and the share outside."""
        draw = keyed.uniform(index, 3, seed, epoch, "cutmix")
        half = 0.5 * np.sqrt(1 - betaincinv(self.alpha, self.alpha, draw[:, 0]))
        inside = []
        for axis, length in enumerate(size):
            centre, reach = np.floor(draw[:, 1 + axis] * length), np.floor(half * length)
            at = np.arange(length)
            inside.append((at >= (centre - reach)[:, None]) & (at < (centre + reach)[:, None]))
        own = 1.0 - (inside[0][:, :, None] & inside[1][:, None, :])
        return own, own.mean((1, 2))


def mixed(
    steps: Sequence[Mix],
    x: Tensor,
    targets: Tensor,
    classes: int,
    index: NDArray[np.int64],
    epoch: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return images (B, H, W, C) and soft labels float32 (B, classes) of a batch with int64 ``targets`` (B,).

    Where there are several steps, each sample takes one of them, keyed and equally likely.
    """
    height, width = x.shape[1:3]
    choice = np.floor(keyed.uniform(index, 1, seed, epoch, "mix")[:, 0] * len(steps))
    own, lam = np.ones((len(x), 1, 1)), np.ones(len(x))
    for number, step in enumerate(steps):
        pixels, label = step.shares((height, width), index, epoch, seed)
        own = np.where((choice == number)[:, None, None], pixels, own)
        lam = np.where(choice == number, label, lam)
    share, soft = (torch.from_numpy(part).to(x.device, torch.float32) for part in (own, lam))
    hot = torch.nn.functional.one_hot(targets, classes).to(torch.float32)
    return _blend(x, share[..., None].to(x.dtype)), _blend(hot, soft[:, None])


def _blend(x: Tensor, share: Tensor) -> Tensor:
    return share * x + (1 - share) * x.roll(1, 0)
