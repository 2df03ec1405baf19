"""Approximate tensor operations at ratio 0.5: the time of a training step, and of single layers, over the strong baseline.

The method acts in every step here (start_at=0, stop_at=1); its norms, copies and scatters are part of the time. The
layers are 3x3 convolutions with as many outputs as inputs, forward and backward, in bfloat16 and channels_last where
this machine is faster with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    Step,
    bare_step,
    build,
    pairs,
    ratio_claim,
    real_images,
    session_step,
    store,
    strong,
)
from hasten import Session
from hasten.contract import Method
from hasten.methods.products.approximate_tensor_ops import ApproximateTensorOps

CLAIM = "approximate tensor operations: steps of wide networks at ratio 0.5 >= 1.5x as fast as the strong baseline's"
MINUTES = 8
NETWORKS = (("wrn-16-8", 128), ("wrn-28-10", 32), ("vgg16", 128))
SECONDS = 75.0
WIDTHS = ((64, 32), (128, 16), (256, 8), (512, 4))  # (channels, height and width)
LAYER_BATCH, LAYER_SECONDS = 64, 15.0


def always(**settings: Any) -> ApproximateTensorOps:
    """Return the method, active in every step."""
    return ApproximateTensorOps(start_at=0.0, stop_at=1.0, **settings)


class OneLayer(nn.Module):
    """A 3x3 convolution, so followed that it is a network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores of x (N, channels, H, W)."""
        y: Tensor = self.head(self.conv(x).mean((2, 3)))
        return y


def layer_step(channels: int, size: int, batch: int, methods: list[Method]) -> Step:
    """Return forward and backward of one convolution as a session with these methods runs it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator).relu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OneLayer(channels)
    session = Session(
        model, torch.optim.SGD(model.parameters(), lr=0.1), methods, sample=(x, torch.zeros(batch).long())
    )
    precision = next(m for m in session.methods if m.spec.name == "mixed_precision")
    with precision.context():
        like = model.conv(x)
    x = x.to(like.dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = (
        torch.randn(like.shape, generator=generator)
        .to(like.dtype)
        .contiguous(memory_format=torch.channels_last)
    )

    def step() -> None:
        with precision.context():
            y = model.conv(x)
        torch.autograd.grad(y, (x, model.conv.weight), grad)

    return step


def main(smoke: bool = False) -> None:
    """Time whole steps, then single layers, and store both."""
    steps: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    claims = []
    for name, batch in (("wrn-10-1", 16),) if smoke else NETWORKS:
        x, y = real_images(batch)
        arms = {
            "plain": bare_step(build(name), x, y),
            "strong": session_step(build(name), x, y, [strong()]),
            "ratio 0.5": session_step(build(name), x, y, [strong(), always()]),
            "ratio 0.5, refresh 8": session_step(build(name), x, y, [strong(), always(refresh=8)]),
            "ratio 0.25": session_step(build(name), x, y, [strong(), always(ratio=0.25)]),
            "ratio 0.5, mode backward": session_step(build(name), x, y, [strong(), always(mode="backward")]),
        }
        title = f"{name}, batch {batch}, 32x32"
        steps[name] = pairs(title, arms, baseline="strong", seconds=SECONDS, smoke=smoke)
        if not smoke:
            what = f"step of {title}, over strong"
            claims.append(ratio_claim("approximate_tensor_ops", what, steps[name], "ratio 0.5", 1.5))
    for channels, size in WIDTHS:
        each = {
            "strong": layer_step(channels, size, LAYER_BATCH, [strong()]),
            "ratio 0.5": layer_step(channels, size, LAYER_BATCH, [strong(), always()]),
            "ratio 0.25": layer_step(channels, size, LAYER_BATCH, [strong(), always(ratio=0.25)]),
        }
        title = f"3x3 convolution, {channels} channels, {size}x{size}, batch {LAYER_BATCH}"
        layers[str(channels)] = pairs(title, each, baseline="strong", seconds=LAYER_SECONDS, smoke=smoke)
        if not smoke:
            what = f"{title}, forward and backward, over strong"
            claims.append(
                ratio_claim("approximate_tensor_ops", what, layers[str(channels)], "ratio 0.5", 1.5)
            )
    settings = {"networks": NETWORKS, "layer_batch": LAYER_BATCH, "method": repr(always())}
    values = {"claim": CLAIM, "settings": settings, "steps": steps, "layers": layers}
    store("approximate_tensor_ops", values, smoke, claims)
