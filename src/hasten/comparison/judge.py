"""What the runs amount to: each arm's curve, the target, times to it, ratios with intervals, and what may be claimed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.comparison import curves, target
from hasten.comparison import rows as rows_
from hasten.comparison.answer import blocked, outcome, percent, verdict, without_claim
from hasten.comparison.arms import Arm
from hasten.comparison.curves import Record, Shares
from hasten.measure.curve import TimeCurve, pooled_spread, sooner, time_to
from hasten.report import schema

LEARNED = 0.05
"""Accuracy above guessing from which a target says something (our choice)."""


@dataclass(frozen=True)
class Judged:
    """rows: the arms as the report has them. aim: the target, None where no arm finished. verdict: the sentence. known: the curves."""

    rows: list[schema.Arm]
    aim: target.Goal | None
    verdict: schema.Verdict
    known: Mapping[str, TimeCurve]


def judged(
    arms: Sequence[Arm], shares: Shares, records: Sequence[Record], *, goal: float | None, aa: schema.Noise | None,
    training_macs: float = 0.0,
    chance: float = 0.0,
) -> Judged:  # fmt: skip
    """Return what the records of the runs amount to; see `summarise` for what is given."""
    blocks = 1 + max((r["block"] for r in records), default=0)
    points = {arm.name: curves.of(arm, records, shares[arm.name]) for arm in arms}
    quiet = curves.quiet(points)
    found = {
        arm.name: curves.curve(points[arm.name], blocks, arm.recipe.epochs, every=not quiet) for arm in arms
    }
    known = {name: curve for name, curve in found.items() if curve is not None}
    aim = _aim(arms, points, known, blocks, goal)
    pooled = pooled_spread(list(known.values()))
    plain = next((arm for arm in arms if arm.kind == "baseline"), None)
    strong = next((arm for arm in arms if arm.kind == "strong"), None)
    tried = [arm.name for arm in arms if arm.kind in ("method", "stack") and arm.name in known]
    rows, corrected = [], {}
    for arm in arms:
        own = [r for _, rs in points[arm.name] for r in rs]
        imitated = rows_.emulated(own)

        def versus(base: Arm | None, arm: Arm = arm, imitated: str = imitated) -> schema.Versus | None:
            if base is None or base is arm:
                return None
            return _versus(base, arm, found, aim.accuracy if aim else None, pooled, imitated)

        base = strong or plain
        if arm.name in tried and base is not None and base.name in known and aim and not imitated:
            corrected[arm.name] = sooner(
                known[base.name], known[arm.name], aim.accuracy, pooled, 1 - 0.05 / max(1, len(tried))
            )
        full = points[arm.name][-1][1] if points[arm.name] else []
        mine = None if arm is strong or strong is None else rows_.accuracies(points[strong.name])
        rows.append(
            schema.Arm(
                name=arm.name, label=arm.title, kind=arm.kind, methods=[str(m) for m in arm.methods],
                points=[rows_.point(share, rs, arm, training_macs) for share, rs in points[arm.name]],
                accuracy=rows_.accuracy(rows_.accuracies(points[arm.name]), mine),
                seconds=rows_.mean([r["seconds_train"] for r in full if r["failure"] is None]),
                time=_time(found[arm.name], own, aim.accuracy if aim else None, pooled, imitated),
                vs_plain=versus(plain), vs_strong=versus(strong),
                sets_target=aim is not None and aim.say.get(arm.name, False),
                work_reduction=None, witness=rows_.witness(full), effects=rows_.effects(full), settings=rows_.settings(arm),
            )
        )  # fmt: skip
    rows_.work(rows, plain)
    seeds = min((int(c.counts.min()) for c in known.values()), default=0)
    why_not = blocked(aa, quiet) if seeds > 1 else ""
    if aim is not None and goal is None and aim.accuracy < chance + LEARNED:
        why_not = (
            f"No claim: at these budgets the arms have hardly learned anything ({percent(aim.accuracy)} is what all reach, "
            f"guessing gives {percent(chance)}); give more epochs or a longer limit."
        )
    if why_not:
        _unclaimed(rows)
    if aim is None:
        said = without_claim("No claim: no arm's runs all finished, so there is no accuracy to compare at.")
    else:
        said = without_claim(why_not) if why_not else verdict(rows, aim.accuracy, corrected, seeds)
    return Judged(rows, aim, said, known)


def _aim(
    arms: Sequence[Arm],
    points: Mapping[str, Any],
    known: Mapping[str, TimeCurve],
    blocks: int,
    goal: float | None,
) -> target.Goal | None:
    if not known:
        return None
    if goal is not None:
        return target.given(goal, known)
    order = sorted(
        (arm for arm in arms if arm.name in known),
        key=lambda arm: ("strong", "baseline", "method", "stack").index(arm.kind),
    )
    reference = order[0]
    judged = {
        arm.name: curves.curve(points[arm.name], blocks, arm.recipe.epochs, "validation") for arm in order
    }
    whole = {name: curve for name, curve in judged.items() if curve is not None}
    return target.highest(known, whole if len(whole) == len(known) else None, reference.name, reference.title)


def _versus(
    base: Arm,
    arm: Arm,
    found: Mapping[str, TimeCurve | None],
    goal: float | None,
    pooled: tuple[float, float],
    imitated: str,
) -> schema.Versus:
    def told(reason: str, word: schema.Outcome) -> schema.Versus:
        return {
            "ratio": None,
            "lo": None,
            "hi": None,
            "reason": reason,
            "n": 0,
            "blocks": 0,
            "verdict": word,
            "note": "",
        }

    one, other = found[base.name], found[arm.name]
    if imitated:
        return told(f"{imitated}: an emulated format, whose time says nothing", "not measured")
    if one is None or other is None or goal is None:
        return told(
            f"runs of {(base if one is None else arm).title} failed, which counts as a miss", "not reached"
        )
    span = sooner(one, other, goal, pooled)
    clean = ~(other.seconds != other.seconds).all(0) & ~(one.seconds != one.seconds).all(0)
    n = int(min(one.counts.min(), other.counts.min()))
    word, reason, note = outcome(span), None, ""
    if n < 2:
        word = "one seed"
    if span.value is None:
        ends = [_missing(curve, which.title, goal) for curve, which in ((one, base), (other, arm))]
        reason = "; ".join(text for text in ends if text) or "no block left both arms a clean time"
        if word not in ("sooner", "later"):
            word = "not reached" if goal > other.heights[-1] else "one seed" if n < 2 else "too wide"
        else:
            note = reason
    return {
        "ratio": span.value, "lo": span.low or None, "hi": span.high if math.isfinite(span.high) else None,
        "reason": reason, "n": n, "blocks": int(clean.sum()), "verdict": word, "note": note,
    }  # fmt: skip


def _missing(curve: TimeCurve, title: str, goal: float) -> str:
    if goal > curve.heights[-1]:
        return f"{title} does not reach it"
    if goal < curve.heights[0]:
        return f"{title} is above it at its smallest budget"
    return ""


def _time(
    curve: TimeCurve | None,
    own: Sequence[Record],
    goal: float | None,
    pooled: tuple[float, float],
    imitated: str,
) -> schema.TimeTo:
    empty: schema.TimeTo = {"seconds": None, "lo": None, "hi": None, "state": "not measured", "note": ""}
    if failed := curves.failures(own):
        return {**empty, "state": "not reached", "note": f"{len(failed)} of {len(own)} runs failed"}
    if curve is None or goal is None:
        return empty
    if imitated:
        return {**empty, "note": f"{imitated}: an emulated format"}
    span = time_to(curve, goal, pooled)
    if span.value is None or not math.isfinite(span.value):
        late = goal > curve.heights[-1]
        place = float(curve.place[-1 if late else 0])
        seconds = float(curve.mean_seconds(place)[0])
        if not math.isfinite(seconds):
            return {**empty, "note": "no run had the machine to itself"}
        return {
            **empty,
            "state": "not reached" if late else "below the smallest budget",
            "note": f"{percent(float(curve.heights[-1 if late else 0]))} in {seconds:.3g} s",
        }
    return {"seconds": span.value, "lo": span.low or None, "hi": span.high if math.isfinite(span.high) else None,
            "state": "reached", "note": ""}  # fmt: skip


def _unclaimed(rows: Sequence[schema.Arm]) -> None:
    """Take back what the intervals would say, where times cannot be trusted."""
    for row in rows:
        for versus in (row["vs_plain"], row["vs_strong"]):
            if versus is not None and versus["verdict"] in ("sooner", "later"):
                versus["verdict"], versus["note"] = "not shown", "times are not trusted here"
