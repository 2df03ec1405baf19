"""From the records of runs to the data of the report: curves, the target, times to it, ratios, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from hasten.comparison import target
from hasten.comparison.arms import Arm
from hasten.comparison.curves import Record, Shares
from hasten.comparison.judge import judged
from hasten.comparison.rows import MARGIN
from hasten.measure.curve import TimeCurve
from hasten.measure.environment import environment
from hasten.report import schema
from hasten.report.schema import ReportData


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
    chance: float = 0.0,
    plan: schema.Plan | None = None,
    notes: Sequence[str] = (),
    command: str = "",
    config_toml: str = "",
) -> ReportData:
    """Return the report data of a comparison.

    shares: each arm's budgets as shares of its full one. records: one for each run, with ``arm``, ``share``, ``block``.
    goal: a target set beforehand, or None for the highest accuracy that all arms are shown to reach. training_macs: work
    of forward and backward for one sample. chance: the accuracy of guessing.
    """
    found = judged(arms, shares, records, goal=goal, aa=aa, training_macs=training_macs, chance=chance)
    aim, rows = found.aim, found.rows
    return schema.check(
        {
            "schema_version": schema.SCHEMA_VERSION,
            "title": title or f"{settings['model']} on {settings['dataset']}",
            "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "verdict": found.verdict,
            "target": {
                "accuracy": aim.accuracy if aim else (goal or 0.0),
                "chosen": aim.chosen if aim else "no arm finished",
                "rule": target.RULE,
                "margin": MARGIN / 100,
            },
            "settings": settings,
            "environment": {k: v if isinstance(v, str | int | float | bool | None) else str(v)
                            for k, v in environment().items()},
            "arms": rows, "aa": aa, "plan": plan, "network": None, "dropped": dropped(records),
            "notes": [*notes, *_notes(rows, records, aim, found.known)],
            "repeat": {"command": command or "hasten compare", "config_toml": config_toml},
            "failures": [{"arm": r["arm"], "seed": r["seed"], "text": r["failure"]} for r in records if r["failure"]],
        }
    )  # fmt: skip


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
    notes = [
        "The clock counts data, augmentation, forward, backward, optimizer, compilation and everything a method adds, "
        "attaching it included, from the first step and without warm-up; evaluation, saving and imports are outside it.",
        f"{n} seeds an arm and budget; the runs of a seed ran one after the other in random order.",
        "Every run ran its own schedule to the end; no early stop, no best epoch.",
    ]
    if n < 5:
        notes.append(f"With {n} seeds an accuracy difference below about half a point says nothing.")
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
    sizes = {row["settings"].get("batch_size") for row in rows}
    if len(sizes) > 1:
        notes.append(f"Batch sizes differ between arms: {', '.join(map(str, sorted(sizes, key=str)))}.")
    return notes
