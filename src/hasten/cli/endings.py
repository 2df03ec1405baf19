"""How a command ends that does not end well: stopped by a signal, by a closed pipe, or by a fault."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hasten.cli.output import note

FAULT = 70  # EX_SOFTWARE of sysexits.h
BROKEN_PIPE = 128 + 13
RESUMING = ("train", "compare")  # commands that go on where they were when they are given again
_ENDING = tuple(
    number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)


@contextmanager
def stops() -> Iterator[list[int]]:
    """Context in which SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does; yields the list of those that came.

    A signal that is ignored stays so (``nohup``). Does nothing outside the main thread.
    """
    seen: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interruption(error: BaseException | None) -> bool:
    """Return whether ``error`` came from a KeyboardInterrupt, which typer turns into an exit."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def stopped(arguments: Sequence[str], seen: Sequence[int]) -> NoReturn:
    """Say that the command was stopped, and whether it can go on, and exit."""
    resumes = any(name in arguments[:1] for name in RESUMING)
    note("stopped; the same command goes on from there" if resumes else "stopped")
    sys.exit(128 + (seen[-1] if seen else signal.SIGINT))


def closed_pipe() -> None:
    """Leave quietly when the reader of the output is gone, as ``head`` is after its lines."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def crashed(error: Exception) -> int:
    """Write the traceback of ``error`` to a file, say so in one line, and return the exit code.

    With ``HASTEN_TRACEBACK=1`` it is shown as well.
    """
    text = "".join(traceback.format_exception(error))
    what = " ".join(str(error).split())[:300]
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="hasten-", suffix=".log", delete=False
        ) as log:
            log.write(text)
        where = f"traceback in {log.name}"
    except OSError as full:
        where = f"the traceback could not be written: {full}"
    if os.environ.get("HASTEN_TRACEBACK") == "1":
        sys.stderr.write(text)
    else:
        where += "; HASTEN_TRACEBACK=1 shows it"
    place = _own_code(error)
    note(f"error: {type(error).__name__}{': ' if what else ''}{what} ({place}{where})")
    return FAULT


def _own_code(error: Exception) -> str:
    """Return "in FILE, line N; " for the last line of the user's own code that ``error`` passed through, if any."""
    others = (str(Path(__file__).parents[1]), sys.prefix, sys.base_prefix, "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others):
            return f"in {frame.filename}, line {frame.lineno}; "
    return ""


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings as lines for a user, without the place in the code that gave them."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        note(f"warning: {message}")

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
