"""Step times of several arms in one process: short chunks in turn, so the machine's moods hit all alike."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

from hasten.errors import SettingsError
from hasten.keyed import permutation
from hasten.measure.clock import Clock
from hasten.measure.load import Limits, Load, Watch
from hasten.measure.stats import speedup
from hasten.measure.verdict import Ratio

AA = "A/A"
"""The arm that runs the baseline against itself; its interval must hold 1.00."""

WANTED_BLOCKS = 10
"""Blocks that the chunk length is chosen for; 8 is where the t interval stands without a mark."""


class Watcher(Protocol):
    """What :class:`hasten.measure.load.Watch` does: report others' load, and why to drop the block."""

    def stop(self) -> tuple[Load, list[str]]: ...


@dataclass(frozen=True)
class Block:
    """One chunk of every arm: seconds per step, the order they ran in, others' load, reasons to drop it."""

    order: tuple[str, ...]
    seconds: dict[str, float]
    load: Load
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class PairedResult:
    """Raw values and ratios of a paired step-time run. ``ratios[arm]`` is the baseline's time over the arm's.

    ``ratios`` has the arm "A/A" as well: ``aa_ok`` says whether its interval holds 1.00. Without that, no
    other ratio of this run may be claimed. ``ratios`` is empty when every block was dropped.
    """

    baseline: str
    arms: tuple[str, ...]
    blocks: tuple[Block, ...]
    steps_per_chunk: dict[str, int]
    warmup: int
    seed: int
    limits: Limits
    ratios: dict[str, Ratio] = field(init=False)

    def __post_init__(self) -> None:
        kept = self.kept()
        ratios = {}
        if kept:
            base = [block.seconds[self.baseline] for block in kept]
            for arm in (AA, *(arm for arm in self.arms if arm != self.baseline)):
                ratios[arm] = speedup(base, [block.seconds[arm] for block in kept], seed=self.seed)
        object.__setattr__(self, "ratios", ratios)

    def kept(self) -> list[Block]:
        """Return the blocks that stand."""
        return [block for block in self.blocks if not block.dropped]

    @property
    def n_dropped(self) -> int:
        """How many blocks the environment rule dropped."""
        return len(self.blocks) - len(self.kept())

    @property
    def aa_ok(self) -> bool:
        """Whether the baseline against itself, over at least 2 blocks, has an interval that holds 1.00."""
        aa = self.ratios.get(AA)
        return aa is not None and aa.n >= 2 and aa.low <= 1.0 <= aa.high

    def seconds_per_step(self, arm: str) -> float:
        """Return the median over kept blocks, in seconds; nan if every block was dropped."""
        values = [block.seconds[arm] for block in self.kept()]
        return statistics.median(values) if values else math.nan

    def to_json(self) -> dict[str, object]:
        """Return everything, raw values of dropped blocks included."""
        return {
            "claim": "step speedup",
            "baseline": self.baseline,
            "arms": list(self.arms),
            "seed": self.seed,
            "warmup_steps": self.warmup,
            "steps_per_chunk": dict(self.steps_per_chunk),
            "limits": asdict(self.limits),
            "n": len(self.kept()),
            "n_dropped": self.n_dropped,
            "unchecked": self._unchecked(),
            "aa_ok": self.aa_ok,
            "ratios": {arm: ratio.to_json() for arm, ratio in self.ratios.items()},
            "blocks": [
                {
                    "order": list(block.order),
                    "seconds_per_step": dict(block.seconds),
                    "load": block.load.to_json(),
                    "dropped": list(block.dropped),
                }
                for block in self.blocks
            ],
        }

    def table(self) -> list[str]:
        """Return the result as lines of plain text."""
        kept = self.kept()
        width = max(len(arm) for arm in (*self.arms, AA, "arm"))
        lines = [
            f"step speedup against {self.baseline}, {len(kept)} blocks, {self.n_dropped} dropped",
            f"{'arm':<{width}}  {'ms/step':>9}  {'p':>6}  {'sd':>5}  speedup",
        ]
        for arm in (self.baseline, AA, *(arm for arm in self.arms if arm != self.baseline)):
            start = f"{arm:<{width}}  {self.seconds_per_step(arm) * 1e3:>9.3f}"
            ratio = self.ratios.get(arm)
            if arm == self.baseline:
                lines.append(f"{start}  {'':>6}  {'':>5}  1 (baseline)")
            elif ratio is None:
                lines.append(f"{start}  {'':>6}  {'':>5}  no block kept")
            else:
                spread = f"{ratio.s:.1%}" if ratio.n > 1 else "-"
                note = " (fewer than 8 blocks)" if ratio.small_n else ""
                lines.append(f"{start}  {ratio.p:>6.3f}  {spread:>5}  {ratio.text()}{note}")
        if not self.aa_ok:
            lines.append(
                "A/A failed: the baseline against itself does not give 1.00 here, so nothing is claimed."
            )
        for reason in sorted({reason.split(" ")[0] for block in self.blocks for reason in block.dropped}):
            count = sum(any(text.startswith(reason) for text in block.dropped) for block in self.blocks)
            lines.append(f"dropped for {reason}: {count}")
        if self._unchecked():
            lines.append("could not be checked on this system: " + ", ".join(self._unchecked()))
        return lines

    def _unchecked(self) -> list[str]:
        return sorted({part for block in self.blocks for part in block.load.unknown()})


def paired_steps(
    arms: Mapping[str, Callable[[], None]],
    *,
    baseline: str,
    seconds: float,
    chunk_s: tuple[float, float] = (0.5, 2.0),
    warmup: int = 5,
    seed: int = 0,
    limits: Limits | None = None,
    clock: Clock | None = None,
    watch: Callable[[Limits], Watcher] = Watch,
    min_blocks: int = 2,
) -> PairedResult:
    """Time the arms' steps against the baseline's in alternating chunks and return ratios with intervals.

    Each arm is a function that does one whole step (its own model, optimizer and batch). Every arm first runs
    ``warmup`` steps that are not counted, then enough to fix its number of steps per chunk. A block is one
    chunk of every arm, plus one more of the baseline as "A/A", in an order drawn per block and keyed by
    ``seed``. Chunks last between ``chunk_s[0]`` and ``chunk_s[1]`` seconds (a chunk is one step if a step
    takes longer), chosen so that about ten blocks fit into ``seconds``; at least ``min_blocks`` are run. A
    block is dropped only if ``limits`` on the environment are exceeded while it ran.

    For work on a GPU give ``clock=Clock(sync=device_sync("cuda"))``: the device is then waited for at the end
    of every chunk. Python's garbage collector is off inside chunks and put back afterwards.

    Raises:
        SettingsError: no such baseline, an arm called "A/A", or a setting out of range.
    """
    if baseline not in arms or AA in arms:
        raise SettingsError(
            f"paired_steps: baseline {baseline!r} must be one of the arms ({', '.join(arms) or 'none'}), "
            f"and no arm may be called {AA!r}, which is added for you."
        )
    if not 0 < chunk_s[0] <= chunk_s[1] or seconds <= 0 or warmup < 3 or min_blocks < 1:
        raise SettingsError(
            f"paired_steps: need 0 < chunk_s[0] <= chunk_s[1], seconds > 0, warmup >= 3 and min_blocks >= 1; "
            f"got chunk_s={chunk_s}, seconds={seconds}, warmup={warmup}, min_blocks={min_blocks}."
        )
    limits = limits or Limits()
    clock = clock or Clock()
    slots = {**arms, AA: arms[baseline]}
    names = list(slots)
    chunk = min(max(seconds / (WANTED_BLOCKS * len(names)), chunk_s[0]), chunk_s[1])
    collecting = gc.isenabled()
    gc.disable()
    try:
        steps = {}
        for name, step in arms.items():
            _chunk(clock, step, warmup)
            steps[name] = _steps_for(clock, step, chunk)
        steps[AA] = steps[baseline]
        started = clock.wall()
        blocks: list[Block] = []
        while len(blocks) < min_blocks or _another_fits(clock.wall() - started, len(blocks), seconds):
            order = tuple(names[i] for i in permutation(len(names), seed, "paired block", len(blocks)))
            gc.collect()
            watcher = watch(limits)
            times = {name: _chunk(clock, slots[name], steps[name]) / steps[name] for name in order}
            load, reasons = watcher.stop()
            blocks.append(Block(order, {name: times[name] for name in names}, load, tuple(reasons)))
    finally:
        if collecting:
            gc.enable()
    return PairedResult(baseline, tuple(arms), tuple(blocks), steps, warmup, seed, limits)


def _another_fits(spent: float, blocks: int, seconds: float) -> bool:
    """Decide by elapsed time alone, so that no block's ratio can influence when the run ends."""
    return spent + spent / blocks <= seconds


def _chunk(clock: Clock, step: Callable[[], None], steps: int) -> float:
    """Return the seconds of ``steps`` steps, the device waited for at the end only."""
    before = clock.totals().get("chunk", 0.0)
    with clock.span("chunk"):
        for _ in range(steps):
            step()
    return clock.totals()["chunk"] - before


def _steps_for(clock: Clock, step: Callable[[], None], chunk: float) -> int:
    """Return how many steps fill ``chunk`` seconds, from growing trial runs of up to a quarter of that."""
    steps = 1
    while True:
        took = _chunk(clock, step, steps)
        if took >= chunk / 4:
            return max(1, round(chunk * steps / took))
        wanted = math.ceil(steps * chunk / 4 / took) if took > 0 else 8 * steps
        steps = min(8 * steps, max(steps + 1, wanted))
