"""The data of one comparison report: what ``report.json`` holds and what the HTML page is made from.

Units, everywhere: times in seconds, accuracies as fractions in [0, 1], ratios as "baseline time / this arm's
time" (above 1 is faster), memory in MB (10^6 bytes), work in MACs (one multiply-add is one MAC). Numbers are
finite; what was not measured or never reached is ``None`` (``null`` in JSON), never NaN, infinity or 0.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any, Literal, NotRequired, TypedDict, cast

from hasten.errors import DataError
from hasten.report.typed import mismatches

SCHEMA_VERSION = 1

Scalar = str | int | float | bool | None
Kind = Literal["baseline", "strong", "method", "stack", "control"]
Outcome = Literal["faster", "slower", "not shown", "missed", "one run", "not measured"]

SPANS = (
    "data",
    "forward",
    "backward",
    "optimizer",
    "method",
    "save",
    "final",
    "eval",
    "compile",
    "setup",
)
"""Names of the exclusive parts of a run, in drawing order. Other names are allowed and drawn as "other"."""


class Seconds(TypedDict):
    """The clock of one run. ``method`` is part of ``train``; the headline time is ``train + final``."""

    train: float
    method: float
    final: float
    eval: float
    compile: float
    setup: float
    total: float


class Run(TypedDict):
    """One run of one arm: one seed in one block.

    ``spans`` are exclusive parts (see ``SPANS``); what they leave of the total is drawn as "other".
    ``curve`` rows are [seconds of training clock, samples seen, accuracy], at the evaluation cadence.
    """

    seed: int
    block: int
    seconds: Seconds
    spans: dict[str, float]
    accuracy: float | None
    curve: list[list[float]]
    samples_forward: int
    samples_backward: int
    macs: float | None
    peak_rss_mb: float | None
    cpu_seconds: float | None
    failure: str | None


class Difference(TypedDict):
    """Accuracy of the arm minus accuracy of the strong baseline, as fractions, with the 95% interval.

    ``noninferior`` is True when ``lo`` is above the margin set beforehand, None when it cannot be said.
    """

    diff: float
    lo: float | None
    hi: float | None
    noninferior: bool | None


class Accuracy(TypedDict):
    """Final accuracy over the seeds of one arm. ``mean`` is None when no run finished; ``sd`` needs two."""

    mean: float | None
    sd: float | None
    n: int
    vs_strong: Difference | None


class Reached(TypedDict):
    """Whether the arm reaches the target.

    ``k`` of ``n`` runs hit it; ``mean_bound`` is the one-sided 95% lower bound of the mean final accuracy.
    """

    k: int
    n: int
    mean_bound: float | None
    yes: bool


class Ratio(TypedDict):
    """A ratio with its 95% interval; where a number is None, ``reason`` says why there is none."""

    ratio: float | None
    lo: float | None
    hi: float | None
    reason: str | None


class Versus(Ratio):
    """A paired time ratio over ``n`` blocks, with its permutation p and verdict.

    ``note`` adds a reason in words, such as "extra forward costs 31%", or is empty.
    """

    n: int
    p: float | None
    verdict: Outcome
    note: str


class Touched(TypedDict):
    """A layer that a method acts on, and how."""

    layer: str
    note: str


class Skipped(TypedDict):
    """A layer that a method leaves alone, and why."""

    layer: str
    reason: str


class MethodEffect(TypedDict):
    """Where one method acted: ``saves`` says in words what it is expected to save."""

    method: str
    touched: list[Touched]
    skipped: list[Skipped]
    saves: str


class Arm(TypedDict):
    """One way of training, with all its runs and what they amount to.

    ``kind``: "baseline" is plain PyTorch, "strong" the system-optimised baseline, "control" a baseline with
    a shortened schedule. ``methods`` are names with the settings that
    differ from the defaults. ``vs_*`` are None for the arm
    compared with itself; ``vs_curve`` is the speedup read off the shortened baselines' time/accuracy curve.
    ``work_reduction`` is the share of the plain arm's MACs that this arm did not execute (negative: it did
    more). ``witness`` counts what the methods really did ("samples skipped": 1200).
    """

    name: str
    label: str
    kind: Kind
    methods: list[str]
    runs: list[Run]
    accuracy: Accuracy
    reached: Reached
    vs_plain: Versus | None
    vs_strong: Versus | None
    vs_curve: Ratio | None
    step_ratio: Ratio | None
    work_reduction: float | None
    witness: dict[str, float]
    effects: list[MethodEffect]
    settings: dict[str, Scalar]


class Verdict(TypedDict):
    """The one sentence at the top. ``claim`` names the arm it is about, None when nothing is claimed."""

    sentence: str
    claim: str | None
    ratio: float | None
    ci: list[float] | None


class Target(TypedDict):
    """The accuracy to reach, and the rule that decides whether an arm reaches it."""

    accuracy: float
    rule: str


class Settings(TypedDict):
    """What all arms share. ``macs`` are the model's, for one forward pass of one sample."""

    model: str
    params: int
    macs: float | None
    dataset: str
    train: int
    test: int
    batch: int
    epochs: float
    threads: int
    extra: NotRequired[dict[str, Scalar]]


class Noise(TypedDict):
    """The baseline against itself: ``s`` is the sd of the log ratio; ``ok`` says that the interval holds 1.

    A false ``ok`` weakens every other ratio.
    """

    ratio: float
    lo: float
    hi: float
    s: float
    ok: bool


class Dropped(TypedDict):
    """A block left out of the statistics by a rule on the environment, never by its value."""

    block: int
    reason: str


class Repeat(TypedDict):
    """How to do it again: a shell command and the resolved settings."""

    command: str
    config_toml: str


class Failure(TypedDict):
    """A run that did not finish, in full. ``seed`` is None when the arm never started."""

    arm: str
    seed: int | None
    text: str


class Prediction(TypedDict):
    """What the cost model said beforehand and what came out, for one quantity of one arm."""

    arm: str
    quantity: str
    unit: str
    predicted: float
    measured: float


class ReportData(TypedDict):
    """Everything the report shows. ``created`` is UTC in ISO form, such as 2026-11-22T09:30:00Z."""

    schema_version: int
    title: str
    created: str
    verdict: Verdict
    target: Target
    settings: Settings
    environment: dict[str, Scalar]
    arms: list[Arm]
    aa: Noise | None
    dropped: list[Dropped]
    notes: list[str]
    repeat: Repeat
    failures: list[Failure]
    predicted: NotRequired[list[Prediction]]


def headline_seconds(run: Run) -> float:
    """Return the time that counts: training with all that a method adds, and a final evaluation it needs."""
    return run["seconds"]["train"] + run["seconds"]["final"]


def _meaning(data: ReportData) -> list[str]:
    """Return what is wrong with data whose types are right."""
    problems: list[str] = []

    def need(ok: bool, path: str, text: str) -> None:
        if not ok:
            problems.append(f"{path}: {text}")

    def fraction(value: float | None, path: str) -> None:
        need(value is None or 0 <= value <= 1, path, f"must be a fraction from 0 to 1, not {value}")

    def interval(value: Any, path: str) -> None:
        if value is None:
            return
        mid, low, high = value.get("ratio", value.get("diff")), value["lo"], value["hi"]
        need((low is None) == (high is None), path, "needs both ends of its interval or none")
        if mid is not None and low is not None and high is not None:
            need(low <= mid <= high, path, f"{mid} must lie inside its interval [{low}, {high}]")
        if "ratio" in value:
            need(mid is None or mid > 0, path, f"a ratio must be above 0, not {mid}")
            need(low is None or low > 0, path, f"a ratio's interval must be above 0, not {low}")
            need(mid is not None or bool(value.get("reason")), path, "without a ratio it needs a reason")

    need(data["schema_version"] == SCHEMA_VERSION, "report.schema_version", f"must be {SCHEMA_VERSION}")
    try:
        utc = datetime.fromisoformat(data["created"]).utcoffset() == timedelta(0)
    except ValueError:
        utc = False
    need(utc, "report.created", f"must be a UTC time such as 2026-11-22T09:30:00Z, not {data['created']!r}")
    fraction(data["target"]["accuracy"], "report.target.accuracy")
    names = [arm["name"] for arm in data["arms"]]
    need(bool(names), "report.arms", "needs at least one arm")
    need(len(set(names)) == len(names), "report.arms", f"names must differ, got {names}")
    claim, ci = data["verdict"]["claim"], data["verdict"]["ci"]
    need(claim is None or claim in names, "report.verdict.claim", f"{claim!r} is none of the arms {names}")
    need(
        ci is None or (len(ci) == 2 and 0 < ci[0] <= ci[1]),
        "report.verdict.ci",
        f"must be [lo, hi], not {ci}",
    )
    interval(data["aa"] and {**data["aa"]}, "report.aa")
    for arm in data["arms"]:
        where = f"report.arms[{arm['name']!r}]"
        fraction(arm["accuracy"]["mean"], f"{where}.accuracy.mean")
        interval(arm["accuracy"]["vs_strong"], f"{where}.accuracy.vs_strong")
        for key in ("vs_plain", "vs_strong", "vs_curve", "step_ratio"):
            interval(arm[key], f"{where}.{key}")
        for i, run in enumerate(arm["runs"]):
            at = f"{where}.runs[{i}]"
            fraction(run["accuracy"], f"{at}.accuracy")
            for part, seconds in {**run["seconds"], **run["spans"]}.items():
                need(
                    cast(float, seconds) >= 0, f"{at}.{part}", f"seconds must not be negative, got {seconds}"
                )
            for row in run["curve"]:
                fine = len(row) == 3 and row[0] >= 0 and 0 <= row[2] <= 1
                need(fine, f"{at}.curve", f"rows are [seconds, samples, accuracy], got {row}")
    return problems


def check(data: object) -> ReportData:
    """Return ``data`` if it is report data; raise one ``DataError`` that names its problems if not."""
    problems = mismatches(data, ReportData, "report")
    if not problems:
        problems = _meaning(cast(ReportData, data))
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise DataError("this is not report data:\n  " + "\n  ".join(problems[:12]) + more)
    return cast(ReportData, data)


def to_json(data: ReportData) -> str:
    """Return the text of ``report.json``: two-space indent, no NaN, ends in a newline."""
    return json.dumps(data, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def from_json(text: str) -> ReportData:
    """Return checked report data from the text of a ``report.json``, which may come from a stranger."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is not a report.json: {error}") from error
    return check(data)
