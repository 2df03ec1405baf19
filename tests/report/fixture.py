"""An invented comparison, shaped like a real one. Every number here is made up and used in tests only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np

from hasten.measure.curve import TimeCurve
from hasten.report.schema import Arm, MethodEffect, Outcome, Point, ReportData, Run, TimeTo, Versus
from hasten.report.trace import time_curve

LAYERS = [
    "stem.conv",
    *(f"stage{s}.block{b}.conv{c}" for s in (1, 2, 3) for b in (1, 2) for c in (1, 2)),
    "head.fc",
]
TARGET = 0.90
EPOCHS = 12.0


@dataclass(frozen=True)
class Invented:
    """An arm: seconds of the full budget, accuracy it tends to, how fast, and the share of its time that is method's."""

    label: str
    kind: Literal["baseline", "strong", "method", "stack"]
    methods: tuple[str, ...]
    seconds: float
    best: float
    rate: float
    method: float = 0.0
    backward: float = 0.52


RESIZE, SELECT = "progressive_resizing(start=0.5)", "selective_backprop(beta=2.0)"
FREEZE = "layer_freezing(start=0.5, end=0.97)"
ARMS = {
    "plain": Invented("plain PyTorch", "baseline", (), 104.0, 0.920, 3.0),
    "strong": Invented("strong (bf16, NHWC)", "strong", (), 51.0, 0.920, 3.0),
    "resize": Invented("+ progressive resizing", "method", (RESIZE,), 39.0, 0.919, 3.0, 0.01),
    "select": Invented("+ selective backprop", "method", (SELECT,), 47.5, 0.919, 2.95, 0.2, 0.34),
    "freeze": Invented("+ layer freezing", "method", (FREEZE,), 45.0, 0.893, 3.1, 0.01, 0.46),
    "all": Invented("all of them", "stack", (RESIZE, SELECT, FREEZE), 33.0, 0.9165, 3.2, 0.12, 0.33),
}


def _run(rng: np.random.Generator, arm: Invented, share: float, seed: int) -> Run:
    train = arm.seconds * share * float(np.exp(rng.normal(0, 0.03)))
    accuracy = (
        0.62 + (arm.best - 0.62) * (1 - math.exp(-arm.rate * share * 1.25)) + float(rng.normal(0, 0.003))
    )
    method = arm.method * train
    spans = {
        "data": 0.03 * train,
        "forward": 0.31 * train,
        "backward": arm.backward * train,
        "optimizer": 0.06 * train,
        "method": method,
        "save": 0.35,
        "eval": 0.6,
        "compile": 0.0 if arm.kind == "baseline" else 2.1,
        "setup": 0.9,
    }
    return {
        "seed": seed,
        "block": seed,
        "seconds": {
            "train": train,
            "method": method,
            "final": 0.0,
            "eval": 0.6,
            "compile": spans["compile"],
            "setup": 0.9,
            "total": max(sum(spans.values()), train + 4.0) + 0.2,
        },
        "spans": spans,
        "accuracy": accuracy,
        "disturbed": [],
        "resumed": False,
        "samples_forward": round(120_000 * share),
        "samples_backward": round((60_960 if arm.method > 0.1 else 120_000) * share),
        "macs": 3.7e12 * share * arm.seconds / 51,
        "peak_rss_mb": 612.0 + 8 * seed,
        "cpu_seconds": train * 1.93,
        "failure": None,
    }


def _point(rng: np.random.Generator, arm: Invented, share: float, seeds: int) -> Point:
    runs = [_run(rng, arm, share, seed) for seed in range(seeds)]
    accuracies = [run["accuracy"] or 0.0 for run in runs]
    return {
        "share": share,
        "epochs": EPOCHS * share,
        "seconds": fmean(run["seconds"]["train"] for run in runs),
        "accuracy": fmean(accuracies),
        "sd": stdev(accuracies) if seeds > 1 else None,
        "n": seeds,
        "runs": runs,
    }


def _time(curve: TimeCurve, several: bool) -> TimeTo:
    place = curve.find(TARGET)
    if math.isfinite(place):
        seconds = float(curve.mean_seconds(place)[0])
        low, high = (seconds * 0.96, seconds * 1.05) if several else (None, None)
        return {"seconds": seconds, "lo": low, "hi": high, "state": "reached", "note": ""}
    if place > 0:
        note = f"its curve ends at {100 * float(curve.levels[-1]):.1f}%"
        return {"seconds": None, "lo": None, "hi": None, "state": "not reached", "note": note}
    return {"seconds": None, "lo": None, "hi": None, "state": "below the smallest budget", "note": ""}


def outcome(low: float | None, high: float | None) -> Outcome:
    """Return what an interval allows to say."""
    return (
        "sooner" if low is not None and low > 1 else "later" if high is not None and high < 1 else "not shown"
    )


def _versus(base: TimeTo, own: TimeTo, n: int) -> Versus:
    if base["seconds"] is None or own["seconds"] is None:
        verdict: Outcome = "not reached"
        return {"ratio": None, "lo": None, "hi": None, "reason": "no time to compare", "n": n, "blocks": n,
                "verdict": verdict, "note": ""}  # fmt: skip
    ratio = base["seconds"] / own["seconds"]
    low, high = (ratio * 0.93, ratio * 1.08) if n > 1 else (None, None)
    return {"ratio": ratio, "lo": low, "hi": high, "reason": None, "n": n, "blocks": n,
            "verdict": outcome(low, high) if n > 1 else "one seed", "note": ""}  # fmt: skip


def _effects(methods: tuple[str, ...]) -> list[MethodEffect]:
    effects: list[MethodEffect] = []
    for text in methods:
        if text == FREEZE:
            touched = [(name, f"frozen from epoch {3 + i // 3}") for i, name in enumerate(LAYERS[:9])]
            skipped = [(name, "last layers are never frozen") for name in LAYERS[9:]]
            saves = "grad_weight and grad_input of frozen layers"
        elif text == RESIZE:
            touched, skipped, saves = [("input", "14, 18, 24, then 28 pixels")], [], "work of early epochs"
        else:
            touched, skipped = [("loss", "half of each batch back-propagated")], []
            saves = "backward work of samples already learnt"
        effects.append(
            {
                "method": text,
                "touched": [{"layer": layer, "note": note} for layer, note in touched],
                "skipped": [{"layer": layer, "reason": reason} for layer, reason in skipped],
                "saves": saves,
            }
        )
    return effects


def _arm(name: str, arm: Invented, seeds: int, shares: tuple[float, ...], rng: np.random.Generator) -> Arm:
    points = [_point(rng, arm, share, seeds) for share in shares]
    full = points[-1]
    witness = {"layers frozen": 9.0} if FREEZE in arm.methods else {}
    if SELECT in arm.methods:
        witness["samples not back-propagated"] = 59_040.0
    built: Arm = {
        "name": name,
        "label": arm.label,
        "kind": arm.kind,
        "methods": list(arm.methods),
        "points": points,
        "accuracy": {"mean": full["accuracy"], "sd": full["sd"], "n": seeds, "vs_strong": None},
        "seconds": full["seconds"],
        "time": {"seconds": None, "lo": None, "hi": None, "state": "not measured", "note": ""},
        "vs_plain": None,
        "vs_strong": None,
        "sets_target": name != "freeze",
        "work_reduction": None if name == "plain" else round(1 - arm.seconds / 104, 3),
        "witness": witness,
        "effects": _effects(arm.methods),
        "settings": {"dtype": "float32" if name == "plain" else "bfloat16", "channels_last": name != "plain"},
    }
    curve = time_curve(built)
    assert curve is not None
    built["time"] = _time(curve, seeds > 1)
    return built


def report(seeds: int = 3, shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0), extra: int = 0) -> ReportData:
    """Return an invented report: plain, strong, three methods, their stack, and ``extra`` more methods."""
    rng = np.random.default_rng(7)
    more = {
        f"extra{i}": Invented(f"another method {i}", "method", (SELECT,), 47.0 - i, 0.918, 3.0)
        for i in range(extra)
    }
    arms = [_arm(name, arm, seeds, shares, rng) for name, arm in (ARMS | more).items()]
    plain, strong = arms[:2]
    for arm in arms:
        arm["vs_plain"] = None if arm is plain else _versus(plain["time"], arm["time"], seeds)
        arm["vs_strong"] = None if arm is strong else _versus(strong["time"], arm["time"], seeds)
        if arm is not strong:
            diff = (arm["accuracy"]["mean"] or 0.0) - (strong["accuracy"]["mean"] or 0.0)
            low, high = (diff - 0.0021, diff + 0.0021) if seeds > 1 else (None, None)
            loses = None if low is None else low > -0.003
            arm["accuracy"]["vs_strong"] = {"diff": diff, "lo": low, "hi": high, "noninferior": loses}
    best = arms[5]["vs_strong"]
    claimed = best is not None and best["verdict"] == "sooner"
    return {
        "schema_version": 2,
        "title": "Fashion-MNIST to 90%",
        "created": "2026-11-22T09:30:00Z",
        "verdict": {
            "sentence": f"Use all of them: 90.0% comes {best['ratio']:.2f}x sooner than with the strong baseline "
            f"(95% interval {best['lo']:.2f} to {best['hi']:.2f}, corrected for the best of 4)."
            if claimed and best and best["ratio"] and best["lo"] and best["hi"]
            else "Nothing was shown to get to 90.0% sooner: one seed each says nothing about chance.",
            "claim": "all" if claimed else None,
            "against": "strong" if claimed else None,
            "ratio": best["ratio"] if claimed and best else None,
            "ci": [best["lo"], best["hi"]] if claimed and best else None,
            "best_of": 4,
        },
        "target": {
            "accuracy": TARGET,
            "chosen": "the highest accuracy that all arms reach in the mean",
            "rule": "an arm reaches it where the curve through its mean accuracies does",
            "margin": 0.003,
        },
        "settings": {
            "model": "resnet8",
            "params": 77_850,
            "macs": 12_300_000.0,
            "dataset": "fashion-mnist-12k",
            "train": 10_000,
            "test": 2_000,
            "batch": 128,
            "epochs": EPOCHS,
            "threads": 2,
        },
        "environment": {
            "cpu": "AMD EPYC 9R14 (2 of 96 cores)",
            "cores": 2,
            "torch": "2.13.0+cpu",
            "python": "3.11.9",
            "hasten": "0.1.0",
            "memory_bytes": 25_276_510_208,
            "parallel": "{'backend': 'OpenMP', 'openmp': '201511'}",
        },
        "arms": arms,
        "aa": {"arm": "strong", "ratio": 1.004, "lo": 0.986, "hi": 1.022, "s": 0.018, "n": 4, "ok": True},
        "plan": {
            "predicted": 1080.0,
            "taken": 1012.0,
            "limit": 1200.0,
            "runs": seeds * len(arms) * len(shares),
            "reused": 0,
            "changes": ["4 budgets instead of 5", "8,000 of 10,000 training images"],
        },
        "network": "network-all",
        "dropped": [{"block": 4, "reason": "steal above 1% of wall time (2.7%)"}],
        "notes": [
            "The clock holds training and everything the methods add. It leaves out the regular evaluation, compile "
            "and set-up.",
            "Target and budgets were chosen on a validation split cut from the training images.",
        ],
        "repeat": {
            "command": "hasten compare --data fashion-mnist-12k --model resnet8 --limit 20m",
            "config_toml": '[data]\nname = "fashion-mnist-12k"\n\n[train]\nmodel = "resnet8"\n'
            'batch = 128\nepochs = 12\nseeds = [0, 1, 2]\n\n[[methods]]\nname = "layer_freezing"\n'
            "start = 0.5\nend = 0.97\n",
        },
        "failures": [],
    }
