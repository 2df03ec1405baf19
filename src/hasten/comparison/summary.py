"""From the records of runs to the data of the report: ratios with intervals, who reached the target, the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import fmean, median, stdev
from typing import Any

import torch

from hasten import models
from hasten.comparison.arms import Arm
from hasten.comparison.worker import Workload
from hasten.errors import HastenError
from hasten.measure import stats
from hasten.measure.curve import CurvePoint, speedup_against_curve
from hasten.measure.environment import environment
from hasten.measure.macs import macs
from hasten.report import schema
from hasten.report.schema import ReportData

MARGIN = 0.3  # points of accuracy that "no loss" may hide; set beforehand for every comparison
Record = dict[str, Any]


def summarise(
    workload: Workload,
    arms: Sequence[Arm],
    records: Sequence[Record],
    *,
    target: float | str,
    title: str = "",
    command: str = "",
    config_toml: str = "",
    aa: schema.Noise | None = None,
    notes: Sequence[str] = (),
) -> ReportData:
    """Return the report data of a comparison. target: an accuracy, or the kind of arm whose median accuracy it is.

    Blocks in which a run was disturbed by other processes are left out of time ratios and counted; accuracies keep
    every run. Raises HastenError if the baseline that sets the target never finished.
    """
    data = workload.load()
    source = models.resolve(workload.model, num_classes=len(data.classes), in_channels=data.train.shape[2],
                            image_size=data.train.shape[0], seed=0)  # fmt: skip
    net = source.make()
    count = macs(net, torch.zeros(1, data.train.shape[2], *data.train.shape[:2]))
    by_arm = {arm.name: [r for r in records if r["arm"] == arm.name] for arm in arms}
    plain = next((arm for arm in arms if arm.kind == "baseline"), None)
    strong = next((arm for arm in arms if arm.kind == "strong"), None)
    goal, rule = _target(target, plain, strong, by_arm)
    dropped = _dropped(records)
    kept = {block for block in {r["block"] for r in records} if block not in {d["block"] for d in dropped}}
    if not kept:  # a busy machine throughout: ratios are shown, and the report says that no block was quiet
        kept = {r["block"] for r in records}
    per_sample = count.training
    rows: list[schema.Arm] = []
    for arm in arms:
        own = by_arm[arm.name]
        runs = [_run(r, arm, per_sample) for r in own]
        accuracies = _accuracies(own)
        rows.append(
            {
                "name": arm.name, "label": arm.label or arm.name, "kind": arm.kind,
                "methods": [str(m) for m in arm.methods], "runs": runs,
                "accuracy": _accuracy(accuracies, None if arm is strong or strong is None else _accuracies(by_arm[strong.name])),
                "reached": _reached(accuracies, goal, len(own)),
                "vs_plain": None if plain in (None, arm) else _versus(by_arm[plain.name], own, kept, goal),
                "vs_strong": None if strong in (None, arm) else _versus(by_arm[strong.name], own, kept, goal),
                "vs_curve": _against_curve(arm, arms, by_arm, kept),
                "step_ratio": None, "work_reduction": None, "witness": _witness(own),
                "effects": _effects(own), "settings": _settings(arm),
            }
        )  # fmt: skip
    _work(rows, plain)
    shared = (strong or plain or arms[0]).recipe
    return schema.check(
        {
            "schema_version": schema.SCHEMA_VERSION,
            "title": title or f"{source.label} on {data.name}",
            "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "verdict": _verdict(rows, goal),
            "target": {"accuracy": goal, "rule": rule},
            "settings": {
                "model": source.label, "params": sum(p.numel() for p in net.parameters()), "macs": float(count.forward),
                "dataset": data.name, "train": len(data.train), "test": len(data.test), "batch": shared.batch_size,
                "epochs": shared.epochs, "threads": workload.threads or torch.get_num_threads(),
            },
            "environment": {k: v if isinstance(v, str | int | float | bool | None) else str(v)
                            for k, v in environment().items()},
            "arms": rows, "aa": aa, "dropped": dropped,
            "notes": [*notes, *_notes(workload, arms, rows, records, dropped)],
            "repeat": {"command": command or "hasten compare", "config_toml": config_toml},
            "failures": [{"arm": r["arm"], "seed": r["seed"], "text": r["failure"]} for r in records if r["failure"]],
        }
    )  # fmt: skip


def _accuracies(records: Sequence[Record]) -> list[float]:
    return [r["accuracy"] for r in records if r["failure"] is None and r.get("accuracy") is not None]


def _target(
    target: float | str, plain: Arm | None, strong: Arm | None, by_arm: dict[str, list[Record]]
) -> tuple[float, str]:
    how = "an arm reaches it if the one-sided 95% lower bound of its mean final accuracy does; with one seed, its accuracy"
    if not isinstance(target, str):
        return target, f"set beforehand; {how}"
    arm = plain if target == "plain" else strong
    if arm is None or not _accuracies(by_arm[arm.name]):
        raise HastenError(f"the target is the {target} baseline's median accuracy, but no run of it finished: "
                          f"{[r['failure'] for r in by_arm[arm.name]] if arm else 'no such arm'}.")  # fmt: skip
    return median(_accuracies(by_arm[arm.name])), f"the {target} baseline's median final accuracy; an arm reaches it if its mean final accuracy does"  # fmt: skip


def _run(r: Record, arm: Arm, per_sample: float) -> schema.Run:
    spans = r.get("spans", {})
    total = r.get("seconds_total") or sum(spans.values())
    counters, extra = (
        r.get("counters", {}),
        sum(w.get("extra_macs", 0.0) for w in r.get("witness", {}).values()),
    )
    work = math.prod(e["work"] for e in r.get("effects", {}).values() if e.get("work") is not None)
    backward = counters.get("backward", 0)
    return {
        "seed": r["seed"], "block": r["block"],
        "seconds": {"train": r.get("seconds_train") or 0.0, "method": spans.get("method", 0.0), "final": 0.0,
                    "eval": spans.get("eval", 0.0), "compile": spans.get("compile", 0.0),
                    "setup": spans.get("setup", 0.0), "total": total},
        "spans": spans, "accuracy": r.get("accuracy"), "curve": [[float(v) for v in row] for row in r.get("curve", [])],
        "samples_forward": counters.get("forward", 0), "samples_backward": backward,
        "macs": per_sample * backward * work + extra if backward else None,
        "peak_rss_mb": r.get("peak_rss_mb"), "cpu_seconds": r.get("cpu_seconds"), "failure": r["failure"],
    }  # fmt: skip


def _accuracy(own: list[float], strong: list[float] | None) -> schema.Accuracy:
    versus: schema.Difference | None = None
    if strong and own:
        diff = fmean(own) - fmean(strong)
        if len(own) > 1 and len(strong) > 1:
            lower = stats.noninferior([100 * a for a in strong], [100 * a for a in own], MARGIN)
            half = diff - lower.lower / 100
            versus = {
                "diff": diff,
                "lo": min(diff, diff - half),
                "hi": max(diff, diff + half),
                "noninferior": lower.no_loss,
            }
        else:
            versus = {"diff": diff, "lo": None, "hi": None, "noninferior": None}
    return {"mean": fmean(own) if own else None, "sd": stdev(own) if len(own) > 1 else None, "n": len(own),
            "vs_strong": versus}  # fmt: skip


def _reached(own: list[float], goal: float, n: int) -> schema.Reached:
    bound = stats.mean_lower_bound(own) if len(own) > 1 else (own[0] if own else None)
    mean = fmean(own) if own else None
    return {"k": sum(a >= goal for a in own), "n": n, "mean_bound": bound, "yes": mean is not None and mean >= goal and len(own) == n}  # fmt: skip


def _pairs(base: Sequence[Record], own: Sequence[Record], kept: set[int]) -> list[tuple[float, float]]:
    times = {r["block"]: r["seconds_train"] for r in base if r["failure"] is None and r.get("seconds_train")}
    return [(times[r["block"]], r["seconds_train"]) for r in own
            if r["failure"] is None and r.get("seconds_train") and r["block"] in times and r["block"] in kept]  # fmt: skip


def _versus(base: Sequence[Record], own: Sequence[Record], kept: set[int], goal: float) -> schema.Versus:
    imitated = _emulated(own)
    pairs = [] if imitated else _pairs(base, own, kept)
    reason = (
        f"{imitated}: an emulated format, whose time says nothing" if imitated else "no pair of runs finished"
    )
    empty: schema.Versus = {"ratio": None, "lo": None, "hi": None, "reason": reason, "n": 0, "p": None,
                            "verdict": "not measured", "note": ""}  # fmt: skip
    if not pairs:
        return empty
    ratio = stats.speedup([a for a, _ in pairs], [b for _, b in pairs])
    accuracies = _accuracies(own)
    missed = not accuracies or fmean(accuracies) < goal
    one = ratio.n < 2
    note = ""
    if missed and accuracies:
        note = f"accuracy {100 * fmean(accuracies):.2f}% is below the target"
    return {
        "ratio": ratio.ratio, "lo": None if one else ratio.low, "hi": None if one else ratio.high, "reason": None,
        "n": ratio.n, "p": None if one else ratio.p, "note": note,
        "verdict": "missed" if missed else "one run" if one else ratio.verdict,
    }  # fmt: skip


def _against_curve(
    arm: Arm, arms: Sequence[Arm], by_arm: dict[str, list[Record]], kept: set[int]
) -> schema.Ratio | None:
    if arm.kind not in ("method", "stack"):
        return None
    points = []
    for point in arms:
        good = [r for r in by_arm[point.name] if r["failure"] is None and r["block"] in kept]
        if point.kind in ("strong", "control") and good:
            points.append(CurvePoint(point.budget, tuple(r["seconds_train"] for r in good), tuple(r["accuracy"] for r in good)))  # fmt: skip
    own = [r for r in by_arm[arm.name] if r["failure"] is None and r["block"] in kept]
    if imitated := _emulated(own):
        return {"ratio": None, "lo": None, "hi": None, "reason": f"{imitated}: an emulated format"}
    if len(points) < 2 or not own:
        return {"ratio": None, "lo": None, "hi": None, "reason": "the shortened baselines were not run"}
    found = speedup_against_curve(points, [r["seconds_train"] for r in own], [r["accuracy"] for r in own])
    bounded = found.low is not None and found.high is not None and found.low > 0 and math.isfinite(found.high)
    return {"ratio": found.ratio, "lo": found.low if bounded else None, "hi": found.high if bounded else None,
            "reason": found.reason or (None if bounded else "some resamples lie outside the measured curve")}  # fmt: skip


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
    recipe = arm.describe()["recipe"]
    return {key: value if isinstance(value, str | int | float | bool | None) else " ".join(map(str, value)) for key, value in recipe.items()}  # fmt: skip


def _work(rows: list[schema.Arm], plain: Arm | None) -> None:
    def mean(row: schema.Arm) -> float | None:
        values = [run["macs"] for run in row["runs"] if run["macs"]]
        return fmean(values) if values else None

    base = next((mean(row) for row in rows if plain and row["name"] == plain.name), None)
    for row in rows:
        own = mean(row)
        row["work_reduction"] = None if base is None or own is None else 1 - own / base


def _dropped(records: Sequence[Record]) -> list[schema.Dropped]:
    reasons: dict[int, list[str]] = {}
    for r in records:
        if r.get("disturbed"):
            reasons.setdefault(r["block"], []).append(f"{r['arm']}: {', '.join(r['disturbed'])}")
    return [{"block": block, "reason": "; ".join(why)} for block, why in sorted(reasons.items())]


def _verdict(rows: Sequence[schema.Arm], goal: float) -> schema.Verdict:
    """Return the headline: a method counts only if training less with the strong baseline does not do as well."""
    percent = f"{100 * goal:.2f}%"
    tried = [row for row in rows if row["kind"] in ("method", "stack")]
    faster = [row for row in tried if row["vs_strong"] and row["vs_strong"]["verdict"] == "faster"]
    real = [row for row in faster if _better_than_less(row)]
    if real:
        best = max(real, key=_over_strong)
        return _claim(best, "vs_strong", f"{_named(best)} reaches {percent} {{}} the strong baseline{{}}.")
    tail = ""
    if faster:
        best = max(faster, key=_over_strong)
        tail = (
            f" {_named(best)} takes {_over_strong(best):.2f}x less time than the strong baseline's full schedule, but no "
            f"gain is shown at equal accuracy."
        )
    elif tried:
        tail = " No method was shown to get there sooner than the strong baseline."
    strong = [
        row
        for row in rows
        if row["kind"] in ("strong", "control") and row["vs_plain"] and row["vs_plain"]["verdict"] == "faster"
    ]
    if strong:
        best = max(strong, key=lambda row: (row["vs_plain"] or {"ratio": 0.0})["ratio"] or 0.0)
        part = ""
        if best["kind"] == "control":
            part = f", trained for {best['label'].rpartition(', ')[2]},"
        return _claim(
            best, "vs_plain", f"The strong baseline{part} reaches {percent} {{}} plain PyTorch{{}}.{tail}"
        )
    return {
        "sentence": tail.strip() or "Nothing was shown to be faster.",
        "claim": None,
        "ratio": None,
        "ci": None,
    }


def _named(row: schema.Arm) -> str:
    label = row["label"].removeprefix("+ ")
    return label[:1].upper() + label[1:]


def _over_strong(row: schema.Arm) -> float:
    versus = row["vs_strong"]
    return (versus["ratio"] or 0.0) if versus is not None else 0.0


def _better_than_less(row: schema.Arm) -> bool:
    """Return whether the arm is shown to be faster than the strong baseline trained down to its accuracy."""
    curve = row["vs_curve"]
    if curve is None:
        return False
    if curve["ratio"] is None:
        return "longer baseline" in (curve["reason"] or "")
    return curve["lo"] is not None and curve["lo"] > 1


def _claim(row: schema.Arm, key: str, sentence: str) -> schema.Verdict:
    versus: Any = row[key]  # type: ignore[literal-required]
    low, high = versus["lo"], versus["hi"]
    text = sentence.format(f"{versus['ratio']:.2f}x sooner than", f" (95% interval {low:.2f} to {high:.2f})")
    return {"sentence": text, "claim": row["name"], "ratio": versus["ratio"], "ci": [low, high]}


def _notes(
    workload: Workload, arms: Sequence[Arm], rows: Sequence[schema.Arm], records: Sequence[Record], dropped: Sequence[schema.Dropped]
) -> list[str]:  # fmt: skip
    n = max(row["accuracy"]["n"] for row in rows)
    blocks = len({r["block"] for r in records})
    notes = [
        "The clock counts data, augmentation, forward, backward, optimizer and everything a method adds, from the first "
        "step and without warm-up; evaluation, set-up and imports are outside it.",
        f"{n} seeds an arm; the arms of a seed ran one after the other in random order, each in a fresh process.",
        "Each arm ran its own fixed schedule to the end; no early stop, no best epoch.",
    ]
    if n < 5:
        notes.append(f"With {n} seeds an accuracy difference below about half a point says nothing.")
    if len(dropped) == blocks and blocks:
        notes.append(
            "Busy machine: other processes disturbed every block, so none was left out; trust the ratios less."
        )
    if workload.train or workload.test:
        notes.append(f"Stratified part of the data: {workload.train or 'all'} training and {workload.test or 'all'} test images.")  # fmt: skip
    recipes = {arm.recipe.batch_size for arm in arms}
    if len(recipes) > 1:
        notes.append(f"Batch sizes differ between arms: {sorted(recipes)}.")
    return notes
