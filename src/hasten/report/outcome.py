"""The words for a time and for a ratio, the same on the page, in the picture and on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.report.schema import Arm, ReportData, TimeTo, Versus
from hasten.report.words import (
    DASH,
    bare_seconds,
    bracket,
    interval,
    plain,
    ratio_digits,
    seconds,
    times,
)

WORDS = {
    "sooner": "sooner",
    "later": "later",
    "not shown": "not shown",
    "too wide": "too wide to say",
    "not reached": "not reached",
    "one seed": "one seed",
    "not measured": "not measured",
}
"""What each outcome is called."""

ALREADY = "already at the smallest budget"
"""What a time is called that lies before the first point of its curve."""


@dataclass(frozen=True)
class Answer:
    """One cell: its value, its interval (or empty), the word for it, and a sentence that adds to it (or empty)."""

    value: str
    span: str = ""
    word: str = ""
    note: str = ""

    def line(self) -> str:
        """Return "2.10x [1.95, 2.26]" for one line of text."""
        return f"{self.value} {self.span}".rstrip()


def time_answer(time: TimeTo, arm: Arm) -> Answer:
    """Return when an arm reaches the target, or why there is no such time."""
    note = plain(time["note"])
    if time["seconds"] is not None:
        unit = seconds(time["seconds"])
        minutes = time["seconds"] >= 999.5
        span = interval(time["lo"], time["hi"], seconds if minutes else bare_seconds)
        return Answer(unit, span or "no interval", "", note)
    if time["state"] == "below the smallest budget":
        least = next((p["seconds"] for p in arm["points"] if p["seconds"] is not None), None)
        value = "before the first point" if least is None else f"before {seconds(least)}"
        return Answer(value, "", ALREADY, note)
    return Answer(DASH, "", time["state"], note)


def versus_answer(versus: Versus | None, itself: bool = False) -> Answer:
    """Return how much sooner an arm is than a baseline; ``itself`` marks the baseline's own row."""
    if versus is None:
        return Answer("1x", "", "", "") if itself else Answer(DASH)
    word, low, high = WORDS[versus["verdict"]], versus["lo"], versus["hi"]
    note = plain(versus["note"])
    if versus["ratio"] is None:
        if versus["verdict"] != "not reached":  # of that the times beside it tell the reason
            note = "; ".join(text for text in dict.fromkeys((plain(versus["reason"] or ""), note)) if text)
        if versus["verdict"] == "sooner" and low is not None:  # the baseline never gets there
            return Answer(f"at least {times(low, ratio_digits(low, None))}", "", word, note)
        return Answer(DASH, "", word, note)
    span = bracket(low, high) or ("" if versus["verdict"] == "one seed" else "no interval")
    return Answer(times(versus["ratio"]), span, word, note)


def deciding(arm: Arm) -> Versus | None:
    """Return the ratio an arm is judged by: against the strong baseline, else against the plain one."""
    return arm["vs_strong"] or arm["vs_plain"] if arm["kind"] != "baseline" else None


def reference(data: ReportData, kind: str) -> Arm | None:
    """Return the arm that ratios against plain ("baseline") or "strong" are measured against, if it ran.

    There may be other arms of that kind, such as strong without one of its parts; those have a ratio of their own.
    """
    key = {"baseline": "vs_plain", "strong": "vs_strong"}[kind]
    return next((arm for arm in data["arms"] if arm["kind"] == kind and arm[key] is None), None)  # type: ignore[literal-required]


def tone(word: str) -> str:
    """Return the style class of an outcome: "gain" only for "sooner", "loss" for what is shown to be worse."""
    return {"sooner": "gain", "later": "loss", "not reached": "loss"}.get(word, "open")
