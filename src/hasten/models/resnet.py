"""Residual networks: He's CIFAR family (8 to 110 layers) and 18, 34, 50; torchvision's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.models.geometry import Geometry, conv1x1, conv3x3, he_init

if TYPE_CHECKING:
    from hasten.surgery.labels import Array
    from hasten.surgery.trace import Follower


class PadShortcut(nn.Module):
    """The parameter-free shortcut (option A): every ``stride``-th pixel, zero channels added on both sides.

    The added channels are ``before`` and ``after``: surgery on the widths changes these two numbers and
    nothing else.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.width = stride, c_out
        self.before = (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, c_out, ceil(H/stride), ceil(W/stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def follow_channels(self, follow: Follower, name: str, labels: Array) -> Array:
        """Say how channels pass: new ones (zeros) before and after those of the input."""
        around = [follow.labels.fresh(count, name) for count in (self.before, self.after)]
        result = np.concatenate([around[0], labels, around[1]])
        follow.slot(name, "pad", result)
        return result

    def cut_channels(self, role: str, index: Array) -> None:
        """Keep the output channels ``index`` (ascending); those that are padded are counted anew."""
        end = self.width - self.after
        self.width = len(index)
        self.before, self.after = int((index < self.before).sum()), int((index >= end).sum())

    def extra_repr(self) -> str:
        """Show the stride and the channels added."""
        return f"stride={self.stride}, before={self.before}, after={self.after}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, width, H/stride, W/stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(out)) + identity)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with the stride on the 3x3 (torchvision's variant, 'v1.5')."""

    expansion: ClassVar[int] = 4

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(c_in, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, 4 * width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, 4*width, H/stride, W/stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        result: Tensor = self.relu(self.bn3(self.conv3(out)) + identity)
        return result


class ResNet(nn.Module):
    """A stem, three or four stages of residual blocks, a global average pool and one linear layer."""

    def __init__(
        self,
        g: Geometry,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        width: int,
        *,
        big_stem: bool,
        pad_shortcut: bool,
    ) -> None:
        super().__init__()
        if big_stem:
            self.conv1 = nn.Conv2d(g.in_channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = conv3x3(g.in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if big_stem else nn.Identity()
        c_in = width
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                c_out = width * 2**i * block.expansion
                shortcut: nn.Module | None = None
                if stride != 1 or c_in != c_out:
                    if pad_shortcut:
                        shortcut = PadShortcut(c_in, c_out, stride)
                    else:
                        shortcut = nn.Sequential(conv1x1(c_in, c_out, stride), nn.BatchNorm2d(c_out))
                blocks.append(block(c_in, width * 2**i, stride, shortcut))
                c_in = c_out
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, g.num_classes)
        he_init(self, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def resnet_cifar(depth: int, g: Geometry, shortcut: str = "A") -> nn.Module:
    """Return He's CIFAR ResNet of ``depth`` = 6n+2 layers, widths 16/32/64.

    ``shortcut`` "A" is parameter-free (the paper's choice on CIFAR), "B" a 1x1 projection with batch norm.
    """
    n = (depth - 2) // 6
    return ResNet(g, BasicBlock, (n, n, n), 16, big_stem=False, pad_shortcut=shortcut == "A")


def resnet(depth: int, g: Geometry) -> nn.Module:
    """Return ResNet-18, 34 or 50: torchvision's layout, with a 3x3 stem and no max pool below 64 pixels."""
    block: type[BasicBlock] | type[Bottleneck] = Bottleneck if depth == 50 else BasicBlock
    depths = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    return ResNet(g, block, depths, 64, big_stem=not g.small, pad_shortcut=False)
