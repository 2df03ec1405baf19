"""Runs in blocks: all budgets of all arms for one seed, one after the other in random order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten import keyed
from hasten.comparison.arms import Arm
from hasten.comparison.curves import Record, Shares
from hasten.comparison.store import Runs, boot
from hasten.comparison.worker import Told, Workload, clean, fresh_process, run_arm
from hasten.measure import stats
from hasten.measure.load import Watch
from hasten.report.schema import Noise

Tell = Callable[[int, int, dict[str, Any]], None]
Job = tuple[Arm, float]

REPEATS = 0.25
"""Share of a comparison's runs that may be run again because something else used the machine beside them (our choice)."""


@dataclass
class Runner:
    """Runs jobs, one after the other, and stores each at once.

    ``tell`` hears of every finished run (done, planned, record), ``live`` of the steps of the one in progress. ``keep`` names
    the arms whose full run of the first seed stays on disk, as the network to deploy.
    """

    workload: Workload
    runs: Runs
    folder: Path | None
    isolate: bool
    planned: int
    tell: Tell = lambda done, planned, record: None
    live: Callable[[str, int, int], None] = lambda what, step, total: None
    first_seed: int = 0
    done: int = 0
    repeated: int = 0
    spent: list[Record] = field(default_factory=list)

    def block(self, block: int, seed: int, jobs: Sequence[Job], name: str = "blocks") -> list[Record]:
        """Run ``jobs`` for one seed in random order, or take them from the store; return their records."""
        order = [jobs[i] for i in keyed.permutation(len(jobs), name, seed)]
        keys = {id(job): self.runs.key(job[0], job[1], seed) for job in order}
        stored = self.runs.block(list(keys.values()))
        return [self.one(job, seed, block, keys[id(job)], stored.get(keys[id(job)])) for job in order]

    def one(self, job: Job, seed: int, block: int, key: str, stored: Record | None) -> Record:
        """Return the record of one run."""
        arm, share = job
        if stored is not None:
            self.runs.taken += 1
            record = stored
        else:
            record = self._run(arm, share, seed, key)
            while record["disturbed"] and not record["failure"] and self.repeated < REPEATS * self.planned:
                self.repeated += 1
                record = self._run(arm, share, seed, key)
            record = self.runs.add(key, record)
        self.done += 1
        record = {**record, "block": block, "arm": arm.name}
        self.tell(self.done, self.planned, record)
        return record

    def _run(self, arm: Arm, share: float, seed: int, key: str) -> Record:
        kept = share == 1 and seed == self.first_seed and self.folder is not None
        out = self.folder / "work" / key if self.folder is not None and arm.train_fn is None else None
        begun, watch = time.time(), Watch()
        told: Told = lambda step, total: self.live(f"{arm.name} at {share:.0%}, seed {seed}", step, total)  # noqa: E731
        if out is not None:
            out.parent.mkdir(exist_ok=True)
        if self.isolate:
            record = fresh_process(self.workload, arm, share, seed, out, told)
        else:
            record = run_arm(self.workload, arm, share, seed, out, told)
            if record["stopped"]:
                raise KeyboardInterrupt
        load, disturbed = watch.stop()
        record |= {
            "disturbed": disturbed,
            "load": load.to_json(),
            "begun": begun,
            "boot": boot(),
            "wall": load.wall,
        }
        if record["failure"] or not kept:
            clean(out)
        self.spent.append(record)
        return record


def jobs(arms: Sequence[Arm], shares: Shares) -> list[Job]:
    """Return every arm at each of its shares."""
    return [(arm, share) for arm in arms for share in sorted(shares[arm.name])]


def noise(runner: Runner, arm: Arm, share: float, pairs: int) -> Noise | None:
    """Run ``arm`` against itself, whole runs in pairs, before anything is compared; None where no two pairs were quiet."""
    first, second = [], []
    for i in range(pairs):
        keys = [runner.runs.key(arm, share, i, copy=copy) for copy in (1, 2)]
        stored = runner.runs.block(keys)
        # in turns first and second, so that a machine that gets faster or slower favours neither
        order = (0, 1) if i % 2 == 0 else (1, 0)
        ran = {k: runner.one((arm, share), i, i, keys[k], stored.get(keys[k])) for k in order}
        a, b = ran[0], ran[1]
        clean_pair = not (a["disturbed"] or b["disturbed"] or a["failure"] or b["failure"])
        if clean_pair:
            first.append(a["seconds_train"])
            second.append(b["seconds_train"])
    if len(first) < 2:
        return None
    ratio = stats.speedup(first, second)
    return {"arm": arm.name, "ratio": ratio.ratio, "lo": ratio.low, "hi": ratio.high, "s": ratio.s, "n": ratio.n,
            "ok": ratio.low <= 1 <= ratio.high}  # fmt: skip
