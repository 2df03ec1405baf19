"""What ``hasten compare`` shows while it runs: a line for each finished run, and one live line for the one in progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from hasten.cli.output import note
from hasten.comparison import Told


class Lines(Told):
    """Prints each finished run with the time that is left; in between a live line on a terminal, a line a minute elsewhere."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._begun = tell, time.monotonic()
        self._first = -1
        self._tty = sys.stderr.isatty()
        self._shown, self._width = time.monotonic(), 0
        self._left, self._told_busy = "", False

    def say(self, line: str) -> None:
        self._clear()
        self._tell(line)
        self._shown = time.monotonic()

    def run(self, done: int, planned: int, record: dict[str, Any]) -> None:
        if self._first < 0:
            self._first, self._begun = done - 1, time.monotonic() - record.get("wall", 0.0)
        spent = time.monotonic() - self._begun
        left = spent / max(1, done - self._first) * max(0, planned - done)
        self._left = f"left {left:4.0f} s"
        what = f"failed: {str(record['failure']).splitlines()[0]}" if record["failure"] else (
            f"{100 * record['accuracy']:5.2f}% in {record['seconds_train']:6.2f} s")  # fmt: skip
        busy = "   busy" if record["disturbed"] else ""
        if busy and not self._told_busy:
            self._told_busy = True
            busy += ": other processes used the machine, so this time will not count"
        self.say(f"Train  {done:>3}/{max(planned, done)}  {record['arm']:24} {record['share']:>4.0%}  seed {record['seed']}  {what}   {self._left}{busy}")  # fmt: skip

    def live(self, what: str, step: int, total: int) -> None:
        now = time.monotonic()
        text = f"       {what}: {step}/{total}  {self._left}"
        if self._tty and now - self._shown >= 0.25:
            self._shown = now
            sys.stderr.write("\r" + text[:99].ljust(self._width))
            sys.stderr.flush()
            self._width = min(len(text), 99)
        elif not self._tty and now - self._shown >= 60:
            self._shown = now
            note(text)

    def _clear(self) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0
