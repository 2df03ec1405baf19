"""Who else is using the machine: steal time, strangers' CPU share and swap, for the rule that drops blocks.

A block of a paired run may be dropped only by these readings, by limits fixed beforehand, never by its own
time.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Reading:
    """Counters at one moment, in seconds (CPU) and pages (swap); None where the system does not tell."""

    at: float
    steal: float | None
    busy: float | None
    own: float | None
    swapped: int | None
    cores: int

    def others(self) -> float | None:
        """Return the CPU seconds of processes that are not ours."""
        return None if self.busy is None or self.own is None else self.busy - self.own


@dataclass(frozen=True)
class Limits:
    """When a block is dropped: fixed before the run and stored with it.

    ``steal``: CPU seconds stolen by the hypervisor per second of wall time (0.01 by the protocol).
    ``foreign``: share of all cores used by processes that are not ours (our choice, 5%; it stands for the
    "load average of strangers", which cannot be told apart from our own). ``swap_pages``: pages moved to or
    from disk (our choice, 256, which is 1 MiB: less is a stranger waking up).
    """

    steal: float = 0.01
    foreign: float = 0.05
    swap_pages: int = 256


@dataclass(frozen=True)
class Load:
    """What others took between two readings; None where the system does not tell."""

    wall: float
    steal: float | None
    foreign: float | None
    swap_pages: int | None

    def disturbed(self, limits: Limits) -> list[str]:
        """Return why a block measured under this load must be dropped, empty if it stands."""
        reasons = []
        if self.steal is not None and self.steal > limits.steal:
            reasons.append(f"steal {self.steal:.1%} of wall > {limits.steal:.1%}")
        if self.foreign is not None and self.foreign > limits.foreign:
            reasons.append(f"other processes used {self.foreign:.1%} of the cores > {limits.foreign:.1%}")
        if self.swap_pages is not None and self.swap_pages > limits.swap_pages:
            reasons.append(f"swapped {self.swap_pages} pages > {limits.swap_pages}")
        return reasons

    def unknown(self) -> list[str]:
        """Return which parts of the rule could not be checked on this system."""
        parts = {"steal": self.steal, "other processes": self.foreign, "swap": self.swap_pages}
        return [name for name, value in parts.items() if value is None]

    def to_json(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return asdict(self)


class Watch:
    """Measures what others take from start to :meth:`stop`. One watch per block."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._start = reading()

    def stop(self) -> tuple[Load, list[str]]:
        """Return the load since the watch was made and the reasons to drop the block (none: it stands)."""
        load = between(self._start, reading())
        return load, load.disturbed(self.limits)


def reading() -> Reading:
    """Return the counters now. Reading costs about a millisecond: it looks at every process once."""
    cpu = _cpu_ticks()
    tick = os.sysconf("SC_CLK_TCK") if cpu else 1
    own = _own_ticks() if cpu else None
    return Reading(
        at=time.perf_counter(),
        steal=cpu[1] / tick if cpu else None,
        busy=cpu[0] / tick if cpu else None,
        own=own / tick if own is not None else None,
        swapped=_swapped(),
        cores=os.cpu_count() or 1,
    )


def between(start: Reading, end: Reading) -> Load:
    """Return the load from ``start`` to ``end``."""
    wall = max(end.at - start.at, 1e-9)
    steal = foreign = pages = None
    if start.steal is not None and end.steal is not None:
        steal = max(0.0, end.steal - start.steal) / wall
    before, after = start.others(), end.others()
    if before is not None and after is not None:
        others = after - before
        foreign = min(1.0, max(0.0, others / (wall * end.cores)))
    if start.swapped is not None and end.swapped is not None:
        pages = end.swapped - start.swapped
    return Load(wall, steal, foreign, pages)


def busy(since: Reading) -> float | None:
    """Return the share of all cores (0 to 1) that other processes used since ``since``; None if unknown.

    Own processes are this one and its descendants.
    """
    return between(since, reading()).foreign


def steal_ticks() -> int | None:
    """Return the ticks the hypervisor took from this machine since boot, over all cores; None if unknown."""
    ticks = _cpu_ticks()
    return ticks[1] if ticks else None


def load_average() -> tuple[float, float, float] | None:
    """Return the 1, 5 and 15 minute load averages, our own processes included; None if unknown."""
    try:
        return os.getloadavg()
    except (OSError, AttributeError):
        return None


def _cpu_ticks() -> tuple[int, int] | None:
    """Return (busy, stolen) ticks of all cores. Guest time is part of user time already."""
    try:
        fields = (PROC / "stat").read_text(encoding="ascii").splitlines()[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError, IndexError):
        return None
    return user + nice + system + irq + softirq, steal


def _own_ticks() -> int | None:
    """Return CPU ticks of this process and its descendants, the ones already waited for included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    try:
        entries = [entry.name for entry in os.scandir(PROC) if entry.name.isdigit()]
    except OSError:
        return None
    for entry in entries:
        try:
            fields = (
                (PROC / entry / "stat")
                .read_text(encoding="utf-8", errors="replace")
                .rpartition(")")[2]
                .split()
            )
        except OSError:
            continue  # It ended since the listing.
        parents[int(entry)] = int(fields[1])
        ticks[int(entry)] = sum(map(int, fields[11:15]))
    me = os.getpid()
    if me not in ticks:
        return None
    children: dict[int, list[int]] = {}
    for process, parent in parents.items():
        children.setdefault(parent, []).append(process)
    total, queue = 0, [me]
    while queue:
        process = queue.pop()
        total += ticks[process]
        queue += children.get(process, [])
    return total


def _swapped() -> int | None:
    try:
        lines = (PROC / "vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    pages = [int(line.split()[1]) for line in lines if line.startswith(("pswpin ", "pswpout "))]
    return sum(pages) if pages else None
