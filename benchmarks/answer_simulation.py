"""How often a comparison's answer is right: invented runs of known truth, driven through the whole path to the headline.

Every cell is one truth, one shape of the learning curve, one kind of noise and one number of seeds. A shortening is a
"method" that is nothing but the strong baseline trained for a part of its epochs; its true ratio is 1.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.comparison import synthetic
from tests.comparison.synthetic import RISING, SATURATED, Law, drive

import hasten
from benchmarks.common import claim, kept, store

CLAIM = "comparisons of known truth: false 'sooner' <= 3%, 95% intervals hold the truth in 93 to 97%, 1.3x found in >= 80%"
MINUTES = 20
SEEDS = (3, 5, 10)
NAME = "answer_simulation"
REPETITIONS = 1000
"""Of every cell; HASTEN_REPETITIONS gives another number. Every finished cell is kept."""
PROCESSES = 2
CHUNK = 25
CURVES = {"rising": RISING, "saturated": SATURATED}
TRUTHS = {"1.0x": (1.0, 1.0), "1.1x": (1.1, 1.0), "1.3x": (1.3, 1.0),
          "shortened to 0.8": (1.0, 0.8), "shortened to 0.65": (1.0, 0.65)}  # fmt: skip
"""Speed of the method's epochs, and its full budget as a share of the baseline's."""
STALLS = 0.1
NOISE = {"normal": (0.0, 0.0), "skewed": (STALLS, STALLS), "skewed method only": (0.0, STALLS)}
"""Chances that a run of the baselines, and of the method, is stalled; where above 0 the noise is skewed."""
PLAIN_SPEED = 0.5


class Cell(NamedTuple):
    """One truth under one kind of noise, asked with a number of seeds."""

    truth: str
    curve: str
    noise: str
    seeds: int

    def __str__(self) -> str:
        return f"{self.truth}, {self.curve}, {self.noise}, {self.seeds} seeds"

    @property
    def laws(self) -> dict[str, Law]:
        """How plain, strong and the method behave."""
        curve = CURVES[self.curve]
        speed, full = TRUTHS[self.truth]
        own, theirs = NOISE[self.noise][1], NOISE[self.noise][0]
        return {
            "plain": Law(curve, faster=PLAIN_SPEED, stalls=theirs),
            "strong": Law(curve, stalls=theirs),
            "method": Law(curve, faster=speed, full=full, stalls=own),
        }

    @property
    def ratio(self) -> float:
        """The true ratio of the geometric mean times: a stall multiplies a time by 1.3."""
        baselines, method = NOISE[self.noise]
        return float(TRUTHS[self.truth][0] * 1.3 ** (baselines - method))


CELLS = [Cell(*parts) for parts in itertools.product(TRUTHS, CURVES, NOISE, SEEDS)]


class Answer(NamedTuple):
    """What one comparison said of the method: ratio (None without one), interval, verdict, and the arm of the headline."""

    ratio: float | None
    low: float
    high: float
    verdict: str
    claimed: str | None


def asked(cell: Cell, numbers: Iterable[int]) -> list[Answer]:
    """Return the answers of the repetitions with these numbers."""
    answers = []
    for number in numbers:
        found = drive(cell.laws, cell.seeds, 1_000_000 * CELLS.index(cell) + number)
        versus = next(row for row in found.rows if row["name"] == "method")["vs_strong"]
        assert versus is not None
        high = math.inf if versus["hi"] is None else versus["hi"]
        answers.append(
            Answer(versus["ratio"], versus["lo"] or 0.0, high, versus["verdict"], found.verdict["claim"])
        )
    return answers


def row_of(cell: Cell, answers: list[Answer]) -> dict[str, Any]:
    """Return the figures of a cell; shares are of all its comparisons."""
    n, truth = len(answers), cell.ratio
    ratios = [a.ratio for a in answers if a.ratio is not None]

    def share(holds: Callable[[Answer], bool]) -> float:
        return sum(map(holds, answers)) / n

    return {
        **cell._asdict(), "ratio": truth, "repetitions": n,
        "coverage": share(lambda a: a.low <= truth <= a.high),
        "sooner": share(lambda a: a.verdict == "sooner"),
        "later": share(lambda a: a.verdict == "later"),
        "too wide": share(lambda a: a.verdict == "too wide"),
        "headline": share(lambda a: a.claimed == "method"),
        "headline of strong": share(lambda a: a.claimed == "strong"),
        "without a ratio": 1 - len(ratios) / n,
        "typical ratio": statistics.median(ratios) if ratios else None,
    }  # fmt: skip


def one_cell(pool: ProcessPoolExecutor, cell: Cell, repetitions: int) -> dict[str, Any]:
    """Return the row of a cell, its repetitions shared among the processes."""
    chunks = [range(i, min(i + CHUNK, repetitions)) for i in range(0, repetitions, CHUNK)]
    found = pool.map(partial(asked, cell), chunks)
    return row_of(cell, list(itertools.chain.from_iterable(found)))


def claims_of(rows: list[dict[str, Any]], repetitions: int) -> list[dict[str, Any]]:
    """Return the worst figures, each against its target."""
    n = f"{repetitions} repetitions a cell"

    def none_true(row: dict[str, Any]) -> bool:
        return float(row["ratio"]) <= 1

    def worst(
        what: str, key: str, chosen: Callable[[dict[str, Any]], bool], pick: Any, least: float, most: float
    ) -> dict[str, Any]:
        able = [row for row in rows if chosen(row)]
        found = pick(able, key=lambda row: row[key])
        where = f"{found['truth']}, {found['curve']}, {found['noise']}, {found['seeds']} seeds"
        value = f"{100 * found[key]:.1f}% in the worst of {len(able)} cells ({where}), {n}"
        aim = f"{100 * least:g} to {100 * most:g}%"
        return claim([], what, value, target=aim, met=least <= found[key] <= most)

    def both_sides(row: dict[str, Any]) -> bool:
        return bool(row["noise"] != "skewed method only")

    return [
        worst("false 'sooner' in the table", "sooner", none_true, max, 0.0, 0.03),
        worst("false headline", "headline", none_true, max, 0.0, 0.03),
        worst("95% intervals that hold the truth, least", "coverage", both_sides, min, 0.93, 0.97),
        worst("95% intervals that hold the truth, most", "coverage", both_sides, max, 0.93, 0.97),
        worst("95% intervals that hold the truth, noise skewed on one side only", "coverage",
              lambda row: not both_sides(row), min, 0.90, 1.0),
        worst("a true 1.3x in the headline, 5 seeds", "headline",
              lambda row: row["truth"] == "1.3x" and row["seeds"] == 5, min, 0.80, 1.0),
    ]  # fmt: skip


def code() -> str:
    """Return a hash of the code that answers: what is kept of another version says nothing about this one."""
    package = Path(hasten.__file__).parent
    files = [
        *sorted(package.glob("comparison/*.py")),
        package / "measure/curve.py",
        package / "measure/stats.py",
    ]
    content = b"".join(file.read_bytes() for file in [*files, Path(synthetic.__file__)])
    return hashlib.sha256(content).hexdigest()[:12]


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of the printed table."""
    typical = "-" if row["typical ratio"] is None else f"{row['typical ratio']:.3f}"
    return (
        f"{row['truth']:18} {row['curve']:10} {row['noise']:19} {row['seeds']:2} {row['ratio']:6.3f} {typical:>7} "
        f"{row['coverage']:9.1%} {row['sooner']:7.1%} {row['later']:6.1%} {row['too wide']:9.1%} {row['headline']:9.1%}"
    )


def main(smoke: bool = False) -> None:
    """Drive all cells, printing a line for each, and store the table."""
    repetitions = 2 if smoke else int(os.environ.get("HASTEN_REPETITIONS", REPETITIONS))
    cells = CELLS[:: len(SEEDS) * 4] if smoke else CELLS
    version = code()
    print(f"{'truth':18} {'curve':10} {'noise':19} {'n':>2} {'ratio':>6} {'typical':>7} {'coverage':>9} {'sooner':>7} "
          f"{'later':>6} {'too wide':>9} {'headline':>9}")  # fmt: skip
    rows = []
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("forkserver")) as pool:
        for cell in cells:
            part = f"{version}-{repetitions}-{cell}".replace(", ", "-").replace(" ", "-")
            rows.append(kept(NAME, part, partial(one_cell, pool, cell, repetitions), smoke))
            print(line(rows[-1]), flush=True)
    claims = [] if smoke else claims_of(rows, repetitions)
    store(NAME, {"repetitions": repetitions, "cells": rows}, smoke, claims)
