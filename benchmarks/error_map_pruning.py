"""Error-map pruning at keep 0.5: the time of a training step over the strong baseline.

The forward pass is exact, so a step can be 1.5x as fast at most if the convolutions were all of it.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import bare_step, build, pairs, ratio_claim, real_images, session_step, store, strong
from hasten.methods.products.error_map_pruning import ErrorMapPruning

CLAIM = (
    "error-map pruning: steps of VGG-16 and ResNet-18 at keep 0.5 >= 1.25x as fast as the strong baseline's"
)
MINUTES = 4
NETWORKS = (("vgg16", 128), ("resnet18", 128))
SECONDS = 75.0


def main(smoke: bool = False) -> None:
    """Time the networks and store the ratios."""
    found: dict[str, Any] = {}
    claims = []
    for name, batch in (("wrn-10-2", 16),) if smoke else NETWORKS:
        x, y = real_images(batch)
        arms = {
            "plain": bare_step(build(name), x, y),
            "strong": session_step(build(name), x, y, [strong()]),
            "keep 0.5": session_step(build(name), x, y, [strong(), ErrorMapPruning()]),
            "keep 0.5, all images, single channels": session_step(
                build(name), x, y, [strong(), ErrorMapPruning(score_images=None, block=1)]
            ),
        }
        title = f"{name}, batch {batch}, 32x32"
        found[name] = pairs(title, arms, baseline="strong", seconds=SECONDS, smoke=smoke)
        if not smoke:
            what = f"step of {title}, over strong"
            claims.append(ratio_claim("error_map_pruning", what, found[name], "keep 0.5", 1.25))
    settings = {"networks": NETWORKS, "method": repr(ErrorMapPruning())}
    store("error_map_pruning", {"claim": CLAIM, "settings": settings, "steps": found}, smoke, claims)
