"""DenseNet-40 with growth 12 (Huang et al. 2017, the plain variant: no bottleneck, no compression)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from hasten.models.geometry import Geometry, conv1x1, conv3x3, he_init


class DenseLayer(nn.Module):
    """BN-ReLU-conv3x3 whose ``growth`` outputs are appended to its input."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(c_in, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, c_in + growth, H, W)."""
        return torch.cat([x, self.conv1(self.relu1(self.norm1(x)))], 1)


class DenseNet(nn.Module):
    """Three dense blocks of (depth-4)/3 layers, joined by 1x1 convolutions and 2x2 average pools."""

    def __init__(self, g: Geometry, depth: int = 40, growth: int = 12) -> None:
        super().__init__()
        n = (depth - 4) // 3
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv0=conv3x3(g.in_channels, 16))
        c = 16
        for block in (1, 2, 3):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for i in range(n):
                layers[f"denselayer{i + 1}"] = DenseLayer(c, growth)
                c += growth
            parts[f"denseblock{block}"] = nn.Sequential(layers)
            if block < 3:
                parts[f"transition{block}"] = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(c),
                        relu=nn.ReLU(inplace=True),
                        conv=conv1x1(c, c),
                        pool=nn.AvgPool2d(2),
                    )
                )
        parts["norm5"] = nn.BatchNorm2d(c)
        self.features = nn.Sequential(parts)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c, g.num_classes)
        he_init(self, self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = self.avgpool(self.relu(self.features(x)))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits
