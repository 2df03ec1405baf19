"""The comparison as plain text for the terminal, and as rows for a spreadsheet."""

from __future__ import annotations

import textwrap

from hasten.report.derived import mean_time, only_trains_less
from hasten.report.schema import Arm, ReportData, Versus
from hasten.report.words import DASH, bare_seconds, bracket, percent, seconds, shortened, times, visible

_INDENT = " " * 7
_LABEL = 24


def summary_lines(data: ReportData, width: int = 100) -> list[str]:
    """Return the result table as lines without markup, control characters or line ends.

    One row an arm: mean time with its 95% interval, the ratio to the plain and to the strong baseline with
    theirs, and the verdict against the strong baseline (the plain one where no strong arm ran). Shortened
    baselines are left out: they are the yardstick. ``width`` wraps the verdict sentence only.
    """
    arms = [arm for arm in data["arms"] if arm["kind"] != "control"]
    n = max((len(arm["runs"]) for arm in arms), default=0)
    counted = f"mean of {n}, 95% interval" if n > 1 else "one run each: no intervals, no claims"
    lines = [f"Result time to {percent(data['target']['accuracy'])} ({counted})"]
    rows = [("", "time", "vs plain", "vs strong", ""), *(_cells(arm) for arm in arms)]
    if all(arm["kind"] != "strong" for arm in arms):
        rows = [(*row[:3], "", row[4]) for row in rows]
    columns = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        padded = [text.ljust(columns[i]) for i, text in enumerate(row)]
        lines.append((_INDENT + "  ".join(padded)).rstrip())
    sentence = visible(data["verdict"]["sentence"])
    lines += textwrap.wrap(sentence, max(width - 7, 20), initial_indent=_INDENT, subsequent_indent=_INDENT)
    if data["failures"]:
        runs = "run" if len(data["failures"]) == 1 else "runs"
        lines.append(f"{_INDENT}{len(data['failures'])} {runs} failed; the report gives the reasons in full")
    return lines


def _cells(arm: Arm) -> tuple[str, str, str, str, str]:
    time = mean_time(arm)
    if time is None:
        clock = "no run finished"
    elif time.low is None or time.high is None:
        clock = f"{seconds(time.mean)} [one run]"
    else:
        clock = f"{seconds(time.mean)} [{bare_seconds(time.low)}, {bare_seconds(time.high)}]"
    label = shortened(visible(arm["label"]), _LABEL)
    deciding = arm["vs_strong"] or arm["vs_plain"]
    verdict = "" if deciding is None or arm["kind"] in ("baseline", "strong") else outcome(arm, deciding)
    plain = _ratio(arm["vs_plain"], arm["kind"] == "baseline")
    return label, clock, plain, _ratio(arm["vs_strong"], arm["kind"] == "strong"), verdict


def _ratio(versus: Versus | None, itself: bool) -> str:
    if versus is None or versus["ratio"] is None:
        return "1.00×" if itself else DASH
    return f"{times(versus['ratio'])} {bracket(versus['lo'], versus['hi']) or '[one run]'}"


def outcome(arm: Arm, versus: Versus) -> str:
    """Return the verdict in words: "faster", "slower here: the reason", "misses the target (0 of 3)"."""
    reached, note = arm["reached"], visible(versus["note"] or versus["reason"] or "")
    if versus["verdict"] == "missed" or (not reached["yes"] and reached["n"] > 1):
        words = f"misses the target ({reached['k']} of {reached['n']})"
    else:
        words = {"slower": "slower here"}.get(versus["verdict"], versus["verdict"])
        if words == "faster" and only_trains_less(arm):
            words = "faster, but not at equal accuracy"
    return f"{words}: {note}" if note else words


def csv_rows(data: ReportData) -> list[list[str]]:
    """Return a header and one row a run, every cell text.

    Text cells that a spreadsheet would run as a formula (=, +, -, @, tab, return first) start with a ``'``.
    """
    numbers = ["seed", "block", "samples_forward", "samples_backward", "macs", "peak_rss_mb", "cpu_seconds"]
    clock = ["train", "method", "final", "eval", "compile", "setup", "total"]
    rows = [["arm", "label", "kind", "methods", "accuracy", *clock, *numbers, "failure"]]
    for arm in data["arms"]:
        for run in arm["runs"]:
            texts = [arm["name"], arm["label"], arm["kind"], " + ".join(arm["methods"])]
            measured: list[object] = [run["accuracy"], *(run["seconds"].get(key) for key in clock)]
            measured += [run.get(key) for key in numbers]
            cells = ["" if value is None else repr(value) for value in measured]
            rows.append([*map(_defused, texts), *cells, _defused(run["failure"] or "")])
    return rows


def _defused(text: str) -> str:
    # Judged on what stays visible, too: a hidden character in front must not smuggle the sign in.
    shown = visible(text)
    risky = text[:1] in ("\t", "\r", "\n") or shown.lstrip()[:1] in ("=", "+", "-", "@")
    return "'" + shown if risky else shown
