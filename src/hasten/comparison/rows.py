"""One arm's row of the report, from the records of its runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean, stdev

from hasten.comparison.arms import Arm
from hasten.comparison.curves import Record
from hasten.measure import stats
from hasten.report import schema

MARGIN = 0.3  # points of accuracy that "no loss" may hide; set beforehand for every comparison


def accuracies(points: Sequence[tuple[float, list[Record]]]) -> list[float]:
    """Return the accuracies of the finished runs at the full budget."""
    full = points[-1][1] if points else []
    return [r["accuracy"] for r in full if r["failure"] is None and r.get("accuracy") is not None]


def point(share: float, records: list[Record], arm: Arm, per_sample: float) -> schema.Point:
    """Return one point of an arm's curve."""
    good = [r for r in records if r["failure"] is None]
    accuracies = [r["accuracy"] for r in good]
    return {
        "share": share, "epochs": share * arm.recipe.epochs, "seconds": mean([r["seconds_train"] for r in good]),
        "accuracy": mean(accuracies), "sd": stdev(accuracies) if len(accuracies) > 1 else None, "n": len(good),
        "runs": [run(r, per_sample) for r in records],
    }  # fmt: skip


def run(r: Record, per_sample: float) -> schema.Run:
    """Return one run as the report has it."""
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


def accuracy(own: list[float], strong: list[float] | None) -> schema.Accuracy:
    """Return the accuracy at the full budget and its difference to the strong baseline's."""
    versus: schema.Difference | None = None
    if strong and own:
        diff = fmean(own) - fmean(strong)
        versus = {"diff": diff, "lo": None, "hi": None, "noninferior": None}
        if len(own) > 1 and len(strong) > 1:
            half = stats.welch_half_width(own, strong)
            no_loss = stats.noninferior([100 * a for a in strong], [100 * a for a in own], MARGIN).no_loss
            versus = {"diff": diff, "lo": diff - half, "hi": diff + half, "noninferior": no_loss}
    return {
        "mean": mean(own),
        "sd": stdev(own) if len(own) > 1 else None,
        "n": len(own),
        "vs_strong": versus,
    }


def emulated(own: Sequence[Record]) -> str:
    """Return the names of the methods whose number format was only imitated in these runs."""
    return ", ".join(
        dict.fromkeys(n for r in own for n, e in r.get("effects", {}).items() if e.get("emulated"))
    )


def witness(own: Sequence[Record]) -> dict[str, float]:
    """Return what the methods really did, by method and counter."""
    last = next((r for r in own if r.get("witness")), None)
    if last is None:
        return {}
    return {
        f"{name}: {what}": float(n) for name, counts in last["witness"].items() for what, n in counts.items()
    }


def effects(own: Sequence[Record]) -> list[schema.MethodEffect]:
    """Return where each method acted."""
    last = next((r for r in own if r.get("effects")), None)
    return [
        {
            "method": name, "saves": e["saves"],
            "touched": [{"layer": layer, "note": note} for layer, note in e["touched"].items()],
            "skipped": [{"layer": layer, "reason": reason} for layer, reason in e["skipped"].items()],
        }
        for name, e in (last["effects"] if last else {}).items()
    ]  # fmt: skip


def settings(arm: Arm) -> dict[str, schema.Scalar]:
    """Return the arm's recipe."""
    return {key: value if isinstance(value, str | int | float | bool | None) else " ".join(map(str, value))
            for key, value in dataclasses.asdict(arm.recipe).items()}  # fmt: skip


def work(rows: list[schema.Arm], plain: Arm | None) -> None:
    """Fill in the work of each row against the plain arm's."""

    def macs(row: schema.Arm) -> float | None:
        return mean([run["macs"] for point in row["points"][-1:] for run in point["runs"] if run["macs"]])

    base = next((macs(row) for row in rows if plain and row["name"] == plain.name), None)
    for row in rows:
        own = macs(row)
        row["work_reduction"] = None if base is None or own is None else 1 - own / base


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return fmean(values) if values else None
