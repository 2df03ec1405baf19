"""A polite stop: SIGTERM and SIGINT ask the training loop to save and leave at the next step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While entered, SIGTERM and SIGINT only set ``requested`` to the signal's number.

    A second signal ends the process at once, with nothing saved. On leaving, the handlers from before return.
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
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 143 for SIGTERM, 130 for SIGINT; else 0."""
        return 0 if self.requested is None else 128 + self.requested

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
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
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = int(number)
