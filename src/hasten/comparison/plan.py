"""How long a comparison will take, told before anything trains, and what has to give so that it fits into a limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.comparison.arms import Arm
from hasten.comparison.curves import Record
from hasten.comparison.shares import FIRST
from hasten.errors import HastenError, SettingsError
from hasten.registry import method

PROBE_STEPS = 10
SEEDS, MOST_SEEDS = 3, 10
LEAST_EPOCHS = 2.0
LEAST_IMAGES = 500
MARGIN = 0.92
"""Share of the limit that the plan fills."""

USUAL = (1.0, 2.0**-0.5, 0.5)
"""Shares an arm is counted with before the first pass has told."""

COMPILE_FROM = 900.0
"""Seconds of a full strong run from which it is tried whether torch.compile pays (our choice: compiling takes a minute or two)."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one arm: overhead of a run, its attaching, and one step; and the steps of the full budget."""

    overhead: float
    attach: float
    step: float
    steps: float

    def run(self, share: float) -> float:
        """Return the seconds of a run at ``share`` of the budget."""
        return self.overhead + self.attach + self.step * self.steps * share


@dataclass
class Plan:
    """arms: with the budgets that fit. costs: by arm. changes: what was cut or added, in words."""

    arms: list[Arm]
    seeds: list[int]
    costs: dict[str, Cost]
    keep: float
    fixed: tuple[float, ...] | None
    pairs: int
    limit: float | None
    changes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Predicted duration of all runs."""
        return total(self.costs, len(self.seeds), self.pairs, self.fixed, self.aa_arm)

    @property
    def runs(self) -> int:
        """Runs that are planned, as far as is known before the first pass."""
        shares = len(self.fixed or USUAL)
        first = 0 if self.fixed else len(self.arms)
        return 2 * self.pairs + first + len(self.arms) * shares * len(self.seeds)

    @property
    def aa_arm(self) -> str:
        """The arm that is run against itself."""
        return reference(self.arms).name


def stored(plan: Plan) -> dict[str, Any]:
    """Return what a later call needs to follow ``plan`` again, as plain JSON."""
    return {
        "epochs": {arm.name: arm.recipe.epochs for arm in plan.arms}, "seeds": plan.seeds, "keep": plan.keep,
        "costs": {name: dataclasses.asdict(cost) for name, cost in plan.costs.items()}, "changes": plan.changes,
        "compiled": any(m.settings().get("compile", False) for arm in plan.arms for m in arm.methods),
    }  # fmt: skip


def again(plan: Plan, kept: Mapping[str, Any]) -> Plan:
    """Return ``plan`` as it was stored, so that a command that was stopped goes on with the same runs."""
    arms = [arm.with_epochs(kept["epochs"][arm.name]) for arm in plan.arms]
    return dataclasses.replace(
        plan, arms=[_compiled(arm) for arm in arms] if kept["compiled"] else arms, seeds=kept["seeds"], keep=kept["keep"],
        costs={name: Cost(**cost) for name, cost in kept["costs"].items()}, changes=kept["changes"],
    )  # fmt: skip


def reference(arms: Sequence[Arm]) -> Arm:
    """Return the arm that others are measured against: strong, else plain, else the first."""
    for kind in ("strong", "baseline"):
        for arm in arms:
            if arm.kind == kind:
                return arm
    return arms[0]


def probe(run: Callable[[Arm, float], Record], arm: Arm, steps_an_epoch: int) -> Cost:
    """Time a few steps of ``arm`` in a run of its own. Raises HastenError with the run's failure if it has one."""
    steps = max(1, round(arm.recipe.epochs * steps_an_epoch))
    record = run(arm, min(1.0, (PROBE_STEPS + 0.25) / steps))
    if record["failure"] and not record.get("idle"):  # too short for a method to act says nothing of its run
        raise HastenError(f"{arm.name} cannot be run: {record['failure']}")
    step = record["step_seconds"] or record["seconds_train"] / max(1, record["steps"])
    attach = record["seconds_attach"]
    overhead = max(0.0, record["wall"] - attach - step * record["steps"])
    return Cost(overhead, attach, step, steps)


def total(
    costs: Mapping[str, Cost], seeds: int, pairs: int, fixed: tuple[float, ...] | None, aa_arm: str
) -> float:
    """Return the seconds of a whole comparison."""
    seconds = 2 * pairs * costs[aa_arm].run(min(fixed) if fixed else min(FIRST))
    for cost in costs.values():
        if not fixed:
            seconds += cost.run(min(FIRST))
        seconds += seeds * sum(cost.run(share) for share in fixed or USUAL)
    return seconds


def fitted(
    plan: Plan, images: int, classes: int, *, seeds_given: bool, spent: float, can_cut: bool = True
) -> Plan:
    """Return ``plan`` cut to its limit, or with more seeds where there is room.

    Epochs give first, down to 2, then images, then seeds. Raises SettingsError if even then it does not fit.
    """
    limit = plan.limit
    if limit is None:
        return plan
    room = limit * MARGIN - spent
    if plan.seconds <= room:
        more = plan
        while not seeds_given and len(more.seeds) < MOST_SEEDS:
            wider = dataclasses.replace(plan, seeds=list(range(len(more.seeds) + 1)))
            if wider.seconds > room:
                break
            more = wider
        if len(more.seeds) > len(plan.seeds):
            more.changes = [*plan.changes, f"{len(more.seeds)} seeds, since there is time"]
        return more
    longest = max(arm.recipe.epochs for arm in plan.arms)
    scale = _scale(plan, room)
    least = min(1.0, LEAST_EPOCHS / longest)
    changes = list(plan.changes)
    epochs = max(scale, least)
    plan = _scaled(plan, epochs)
    if epochs < 1:
        changes.append(f"{longest * epochs:.3g} epochs instead of {longest:g}")
    if scale < least:
        share = max(_scale(plan, room), min(1.0, max(LEAST_IMAGES, 10 * classes) / images))
        if share < 1 and can_cut:
            plan = dataclasses.replace(plan, keep=share, costs=_slower(plan.costs, share))
            changes.append(f"{int(images * share):,} of {images:,} training images")
    while plan.seconds > room * 1.02 and len(plan.seeds) > 1 and not seeds_given:
        plan = dataclasses.replace(plan, seeds=plan.seeds[:-1])
        changes = [c for c in changes if not c.endswith("seeds")]
        changes.append(f"{len(plan.seeds)} seed{'s' if len(plan.seeds) > 1 else ''}")
    if plan.seconds > room * 1.1:
        raise SettingsError(
            f"the limit of {duration(limit)} is too short: with {LEAST_EPOCHS:g} epochs of "
            f"{int(images * plan.keep):,} images and {len(plan.seeds)} seed(s) it takes about {duration(plan.seconds + spent)}. "
            f"Give a longer limit, fewer methods or seeds, or a smaller model or image size."
        )
    return dataclasses.replace(plan, changes=changes)


def _scale(plan: Plan, room: float) -> float:
    """Return the share of the epochs at which the plan takes ``room`` seconds; below 0 where it never does."""
    whole, none = plan.seconds, dataclasses.replace(plan, costs=_slower(plan.costs, 0.0)).seconds
    return (room - none) / max(whole - none, 1e-9)


def _slower(costs: Mapping[str, Cost], share: float) -> dict[str, Cost]:
    return {name: dataclasses.replace(cost, steps=cost.steps * share) for name, cost in costs.items()}


def _scaled(plan: Plan, share: float) -> Plan:
    arms = [arm.with_epochs(round(arm.recipe.epochs * share, 3)) for arm in plan.arms]
    return dataclasses.replace(plan, arms=arms, costs=_slower(plan.costs, share))


def duration(seconds: float) -> str:
    """Return e.g. ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def from_text(text: str) -> float:
    """Return the seconds of ``90s``, ``20m``, ``1h30m`` or a number of minutes. Raises SettingsError for other text."""
    import re

    match = re.fullmatch(
        r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower()
    )
    parts = [float(part or 0) for part in match.groups()] if match and text.strip() else []
    seconds = parts[0] * 3600 + parts[1] * 60 + parts[2] if parts else _minutes(text)
    if not (math.isfinite(seconds) and seconds > 0):
        raise SettingsError(f"limit {text!r}: give a time above 0 such as 20m, 90s or 1h30m.")
    return seconds


def _minutes(text: str) -> float:
    try:
        return float(text) * 60
    except ValueError as error:
        raise SettingsError(f"limit {text!r}: give a time such as 20m, 90s or 1h30m.") from error


def compiled(
    arms: Sequence[Arm], costs: Mapping[str, Cost], run: Callable[[Arm, float], Record], steps_an_epoch: int
) -> tuple[list[Arm], str]:
    """Return the arms with ``torch.compile`` where it pays within the shortest runs of the strong arm, and what was found.

    It is tried only where a full strong run is long enough that it might. The time to compile counts.
    """
    base = reference(arms)
    cost = costs[base.name]
    own = next((m for m in base.methods if m.spec.name == "mixed_precision"), None)
    if own is None or own.settings()["compile"] or cost.step * cost.steps < COMPILE_FROM:
        return list(arms), ""
    unable = {m.spec.name for arm in arms for m in arm.methods if "compile" not in m.spec.promises} - {
        "mixed_precision"
    }
    if unable:
        return list(arms), f"torch.compile was left out: {', '.join(sorted(unable))} does not work with it"
    record = run(_compiled(base), min(1.0, (PROBE_STEPS + 0.25) / cost.steps))
    if record["failure"]:
        return list(arms), f"torch.compile was left out: {str(record['failure']).splitlines()[0][:120]}"
    step = record["step_seconds"]
    paid = record["seconds_train"] - step * record["steps"]
    gain = cost.step - step
    if gain <= 0 or paid / gain > cost.steps * min(FIRST):
        return (
            list(arms),
            f"torch.compile was left out: it takes {paid:.0f} s and makes a step {cost.step / step:.2f}x as fast",
        )
    words = f"torch.compile is on: it takes {paid:.0f} s, makes a step {cost.step / step:.2f}x as fast, and pays after {paid / gain:.0f} steps of {cost.steps:.0f}"
    return [_compiled(arm) for arm in arms], words


def _compiled(arm: Arm) -> Arm:
    def one(m: Any) -> Any:
        return (
            method("mixed_precision", **{**m.settings(), "compile": True})
            if m.spec.name == "mixed_precision"
            else m
        )

    label = arm.label.replace("(bf16, NHWC)", "(bf16, NHWC, compiled)")
    return dataclasses.replace(arm, methods=tuple(map(one, arm.methods)), label=label)
