"""Small pieces and random layers that the products' tests share."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hasten.products import Selection

CHANNELS_LAST = torch.channels_last


class Identity:
    """A transform that changes nothing, so that the three products run but nothing differs."""

    name = "identity"

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor


class Times:
    """A transform with a visible effect."""

    name = "times"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor * self.factor


class Fixed:
    """A selector that always returns the same selection and counts its calls."""

    name = "fixed"
    static = True

    def __init__(
        self, index: list[int], scale: list[float] | None = None, block: int = 1, repeats: bool = False
    ):
        self.index, self.scale, self.block, self.repeats = index, scale, block, repeats
        self.seen: list[tuple[torch.Size, torch.Size]] = []

    def __call__(self, first: Tensor, second: Tensor) -> Selection:
        self.seen.append((first.shape, second.shape))
        scale = None if self.scale is None else torch.tensor(self.scale, dtype=torch.float64)
        return Selection(torch.tensor(self.index), scale, self.block, self.repeats)


class TopK:
    """A statically-sized selector: the k largest slices, along ``dim``, of the first operand."""

    name = "top-k"
    static = True

    def __init__(self, k: int, dim: int = 1) -> None:
        self.k, self.dim = k, dim

    def __call__(self, first: Tensor, second: Tensor) -> Selection:
        others = [d for d in range(first.dim()) if d != self.dim % first.dim()]
        return Selection(torch.topk(first.square().sum(others), self.k).indices.sort().values)


def layers(count: int, seed: int, channels_last: bool = False) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield random convolutions of every geometry, and linear layers on 1 to 4 dimensions, with inputs."""
    draw = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    for number in range(count):
        if number % 4 == 3:
            shape = [draw.randint(2, 5) for _ in range(draw.randint(0, 3))]
            layer: nn.Module = nn.Linear(draw.randint(2, 9), draw.randint(2, 9), bias=draw.random() < 0.7)
            x = torch.randn(*shape, layer.in_features, generator=noise)
        else:
            groups = draw.choice([1, 1, 2, 4])
            kernel = (draw.randint(1, 4), draw.randint(1, 4))
            layer = nn.Conv2d(
                groups * draw.randint(1, 4),
                groups * draw.randint(1, 4),
                kernel,
                stride=(draw.randint(1, 3), draw.randint(1, 3)),
                padding=(draw.randint(0, 3), draw.randint(0, 3)),
                dilation=(draw.randint(1, 2), draw.randint(1, 2)),
                groups=groups,
                bias=draw.random() < 0.7,
            )
            x = torch.randn(
                draw.randint(1, 4),
                layer.in_channels,
                draw.randint(7, 12),
                draw.randint(7, 12),
                generator=noise,
            )
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=noise))
        if channels_last and isinstance(layer, nn.Conv2d):
            yield layer.to(memory_format=CHANNELS_LAST), x.contiguous(memory_format=CHANNELS_LAST)
        else:
            yield layer, x


def run(layer: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Return the output and all gradients of one pass, for a gradient of the output fixed by its size."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(y.numel()))
    y.backward(noise.to(y))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return found


def strides(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the memory layout of each tensor."""
    return {name: tensor.stride() for name, tensor in tensors.items()}
