"""One run of one arm in a process of its own, so that no run inherits another's caches, threads or memory."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing as mp
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.comparison.arms import Arm
from hasten.data import DataSet, as_data
from hasten.data.images import held_out
from hasten.data.streams import Streams
from hasten.errors import HastenError, UnsupportedError
from hasten.loop import fit
from hasten.progress import Progress, silent

PATIENCE = 20.0
"""Seconds that a stopped run gets to save itself."""


@dataclass(frozen=True)
class Workload:
    """What all arms share.

    train and test cut the data to stratified parts of that size, keep to a share of the training images in which every
    class keeps its share. validation: the share of the training images that is held out to choose the target with, 0 for
    none.
    """

    model: str | nn.Module | Callable[..., nn.Module]
    data: Any
    root: str | None = None
    size: int | None = None
    train: int | None = None
    test: int | None = None
    keep: float = 1.0
    validation: float = 0.0
    threads: int | None = None
    device: str = "cpu"
    init: Any = None

    def load(self) -> DataSet | Streams:
        """Return the data that every run uses."""
        data = as_data(self.data, root=self.root, size=self.size)
        if isinstance(data, DataSet):
            if self.train is not None or self.test is not None:
                data = data.stratified(self.train, self.test)
            if self.keep < 1:
                chosen = held_out(data.train.labels, data.classes, self.keep, 1)
                data = dataclasses.replace(data, train=data.train.take(chosen))
        elif self.train is not None or self.test is not None or self.keep < 1:
            raise UnsupportedError(
                "a part of this data cannot be cut out, since its own loader reads it: leave train and test out and give "
                "a shorter loader."
            )
        return data.hold_out(self.validation) if self.validation and not data.has_validation else data


Told = Callable[[int, int], None]
"""Told of a run's progress: steps done and steps in all."""


class _Steps(Progress):
    def __init__(self, told: Told) -> None:
        self._told, self._last = told, 0.0

    def step(self, step: int, total: int, loss: float) -> None:
        now = time.monotonic()
        if now - self._last > 0.2:
            self._last = now
            self._told(step, total)


def run_arm(
    workload: Workload, arm: Arm, share: float, seed: int, out: Path | None = None, told: Told | None = None
) -> dict[str, Any]:
    """Run ``arm`` at ``share`` of its budget here and return its record; a HastenError becomes a failure in the record."""
    begun, cpu = time.perf_counter(), time.process_time()
    if workload.threads:
        torch.set_num_threads(workload.threads)
    record: dict[str, Any] = {"arm": arm.name, "share": share, "seed": seed, "failure": None, "accuracy": None,
                              "validation": None, "spans": {}, "counters": {}, "witness": {}, "effects": {}, "idle": [],
                              "seconds_train": None, "resumed": False, "stopped": 0}  # fmt: skip
    step_at: list[float] = []
    try:
        result = fit(workload.model, workload.load(), arm.methods, recipe=arm.at(share), seed=seed, out=out,
                     device=workload.device, init=workload.init, loss=arm.loss, optimizer=arm.optimizer,
                     train_fn=arm.train_fn, share=share, allow_no_effect=idle_allowed(arm), on_step=lambda step: step_at.append(time.perf_counter()),
                     progress=_Steps(told) if told is not None else silent)  # fmt: skip
        idle = [name for name, counts in result.witness.items()
                if counts and not any(counts.values()) and name not in idle_allowed(arm)]  # fmt: skip
        record |= {
            "accuracy": result.accuracy, "validation": result.validation, "spans": result.spans,
            "counters": result.counters, "witness": result.witness, "seconds_train": result.seconds_train,
            "seconds_attach": result.seconds_attach, "steps": result.steps, "stopped": result.stopped, "idle": idle,
            "resumed": any("continued" in message for message in result.messages),
            "step_seconds": _typical(step_at),
            "effects": {name: {"touched": e.touched, "skipped": e.skipped, "saves": e.saves, "work": e.work,
                               "emulated": e.emulated}
                        for name, e in result.effects.items()},
        }  # fmt: skip
        if idle and share == 1:
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


def idle_allowed(arm: Arm) -> tuple[str, ...]:
    """Return the methods that may do nothing here: the strong baseline's own, where they are not what is asked about."""
    return ("mixed_precision",) if arm.kind == "strong" or len(arm.methods) > 1 else ()


def _typical(moments: list[float]) -> float | None:
    """Return the median time between steps, in seconds."""
    gaps = sorted(b - a for a, b in itertools.pairwise(moments))
    return gaps[len(gaps) // 2] if gaps else None


def die_with_parent() -> None:
    """End this process as soon as the one that asked for it is gone, however that ended."""
    parent = mp.parent_process()

    def watch() -> None:
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _child(
    connection: Connection, workload: Workload, arm: Arm, share: float, seed: int, out: Path | None
) -> None:
    die_with_parent()

    def told(step: int, total: int) -> None:
        with suppress(OSError):
            connection.send((step, total))

    try:
        with redirect_stdout(sys.stderr):  # what the user's model prints must not spoil a program's output
            record = run_arm(workload, arm, share, seed, out, told)
    except Exception as error:  # the parent must learn of a bug in user code, too, instead of waiting
        record = {
            "arm": arm.name,
            "share": share,
            "seed": seed,
            "failure": f"{type(error).__name__}: {error}",
        }
    connection.send(record)
    connection.close()


def _server() -> Any:
    """Return the way to make processes that have imported torch and nothing more."""
    context = mp.get_context("forkserver")
    # optimizers import torch._dynamo when the first is made, which takes a second that every run would pay
    context.set_forkserver_preload(["hasten.comparison.worker", "torch._dynamo"])
    return context


def warm_up() -> None:
    """Start the server of fresh processes, so that no run waits for its imports.

    Raises UnsupportedError where a fresh process cannot import the program that calls.
    """
    process = _server().Process(target=os.getpid, daemon=True)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise UnsupportedError(
            "a fresh process could not import your script, for the reason above: put the call under `if __name__ == "
            '"__main__":`, or give compare(..., isolate=False).'
        )


def fresh_process(
    workload: Workload, arm: Arm, share: float, seed: int, out: Path | None = None, told: Told | None = None
) -> dict[str, Any]:
    """Run ``arm`` in a fresh process and return its record; if the process dies, a record of the failure.

    Processes are forked from a server that has imported torch and nothing more, so a run does not pay for imports and
    starts with no caches. Interrupted, it has the run save itself before it ends the process. Raises UnsupportedError if
    model or data cannot be handed to another process.
    """
    context = _server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, workload, arm, share, seed, out), daemon=True)
    try:
        process.start()
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise UnsupportedError(
            f"every run gets a process of its own, and this model or data cannot be handed to one "
            f"({type(error).__name__}: {str(error).splitlines()[0]}): give a name, file.py:factory or pkg.mod:factory, or "
            f"compare(..., isolate=False)."
        ) from error
    theirs.close()
    record: dict[str, Any] | None = None
    try:
        while record is None:
            wait([ours, process.sentinel])  # the pipe alone may be held open by another process
            if not ours.poll():
                break
            try:
                message = ours.recv()
            except EOFError:
                break
            if isinstance(message, dict):
                record = message
            elif told is not None:
                told(*message)
    except BaseException:
        if out is not None and process.is_alive():
            process.terminate()  # the run saves itself and ends
            process.join(PATIENCE)
        process.kill()
        raise
    process.join()
    if record is None:
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        record = {"arm": arm.name, "share": share, "seed": seed,
                  "failure": f"the run's process {how} before it gave a result"}  # fmt: skip
    if record.get("stopped"):
        raise KeyboardInterrupt
    return record


def handed_over(workload: Workload, arms: Any) -> str:
    """Return why model, data or arms cannot be handed to another process, or nothing."""
    if getattr(mp.current_process(), "_inheriting", False):
        raise UnsupportedError(
            "compare(...) was called while a run's process imported your script: put the call under `if __name__ == "
            '"__main__":`, or give compare(..., isolate=False).'
        )
    from multiprocessing.reduction import ForkingPickler

    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and file is not None and not os.path.exists(file):
        return "the program came from standard input, which no other process can read"
    if getattr(main, "__spec__", None) is None and file is None:
        named = [workload.model, *(f for arm in arms for f in (arm.optimizer, arm.loss, arm.train_fn))]
        for thing in named:
            kind = thing if callable(thing) and not isinstance(thing, nn.Module) else type(thing)
            if getattr(kind, "__module__", "") == "__main__":
                return "the model or a function was made in a notebook or on standard input, which no other process can read"
    try:
        ForkingPickler.dumps((workload, tuple(arms)))
    except Exception as error:
        return (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'it cannot be pickled'}"
        )
    return ""


def clean(folder: Path | None) -> None:
    """Remove a run's folder."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def threads_here() -> int:
    """Return the number of threads a run uses where none is given."""
    return min(torch.get_num_threads(), os.cpu_count() or 1)
