"""What a user sees while a run goes on: one live line in a terminal or notebook, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Receives every step, evaluation and message of a run. This base class shows nothing."""

    def step(self, step: int, total: int, loss: float) -> None:
        """A step of ``total`` ended; ``loss`` is the newest that is known, NaN before the first."""

    def evaluation(self, step: int, total: int, accuracy: float) -> None:
        """An evaluation gave this accuracy in [0, 1]."""

    def message(self, text: str) -> None:
        """Something that the user should know has happened."""

    def close(self) -> None:
        """The run ended."""


silent = Progress()


class Messages(Progress):
    """Messages only, a line each."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out

    def message(self, text: str) -> None:
        print(text, file=self._out or sys.stderr, flush=True)


class Lines(Messages):
    """A plain line for each evaluation and message, and at most every ``interval`` seconds, for logs and pipes.

    With ``beat`` a line also comes after ``interval`` seconds in which nothing else has, such as while data is read; a
    thread sees to that until ``close``.
    """

    def __init__(self, out: TextIO | None = None, interval: float = 10.0, *, beat: bool = False) -> None:
        super().__init__(out)
        self._interval, self._at = interval, "setting up"
        self._last = self._began = time.monotonic()
        self._ended = threading.Event()
        if beat:
            threading.Thread(target=self._beat, daemon=True, name="hasten progress").start()

    def step(self, step: int, total: int, loss: float) -> None:
        self._at = f"step {step}/{total}  loss {loss:.3f}"
        if time.monotonic() - self._last >= self._interval:
            self.message(self._at)

    def evaluation(self, step: int, total: int, accuracy: float) -> None:
        self._at = f"step {step}/{total}  accuracy {100 * accuracy:.2f}%"
        self.message(self._at)

    def message(self, text: str) -> None:
        self._last = time.monotonic()
        super().message(text)

    def close(self) -> None:
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(max(0.01, self._last + self._interval - time.monotonic())):
            now = time.monotonic()
            if now - self._last >= self._interval:
                self.message(f"{self._at}  ({now - self._began:.0f} s)")


class Bar(Progress):
    """One live line with a bar and the time left, refreshed at most four times a second; messages go above it."""

    def __init__(self, console: Console | None = None) -> None:
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
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), refresh_per_second=4, console=console,
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

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Now:
    """Passes on a message that would come again and again the first time, and then every ``interval`` seconds."""

    def __init__(self, progress: Progress, interval: float = 600.0) -> None:
        self._progress, self._interval = progress, interval
        self._since: float | None = None
        self._held = 0

    def message(self, text: str) -> None:
        """Pass ``text`` on, or count it."""
        now = time.monotonic()
        if self._since is not None and now - self._since < self._interval:
            self._held += 1
            return
        more = f" ({self._held} more times since the last time this was said)" if self._held else ""
        self._since, self._held = now, 0
        self._progress.message(text + more)


def for_terminal() -> Progress:
    """Return a live line where standard error is a terminal or this is a notebook, plain lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    return Bar(console) if console.is_terminal or console.is_jupyter else Lines(beat=True)
