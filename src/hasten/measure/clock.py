"""The one clock: named spans that add up to the wall time, the device waited for where each one ends.

A GPU runs behind the Python that feeds it, so a timer read without waiting measures the launch, not the work
(1ytic/warp-rnnt#9). All timing in hasten therefore goes through :class:`Clock`, which waits at span ends
only.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

import torch

from hasten.errors import CheckpointError, SettingsError

SPANS = (
    "data",
    "forward",
    "backward",
    "optimizer",
    "method",
    "save",
    "eval",
    "compile",
    "setup",
    "prepare",
    "final",
)
"""The span names hasten uses. Any other name counts as training time, so a typo hides nothing."""

OUTSIDE_TRAINING = ("save", "eval", "compile", "setup", "prepare", "final")


class Span(Protocol):
    """What :meth:`Clock.span` returns: a context manager that may be entered again, also inside itself."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def device_sync(device: torch.device | str) -> Callable[[], None] | None:
    """Return the function that waits for ``device``'s queue, or None where work is synchronous (cpu)."""
    device = torch.device(device)
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return None


def process_seconds() -> float | None:
    """Return the seconds since this process started, for ``t_total``; None where the system does not tell.

    Known on Linux, with a resolution of one scheduler tick, commonly 10 ms.
    """
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, IndexError, ValueError):
        return None


class Clock:
    """Adds up seconds under names such as ``forward`` or ``method``.

    Spans nest: while an inner span runs, the outer one stands still, so every second is charged once and the
    totals sum to the wall time spent inside spans. The device is waited for when a stretch is charged (a span
    ends, or an inner span takes over from an outer one), never inside a stretch and not when a first span
    starts: work queued outside all spans is paid for by the next span instead of being lost.

    One clock serves one thread. ``sync`` is :func:`device_sync` of the training device, or any function that
    waits; ``now`` and ``cpu`` are time sources in seconds (for tests). A clock with ``enabled=False`` charges
    nothing.
    """

    def __init__(
        self,
        *,
        sync: Callable[[], None] | None = None,
        now: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.process_time,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self._sync, self._now, self._cpu = sync, now, cpu
        self._own: dict[str, float] = {}
        self._carried: dict[str, float] = {}
        self._carried_wall = self._carried_cpu = 0.0
        self._identity = uuid.uuid4().hex
        self._stack: list[str] = []
        self._spans: dict[str, _Span] = {}
        self._started, self._cpu_started = now(), cpu()
        self._mark = self._started

    def span(self, name: str) -> Span:
        """Return the context manager that charges its body's own time to ``name``."""
        if not self.enabled:
            return _IDLE
        span = self._spans.get(name)
        if span is None:
            span = self._spans[name] = _Span(self, name)
        return span

    def add(self, name: str, seconds: float) -> None:
        """Charge ``seconds`` measured some other way to ``name``.

        Inside an open span the same seconds are taken out of that span, so the sum stays the wall time.

        Raises:
            SettingsError: ``seconds`` is negative, not finite, or more than the open span has.
        """
        if not self.enabled:
            return
        if not (math.isfinite(seconds) and seconds >= 0.0):
            raise SettingsError(f"clock.add({name!r}, {seconds}): seconds must be a finite number >= 0.")
        if self._stack:
            self._charge(self._now())
            outer = self._stack[-1]
            left = self._own[outer] - seconds
            if left < 0.0:
                raise SettingsError(
                    f"clock.add({name!r}, {seconds}): open span {outer!r} has only {self._own[outer]:.6f} s."
                )
            self._own[outer] = left
        self._own[name] = self._own.get(name, 0.0) + seconds

    def totals(self) -> dict[str, float]:
        """Return seconds for each name so far, earlier processes and the running stretch included."""
        if self._stack:
            self._charge(self._now())
        names = [*self._carried, *(name for name in self._own if name not in self._carried)]
        return {name: self._carried.get(name, 0.0) + self._own.get(name, 0.0) for name in names}

    def wall(self) -> float:
        """Return seconds since the clock was made, plus those of earlier processes."""
        return self._carried_wall + self._now() - self._started

    def cpu_seconds(self) -> float:
        """Return CPU seconds of this process since the clock was made, plus those of earlier processes."""
        return self._carried_cpu + self._cpu() - self._cpu_started

    def columns(self) -> dict[str, float]:
        """Return the columns of a result table, in seconds.

        ``t_headline`` is ``t_train + t_final``: what a time-to-accuracy claim counts. ``t_method`` is a part
        of ``t_train``. Every name outside the known list counts as training. ``t_save`` stands apart (our
        choice: checkpoints are written at the same cadence in every arm). ``t_other`` was spent outside all
        spans.
        """
        totals = self.totals()
        train = math.fsum(seconds for name, seconds in totals.items() if name not in OUTSIDE_TRAINING)
        columns = {"t_train": train, "t_method": totals.get("method", 0.0)}
        columns |= {f"t_{name}": totals.get(name, 0.0) for name in OUTSIDE_TRAINING}
        wall = self.wall()
        columns["t_headline"] = train + columns["t_final"]
        columns["t_other"] = max(0.0, wall - math.fsum(totals.values()))
        columns["t_total"] = wall
        columns["cpu_seconds"] = self.cpu_seconds()
        return columns

    def state_dict(self) -> dict[str, object]:
        """Return what a checkpoint keeps: plain strings and floats, JSON-ready."""
        return {
            "clock": self._identity,
            "totals": self.totals(),
            "wall": self.wall(),
            "cpu": self.cpu_seconds(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a saved clock: its seconds are added to what this process has spent already.

        A state that this very clock saved is already counted here, so going back to it forgets no second and
        counts none twice. Time between the last checkpoint and a kill is unknown and not included.

        Raises:
            CheckpointError: the state is not one that :meth:`state_dict` wrote.
        """
        totals, identity = state.get("totals"), state.get("clock")
        if not isinstance(totals, Mapping) or not isinstance(identity, str):
            raise CheckpointError(
                "clock state: need 'clock' (text), 'totals' (name: seconds), 'wall' and 'cpu'."
            )
        carried = {str(name): _seconds(f"totals[{name!r}]", value) for name, value in totals.items()}
        wall, cpu = _seconds("wall", state.get("wall")), _seconds("cpu", state.get("cpu"))
        if identity == self._identity:
            return
        self._carried, self._carried_wall, self._carried_cpu = carried, wall, cpu

    def _charge(self, now: float) -> None:
        name = self._stack[-1]
        self._own[name] = self._own.get(name, 0.0) + now - self._mark
        self._mark = now

    def _settle(self) -> None:
        """Wait for the device, then charge the stretch that ends here."""
        try:
            if self._sync is not None:
                self._sync()
        finally:
            self._charge(self._now())

    def _push(self, name: str) -> None:
        if self._stack:
            self._settle()
        else:
            self._mark = self._now()
        self._stack.append(name)

    def _pop(self) -> None:
        try:
            self._settle()
        finally:
            self._stack.pop()


class _Span:
    """Keeps no state of its own, so one object per name serves every use."""

    __slots__ = ("_clock", "_name")

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock._push(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock._pop()


class _Idle:
    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


_IDLE = _Idle()


def _seconds(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise CheckpointError(
            f"clock state: {what} is {value!r}; it must be a finite number of seconds >= 0."
        )
    return float(value)
