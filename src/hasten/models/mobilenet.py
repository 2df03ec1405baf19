"""MobileNet-v1 (Howard et al. 2017): depthwise and pointwise pairs, timm's names (`mobilenetv1_100`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.models.geometry import Geometry, conv1x1, conv3x3, he_init

STAGES: tuple[tuple[int, int, int], ...] = ((1, 1, 64), (2, 2, 128), (2, 2, 256), (6, 2, 512), (2, 2, 1024))
"""(blocks, stride of the first block, width) of each stage: Table 1 of the paper."""


class DepthwiseSeparable(nn.Module):
    """A depthwise 3x3 and a pointwise 1x1 convolution, each with batch norm and ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv_pw = conv1x1(c_in, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, c_out, H/stride, W/stride)."""
        x = self.relu(self.bn1(self.conv_dw(x)))
        result: Tensor = self.relu(self.bn2(self.conv_pw(x)))
        return result


class MobileNetV1(nn.Module):
    """MobileNet-v1 at width 1.0; below 64 pixels the stem keeps stride 1, the usual CIFAR form."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.conv_stem = conv3x3(g.in_channels, 32, 1 if g.small else 2)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        stages: list[nn.Module] = []
        c_in = 32
        for blocks, stride, width in STAGES:
            stage: list[nn.Module] = []
            for j in range(blocks):
                stage.append(DepthwiseSeparable(c_in, width, stride if j == 0 else 1))
                c_in = width
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c_in, g.num_classes)
        he_init(self, self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = self.blocks(self.relu(self.bn1(self.conv_stem(x))))
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(x), 1))
        return logits
