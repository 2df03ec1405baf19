"""Net2Net on full CIFAR-10: the large network's accuracy sooner, from a small one grown in the run or made before it.

Two comparisons, each with the strong baseline beside it at its full and at shorter schedules. In the first every arm
trains WRN-16-4 from fresh weights, and the grown ones begin with half its channels. In the second a trained WRN-16-2 is
widened to WRN-16-4 and trained on; it exists for other reasons, so its training is not counted.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.common import WORK, accuracy_claims, build, cifar10, claim, store, to_accuracy
from hasten import PLAIN, STRONG, fit, keyed
from hasten.comparison import Arm, baselines, controls
from hasten.comparison.worker import Workload, fresh_process, run_arm, threads_here
from hasten.data import DataSet
from hasten.measure import stats
from hasten.measure.curve import CurvePoint, speedup_against_curve
from hasten.measure.load import Watch
from hasten.measure.store import append_jsonl, read_jsonl
from hasten.methods.structure.growing import target_widths, widen
from hasten.methods.structure.net2net import Net2Net
from hasten.surgery import Surgeon

CLAIM = "net2net, WRN-16-4, CIFAR-10: strong's accuracy >= 1.5x sooner from an existing WRN-16-2, >= 1.15x in one run"
MINUTES = 20
SEEDS = 1
LARGE, SMALL = "wrn-16-4", "wrn-16-2"
SHORT = (0.3, 0.5)
LONGER = 1.25
RATES = (0.1, 0.3)  # of the teacher's initial rate; the first is the paper's advice
Record = dict[str, Any]


def main(smoke: bool = False) -> None:
    """Run both comparisons and store them in one result."""
    data = cifar10()
    both = baselines(
        PLAIN.with_(epochs=0.1, eval_every=0.0), STRONG.with_(epochs=1.0, lr=0.2, eval_every=0.0)
    )
    base = both[1]
    arms = [
        *both,
        *controls(base, (0.5, 0.7)),
        grown("grown-0.4", base, "grown at 40%, scheduled rate", at=(0.4,), lr_scale=1.0),
        grown("grown-0.6", base, "grown at 60%, scheduled rate", at=(0.6,), lr_scale=1.0),
        grown("grown-0.6-longer", base, "grown at 60%, 1.25x the epochs", LONGER, at=(0.6,), lr_scale=1.0),
    ]
    finished = to_accuracy("net2net", LARGE, data, arms, seeds=SEEDS, target="strong", smoke=smoke)
    records = students(data, base, smoke)
    rows, claims = student_rows(records)
    values = {"report": finished.data, "student": {"rows": rows, "records": records}}
    store("net2net", values, smoke, [*accuracy_claims(finished, 1.15), *claims])


def grown(name: str, base: Arm, label: str, times: float = 1.0, **settings: Any) -> Arm:
    """Return the strong baseline that begins with half the channels, run for ``times`` its epochs."""
    recipe = base.recipe.with_(epochs=times * base.recipe.epochs)
    return Arm(name, recipe, (*base.methods, Net2Net(narrow=0.5, **settings)), "method", label)


# -- from a small network that exists
def students(data: DataSet, base: Arm, smoke: bool) -> list[Record]:
    """Return the runs of the second comparison; those of a seed run one after the other in random order."""
    if smoke:
        data = data.stratified(320, 100)
        base = Arm(base.name, base.recipe.with_(batch_size=64), base.methods, base.kind)
    path = WORK / "net2net-student.jsonl"
    known = [] if smoke or not path.exists() else read_jsonl(path)
    records: list[Record] = []
    for seed in range(1 if smoke else SEEDS):
        jobs = [base, *controls(base, SHORT), *student_arms(base)]
        made: nn.Module | None = None
        for number in keyed.permutation(len(jobs), "students", seed):
            arm = jobs[number]
            key = arm.key(seed, {"data": data.name, "teacher": base.describe()})
            record = next((r for r in known if r["key"] == key), None)
            if record is None:
                if arm.kind == "method" and made is None:
                    made = student(data, base, seed, smoke)
                model = made if made is not None and arm.kind == "method" else LARGE
                record = one_run(Workload(model, data, threads=threads_here()), arm, seed, smoke) | {
                    "key": key
                }
                if not smoke:
                    append_jsonl(path, record)
            records.append(record)
            told = record["failure"] or f"{100 * record['accuracy']:.2f}% in {record['seconds_train']:.1f} s"
            print(f"{arm.name} seed {seed}: {told} {record['disturbed'] or ''}", flush=True)
    return records


def student_arms(base: Arm) -> list[Arm]:
    """Return the strong baseline for the student, at shorter schedules and lower rates."""
    return [
        Arm(f"student-{budget:g}-lr{rate:g}", base.recipe.scaled(budget).with_(lr=base.recipe.lr * rate), base.methods,
            "method", f"student, {budget:.0%} of the epochs, {rate:g} of the rate", budget)
        for budget in SHORT
        for rate in RATES
    ]  # fmt: skip


def student(data: DataSet, base: Arm, seed: int, smoke: bool) -> nn.Module:
    """Return the large network with the function of the small one, which is trained when it is first needed."""
    folder = None if smoke else WORK / f"net2net-teacher-{seed}"
    done = fit(SMALL, data, base.methods, recipe=base.recipe, seed=seed, out=folder)
    assert done.model is not None
    print(f"teacher of seed {seed}: {100 * done.accuracy:.2f}%", flush=True)
    height, width, depth = data.train.shape
    surgeon = Surgeon(done.model.train(), (), torch.zeros(2, depth, height, width))
    widen(surgeon, target_widths(surgeon, {"layer*": 2.0}), seed=seed)
    large = build(LARGE, num_classes=len(data.classes), in_channels=depth, image_size=height)
    large.load_state_dict(done.model.state_dict())  # raises unless every shape is the large network's
    return large


def one_run(workload: Workload, arm: Arm, seed: int, smoke: bool) -> Record:
    """Run ``arm`` and return its record, with what other processes took of the machine meanwhile."""
    watch = Watch()
    record = run_arm(workload, arm, seed) if smoke else fresh_process(workload, arm, seed)
    load, disturbed = watch.stop()
    return {**record, "kind": arm.kind, "budget": arm.budget, "settings": arm.describe(), "disturbed": disturbed,
            "load": load.to_json()}  # fmt: skip


def student_rows(records: list[Record]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row of figures for every arm, and the claims of the students.

    The goal is the mean accuracy of the large network trained from fresh weights. Seeds in which a run was disturbed
    are left out of ratios unless all were.
    """
    good = [r for r in records if r["failure"] is None]
    loud = {r["seed"] for r in records if r["disturbed"]}
    quiet = [r for r in good if r["seed"] not in loud] or good
    strong = [r for r in quiet if r["kind"] == "strong"]
    goal = statistics.mean(r["accuracy"] for r in strong)
    baseline = {name: [r for r in quiet if r["arm"] == name] for name in
                dict.fromkeys(r["arm"] for r in quiet if r["kind"] in ("strong", "control"))}  # fmt: skip
    points = [CurvePoint(runs[0]["budget"], tuple(r["seconds_train"] for r in runs), tuple(r["accuracy"] for r in runs))
              for runs in baseline.values()]  # fmt: skip
    seconds = {r["seed"]: r["seconds_train"] for r in strong}
    rows, claims = [], []
    for name in dict.fromkeys(r["arm"] for r in quiet):
        runs = [r for r in quiet if r["arm"] == name and r["seed"] in seconds]
        accuracy = statistics.mean(r["accuracy"] for r in runs)
        ratio = stats.speedup([seconds[r["seed"]] for r in runs], [r["seconds_train"] for r in runs])
        row = {"arm": name, "accuracy": accuracy, "seeds": len(runs), "ratio": ratio.to_json(), "curve": None}
        rows.append(row)
        if runs[0]["kind"] != "method":
            continue
        equal = speedup_against_curve(
            points, [r["seconds_train"] for r in runs], [r["accuracy"] for r in runs]
        )
        row["curve"] = equal.ratio
        reached = accuracy >= goal
        text = (
            f"{ratio.text()} over strong, accuracy {100 * accuracy:.2f}% against {100 * goal:.2f}%"
            f"{'' if reached else ' (missed)'}; at equal accuracy {equal.text()}"
        )
        met = reached and ratio.verdict == "faster" and ratio.ratio >= 1.5
        what = f"time to strong's accuracy, {LARGE} from an existing {SMALL}, CIFAR-10, {name}"
        claims.append(claim("net2net", what, text, target=">= 1.5x, no point lost", met=met))
    return rows, claims
