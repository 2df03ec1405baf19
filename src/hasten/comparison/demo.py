"""The comparison of ``hasten compare --demo``: real images, two minutes on two cores."""

from __future__ import annotations

from typing import Any

from hasten.comparison.arms import Arm, baselines
from hasten.recipe import PLAIN, RECIPES
from hasten.registry import method


def demo_arms() -> tuple[list[Arm], dict[str, Any]]:
    """Return the demo's arms and its other settings for ``compare``.

    The strong baseline is the record net's own recipe in bf16. Both methods wait for the second epoch, since nothing
    is easy to the network before it.
    """
    strong = RECIPES["record-small"].with_(epochs=2.0, batch_size=256, eval_every=0.5)
    both = baselines(PLAIN.with_(epochs=1.0, lr=0.1, eval_every=0.25), strong)
    base = both[1]
    chosen = method("selective_backprop", beta=2.0, prime_epochs=1)
    pruned = method("error_map_pruning", keep=0.5, start_at=0.5)
    return [
        *both,
        Arm("selective_backprop", base.recipe, (*base.methods, chosen), "method", "+ selective backprop"),
        Arm(
            "selective_backprop+error_map_pruning",
            base.recipe,
            (*base.methods, chosen, pruned),
            "stack",
            "+ selective backprop, EMP",
        ),
    ], {"model": "record-small", "data": "fashion-mnist-12k", "seeds": range(3), "target": "plain"}
