"""Comparisons of known truth: runs invented from a law, driven through the whole path to the headline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.comparison import Arm, Told
from hasten.comparison.blocks import Runner, noise
from hasten.comparison.judge import Judged, judged
from hasten.comparison.plan import Cost, Plan
from hasten.comparison.run import _Course
from hasten.comparison.worker import Workload
from hasten.recipe import PLAIN, STRONG

RISING: Callable[[float], float] = lambda share: 0.93 - 0.09 * share**-0.5  # noqa: E731
SATURATED: Callable[[float], float] = lambda share: 0.93 - 0.35 * math.exp(-9 * share)  # noqa: E731


@dataclass(frozen=True)
class Law:
    """How an arm behaves: its accuracy at a share of the *baseline's* epochs, how much faster its epochs are, and its full budget.

    noise: of accuracies, in fractions. stalls: the chance that a run takes 1.3 times as long, and times are skewed.
    """

    accuracy: Callable[[float], float]
    faster: float = 1.0
    full: float = 1.0
    noise: float = 0.003
    stalls: float = 0.0
    seconds: float = 100.0


class Stored:
    """Stands for the store of runs: nothing is kept."""

    taken = ran = 0

    def key(self, arm: Arm, share: float, seed: int, copy: int = 0) -> str:
        return f"{arm.name}-{share}-{seed}-{copy}"

    def block(self, keys: list[str]) -> dict[str, Any]:
        return {}

    def add(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        return record


class Invented(Runner):
    """A runner whose runs come from laws."""

    laws: dict[str, Law]
    rng: np.random.Generator
    drift: dict[int, float]

    def _run(self, arm: Arm, share: float, seed: int, key: str) -> dict[str, Any]:
        law, rng = self.laws[arm.name], self.rng
        drift = self.drift.setdefault(seed, float(rng.normal(0, 0.02)))
        time = law.seconds * share * law.full / law.faster * math.exp(drift + rng.normal(0, 0.03))
        wobble = rng.normal(0, 1, 2)
        if law.stalls:
            time *= (1.3 if rng.random() < law.stalls else 1.0) * math.exp(0.03 * (rng.exponential() - 1))
            wobble = 1 - rng.exponential(1, 2)
        seen = law.accuracy(share * law.full) + law.noise * wobble * np.array([1.0, 1.5])
        return {"arm": arm.name, "share": share, "seed": seed, "failure": None, "accuracy": float(seen[0]),
                "validation": float(seen[1]), "seconds_train": time, "seconds_total": time, "disturbed": [], "idle": []}  # fmt: skip


def arms(laws: dict[str, Law]) -> list[Arm]:
    kinds = {"plain": "baseline", "strong": "strong"}
    return [Arm(name, (PLAIN if name == "plain" else STRONG).with_(epochs=10 * law.full), (), kinds.get(name, "method"))  # type: ignore[arg-type]
            for name, law in laws.items()]  # fmt: skip


def drive(laws: dict[str, Law], seeds: int, seed: int, *, target: float | None = None) -> Judged:
    """Return the report of one invented comparison: A/A test, first pass, placing, blocks, answer."""
    rng = np.random.Generator(np.random.Philox(seed))
    chosen = arms(laws)
    work = Workload("m", None)
    runner = Invented(work, Stored(), None, False, 100)  # type: ignore[arg-type]
    runner.laws, runner.rng, runner.drift = laws, rng, {}
    course = _Course(
        work, chosen, list(range(seeds)), None, False, Told(), 0.0, None, True, target, None, 3, False
    )
    plan = Plan(chosen, list(range(seeds)), dict.fromkeys(laws, Cost(0, 0, 1, 100)), 1.0, None, 3, None)
    aa = noise(runner, chosen[1], 0.25, 3)
    if (
        aa is not None and not aa["ok"]
    ):  # a failed one blocks every claim, which would flatter the rate of false ones
        aa = {**aa, "ratio": 1.0, "lo": 0.9, "hi": 1.1, "ok": True}
    shares, records, _ = course._blocks(runner, plan)
    return judged(chosen, shares, records, goal=target, aa=aa)
