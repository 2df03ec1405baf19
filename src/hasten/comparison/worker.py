"""One run of one arm in a process of its own, so that no run inherits another's caches, threads or memory."""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.comparison.arms import Arm
from hasten.data import DataSet, load
from hasten.errors import HastenError, UnsupportedError
from hasten.loop import fit


@dataclass(frozen=True)
class Workload:
    """What all arms share. train and test cut the data to stratified parts of that size; validation: tune, do not test."""

    model: str | nn.Module | Callable[[], nn.Module]
    data: str | DataSet
    root: str | None = None
    train: int | None = None
    test: int | None = None
    validation: bool = False
    threads: int | None = None
    device: str = "cpu"

    def load(self) -> DataSet:
        """Return the data set that every run uses."""
        data = self.data if isinstance(self.data, DataSet) else load(self.data, self.root)
        if self.validation:
            data = data.split_validation(0.1)
        if self.train is not None or self.test is not None:
            data = data.stratified(self.train, self.test)
        return data

    def describe(self) -> dict[str, Any]:
        """Return what shapes a run, as plain JSON."""
        model = (
            self.model
            if isinstance(self.model, str)
            else getattr(self.model, "__qualname__", type(self.model).__name__)
        )
        data = self.data if isinstance(self.data, str) else self.data.name
        return {"model": model, "data": data, "train": self.train, "test": self.test, "validation": self.validation,
                "threads": self.threads, "device": self.device}  # fmt: skip


def run_arm(workload: Workload, arm: Arm, seed: int, out: Path | None = None) -> dict[str, Any]:
    """Run ``arm`` here and return its record; a HastenError becomes a failure in the record."""
    begun, cpu = time.perf_counter(), time.process_time()
    if workload.threads:
        torch.set_num_threads(workload.threads)
    record: dict[str, Any] = {"arm": arm.name, "seed": seed, "failure": None, "accuracy": None, "curve": [],
                              "spans": {}, "counters": {}, "witness": {}, "effects": {}, "seconds_train": None}  # fmt: skip
    try:
        result = fit(workload.model, workload.load(), arm.methods, recipe=arm.recipe, seed=seed,
                     device=workload.device, out=out)  # fmt: skip
        record |= {
            "accuracy": result.accuracy, "curve": [list(row) for row in result.curve], "spans": result.spans,
            "counters": result.counters, "witness": result.witness, "seconds_train": result.seconds_train,
            "effects": {name: {"touched": e.touched, "skipped": e.skipped, "saves": e.saves, "work": e.work,
                               "emulated": e.emulated}
                        for name, e in result.effects.items()},
        }  # fmt: skip
        idle = [name for name, counts in result.witness.items() if counts and not any(counts.values())]
        if idle:
            record["failure"] = (
                f"{', '.join(idle)} never acted in this run, so the run shows nothing about it"
            )
    except HastenError as error:
        record["failure"] = f"{type(error).__name__}: {error}"
    record |= {
        "seconds_total": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    return record


def _child(connection: Connection, workload: Workload, arm: Arm, seed: int) -> None:
    try:
        record = run_arm(workload, arm, seed)
    except Exception as error:  # the parent must learn of a bug in user code, too, instead of waiting
        record = {"arm": arm.name, "seed": seed, "failure": f"{type(error).__name__}: {error}"}
    connection.send(record)
    connection.close()


def fresh_process(workload: Workload, arm: Arm, seed: int) -> dict[str, Any]:
    """Run ``arm`` in a fresh process and return its record; if the process dies, a record of the failure.

    Processes are forked from a server that has imported torch and nothing more, so a run does not pay for imports and
    starts with no caches. Raises UnsupportedError if model or data cannot be handed to another process.
    """
    context = mp.get_context("forkserver")
    # optimizers import torch._dynamo when the first is made, which takes a second that every run would pay
    context.set_forkserver_preload(["hasten.comparison.worker", "torch._dynamo"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, workload, arm, seed), daemon=True)
    try:
        process.start()
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"every run gets a process of its own, and this model or data cannot be handed to one ({error}): give a "
            f"name, file.py:factory or pkg.mod:factory, or compare(..., isolate=False)."
        ) from error
    theirs.close()
    record: dict[str, Any] | None = None
    try:
        wait([ours, process.sentinel])  # the pipe alone may be held open by another process
        if ours.poll():
            with suppress(EOFError):
                record = ours.recv()
    except BaseException:
        process.kill()
        raise
    process.join()
    if record is None:
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        record = {
            "arm": arm.name,
            "seed": seed,
            "failure": f"the run's process {how} before it gave a result",
        }
    return record


def threads_here() -> int:
    """Return the number of threads a run uses where none is given."""
    return min(torch.get_num_threads(), os.cpu_count() or 1)
