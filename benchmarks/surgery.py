"""Surgery: how long one takes, and whether a step becomes faster as its MACs become fewer.

Every layer whose outputs can go loses the same share of its channels, rounded so that multiples of 8 stay; the step of
the smaller network is timed beside that of the whole one, both in the strong baseline's precision and layout.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import build, claim, pairs, real_images, session_step, store, strong
from hasten.measure.macs import macs
from hasten.surgery import RemoveChannels, Surgeon, follow

CLAIM = "one surgery on ResNet-50 <= 50 ms; time falls as MACs do, within 20%, for widths >= 64"
MINUTES = 5
NETWORKS = (("vgg16", 128), ("resnet18", 64), ("resnet50", 32), ("wrn-16-4", 128), ("mobilenet-v1", 128))
KEEP = (0.75, 0.5)
SECONDS, REPEATS = 40.0, 21


def narrowed(model: nn.Module, keep: float) -> list[RemoveChannels]:
    """Return edits that leave ``keep`` of every group's channels, a multiple of 8, the last ones gone."""
    channels = follow(model, torch.zeros(2, 3, 32, 32))
    edits, done = [], set()
    for name, role in channels.slots:
        if role != "out" or channels.why_not(name) is not None:
            continue
        classes = channels.outputs(name)
        n = len(classes)
        stays = max(8, int(np.ceil(keep * n / 8)) * 8)
        if stays < n and not done & set(classes.tolist()):
            edits.append(RemoveChannels(name, tuple(range(stays, n))))
        done |= set(classes.tolist())
    return edits


def surgery_times(smoke: bool) -> list[float]:
    """Return the seconds of single surgeries on a ResNet-50 in training, of one channel in one layer each."""
    model = build("resnet8" if smoke else "resnet50")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = real_images(20)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    surgeon = Surgeon(model, (optimizer,), x)
    layers = [name for name, role in surgeon.channels.slots if role == "out" and name.endswith("conv1")]
    layers = [name for name in layers if surgeon.channels.why_not(name) is None and name != "conv1"]
    seconds = []
    for i in range(3 if smoke else REPEATS):
        begun = time.perf_counter()
        surgeon.apply([RemoveChannels(layers[i % len(layers)], tuple(range(8)) if not smoke else (0,))])
        seconds.append(time.perf_counter() - begun)
    return seconds


def step_claims(title: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a claim for each narrowed form; none is met where the whole network did not equal itself."""
    claims = []
    for arm, share in result["macs"].items():
        ratio = result["ratios"][arm]
        near = ratio["ratio"] * share >= 1 / 1.2  # 1 where time falls exactly as MACs do
        text = ratio["text"] if result["aa_ok"] else f"{ratio['text']}, not claimed: the A/A test failed"
        claims.append(claim([], f"step of {title}, {arm} of the channels: {1 / share:.2f}x fewer MACs", text,
                            target="within 20% of the MACs' ratio", met=near and result["aa_ok"]))  # fmt: skip
    return claims


def main(smoke: bool = False) -> None:
    """Time surgeries, then steps of whole and narrowed networks."""
    seconds = surgery_times(smoke)
    median = 1000 * statistics.median(seconds)
    text = (
        f"{median:.0f} ms (median of {len(seconds)}, {1000 * min(seconds):.0f} to {1000 * max(seconds):.0f})"
    )
    claims = [
        claim(
            [], "one surgery on ResNet-50, 8 channels of a layer", text, target="<= 50 ms", met=median <= 50
        )
    ]
    found: dict[str, Any] = {}
    for name, batch in (("resnet8", 16),) if smoke else NETWORKS:
        x, y = real_images(batch)
        whole = build(name)
        full = macs(whole, x[:1]).training
        arms = {"whole": session_step(copy.deepcopy(whole), x, y, [strong()])}
        shares = {}
        for keep in KEEP:
            model = copy.deepcopy(whole)
            Surgeon(model, (), x).apply(narrowed(model, keep))
            shares[f"keep {keep}"] = macs(model, x[:1]).training / full
            arms[f"keep {keep}"] = session_step(model, x, y, [strong()])
        title = f"{name}, batch {batch}, 32x32"
        result = pairs(title, arms, baseline="whole", seconds=SECONDS, smoke=smoke)
        found[name] = {**result, "macs": shares}
        claims += step_claims(title, found[name])
    store("surgery", {"claim": CLAIM, "surgery_seconds": seconds, "steps": found}, smoke, claims)
