"""Compare ways of training: plan, A/A test, a first pass that places the budgets, blocks, and the answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hasten.checkpoint import claim_folder
from hasten.comparison.arms import Arm, usual
from hasten.comparison.blocks import Runner, jobs, noise
from hasten.comparison.curves import Record, Shares
from hasten.comparison.plan import (
    SEEDS,
    Cost,
    Plan,
    again,
    compiled,
    duration,
    fitted,
    from_text,
    probe,
    reference,
    stored,
)
from hasten.comparison.prepare import built
from hasten.comparison.shares import FIRST, placed
from hasten.comparison.store import Runs
from hasten.comparison.summary import summarise
from hasten.comparison.worker import Workload, fresh_process, handed_over, run_arm, threads_here, warm_up
from hasten.contract import Method
from hasten.data import DataSet
from hasten.devices import training_device
from hasten.errors import SettingsError, UnsupportedError
from hasten.recipe import PLAIN, STRONG, Recipe
from hasten.report.schema import Plan as PlanData
from hasten.report.schema import ReportData

VALIDATION = 0.1
AA_PAIRS = 3


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: ``data`` is what report.json holds, ``folder`` where it was written, if anywhere."""

    data: ReportData
    folder: Path | None

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *([f"Report {self.folder / 'report.html'}"] if self.folder else [])])

    def __repr__(self) -> str:
        return f"Comparison({self.sentence!r}, folder={str(self.folder) if self.folder else None!r})"

    @property
    def sentence(self) -> str:
        """The answer."""
        return self.data["verdict"]["sentence"]

    def lines(self) -> list[str]:
        """Return the answer and the result table as plain text."""
        from hasten.report.terminal import summary_lines

        return summary_lines(self.data)


class Told:
    """What a comparison tells while it goes on. This base class says nothing."""

    def say(self, line: str) -> None:
        """A line for the user: the plan, and what was decided."""

    def run(self, done: int, planned: int, record: dict[str, Any]) -> None:
        """A run ended; ``planned`` is how many there will be, as far as is known."""

    def live(self, what: str, step: int, total: int) -> None:
        """The run in progress is at ``step`` of ``total``."""


def compare(
    model: str | nn.Module | Callable[..., nn.Module] = "resnet8",
    data: Any = "fashion-mnist-12k",
    methods: Sequence[Method | str] = (),
    *,
    arms: Sequence[Arm] | None = None,
    plain: Recipe = PLAIN,
    strong: Recipe = STRONG,
    budgets: Sequence[float] | None = None,
    seeds: int | Iterable[int] | None = None,
    target: float | None = None,
    limit: float | str | None = None,
    device: str | None = None,
    size: int | None = None,
    init: Any = None,
    optimizer: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    train_fn: Callable[..., None] | None = None,
    out: str | Path | None = None,
    root: str | None = None,
    train: int | None = None,
    test: int | None = None,
    threads: int | None = None,
    isolate: bool | None = None,
    aa_pairs: int = AA_PAIRS,
    compile: bool = True,
    leave_one_out: bool = True,
    title: str = "",
    command: str = "",
    config_toml: str = "",
    told: Told | None = None,
) -> Comparison:
    """Measure how much sooner ``methods`` reach an accuracy than plain and strong training, on this machine.

    Without ``arms`` these run: both baselines, every method added to the strong one, all methods together, and that
    stack less each method. Each is trained at several budgets, which make its time-accuracy curve; the times to one
    accuracy are read off these curves.

    model, data, init, optimizer, loss, train_fn, root, size: as in `hasten.fit`. budgets: shares of the epochs to run every arm at; without them a
    first pass of one seed finds those that bracket the target. seeds: how many, or which; 3 where not given. target: an
    accuracy in (0, 1); without it the highest that all arms are shown to reach, chosen on a tenth of the training images. limit: seconds, or text such as
    "20m", into which epochs, seeds and images are fitted. device: where to train; the accelerator if there is one. out: folder that keeps every
    finished run; the same call again runs only what is missing. isolate: give every run a process of its own; None does
    where it is possible. aa_pairs: pairs of the A/A test, the strong baseline against itself; without it nothing is claimed. compile: try whether torch.compile pays.

    Raises ConflictError before anything runs if methods cannot be stacked, SettingsError for bad settings, and HastenError
    where model, data or an arm does not work.
    """
    begun, told = time.monotonic(), told or Told()
    if target is not None and not (isinstance(target, int | float) and 0 < target < 1):
        raise SettingsError(f"target must be an accuracy in (0, 1), such as 0.9, got {target!r}.")
    if budgets is not None and not (len(budgets) > 0 and all(0 < b <= 1 for b in budgets)):
        raise SettingsError(
            f"budgets must be shares of the epochs in (0, 1], such as 0.25, 0.5 and 1, got {list(budgets)}."
        )
    if arms is None:
        arms = usual([_method(m) for m in methods], plain, strong, leave_one_out=leave_one_out,
                     optimizer=optimizer, loss=loss, train_fn=train_fn)  # fmt: skip
    arms, numbers = list(arms), _numbers(seeds)
    names = [arm.name for arm in arms]
    if not numbers or not arms or len(set(names)) != len(names):
        raise SettingsError(
            f"give at least one seed and arms with different names; got seeds {numbers}, arms {names}."
        )
    workload = Workload(
        model,
        data,
        root,
        size,
        train,
        test,
        1.0,
        0.0,
        threads or threads_here(),
        training_device(device),
        init,
    )
    seconds = from_text(limit) if isinstance(limit, str) else limit
    if isolate is None or isolate:
        why = handed_over(workload, arms)
        if why and isolate:
            raise UnsupportedError(f"every run gets a process of its own, and this cannot be handed to one: {why}. Give a name, "
                                   f"file.py:factory or pkg.mod:factory, or compare(..., isolate=False).")  # fmt: skip
        if why:
            told.say(f"Note   all runs share this process, since they cannot be handed to others: {why}")
        isolate = not why
    built(workload, reference(arms))  # what cannot be built leaves no folder behind
    folder = claim_folder(Path(out), kind="hasten comparison") if out is not None else None
    course = _Course(workload, arms, numbers, folder, isolate, told, begun, seconds, seeds is not None, target,
                     tuple(sorted({*budgets, 1.0})) if budgets else None, aa_pairs, compile)  # fmt: skip
    report = course.run(title, command, config_toml)
    if folder is not None:
        from hasten.report import write

        write(folder, report)
    return Comparison(report, folder)


def _method(given: Method | str) -> Method:
    if isinstance(given, str):
        from hasten.cli.config import method_from

        return method_from(given)  # type: ignore[no-any-return]
    return given


def _numbers(seeds: int | Iterable[int] | None) -> list[int]:
    return (
        list(range(SEEDS if seeds is None else seeds))
        if seeds is None or isinstance(seeds, int)
        else list(seeds)
    )


@dataclass
class _Course:
    """The course of one comparison."""

    workload: Workload
    arms: list[Arm]
    seeds: list[int]
    folder: Path | None
    isolate: bool
    told: Told
    begun: float
    limit: float | None
    seeds_given: bool
    target: float | None
    fixed: tuple[float, ...] | None
    pairs: int
    compile: bool
    _probing: str = "a few steps"

    def run(self, title: str, command: str, config_toml: str) -> ReportData:
        """Plan, run, and return the report's data."""
        base = reference(self.arms)
        data, _, _ = built(self.workload, base)
        whole = data
        for line in getattr(data, "notes", ()):
            self.told.say(f"Data   {line}")
        if self.target is None and _can_hold_out(data):
            self.workload = dataclasses.replace(self.workload, validation=VALIDATION)
            data = self.workload.load()
        plan = self._planned(data)
        if plan.keep < 1:
            self.workload = dataclasses.replace(self.workload, keep=plan.keep)
            data = self.workload.load()
        self.arms = plan.arms
        base = reference(self.arms)
        _, settings, training = built(self.workload, base)
        runs = Runs(self.folder, self.workload, data)
        runner = Runner(
            self.workload,
            runs,
            self.folder,
            self.isolate,
            plan.runs,
            self.told.run,
            self.told.live,
            plan.seeds[0],
        )
        predicted = time.monotonic() - self.begun + plan.seconds
        self.told.say(f"Plan   {len(self.arms)} arms × {len(plan.seeds)} seeds at several budgets, about {plan.runs} runs; "
                      f"predicted {duration(predicted)}{f' (limit {duration(self.limit)})' if self.limit else ''}")  # fmt: skip
        for change in plan.changes:
            self.told.say(f"         {change}")
        for arm in self.arms:
            self.told.say(f"         {arm.name:24} {arm.recipe.epochs:g} epochs, batch {arm.recipe.batch_size}, "
                          f"{duration(plan.costs[arm.name].run(1.0))} a full run" + "".join(f", {m}" for m in arm.methods))  # fmt: skip
        aa = noise(runner, base, min(self.fixed or FIRST), self.pairs) if self.pairs else None
        if aa is not None:
            self.told.say(f"A/A    {base.name} against itself: {aa['ratio']:.3f}x [{aa['lo']:.3f}, {aa['hi']:.3f}]"
                          + ("" if aa["ok"] else ": the interval does not hold 1, so nothing will be claimed"))  # fmt: skip
        shares, records, seeds = self._blocks(runner, plan)
        if runs.taken:
            self.told.say(f"{runs.taken} of {runs.taken + runs.ran} runs taken from {self.folder}")
        plan_data: PlanData = {
            "predicted": predicted, "taken": time.monotonic() - self.begun, "limit": self.limit, "runs": runs.taken + runs.ran,
            "reused": runs.taken, "changes": [*plan.changes, *seeds],
        }  # fmt: skip
        report = summarise(settings, self.arms, shares, records, goal=self.target, aa=aa, title=title, training_macs=training,
                           plan=plan_data, notes=self._notes(whole), chance=1 / len(data.classes), command=command, config_toml=config_toml)  # fmt: skip
        report["network"] = self._kept(runner, report)
        return report

    # -- the plan
    def _planned(self, data: Any) -> Plan:
        plan = Plan(self.arms, self.seeds, {}, 1.0, self.fixed, self.pairs, self.limit, [])
        asked = Runs(None, self.workload, data)
        what = [asked.key(arm, 1.0, 0) for arm in self.arms]
        text = json.dumps(
            [what, self.seeds, self.seeds_given, self.limit, self.fixed, self.pairs, self.compile]
        )
        key = hashlib.sha256(text.encode()).hexdigest()[:20]
        file = self.folder / "plan.json" if self.folder is not None else None
        kept = _read(file)
        if key in kept:
            return again(plan, kept[key])
        plan = self._timed(plan, data)
        if file is not None:
            file.write_text(json.dumps({**kept, key: stored(plan)}, indent=1) + "\n", encoding="utf-8")
        return plan

    def _timed(self, plan: Plan, data: Any) -> Plan:
        steps = _steps(data)
        costs: dict[str, Cost] = {}
        if self.isolate:
            warm_up()
        self.told.say(f"Probe  timing a few steps of {', '.join(arm.name for arm in self.arms)}")
        for arm in self.arms:
            self._probing = f"a few steps of {arm.name}"
            costs[arm.name] = probe(self._probe, arm, steps(arm))
        arms, words = self.arms, ""
        if self.compile:
            arms, words = compiled(self.arms, costs, self._probe, steps(reference(self.arms)))
        for arm in arms:
            if arm not in self.arms:
                costs[arm.name] = probe(self._probe, arm, steps(arm))
        plan = dataclasses.replace(plan, arms=arms, costs=costs, changes=[words] if words else [])
        return fitted(plan, data.train_count, len(data.classes), seeds_given=self.seeds_given,
                      spent=time.monotonic() - self.begun, can_cut=isinstance(data, DataSet))  # fmt: skip

    def _probe(self, arm: Arm, share: float) -> Record:
        begun = time.monotonic()
        run = fresh_process if self.isolate else run_arm
        record = run(
            self.workload, arm, share, 0, None, lambda step, total: self.told.live(self._probing, step, total)
        )
        return {**record, "wall": time.monotonic() - begun}

    # -- the runs
    def _blocks(self, runner: Runner, plan: Plan) -> tuple[Shares, list[Record], list[str]]:
        first = plan.seeds[0]
        if self.fixed:
            shares: dict[str, tuple[float, ...]] = dict.fromkeys((arm.name for arm in self.arms), self.fixed)
            start: list[Record] = []
        else:
            start = runner.block(
                0, first, jobs(self.arms, dict.fromkeys((a.name for a in self.arms), FIRST)), "first pass"
            )
            shares = self._placed(start)
        done = {(r["arm"], r["share"]) for r in start}
        missing = [job for job in jobs(self.arms, shares) if (job[0].name, job[1]) not in done]
        each = sum(len(own) for own in shares.values())
        runner.planned = runner.done + len(missing) + each * (len(plan.seeds) - 1)
        records = [*start, *runner.block(0, first, missing)]
        changes: list[str] = []
        block_seconds = 0.0
        for block, seed in enumerate(plan.seeds[1:], 1):
            spent = time.monotonic() - self.begun
            if self.limit and block >= 2 and spent + block_seconds > self.limit:
                changes.append(f"{block} of {len(plan.seeds)} seeds, since the limit was near")
                self.told.say(f"         {changes[-1]}")
                break
            records += runner.block(block, seed, jobs(self.arms, shares))
            block_seconds = max(block_seconds, time.monotonic() - self.begun - spent)
        return shares, records, changes

    def _placed(self, start: Sequence[Record]) -> dict[str, tuple[float, ...]]:
        points: dict[str, dict[float, float]] = {}
        for r in start:
            if r["failure"] is None and not (r.get("idle") and r["share"] < 1):
                seen = r["accuracy"] if r.get("validation") is None else r["validation"]
                points.setdefault(r["arm"], {})[r["share"]] = seen
        base = reference(self.arms).name
        usable = {name: own for name, own in points.items() if 1.0 in own}
        chosen: Mapping[str, tuple[float, ...]] = placed(usable, base, self.target) if base in usable else {}
        return {arm.name: chosen.get(arm.name, (0.5, 1.0)) for arm in self.arms}

    # -- the rest
    def _notes(self, whole: Any) -> list[str]:
        notes = list(getattr(whole, "notes", ()))
        if self.workload.validation:
            notes.append(
                f"A tenth of the training images chose the target and the budgets and was not trained on ({whole.train_count:,} images in all)."
            )
        elif self.target is None and whole.has_validation:
            notes.append("The data's own validation images chose the target and the budgets.")
        elif self.target is None:
            notes.append(
                "The target was chosen on the test images, since no validation part can be cut from this data."
            )
        if getattr(whole, "owns_augmentation", False):
            notes.append("The data's own loader decides order and augmentation.")
        if not self.isolate:
            notes.append("All runs shared one process, so caches and memory of one may have served the next.")
        if self.workload.train or self.workload.test:
            notes.append(
                f"Stratified part of the data: {self.workload.train or 'all'} training and {self.workload.test or 'all'} test images."
            )
        return notes

    def _kept(self, runner: Runner, report: ReportData) -> str | None:
        """Keep the claimed arm's full run of the first seed as ``network``, and remove all others."""
        if self.folder is None:
            return None
        name = report["verdict"]["claim"] or _most_accurate(report)
        place, work = self.folder / "network", self.folder / "work"
        arm = next((a for a in self.arms if a.name == name), None)
        if arm is not None:
            run = work / runner.runs.key(arm, 1.0, runner.first_seed)
            if run.is_dir():
                shutil.rmtree(place, ignore_errors=True)
                os.replace(run, place)
        shutil.rmtree(work, ignore_errors=True)
        return "network" if place.is_dir() else None


def _most_accurate(report: ReportData) -> str:
    return max(report["arms"], key=lambda row: row["accuracy"]["mean"] or 0.0)["name"]


def _can_hold_out(data: Any) -> bool:
    if data.has_validation:
        return False
    try:
        data.hold_out(VALIDATION)
    except (UnsupportedError, SettingsError):
        return False
    except Exception as error:  # a class of one image cannot be in both parts
        from hasten.errors import DataError

        if isinstance(error, DataError):
            return False
        raise
    return True


def _read(file: Path | None) -> dict[str, Any]:
    """Return what a file holds; nothing where there is none or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _steps(data: Any) -> Callable[[Arm], int]:
    def steps(arm: Arm) -> int:
        return len(data.training(arm.recipe.batch_size, seed=0))

    return steps
