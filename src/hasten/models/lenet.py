"""LeNet and CifarNet, the two small networks without batch norm that the papers use on MNIST and CIFAR-10."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.models.geometry import Geometry, he_init


class LeNet(nn.Module):
    """Caffe's LeNet (20-50-500), the one of SSL, AOFP and TernGrad: 2,293,000 MACs on a 28x28 grey image."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        side = ((g.image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(g.in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.fc2 = nn.Linear(500, g.num_classes)
        he_init(self, self.fc2, "fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = self.pool(self.conv1(x))
        x = self.pool(self.conv2(x))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc2(x)
        return logits


class CifarNet(nn.Module):
    """TF-slim's CifarNet (two 5x5 convs of 64, then 384-192), the one of Adaptive Deep Reuse.

    TensorFlow's response normalisation has radius 4, so 9 channels, and alpha 0.001/9 on the sum; PyTorch
    divides by the size itself, hence alpha 0.001.
    """

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        side = g.image_size // 4
        self.conv1 = nn.Conv2d(g.in_channels, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.norm = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
        self.pool = nn.MaxPool2d(2)
        self.fc3 = nn.Linear(64 * side * side, 384)
        self.dropout = nn.Dropout(0.5)
        self.fc4 = nn.Linear(384, 192)
        self.logits = nn.Linear(192, g.num_classes)
        he_init(self, self.logits, "fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = self.norm(self.pool(F.relu(self.conv1(x))))
        x = self.pool(self.norm(F.relu(self.conv2(x))))
        x = self.dropout(F.relu(self.fc3(torch.flatten(x, 1))))
        logits: Tensor = self.logits(F.relu(self.fc4(x)))
        return logits
