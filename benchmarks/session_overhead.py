"""A session without methods against a bare PyTorch loop: bit-identical, and how much slower."""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks.common import bare_step, build, claim, pairs, real_images, session_step, store

CLAIM = "a session without methods costs <= 1.02x a bare loop and computes the same bits"
MINUTES = 3


def mlp() -> nn.Module:
    """Return a 784-512-512-10 perceptron."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def main(smoke: bool = False) -> None:
    """Time both loops on ResNet-20 and on a perceptron, batch 128, after checking that they agree in every bit."""
    results, claims = {}, []
    x, y = real_images(128)
    grey = torch.nn.functional.interpolate(x[:, :1], size=(28, 28))
    for name, net, images in (("resnet20", build("resnet20"), x), ("mlp", mlp(), grey)):
        twin = copy.deepcopy(net)
        bare, ours = bare_step(net, images, y), session_step(twin, images, y, [])
        for _ in range(5):
            bare()
            ours()
        same = all(
            torch.equal(a, b)
            for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True)
        )
        if not same:
            raise SystemExit(f"{name}: weights differ from a bare loop after 5 steps")
        arms = {"bare": bare, "session": ours}
        results[name] = pairs(f"{name}, batch 128", arms, baseline="bare", seconds=60, smoke=smoke)
        results[name]["bit_identical"] = same
        ratio = results[name]["ratios"].get("session")
        if ratio and ratio["low"] and ratio["high"]:
            cost = f"{1 / ratio['ratio']:.3f}x [{1 / ratio['high']:.3f}, {1 / ratio['low']:.3f}] of a bare step, the same bits"
            claims.append(
                claim(
                    [],
                    f"session without methods, {name}",
                    cost,
                    target="<= 1.02x",
                    met=1 / ratio["ratio"] <= 1.02,
                )
            )
    store("session_overhead", results, smoke, claims)
