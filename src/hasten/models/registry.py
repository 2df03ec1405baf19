"""The networks hasten knows by name, and how to build one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hasten import errors
from hasten.errors import SettingsError, UnsupportedError
from hasten.keyed import key64
from hasten.models.chain import alexnet, vgg
from hasten.models.densenet import DenseNet
from hasten.models.geometry import Geometry
from hasten.models.lenet import CifarNet, LeNet
from hasten.models.mobilenet import MobileNetV1
from hasten.models.record import record
from hasten.models.resnet import resnet, resnet_cifar
from hasten.models.wrn import WideResNet


@dataclass(frozen=True)
class Entry:
    """One known network: its line in a listing, its factory, its smallest image and its string options."""

    line: str
    factory: Callable[..., nn.Module]
    smallest: int = 1
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_RECORD = {"variant": ("sgd", "muon")}
_SHORTCUT = {"shortcut": ("A", "B")}

_ENTRIES: dict[str, Entry] = {
    "lenet": Entry("LeNet (Caffe, 20-50-500), the MNIST network", LeNet, 16),
    "cifarnet": Entry("CifarNet (TF-slim, 64-64-384-192), two 5x5 convolutions", CifarNet, 4),
    "alexnet": Entry("AlexNet; CIFAR form below 64 pixels, torchvision's from 64 on", alexnet, 29),
    "vgg16": Entry("VGG-16 with batch norm; one linear layer below 64 pixels", partial(vgg, 16), 32),
    "vgg19": Entry("VGG-19 with batch norm; one linear layer below 64 pixels", partial(vgg, 19), 32),
    **{
        f"resnet{d}": Entry(
            f"ResNet-{d} for CIFAR (16/32/64); shortcut='A' parameter-free or 'B' projection",
            partial(resnet_cifar, d),
            options=_SHORTCUT,
        )
        for d in (8, 20, 32, 56, 110)
    },
    **{
        f"resnet{d}": Entry(f"ResNet-{d}, torchvision's; 3x3 stem below 64 pixels", partial(resnet, d))
        for d in (18, 34, 50)
    },
    "wrn-28-10": Entry(
        "Wide ResNet 28-10; any wrn-D-K with D = 6n+4 works", partial(WideResNet, depth=28, k=10)
    ),
    "wrn-16-4": Entry("Wide ResNet 16-4", partial(WideResNet, depth=16, k=4)),
    "mobilenet-v1": Entry("MobileNet-v1, width 1.0", MobileNetV1),
    "densenet40": Entry("DenseNet-40, growth 12", DenseNet, 4),
    "record94": Entry("record net 64/256/256 (baseline B2)", partial(record, "record94"), 9, _RECORD),
    "record95": Entry("record net 128/384/384", partial(record, "record95"), 9, _RECORD),
    "record96": Entry("record net 128/384/512, three convs a group", partial(record, "record96"), 9, _RECORD),
    "record-small": Entry(
        "record net 32/128/128 (baseline B2-small)", partial(record, "record-small"), 9, _RECORD
    ),
}

_SUFFIXES = {"-proj": {"shortcut": "B"}, "-muon": {"variant": "muon"}}
_WRN = re.compile(r"wrn-(\d{1,4})-(\d{1,3})")


def available() -> dict[str, str]:
    """Return every name `build` knows and one line about it; ``wrn-D-K`` stands for a family."""
    return {name: entry.line for name, entry in _ENTRIES.items()}


def lookup(name: str) -> tuple[Entry, dict[str, str]]:
    """Return the entry of ``name`` and the options its suffix stands for.

    ``resnet20-proj`` is ``resnet20`` with shortcut "B"; ``record94-muon`` is ``record94`` in its Muon
    variant. Raises UnknownName, or SettingsError for an impossible ``wrn-D-K``.
    """
    if name in _ENTRIES:
        return _ENTRIES[name], {}
    for suffix, options in _SUFFIXES.items():
        entry = _ENTRIES.get(name.removesuffix(suffix))
        if name.endswith(suffix) and entry is not None and options.keys() <= entry.options.keys():
            return entry, dict(options)
    match = _WRN.fullmatch(name)
    if match is None:
        raise errors.unknown("model", name, _ENTRIES)
    depth, k = int(match[1]), int(match[2])
    if depth < 10 or depth > 1000 or (depth - 4) % 6 or not 1 <= k <= 64:
        raise SettingsError(
            f"{name}: the depth must be 6n+4 from 10 to 1000 and the width 1 to 64, e.g. wrn-28-10"
        )
    return Entry(f"Wide ResNet {depth}-{k}", partial(WideResNet, depth=depth, k=k)), {}


def check_geometry(num_classes: int, in_channels: int, image_size: int) -> Geometry:
    """Return the checked numbers; raises SettingsError that lists all that are out of range."""
    limits = {
        "num_classes": (num_classes, 10**6),
        "in_channels": (in_channels, 4096),
        "image_size": (image_size, 8192),
    }
    problems = [
        f"{key} is {value!r}, must be an integer from 1 to {top}"
        for key, (value, top) in limits.items()
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= top
    ]
    if problems:
        raise SettingsError("model: " + "; ".join(problems))
    return Geometry(num_classes, in_channels, image_size)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Make initial weights drawn inside a function of ``seed``, leaving the global generators untouched.

    Weights are drawn on the CPU, so that they are the same whatever device is the default; inside
    ``torch.device("meta")`` nothing is drawn. With None, PyTorch's global stream is used as by any plain
    module.
    """
    if seed is None:
        yield
        return
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[]), torch.device(device if device.type == "meta" else "cpu"):
        # The default generator itself: torch.manual_seed would also reseed every GPU.
        torch.default_generator.manual_seed(key64("model", seed))
        yield


def build(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    seed: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a known network with fresh weights.

    ``image_size`` is the side in pixels; several networks have a CIFAR form below 64 pixels. With ``seed``
    the weights are a function of it and no global generator moves; without, they come from PyTorch's global
    stream. ``options``: ``shortcut="A"|"B"`` for the CIFAR ResNets, ``variant="sgd"|"muon"`` for the record
    nets.

    Raises UnknownName, SettingsError (numbers or options out of range) and UnsupportedError (image too
    small).
    """
    entry, implied = lookup(name)
    geometry = check_geometry(num_classes, in_channels, image_size)
    problems = [
        f"unknown option {key!r}, {name} has {', '.join(sorted(entry.options)) or 'none'}"
        if key not in entry.options
        else f"{key} is {value!r}, must be one of {', '.join(map(repr, entry.options[key]))}"
        for key, value in options.items()
        if value not in entry.options.get(key, ())
    ]
    problems += [f"{key} is already fixed by the name" for key in options if key in implied]
    if problems:
        raise SettingsError(f"model {name}: " + "; ".join(problems))
    if image_size < entry.smallest:
        raise UnsupportedError(
            f"model {name} needs images of at least {entry.smallest}x{entry.smallest} pixels, "
            f"got {image_size}x{image_size}: "
            "enlarge the images or take a network without so much pooling, e.g. resnet20"
        )
    with seeded(seed):
        model = entry.factory(g=geometry, **implied, **options)
    if seed is not None:
        model.to(torch.get_default_device())
    return model
