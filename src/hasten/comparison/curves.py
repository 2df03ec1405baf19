"""From the records of runs to each arm's time-accuracy curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hasten.comparison.arms import Arm
from hasten.measure.curve import TimeCurve

Record = dict[str, Any]
Shares = Mapping[str, Sequence[float]]


def of(arm: Arm, records: Sequence[Record], shares: Sequence[float]) -> list[tuple[float, list[Record]]]:
    """Return (share, its records by block) of one arm, from the smallest share to the largest.

    A share below the full one at which a method never acted shows nothing of the arm and is left out.
    """
    found = []
    for share in sorted(shares):
        own = sorted(
            (r for r in records if r["arm"] == arm.name and r["share"] == share),
            key=lambda r: int(r["block"]),
        )
        if own and not (share < 1 and any(r.get("idle") for r in own)):
            found.append((share, own))
    return found


def failures(records: Sequence[Record]) -> list[Record]:
    """Return the records of runs that did not end well; a failed run is a miss."""
    return [r for r in records if r["failure"] is not None]


def quiet(points: Mapping[str, Sequence[tuple[float, list[Record]]]]) -> bool:
    """Return whether every arm has times of two blocks, or of the only one, beside which nothing else used the machine."""
    for own in points.values():
        good = [r for _, records in own for r in records if r["failure"] is None]
        blocks = {r["block"] for r in good}
        if len({r["block"] for r in good if not r["disturbed"]}) < min(2, len(blocks)):
            return False
    return True


def curve(
    points: Sequence[tuple[float, list[Record]]],
    blocks: int,
    epochs: float,
    key: str = "accuracy",
    *,
    every: bool = False,
) -> TimeCurve | None:
    """Return the curve through an arm's points; None where a run failed, or there are none.

    A run beside which something else used the machine keeps its accuracy, but its time is left out, unless ``every``. key:
    "accuracy", or "validation" for the accuracy on the validation images.
    """
    records = [r for _, own in points for r in own]
    if not records or failures(records) or any(r.get(key) is None for r in records):
        return None
    seconds = np.full((len(points), blocks), np.nan)
    accuracies = np.full((len(points), blocks), np.nan)
    for row, (_, own) in enumerate(points):
        for r in own:
            accuracies[row, r["block"]] = r[key]
            if every or not r["disturbed"]:
                seconds[row, r["block"]] = r["seconds_train"]
    return TimeCurve(np.array([share * epochs for share, _ in points]), seconds, accuracies)
