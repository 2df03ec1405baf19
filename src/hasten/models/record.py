"""The record network of training_recipes.md 3.1 (airbench) and its test-time augmentation.

A frozen whitening convolution, three groups of 3x3 convolutions with pooling *before* batch norm, a global
max pool and a linear head scaled down. Before training, call `RecordNet.init_whitening` once with training
images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import SettingsError
from hasten.models.geometry import Geometry
from hasten.models.whitening import whitening_filters

WIDTHS: dict[str, tuple[int, int, int]] = {
    "record94": (64, 256, 256),
    "record95": (128, 384, 384),
    "record96": (128, 384, 512),
    "record-small": (32, 128, 128),
}


def frozen_scale_norm(width: int, momentum: float) -> nn.BatchNorm2d:
    """Return batch norm whose scale stays 1 and whose bias trains, eps 1e-12."""
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad_(False)
    return norm


def dirac_conv(c_in: int, c_out: int) -> nn.Conv2d:
    """Return a 3x3 convolution whose first ``c_in`` filters are the identity, the rest PyTorch's default."""
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:c_in])
    return conv


class RecordGroup(nn.Module):
    """conv, maxpool, BN, GELU, conv, BN, GELU; with ``convs=3`` a residual over the last two convs."""

    def __init__(self, c_in: int, width: int, convs: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = dirac_conv(c_in, width)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = frozen_scale_norm(width, momentum)
        self.conv2 = dirac_conv(width, width)
        self.norm2 = frozen_scale_norm(width, momentum)
        self.residual = convs == 3
        if self.residual:
            self.conv3 = dirac_conv(width, width)
            self.norm3 = frozen_scale_norm(width, momentum)
        self.activ = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c_in, H, W) to (N, width, H/2, W/2)."""
        x = self.activ(self.norm1(self.pool(self.conv1(x))))
        y: Tensor = self.activ(self.norm2(self.conv2(x)))
        if self.residual:
            y = self.activ(self.norm3(self.conv3(y)) + x)
        return y


class RecordNet(nn.Module):
    """The record network; ``variant`` "muon" gives the head unit standard deviation and divides by the width.

    The last pool is global, which on the recipe's 32-pixel images is its 3x3 max pool; larger images also
    work. ``scale`` multiplies the logits: 1/9, or 1/width in the Muon variant. Batch norm's momentum (in
    PyTorch's sense) is 0.4, and 0.1 in the three-conv form, as in airbench96.
    """

    def __init__(
        self, g: Geometry, widths: tuple[int, int, int], convs: int = 2, variant: str = "sgd"
    ) -> None:
        super().__init__()
        momentum = 0.4 if convs == 2 else 0.1
        stem = 2 * g.in_channels * 4
        self.variant = variant
        self.whiten = nn.Conv2d(g.in_channels, stem, 2)
        self.whiten.weight.requires_grad_(False)
        assert self.whiten.bias is not None
        nn.init.zeros_(self.whiten.bias)
        self.activ = nn.GELU()
        self.layers = nn.Sequential(
            RecordGroup(stem, widths[0], convs, momentum),
            RecordGroup(widths[0], widths[1], convs, momentum),
            RecordGroup(widths[1], widths[2], convs, momentum),
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(widths[2], g.num_classes, bias=False)
        self.scale = 1 / 9
        if variant == "muon":
            self.scale = 1 / widths[2]
            with torch.no_grad():
                self.head.weight /= self.head.weight.std()

    @property
    def whitened(self) -> bool:
        """Whether the whitening filters are set (their halves are exact negatives), loaded ones included."""
        first, second = self.whiten.weight.detach().chunk(2)
        return bool(torch.equal(first, -second)) and bool(first.any())

    @torch.no_grad()
    def init_whitening(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the frozen first layer from normalised training images (N, C, H, W), e.g. the first 5000.

        Raises DataError as `whitening_filters` does, SettingsError when the channels do not fit the network.
        """
        filters = whitening_filters(images, self.whiten.kernel_size[0], eps)
        if filters.shape != self.whiten.weight.shape:
            raise SettingsError(
                f"init_whitening: the images have {images.shape[1]} channels, "
                f"the network takes {self.whiten.in_channels}"
            )
        self.whiten.weight.copy_(filters)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        x = self.pool(self.layers(self.activ(self.whiten(x))))
        logits: Tensor = self.head(torch.flatten(x, 1)) * self.scale
        return logits


def record(name: str, g: Geometry, variant: str = "sgd") -> nn.Module:
    """Return the record network ``name``, a key of `WIDTHS`."""
    return RecordNet(g, WIDTHS[name], convs=3 if name == "record96" else 2, variant=variant)


def _mirror(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = 0.5 * model(x) + 0.5 * model(x.flip(-1))
    return logits


def tta(model: nn.Module, x: Tensor, level: int) -> Tensor:
    """Return logits (N, num_classes) averaged over views of the images ``x`` (N, C, H, W).

    Level 0 is the plain forward; 1 averages the image and its mirror; 2 has six views, mirror x {centre, and
    reflect-padded shifts by (-1,-1) and (+1,+1)}, weight 0.5 for the centre and 0.25 for each shift. A result
    that used level 1 or 2 must say so: inference costs 2 or 6 times as much. The model's mode and the grad
    mode are the caller's. Source: training_recipes.md 3.1. Raises SettingsError for another level.
    """
    if level == 0:
        plain: Tensor = model(x)
        return plain
    if level == 1:
        return _mirror(model, x)
    if level == 2:
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1), "reflect")
        shifted = _mirror(model, padded[:, :, :height, :width]) + _mirror(model, padded[:, :, 2:, 2:])
        return 0.5 * _mirror(model, x) + 0.25 * shifted
    raise SettingsError(
        f"TTA level {level} does not exist: use 0 (none), 1 (mirror) or 2 (mirror and shifts)"
    )
