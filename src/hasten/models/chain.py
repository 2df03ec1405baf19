"""AlexNet and VGG: a chain of convolutions (`features`), a pool and a classifier, named as in torchvision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.models.geometry import Geometry, Mode, he_init

VGG_WIDTHS: dict[int, tuple[tuple[int, ...], ...]] = {
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class Chain(nn.Module):
    """A network without branches: features, average pool, flatten, classifier."""

    def __init__(self, features: nn.Sequential, pool: int, classifier: nn.Sequential, mode: Mode) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(pool)
        self.classifier = classifier
        head = classifier[-1]
        assert isinstance(head, nn.Linear)
        he_init(self, head, mode)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        logits: Tensor = self.classifier(x)
        return logits


def _conv_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=padding), nn.ReLU(inplace=True)]


def alexnet(g: Geometry) -> nn.Module:
    """Return AlexNet: torchvision's layout from 64 pixels on, below that a CIFAR form with one linear layer.

    The CIFAR form keeps the 11x11 stride-4 stem and the widths, and pools by 2
    (bearpaw/pytorch-classification).
    """
    kernel, stem_pad = (2, 5) if g.small else (3, 2)
    features = nn.Sequential(
        *_conv_relu(g.in_channels, 64, 11, 4, stem_pad),
        nn.MaxPool2d(kernel, 2),
        *_conv_relu(64, 192, 5, 1, 2),
        nn.MaxPool2d(kernel, 2),
        *_conv_relu(192, 384, 3, 1, 1),
        *_conv_relu(384, 256, 3, 1, 1),
        *_conv_relu(256, 256, 3, 1, 1),
        nn.MaxPool2d(kernel, 2),
    )
    if g.small:
        return Chain(features, 1, nn.Sequential(nn.Linear(256, g.num_classes)), "fan_in")
    classifier = nn.Sequential(
        nn.Dropout(0.5),
        nn.Linear(256 * 36, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, g.num_classes),
    )
    return Chain(features, 6, classifier, "fan_in")


def vgg(depth: int, g: Geometry) -> nn.Module:
    """Return VGG-16 or VGG-19 with batch norm: one linear layer below 64 pixels, else ImageNet's three."""
    layers: list[nn.Module] = []
    c_in = g.in_channels
    for stage in VGG_WIDTHS[depth]:
        for width in stage:
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            c_in = width
        layers.append(nn.MaxPool2d(2, 2))
    if g.small:
        return Chain(nn.Sequential(*layers), 1, nn.Sequential(nn.Linear(512, g.num_classes)), "fan_out")
    classifier = nn.Sequential(
        nn.Linear(512 * 49, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, g.num_classes),
    )
    return Chain(nn.Sequential(*layers), 7, classifier, "fan_out")
