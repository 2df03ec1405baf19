"""What a user sees while a run goes on: one live line in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Receives every step and evaluation of a run. This base class shows nothing."""

    def step(self, step: int, total: int, loss: float) -> None:
        """A step of ``total`` ended with this loss."""

    def evaluation(self, step: int, total: int, accuracy: float) -> None:
        """An evaluation gave this accuracy in [0, 1]."""

    def close(self) -> None:
        """The run ended."""


silent = Progress()


class Lines(Progress):
    """A plain line for each evaluation and at most every ``interval`` seconds, for logs and pipes."""

    def __init__(self, out: TextIO | None = None, interval: float = 10.0) -> None:
        self._out, self._interval = out or sys.stderr, interval
        self._last = time.monotonic()

    def step(self, step: int, total: int, loss: float) -> None:
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            print(f"step {step}/{total}  loss {loss:.3f}", file=self._out, flush=True)

    def evaluation(self, step: int, total: int, accuracy: float) -> None:
        self._last = time.monotonic()
        print(f"step {step}/{total}  accuracy {100 * accuracy:.2f}%", file=self._out, flush=True)


class Bar(Progress):
    """One live line with a bar and the time left, refreshed at most four times a second."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("Train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), refresh_per_second=4,
        )  # fmt: skip
        self._task = self._bar.add_task("Train", note="")
        self._note, self._shown = "", 0.0
        self._bar.start()

    def step(self, step: int, total: int, loss: float) -> None:
        now = time.monotonic()
        if now - self._shown >= 0.25 or step == total:
            self._shown = now
            self._bar.update(self._task, completed=step, total=total, note=f"loss {loss:.3f} {self._note}")

    def evaluation(self, step: int, total: int, accuracy: float) -> None:
        self._note = f"accuracy {100 * accuracy:.2f}%"
        self._bar.update(self._task, completed=step, total=total, note=self._note)

    def close(self) -> None:
        self._bar.stop()


def for_terminal() -> Progress:
    """Return a bar where standard error is a terminal, plain lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Lines()
