"""The comparison of ``hasten compare --demo``: real images, two minutes on two cores."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from hasten.comparison.arms import Arm, baselines
from hasten.recipe import PLAIN, RECIPES

Form = Literal["quick", "usual", "thorough"]

SEEDS: dict[Form, int] = {"quick": 1, "usual": 3, "thorough": 5}
LIMITS: dict[Form, float] = {"quick": 45.0, "usual": 110.0, "thorough": 300.0}
"""Seconds that each form of the demo may take; slow machines train for less."""


def demo_arms(form: Form = "usual") -> tuple[list[Arm], dict[str, Any]]:
    """Return the demo's arms and its other settings for ``compare``.

    The strong baseline is the record net's own recipe in bf16; plain PyTorch trains the same net with momentum SGD.
    """
    strong = RECIPES["record-small"].with_(epochs=2.0, batch_size=256)
    settings = {"model": "record-small", "data": "fashion-mnist-12k", "train": 4000, "test": 1000, "budgets": (0.35, 0.6),
                "seeds": SEEDS[form], "limit": LIMITS[form]}  # fmt: skip
    plain, base = baselines(PLAIN.with_(epochs=2.0, lr=0.1), strong)
    return [plain, dataclasses.replace(base, label="strong (record recipe, bf16, NHWC)")], settings
