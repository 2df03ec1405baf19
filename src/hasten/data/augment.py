"""The augmentations that recipes know by name. Each acts on a whole batch, every draw keyed by (seed, epoch, sample).

What a sample becomes never depends on which batch it is in (mixup and cutmix, whose partners come from the batch,
apart), so a resumed run sees what the uninterrupted one saw.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hasten.data.boxes import RandomResizedCrop
from hasten.data.erase import Cutout, RandomErasing
from hasten.data.geometric import AlternatingFlip, Crop, Flip, Index
from hasten.data.mix import Cutmix, Mix, Mixup
from hasten.data.policies import RandAugment, TrivialAugmentWide

# A batch transform: (pixels (B, H, W, C), sample numbers (B,), epoch, seed) -> pixels of the same shape and
# dtype; or a Mix, which also changes the labels.
Transform = Callable[[Tensor, Index, int, int], Tensor] | Mix

BY_NAME: dict[str, Transform] = {
    "random_resized_crop": RandomResizedCrop(),
    "crop": Crop(pad=4),
    "crop2": Crop(pad=2),
    "flip": Flip(),
    "alternating_flip": AlternatingFlip(),
    "randaugment": RandAugment(),
    "trivialaugment": TrivialAugmentWide(),
    "cutout": Cutout(size=8),
    "random_erasing": RandomErasing(),
    "mixup": Mixup(),
    "cutmix": Cutmix(),
}
