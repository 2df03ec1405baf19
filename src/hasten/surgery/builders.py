"""Modules that an edit can put into a network, by the name under which a log holds them.

A log never names a class or an import path: only what is registered here can be built from a checkpoint.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hasten.errors import SettingsError, unknown
from hasten.models.registry import seeded
from hasten.models.resnet import BasicBlock
from hasten.models.wrn import PreActBlock

Builder = Callable[..., nn.Module]


def identity_conv(channels: int, kernel: int = 3, norm: bool = True, activation: bool = True) -> nn.Module:
    """Return convolution, batch norm and ReLU for ``channels`` in and out; the convolution is the identity."""
    if kernel % 2 != 1:
        raise SettingsError(f"identity_conv needs an odd kernel, not {kernel}: an even one has no centre.")
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=not norm)
    nn.init.dirac_(conv.weight)
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    if norm:
        parts["bn"] = nn.BatchNorm2d(channels)
    if activation:
        parts["relu"] = nn.ReLU()
    return nn.Sequential(parts)


def identity_linear(features: int, activation: bool = True) -> nn.Module:
    """Return a linear layer that is the identity, and ReLU."""
    linear = nn.Linear(features, features)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(
        OrderedDict(linear=linear, relu=nn.ReLU()) if activation else OrderedDict(linear=linear)
    )


def basic_block(channels: int, width: int | None = None) -> nn.Module:
    """Return a He block whose branch gives zero: its last batch norm has weight and bias 0."""
    block = BasicBlock(channels, channels, 1, None)
    if width not in (None, channels):
        raise SettingsError(f"basic_block keeps its width; give width=None or {channels}, not {width}.")
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    return block


def preact_block(channels: int) -> nn.Module:
    """Return a pre-activation block whose branch gives zero: its last convolution is 0."""
    block = PreActBlock(channels, channels, 1)
    nn.init.kaiming_normal_(block.conv1.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(block.conv2.weight)
    return block


BUILDERS: dict[str, Builder] = {
    "identity_conv": identity_conv,
    "identity_linear": identity_linear,
    "basic_block": basic_block,
    "preact_block": preact_block,
}


def register(kind: str, builder: Builder) -> None:
    """Make ``kind`` known to edits; a method that brings its own modules calls this when it is imported."""
    if BUILDERS.setdefault(kind, builder) is not builder:
        raise SettingsError(f"an edit kind {kind!r} exists already; choose another name.")


def build(kind: str, settings: Mapping[str, Any]) -> nn.Module:
    """Return the module ``kind`` with ``settings``. Raises UnknownName, SettingsError."""
    if kind not in BUILDERS:
        raise unknown("module of an edit", kind, BUILDERS)
    try:
        with seeded(0):  # the weights that count come from the edit's settings or the checkpoint
            return BUILDERS[kind](**settings)
    except TypeError as error:
        raise SettingsError(f"edit kind {kind!r}: {error}.") from error
