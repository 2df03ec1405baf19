"""Wide residual networks (Zagoruyko and Komodakis 2016): pre-activation blocks, widths 16k/32k/64k."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.models.geometry import Geometry, conv1x1, conv3x3, he_init


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3 twice; where the shape changes the shortcut is a 1x1 conv of the first activation."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv3x3(c_in, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv1x1(c_in, width, stride) if stride != 1 or c_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, width, H/stride, W/stride)."""
        active = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(active)
        out = self.conv2(self.relu(self.bn2(self.conv1(active))))
        result: Tensor = out + identity
        return result


class WideResNet(nn.Module):
    """A WRN-``depth``-``k`` without dropout; ``depth`` is 6n+4."""

    def __init__(self, g: Geometry, depth: int, k: int) -> None:
        super().__init__()
        n = (depth - 4) // 6
        widths = (16 * k, 32 * k, 64 * k)
        self.conv1 = conv3x3(g.in_channels, 16)
        self.layer1 = self._stage(16, widths[0], n, 1)
        self.layer2 = self._stage(widths[0], widths[1], n, 2)
        self.layer3 = self._stage(widths[1], widths[2], n, 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], g.num_classes)
        he_init(self, self.fc)

    @staticmethod
    def _stage(c_in: int, width: int, n: int, stride: int) -> nn.Sequential:
        first = PreActBlock(c_in, width, stride)
        return nn.Sequential(first, *(PreActBlock(width, width, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.avgpool(self.relu(self.bn1(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits
