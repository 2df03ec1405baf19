"""The filter networks of early instance filtering: an image in, two logits (low, high) out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import UnsupportedError
from hasten.models.geometry import Geometry, he_init
from hasten.models.resnet import BasicBlock, ResNet, resnet_cifar

FILTERS = ("lenet", "resnet8", "resnet10")
LOW, HIGH = 0, 1
"""The two classes: columns of the logits."""


class FilterLeNet(nn.Module):
    """LeNet with 3x3 kernels, 6 and 16 of them (from the paper).

    They are padded so that shrunk images still fit (our choice). The linear layers are LeNet-5's, 120 and 84
    wide.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * (height // 4) * (width // 4), 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 2)
        he_init(self, self.fc3, "fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, 2)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        logits: Tensor = self.fc3(x)
        return logits


def filter_for(channels: int, size: int) -> str:
    """Return the paper's filter for such images: MNIST's LeNet, CIFAR's ResNet-8, ImageNet's ResNet-10."""
    if size >= 64:
        return "resnet10"
    return "lenet" if channels == 1 else "resnet8"


def build_filter(name: str, channels: int, height: int, width: int, seed: int) -> nn.Module:
    """Return the filter network ``name`` for (channels, height, width) images, initialised by ``seed``.

    PyTorch's global generators are left as they were. Raises UnsupportedError if the images are too small for
    it.
    """
    least = 4 if name == "lenet" else 1
    if min(height, width) < least:
        raise UnsupportedError(
            f"the filter {name!r} needs images of at least {least}x{least} pixels after scaling, not "
            f"{height}x{width}; use a larger scale."
        )
    geometry = Geometry(2, channels, height)
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would seed the accelerators too
        torch.default_generator.manual_seed(seed)
        if name == "lenet":
            return FilterLeNet(channels, height, width)
        if name == "resnet8":
            return resnet_cifar(8, geometry)
        return ResNet(geometry, BasicBlock, (1, 1, 1, 1), 64, big_stem=True, pad_shortcut=False)
