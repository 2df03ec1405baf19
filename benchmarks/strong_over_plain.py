"""The strong baseline against the plain one: bf16 and channels_last, and compile beside it, in one interleaved run."""

from __future__ import annotations

import torch

from benchmarks.common import build, pairs, ratio_claim, real_images, session_step, store
from hasten import method

CLAIM = "strong (bf16, channels_last) against plain fp32, ResNet-18 at 32x32: >= 2.0x step"
MINUTES = 6


def main(smoke: bool = False) -> None:
    """Time ResNet-18 and ResNet-20, with torch.compile as a third arm; compile time is stored beside the ratio."""
    results, claims = {}, []
    for name, batch in (("resnet18", 64), ("resnet20", 128)):
        x, y = real_images(16 if smoke else batch)
        arms = {
            "plain": session_step(build(name), x, y, []),
            "strong": session_step(build(name), x, y, [method("mixed_precision")]),
        }
        if not smoke:
            torch._dynamo.reset()
            arms["strong+compile"] = session_step(
                build(name), x, y, [method("mixed_precision", compile=True)]
            )
        results[name] = pairs(f"{name}, batch {batch}", arms, baseline="plain", seconds=90, smoke=smoke)
        ratios = results[name]["ratios"]
        if "strong" in ratios:
            what = f"step over plain fp32, {name}, batch {batch}"
            target = 2.0 if name == "resnet18" else None
            claims.append(ratio_claim("mixed_precision", what, results[name], "strong", target))
        if "strong+compile" in ratios:
            what = f"the same with compile=True, {name}"
            claims.append(ratio_claim("mixed_precision", what, results[name], "strong+compile"))
    store("strong_over_plain", results, smoke, claims)
