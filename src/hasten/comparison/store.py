"""Which stored runs may be taken instead of being run again, and which belong together."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hasten.comparison.arms import Arm
from hasten.comparison.curves import Record
from hasten.comparison.worker import Workload
from hasten.kernels import probe
from hasten.measure.store import append_jsonl, read_jsonl
from hasten.run_identity import identity_of

SITTING = 12 * 3600.0
"""Seconds within which the runs of a block must have begun to be paired (our choice)."""


class Runs:
    """The runs of one comparison, in ``runs.jsonl`` of its folder, found again by all that shapes them.

    The key of a run is its identity (the model with the hash of its code, the data's content, recipe, methods, seed),
    the budget, threads, device, and this machine with its versions. Failures are never taken again, nor, once
    the comparison has ended, runs beside which something else used the machine.
    """

    def __init__(self, folder: Path | None, workload: Workload, data: Any) -> None:
        self._path = folder / "runs.jsonl" if folder is not None else None
        self._workload, self._data = workload, data
        stored = read_jsonl(self._path) if self._path is not None and self._path.exists() else []
        # a finished comparison is asked for again to have the times that did not count; an unfinished one goes on
        finished = folder is not None and (folder / "report.json").exists()
        self._known = {
            r["key"]: r for r in stored if r.get("failure") is None and not (finished and r.get("disturbed"))
        }
        self.taken = self.ran = 0

    def key(self, arm: Arm, share: float, seed: int, copy: int = 0) -> str:
        """Return the name under which a run is stored. copy: which of several equal runs, as the A/A test makes."""
        w = self._workload
        identity = identity_of(w.model, self._data, arm.methods, arm.at(share), seed, init=w.init, loss=arm.loss,
                               optimizer=arm.optimizer, train_fn=arm.train_fn, weights=True)  # fmt: skip
        text = json.dumps({"run": identity, "share": share, "threads": w.threads, "device": w.device, "copy": copy,
                           "machine": probe.fingerprint()}, sort_keys=True, default=str)  # fmt: skip
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def block(self, keys: Sequence[str]) -> dict[str, Record]:
        """Return the stored runs of a block that may be taken: all of one sitting, and of this one if any is missing."""
        have = {key: self._known[key] for key in keys if key in self._known}
        if len(have) < len(set(keys)):
            now = time.time()
            return {k: r for k, r in have.items() if r["boot"] == boot() and now - r["begun"] <= SITTING}
        times = [r["begun"] for r in have.values()]
        together = len({r["boot"] for r in have.values()}) == 1 and max(times) - min(times) <= SITTING
        return have if together else {}

    def add(self, key: str, record: Record) -> Record:
        """Store a run that has just ended and return it."""
        record = {**record, "key": key}
        self.ran += 1
        self._known[key] = record
        if self._path is not None:
            append_jsonl(self._path, record)
        return record


@cache
def boot() -> str:
    """Return the id of this boot of the machine, or nothing where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
