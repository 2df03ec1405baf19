"""The comparison of ``hasten compare --demo``: real images, two minutes on two cores."""

from __future__ import annotations

from typing import Any

from hasten.comparison.arms import Arm, usual
from hasten.recipe import PLAIN, RECIPES
from hasten.registry import method


def demo_arms() -> tuple[list[Arm], dict[str, Any]]:
    """Return the demo's arms and its other settings for ``compare``.

    The strong baseline is the record net's own recipe in bf16; plain PyTorch trains the same net with momentum SGD.
    """
    strong = RECIPES["record-small"].with_(epochs=2.0, batch_size=256)
    arms = usual(
        [method("selective_backprop", beta=1.0, prime_epochs=0)], PLAIN.with_(epochs=2.0, lr=0.1), strong
    )
    return arms, {"model": "record-small", "data": "fashion-mnist-12k"}
