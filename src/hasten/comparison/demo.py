"""The comparison of ``hasten compare --demo``: real images, two minutes on two cores."""

from __future__ import annotations

from typing import Any

from hasten.comparison.arms import Arm, baselines, controls
from hasten.recipe import PLAIN, STRONG


def demo_arms() -> tuple[list[Arm], dict[str, Any]]:
    """Return the demo's arms and its other settings for ``compare``."""
    both = baselines(PLAIN.with_(epochs=1.0), STRONG.with_(epochs=1.0, lr=0.2))
    return [*both, *controls(both[1], (0.5,))], {
        "model": "resnet8", "data": "fashion-mnist-12k", "seeds": range(2), "target": "plain",
    }  # fmt: skip
