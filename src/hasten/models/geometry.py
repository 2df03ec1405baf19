"""What a network is built for (classes, channels, image size), and the shared initialisation."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn

Mode = Literal["fan_in", "fan_out"]


class Geometry(NamedTuple):
    """The three numbers every factory receives; images are square, ``image_size`` pixels a side."""

    num_classes: int
    in_channels: int
    image_size: int

    @property
    def small(self) -> bool:
        """Whether the CIFAR form of a network is meant: below 64 pixels an ImageNet stem leaves nothing."""
        return self.image_size < 64


def he_init(model: nn.Module, head: nn.Linear, mode: Mode = "fan_out") -> None:
    """Give conv and hidden linear weights He's normal initialisation, in place.

    ``mode`` is "fan_out" for networks with batch norm (torchvision's choice) and "fan_in" for those without,
    where the forward variance matters. ``head``, the layer that makes the logits, keeps PyTorch's smaller
    default, so that the first loss is close to log(num_classes). Biases start at zero. Source: He et al.
    2015, eq. 10.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module is not head:
            nn.init.kaiming_normal_(module.weight, mode=mode if isinstance(module, nn.Conv2d) else "fan_in")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """Return the padded 3x3 convolution without bias that nets with batch norm use."""
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)


def conv1x1(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias."""
    return nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)
