"""From the records of runs to the data of the report: curves, the target, times to it, ratios, the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean, stdev
from typing import Any

from hasten.comparison import curves, target
from hasten.comparison.answer import outcome, percent, verdict, without_claim
from hasten.comparison.arms import Arm
from hasten.comparison.curves import Record, Shares
from hasten.measure import stats
from hasten.measure.curve import TimeCurve, pooled_spread, sooner, time_to
from hasten.measure.environment import environment
from hasten.report import schema
from hasten.report.schema import ReportData

MARGIN = 0.3  # points of accuracy that "no loss" may hide; set beforehand for every comparison


def summarise(
    settings: schema.Settings,
    arms: Sequence[Arm],
    shares: Shares,
    records: Sequence[Record],
    *,
    goal: float | None,
    aa: schema.Noise | None,
    title: str = "",
    training_macs: float = 0.0,
    plan: schema.Plan | None = None,
    notes: Sequence[str] = (),
    command: str = "",
    config_toml: str = "",
) -> ReportData:
    """Return the report data of a comparison.

    shares: each arm's budgets as shares of its full one. records: one for each run, with ``arm``, ``share``, ``block``.
    goal: a target set beforehand, or None for the highest accuracy that all arms are shown to reach. training_macs: work
    of forward and backward for one sample.
    """
    blocks = 1 + max((r["block"] for r in records), default=0)
    points = {arm.name: curves.of(arm, records, shares[arm.name]) for arm in arms}
    found = {arm.name: curves.curve(points[arm.name], blocks, arm.recipe.epochs) for arm in arms}
    known = {name: curve for name, curve in found.items() if curve is not None}
    aim = _aim(arms, points, known, blocks, goal)
    pooled = pooled_spread(list(known.values()))
    plain = next((arm for arm in arms if arm.kind == "baseline"), None)
    strong = next((arm for arm in arms if arm.kind == "strong"), None)
    tried = [arm.name for arm in arms if arm.kind in ("method", "stack") and arm.name in known]
    rows, corrected = [], {}
    for arm in arms:
        own = [r for _, rs in points[arm.name] for r in rs]
        imitated = _emulated(own)

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
        mine = None if arm is strong or strong is None else _accuracies(points[strong.name])
        rows.append(
            schema.Arm(
                name=arm.name, label=arm.title, kind=arm.kind, methods=[str(m) for m in arm.methods],
                points=[_point(share, rs, arm, training_macs) for share, rs in points[arm.name]],
                accuracy=_accuracy(_accuracies(points[arm.name]), mine),
                seconds=_mean([r["seconds_train"] for r in full if r["failure"] is None]),
                time=_time(found[arm.name], own, aim.accuracy if aim else None, pooled, imitated),
                vs_plain=versus(plain), vs_strong=versus(strong),
                sets_target=aim is not None and aim.say.get(arm.name, False),
                work_reduction=None, witness=_witness(full), effects=_effects(full), settings=_settings(arm),
            )
        )  # fmt: skip
    _work(rows, plain)
    seeds = min((int(c.counts.min()) for c in known.values()), default=0)
    if aim is None:
        said = without_claim("No claim: no arm's runs all finished, so there is no accuracy to compare at.")
    else:
        said = verdict(rows, aim.accuracy, aa, corrected, seeds)
    return schema.check(
        {
            "schema_version": schema.SCHEMA_VERSION,
            "title": title or f"{settings['model']} on {settings['dataset']}",
            "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "verdict": said,
            "target": {
                "accuracy": aim.accuracy if aim else (goal or 0.0),
                "chosen": aim.chosen if aim else "no arm finished",
                "rule": target.RULE,
            },
            "settings": settings,
            "environment": {k: v if isinstance(v, str | int | float | bool | None) else str(v)
                            for k, v in environment().items()},
            "arms": rows, "aa": aa, "plan": plan, "network": None, "dropped": dropped(records),
            "notes": [*notes, *_notes(rows, records, aim, known)],
            "repeat": {"command": command or "hasten compare", "config_toml": config_toml},
            "failures": [{"arm": r["arm"], "seed": r["seed"], "text": r["failure"]} for r in records if r["failure"]],
        }
    )  # fmt: skip


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


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _accuracies(points: Sequence[tuple[float, list[Record]]]) -> list[float]:
    full = points[-1][1] if points else []
    return [r["accuracy"] for r in full if r["failure"] is None and r.get("accuracy") is not None]


def _point(share: float, records: list[Record], arm: Arm, per_sample: float) -> schema.Point:
    good = [r for r in records if r["failure"] is None]
    accuracies = [r["accuracy"] for r in good]
    return {
        "share": share, "epochs": share * arm.recipe.epochs, "seconds": _mean([r["seconds_train"] for r in good]),
        "accuracy": _mean(accuracies), "sd": stdev(accuracies) if len(accuracies) > 1 else None, "n": len(good),
        "runs": [_run(r, per_sample) for r in records],
    }  # fmt: skip


def _run(r: Record, per_sample: float) -> schema.Run:
    spans = r.get("spans", {})
    counters = r.get("counters", {})
    extra = sum(w.get("extra_macs", 0.0) for w in r.get("witness", {}).values())
    work = math.prod(e["work"] for e in r.get("effects", {}).values() if e.get("work") is not None)
    backward = counters.get("backward", 0)
    return {
        "seed": r["seed"], "block": r["block"],
        "seconds": {"train": r.get("seconds_train") or 0.0, "method": spans.get("method", 0.0), "final": 0.0,
                    "eval": spans.get("eval", 0.0), "compile": spans.get("compile", 0.0),
                    "setup": spans.get("setup", 0.0), "total": r.get("seconds_total") or sum(spans.values())},
        "spans": spans, "accuracy": r.get("accuracy"), "disturbed": list(r["disturbed"]),
        "resumed": bool(r.get("resumed")),
        "samples_forward": counters.get("forward", 0), "samples_backward": backward,
        "macs": per_sample * backward * work + extra if backward else None,
        "peak_rss_mb": r.get("peak_rss_mb"), "cpu_seconds": r.get("cpu_seconds"), "failure": r["failure"],
    }  # fmt: skip


def _accuracy(own: list[float], strong: list[float] | None) -> schema.Accuracy:
    versus: schema.Difference | None = None
    if strong and own:
        diff = fmean(own) - fmean(strong)
        versus = {"diff": diff, "lo": None, "hi": None, "noninferior": None}
        if len(own) > 1 and len(strong) > 1:
            half = stats.welch_half_width(own, strong)
            no_loss = stats.noninferior([100 * a for a in strong], [100 * a for a in own], MARGIN).no_loss
            versus = {"diff": diff, "lo": diff - half, "hi": diff + half, "noninferior": no_loss}
    return {
        "mean": _mean(own),
        "sd": stdev(own) if len(own) > 1 else None,
        "n": len(own),
        "vs_strong": versus,
    }


def _emulated(own: Sequence[Record]) -> str:
    """Return the names of the methods whose number format was only imitated in these runs."""
    return ", ".join(
        dict.fromkeys(n for r in own for n, e in r.get("effects", {}).items() if e.get("emulated"))
    )


def _witness(own: Sequence[Record]) -> dict[str, float]:
    last = next((r for r in own if r.get("witness")), None)
    if last is None:
        return {}
    return {
        f"{name}: {what}": float(n) for name, counts in last["witness"].items() for what, n in counts.items()
    }


def _effects(own: Sequence[Record]) -> list[schema.MethodEffect]:
    last = next((r for r in own if r.get("effects")), None)
    return [
        {
            "method": name, "saves": e["saves"],
            "touched": [{"layer": layer, "note": note} for layer, note in e["touched"].items()],
            "skipped": [{"layer": layer, "reason": reason} for layer, reason in e["skipped"].items()],
        }
        for name, e in (last["effects"] if last else {}).items()
    ]  # fmt: skip


def _settings(arm: Arm) -> dict[str, schema.Scalar]:
    from dataclasses import asdict

    return {key: value if isinstance(value, str | int | float | bool | None) else " ".join(map(str, value))
            for key, value in asdict(arm.recipe).items()}  # fmt: skip


def _work(rows: list[schema.Arm], plain: Arm | None) -> None:
    def mean(row: schema.Arm) -> float | None:
        values = [run["macs"] for point in row["points"][-1:] for run in point["runs"] if run["macs"]]
        return fmean(values) if values else None

    base = next((mean(row) for row in rows if plain and row["name"] == plain.name), None)
    for row in rows:
        own = mean(row)
        row["work_reduction"] = None if base is None or own is None else 1 - own / base


def dropped(records: Sequence[Record]) -> list[schema.Dropped]:
    """Return the blocks in which runs were disturbed by other processes, with the runs and why."""
    reasons: dict[int, list[str]] = {}
    for r in records:
        if r["disturbed"]:
            reasons.setdefault(r["block"], []).append(
                f"{r['arm']} at {r['share']:.0%}: {', '.join(r['disturbed'])}"
            )
    return [{"block": block, "reason": "; ".join(why)} for block, why in sorted(reasons.items())]


def _notes(
    rows: Sequence[schema.Arm],
    records: Sequence[Record],
    aim: target.Goal | None,
    known: Mapping[str, TimeCurve],
) -> list[str]:
    n = max(row["accuracy"]["n"] for row in rows)
    disturbed = sum(bool(r["disturbed"]) for r in records)
    notes = [
        "The clock counts data, augmentation, forward, backward, optimizer, compilation and everything a method adds, "
        "attaching it included, from the first step and without warm-up; evaluation, saving and imports are outside it.",
        f"{n} seeds an arm and budget; the runs of a seed ran one after the other in random order.",
        "Every run ran its own schedule to the end; no early stop, no best epoch.",
    ]
    if n < 5:
        notes.append(f"With {n} seeds an accuracy difference below about half a point says nothing.")
    if disturbed:
        notes.append(
            f"Beside {disturbed} of {len(records)} runs other processes used the machine; their accuracies count, their "
            f"times do not."
        )
    if aim is not None and (
        low := [row["label"] for row in rows if row["name"] in known and not row["sets_target"]]
    ):
        notes.append(
            f"{', '.join(low)}: at the full budget below what the strong baseline has at its smallest, so without a say "
            f"in the target."
        )
    idle = sorted({r["arm"] for r in records if r.get("idle") and r["share"] < 1})
    if idle:
        notes.append(f"{', '.join(idle)}: budgets too short for the method to act are left out of the curve.")
    if any(r.get("resumed") for r in records):
        notes.append("Some runs were interrupted and went on from their own checkpoint.")
    sizes = {row["settings"].get("batch_size") for row in rows}
    if len(sizes) > 1:
        notes.append(f"Batch sizes differ between arms: {', '.join(map(str, sorted(sizes, key=str)))}.")
    return notes
