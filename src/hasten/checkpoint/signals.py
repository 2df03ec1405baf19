"""A polite stop: SIGTERM, SIGINT and their like ask the training loop to save and leave at the next step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# A person's or a system's stop; a closed terminal; a scheduler's warning; the end of the CPU time allowed.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
INSISTENT = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While entered, SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGXCPU only set ``requested`` to the first one's number.

    A second SIGTERM or SIGINT ends the process at once, with nothing saved; the others may come several times, as a closed
    terminal's do. A SIGHUP that ``nohup`` has switched off stays so. On leaving, the handlers from
    before return.
    Outside the main thread, where Python allows no handlers, it does nothing; ``requested`` can still be set
    by hand.

        with StopSignal() as stop:
            for batch in batches:
                step(batch)
                if stop.requested:
                    save()
                    raise SystemExit(stop.exit_code)
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._insisted = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 143 for SIGTERM, 130 for SIGINT; else 0."""
        return 0 if self.requested is None else 128 + self.requested

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number not in INSISTENT and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler from before was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in INSISTENT:
            if self._insisted:
                os._exit(128 + number)
            self._insisted = True
        if self.requested is None:
            self.requested = int(number)
