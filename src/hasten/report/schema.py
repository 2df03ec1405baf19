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

SCHEMA_VERSION = 2

Scalar = str | int | float | bool | None
Kind = Literal["baseline", "strong", "method", "stack"]
Outcome = Literal["sooner", "later", "not shown", "too wide", "not reached", "one seed", "not measured"]
State = Literal["reached", "not reached", "below the smallest budget", "not measured"]

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
    """One whole run of one arm at one budget: one seed in one block.

    ``spans`` are exclusive parts (see ``SPANS``); what they leave of the total is drawn as "other". ``disturbed``
    says what else used the machine meanwhile (empty: nothing), and ``resumed`` that the run was interrupted.
    """

    seed: int
    block: int
    seconds: Seconds
    spans: dict[str, float]
    accuracy: float | None
    disturbed: list[str]
    resumed: bool
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


class Point(TypedDict):
    """An arm at one budget, its schedule fully run: a point of its time-accuracy curve.

    ``share`` is the part of the full schedule, ``epochs`` what that is. ``seconds`` is the mean training time of the
    finished runs, ``accuracy`` their mean; both None where none finished. ``sd`` is of the accuracy.
    """

    share: float
    epochs: float
    seconds: float | None
    accuracy: float | None
    sd: float | None
    n: int
    runs: list[Run]


class TimeTo(TypedDict):
    """When the arm's curve reaches the target, in seconds, with its 95% interval.

    ``lo`` or ``hi`` is None where the runs do not bound that side. ``state`` says why there may be no time: the curve
    ends below the target, or starts above it. ``note`` adds the reason in words, or is empty.
    """

    seconds: float | None
    lo: float | None
    hi: float | None
    state: State
    note: str


class Versus(TypedDict):
    """How much sooner the arm reaches the target than a baseline: the ratio of both times, above 1 is sooner.

    ``lo`` and ``hi`` are its 95% interval; one that is None has no bound. Where ``ratio`` is None, ``reason`` says
    why. ``n`` seeds, ``blocks`` of them with clean times. ``verdict`` is what the interval allows to say, ``note`` adds words, or is empty.
    """

    ratio: float | None
    lo: float | None
    hi: float | None
    reason: str | None
    n: int
    blocks: int
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
    """One way of training, with its time-accuracy curve and what that amounts to.

    ``kind``: "baseline" is plain PyTorch, "strong" the system-optimised baseline. ``methods`` are names with the
    settings that differ from the defaults. ``points`` go from the smallest budget to the largest. ``accuracy`` and
    ``seconds`` are those of the full budget. ``vs_*`` are None for the arm compared with itself and where that
    baseline did not run. ``sets_target`` is False for an arm too far below the rest to have a say in the target.
    ``work_reduction`` is the share of the plain arm's MACs at the full budget that this arm did not execute
    (negative: it did more). ``witness`` counts what the methods really did ("samples skipped": 1200).
    """

    name: str
    label: str
    kind: Kind
    methods: list[str]
    points: list[Point]
    accuracy: Accuracy
    seconds: float | None
    time: TimeTo
    vs_plain: Versus | None
    vs_strong: Versus | None
    sets_target: bool
    work_reduction: float | None
    witness: dict[str, float]
    effects: list[MethodEffect]
    settings: dict[str, Scalar]


class Verdict(TypedDict):
    """The one sentence at the top. ``claim`` names the arm it is about, None when nothing is claimed.

    ``against`` is the name of the arm it is sooner than, ``ratio`` by how much, ``ci`` the interval at that claim's own confidence:
    corrected where the arm is the best of several (``best_of``), with None for an end without a bound.
    """

    sentence: str
    claim: str | None
    against: str | None
    ratio: float | None
    ci: list[float | None] | None
    best_of: int


class Target(TypedDict):
    """The accuracy to reach, how it was chosen, and the rule that decides whether an arm reaches it.

    ``margin`` is the fraction of accuracy that "no loss" may hide, set before the runs.
    """

    accuracy: float
    chosen: str
    rule: str
    margin: NotRequired[float]


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
    """Whole runs of one arm against themselves, made first: ``s`` is the sd of the log ratio over ``n`` pairs.

    ``ok`` says that the 95% interval holds 1. Where it does not, nothing is claimed.
    """

    arm: str
    ratio: float
    lo: float
    hi: float
    s: float
    n: int
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


class Plan(TypedDict):
    """What the comparison was going to take, told before anything trained, and what it took; seconds.

    ``limit`` is the time it had to fit into, None without one. ``reused`` of ``runs`` runs were taken from an earlier
    call; the time of a comparison that took any says nothing. ``changes`` are what was cut or added to fit, in words.
    """

    predicted: float
    taken: float
    limit: float | None
    runs: int
    reused: int
    changes: list[str]


class Prediction(TypedDict):
    """What the cost model said beforehand and what came out, for one quantity of one arm."""

    arm: str
    quantity: str
    unit: str
    predicted: float
    measured: float


class ReportData(TypedDict):
    """Everything the report shows. ``created`` is UTC in ISO form, such as 2026-11-22T09:30:00Z.

    ``network`` is the folder in which the claimed arm's trained network was kept, beside the report.
    """

    schema_version: int
    title: str
    created: str
    verdict: Verdict
    target: Target
    settings: Settings
    environment: dict[str, Scalar]
    arms: list[Arm]
    aa: Noise | None
    plan: Plan | None
    network: str | None
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

    def interval(value: Any, path: str, middle: str = "ratio") -> None:
        if value is None:
            return
        mid, low, high = value[middle], value["lo"], value["hi"]
        need(low is None or mid is None or low <= mid, path, f"{mid} must not lie below its interval's {low}")
        need(
            high is None or mid is None or mid <= high,
            path,
            f"{mid} must not lie above its interval's {high}",
        )
        if middle != "diff":
            for number in (mid, low, high):
                need(number is None or number > 0, path, f"must be above 0, not {number}")
        need(
            low is None or high is None or low <= high,
            path,
            f"its interval's ends are swapped: {low}, {high}",
        )
        if "reason" in value:
            need(mid is not None or bool(value["reason"]), path, "without a ratio it needs a reason")
        if "verdict" in value:
            said = value["verdict"]
            need(
                said != "sooner" or (low or 0) > 1,
                path,
                f"'sooner' needs an interval above 1, not from {low}",
            )
            need(
                said != "later" or 0 < (high or 0) < 1,
                path,
                f"'later' needs an interval below 1, not to {high}",
            )

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
    verdict = data["verdict"]
    for key, named in (("claim", verdict["claim"]), ("against", verdict["against"])):
        need(
            named is None or named in names, f"report.verdict.{key}", f"{named!r} is none of the arms {names}"
        )
    ci = verdict["ci"]
    need(ci is None or len(ci) == 2, "report.verdict.ci", f"must be [lo, hi], not {ci}")
    if ci is not None and len(ci) == 2:
        interval({"ratio": verdict["ratio"], "lo": ci[0], "hi": ci[1]}, "report.verdict")
    interval(data["aa"] and {**data["aa"]}, "report.aa")
    aa = data["aa"]
    need(not (aa and aa["ok"]) or aa["lo"] <= 1 <= aa["hi"], "report.aa.ok", "the interval does not hold 1")
    if verdict["claim"] is not None:
        where = "report.verdict.claim"
        need(verdict["against"] is not None, where, "needs the arm it is sooner than, in against")
        need(aa is not None and aa["ok"], where, "no claim without an A/A test that held")
        low = ci[0] if ci else None
        need(low is not None and low > 1, where, f"needs an interval above 1, not {ci}")
        rows = {arm["name"]: arm for arm in data["arms"]}
        own, other = rows.get(verdict["claim"]), rows.get(verdict["against"] or "")
        need(own is None or own is not other, where, "an arm cannot be sooner than itself")
        field = {"baseline": "vs_plain", "strong": "vs_strong"}.get(
            other["kind"] if other is not None else ""
        )
        if own is not None and field is not None and cast(dict[str, Any], other)[field] is None:
            row = cast(dict[str, Versus | None], own)[field]
            said = row is not None and row["verdict"] == "sooner"
            need(said, where, "its own row does not say 'sooner'")
            need(row is None or row["ratio"] == verdict["ratio"], where, "its own row has another ratio")
    for arm in data["arms"]:
        where = f"report.arms[{arm['name']!r}]"
        fraction(arm["accuracy"]["mean"], f"{where}.accuracy.mean")
        interval(arm["accuracy"]["vs_strong"], f"{where}.accuracy.vs_strong", "diff")
        interval(arm["time"], f"{where}.time", "seconds")
        need(
            (arm["time"]["seconds"] is not None) == (arm["time"]["state"] == "reached"),
            f"{where}.time",
            f"has a time if and only if it is reached, got {arm['time']['state']!r}",
        )
        interval(arm["vs_plain"], f"{where}.vs_plain")
        interval(arm["vs_strong"], f"{where}.vs_strong")
        shares = [point["share"] for point in arm["points"]]
        need(shares == sorted(set(shares)), f"{where}.points", f"shares must rise, got {shares}")
        for i, point in enumerate(arm["points"]):
            fraction(point["accuracy"], f"{where}.points[{i}].accuracy")
            for k, run in enumerate(point["runs"]):
                at = f"{where}.points[{i}].runs[{k}]"
                fraction(run["accuracy"], f"{at}.accuracy")
                for part, seconds in {**run["seconds"], **run["spans"]}.items():
                    need(
                        cast(float, seconds) >= 0,
                        f"{at}.{part}",
                        f"seconds must not be negative, got {seconds}",
                    )
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
