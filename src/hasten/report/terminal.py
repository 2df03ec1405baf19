"""The comparison as plain text for the terminal, and as rows for a spreadsheet."""

from __future__ import annotations

import textwrap

from hasten.report.outcome import ALREADY, Answer, deciding, time_answer, versus_answer
from hasten.report.schema import Arm, ReportData
from hasten.report.words import goal, percent, shortened, visible

_LABELS = (24, 20)
_READ = (
    "In brackets: 95% intervals, which hold the true value in 95 of 100 such comparisons. Above 1x is sooner, and "
    "“sooner” is said only where the whole interval is."
)
_SEEDS = "One seed each, so there are no intervals and no claims."


def summary_lines(data: ReportData, width: int = 100) -> list[str]:
    """Return the answer, then its table, as lines without markup, control characters or line ends.

    The verdict's sentence comes first. Then one row an arm: its time to the target and how much sooner that is than
    plain and strong, each with its 95% interval, the outcome against strong (plain, where there is no strong arm) and
    the accuracy at the full budget; then the reasons of what could not be said. Nothing is wider than ``width``, down to
    80; below the table loses columns first.
    """
    lines = [*textwrap.wrap(visible(data["verdict"]["sentence"]), width), ""]
    lines += _table(data, width)
    lines.append("")
    for arm in data["arms"]:
        note = _note(arm)
        if note:
            lines += textwrap.wrap(f"{visible(arm['label'])}: {note}.", width, subsequent_indent="  ")
    several = any(arm["accuracy"]["n"] > 1 for arm in data["arms"])
    lines += textwrap.wrap(_READ if several else _SEEDS, width)
    if data["failures"]:
        runs = "run" if len(data["failures"]) == 1 else "runs"
        lines.append(f"{len(data['failures'])} {runs} failed; the report gives the reasons in full.")
    return lines


def _table(data: ReportData, width: int) -> list[str]:
    """Return the widest table that fits: the accuracy goes first, then labels are cut, then intervals go from the left."""
    has = {arm["kind"] for arm in data["arms"]}
    kept = [0, 1, *([2] if "baseline" in has else []), *([3] if "strong" in has else []), 4]
    trials = [(spans, limit, spans == 0b1110 and last) for spans in (0b1110, 0b1100, 0b1000, 0)
              for last in (True, False) for limit in _LABELS]  # fmt: skip
    lines: list[str] = []
    for spans, limit, last in trials:
        head = ["", f"time to {goal(data['target']['accuracy'])}"]
        head += [
            "sooner than plain" if spans & 4 else "than plain",
            "sooner than strong" if spans & 8 else "than strong",
        ]
        rows = [[*head, "", "accuracy"], *(_cells(arm, limit, spans) for arm in data["arms"])]
        rows = [[row[i] for i in [*kept, *([5] if last else [])]] for row in rows]
        columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(columns[i]) for i, cell in enumerate(row)).rstrip() for row in rows]
        if max(map(len, lines)) <= width:
            break
    return lines


def _cells(arm: Arm, limit: int, spans: int) -> list[str]:
    """Return the texts of a row; bit i of ``spans`` says that column i shows its interval."""
    time = time_answer(arm["time"], arm)
    versus = deciding(arm)
    word = versus_answer(versus).word if versus is not None else ""

    def cell(column: int, answer: Answer) -> str:
        return answer.line() if spans >> column & 1 and answer.span != "no interval" else answer.value

    return [
        shortened(visible(arm["label"]), limit),
        time.word if time.word not in ("", ALREADY) else cell(1, time),
        cell(2, versus_answer(arm["vs_plain"], arm["kind"] == "baseline")),
        cell(3, versus_answer(arm["vs_strong"], arm["kind"] == "strong")),
        "" if word == time.word else word,
        percent(arm["accuracy"]["mean"]),
    ]


def _note(arm: Arm) -> str:
    """Return what the row of an arm cannot hold, without repeating itself: "not reached, 88.5% in 45.6 s"."""
    time = time_answer(arm["time"], arm)
    when = (
        ", ".join(text for text in (time.word, time.note) if text)
        if time.note or time.word == ALREADY
        else ""
    )
    notes = [when, versus_answer(arm["vs_strong"]).note, versus_answer(arm["vs_plain"]).note]
    return "; ".join(dict.fromkeys(note.rstrip(".") for note in notes if note))


def csv_rows(data: ReportData) -> list[list[str]]:
    """Return a header and one row a run, every cell text.

    Text cells that a spreadsheet would run as a formula (=, +, -, @, tab, return first) start with a ``'``.
    """
    numbers = ["seed", "block", "samples_forward", "samples_backward", "macs", "peak_rss_mb", "cpu_seconds"]
    clock = ["train", "method", "final", "eval", "compile", "setup", "total"]
    rows = [
        [
            "arm",
            "label",
            "kind",
            "methods",
            "share",
            "epochs",
            "accuracy",
            *clock,
            *numbers,
            "disturbed",
            "resumed",
            "failure",
        ]
    ]
    for arm in data["arms"]:
        for point in arm["points"]:
            for run in point["runs"]:
                texts = [arm["name"], arm["label"], arm["kind"], " + ".join(arm["methods"])]
                measured: list[object] = [point["share"], point["epochs"], run["accuracy"]]
                measured += [run["seconds"].get(key) for key in clock] + [run.get(key) for key in numbers]
                cells = ["" if value is None else repr(value) for value in measured]
                ends = ["; ".join(run["disturbed"]), "yes" if run["resumed"] else "no", run["failure"] or ""]
                rows.append([*map(_defused, texts), *cells, *map(_defused, ends)])
    return rows


def _defused(text: str) -> str:
    # Judged on what stays visible, too: a hidden character in front must not smuggle the sign in.
    shown = visible(text)
    risky = text[:1] in ("\t", "\r", "\n") or shown.lstrip()[:1] in ("=", "+", "-", "@")
    return "'" + shown if risky else shown
