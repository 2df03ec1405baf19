"""Run arms in interleaved blocks, one seed a block, each run in a fresh process, and store every run at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hasten import keyed
from hasten.checkpoint import claim_folder
from hasten.comparison.arms import Arm, baselines, controls, stacks
from hasten.comparison.noise import noise
from hasten.comparison.summary import summarise
from hasten.comparison.worker import Workload, fresh_process, run_arm, threads_here
from hasten.contract import Method
from hasten.data import DataSet
from hasten.errors import SettingsError
from hasten.measure.load import Watch
from hasten.measure.store import append_jsonl, read_jsonl
from hasten.recipe import PLAIN, STRONG, Recipe
from hasten.report.schema import ReportData

Tell = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: ``data`` is what report.json holds, ``folder`` where it was written, if anywhere."""

    data: ReportData
    folder: Path | None

    def lines(self) -> list[str]:
        """Return the result table as plain text."""
        from hasten.report.terminal import summary_lines

        return summary_lines(self.data)


def compare(
    model: str | nn.Module | Callable[[], nn.Module] = "resnet8",
    data: str | DataSet = "fashion-mnist-12k",
    methods: Sequence[Method] = (),
    *,
    arms: Sequence[Arm] | None = None,
    plain: Recipe = PLAIN,
    strong: Recipe = STRONG,
    budgets: Sequence[float] = (0.5, 0.65, 0.8),
    seeds: Iterable[int] = range(3),
    target: float | str = "plain",
    out: str | Path | None = None,
    root: str | None = None,
    train: int | None = None,
    test: int | None = None,
    validation: bool = False,
    threads: int | None = None,
    isolate: bool = True,
    aa_seconds: float = 4.0,
    title: str = "",
    command: str = "",
    config_toml: str = "",
    tell: Tell = lambda done, total, record: None,
) -> Comparison:
    """Measure how much sooner ``methods`` reach an accuracy than plain and strong training, on this machine.

    Without ``arms`` these run: both baselines, the strong one at ``budgets`` of its epochs, every method added to the
    strong one, all methods together, and that stack less each method. target: an accuracy in (0, 1), or "plain" or
    "strong" for that baseline's median accuracy. out: folder that keeps every finished run; the same call again runs
    only what is missing. aa_seconds: length of the A/A test, the strong baseline's step against itself. tell: called after every run with (done, total, record).

    Raises ConflictError before anything runs if methods cannot be stacked, and SettingsError for a bad target.
    """
    if isinstance(target, str) and target not in ("plain", "strong"):
        raise SettingsError(f"target must be an accuracy in (0, 1), 'plain' or 'strong', got {target!r}.")
    if not isinstance(target, str) and not 0 < target < 1:
        raise SettingsError(f"target must be an accuracy in (0, 1), such as 0.9, got {target}.")
    if arms is None:
        both = baselines(plain, strong)
        arms = [*both, *controls(both[1], budgets), *stacks(both[1], methods)]
    seeds = list(seeds)
    names = [arm.name for arm in arms]
    if not seeds or len(set(names)) != len(names):
        raise SettingsError(
            f"give at least one seed and arms with different names; got seeds {seeds}, arms {names}."
        )
    workload = Workload(model, data, root, train, test, validation, threads or threads_here())
    folder = claim_folder(Path(out), kind="hasten comparison") if out is not None else None
    records = run_blocks(workload, arms, seeds, folder, isolate, tell)
    base = next((arm for arm in arms if arm.kind == "strong"), None)
    aa = noise(workload, base, aa_seconds) if base is not None and aa_seconds > 0 else None
    report = summarise(workload, arms, records, target=target, title=title, command=command, aa=aa,
                       config_toml=config_toml)  # fmt: skip
    if folder is not None:
        from hasten.report import write

        write(folder, report)
    return Comparison(report, folder)


def run_blocks(
    workload: Workload,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    folder: Path | None,
    isolate: bool,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Run every arm once for every seed, the arms of a seed one after the other in random order; return the records.

    A record found in ``folder/runs.jsonl`` under the same key is taken instead of running again. Each record says which
    block it belongs to, and what other processes took of the machine meanwhile.
    """
    path = folder / "runs.jsonl" if folder is not None else None
    known = {r["key"]: r for r in read_jsonl(path)} if path is not None and path.exists() else {}
    total, records = len(arms) * len(seeds), []
    for block, seed in enumerate(seeds):
        order = [arms[i] for i in keyed.permutation(len(arms), "blocks", seed)]
        for arm in order:
            key = arm.key(seed, workload.describe())
            record = known.get(key)
            if record is None:
                watch = Watch()
                record = fresh_process(workload, arm, seed) if isolate else run_arm(workload, arm, seed)
                load, disturbed = watch.stop()
                record |= {
                    "key": key,
                    "disturbed": disturbed,
                    "load": load.to_json(),
                    "settings": arm.describe(),
                }
                if path is not None:
                    append_jsonl(path, record)
            records.append({**record, "block": block, "arm": arm.name})
            tell(len(records), total, record)
    return records
