"""The words of a report, each explained in a sentence or two where it stands."""

from __future__ import annotations

from hasten.report.schema import ReportData
from hasten.report.words import goal, plain

_TERMS = {
    "curve": "Each mark is an arm trained for one budget, its whole learning-rate schedule fitted into it; faint dots are the single seeds. The curve joins the means without ever falling, and is never drawn beyond the budgets that were run.",
    "sooner": "The time one arm takes to the target, divided by the time of another: 2x sooner is half the time at the same accuracy. Training less does not count as a gain, for then the baseline's own curve would get there as early.",
    "interval": "The range in brackets would hold the true value in 95 of 100 such comparisons. “Sooner” is said only where all of it lies above 1. More seeds make it narrower.",
    "not shown": "The interval holds 1, so the runs do not tell whether there is a gain.",
    "too wide to say": "The interval holds 1 and is so wide that a large gain or loss may hide in it: too few seeds, or too noisy a machine.",
    "not reached": "The arm's curve ends below the target. How much longer it would take was not measured and is not guessed.",
    "already at the smallest budget": "The arm is above the target with its smallest budget, so it gets there before the first point. How much earlier was not measured.",
    "one seed": "A single run of each says nothing about chance. Give more seeds for an interval.",
    "full budget": "The longest training that was run. These two columns compare neither equal time nor equal accuracy, which is why the answer is not read from them.",
    "plain and strong": "Plain is PyTorch as its tutorials show it. Strong adds all that is exact and pays here, such as a faster number format, memory layout or compiling; a method has to beat it to be worth its while.",
    "block": "One run of every arm with the same seed, made one after the other, so that the machine's moods meet all alike. Where something else used the machine meanwhile, the times are left out; the accuracies stay.",
    "A/A test": "Whole runs of one arm are timed against themselves before anything else. The true ratio is 1, so the interval must hold it; where it does not, the machine is too restless and nothing is claimed.",
    "sd of a pair": "How much the times of two equal runs differ by themselves. A gain much smaller than that needs many seeds to be seen.",
}  # fmt: skip

_PICTURE = ("curve", "sooner")
_OUTCOMES = ("not shown", "too wide to say", "not reached", "already at the smallest budget", "one seed")
_HONESTY = ("block", "A/A test", "sd of a pair")


def terms(data: ReportData, words: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Return (term, explanation) of the picture, the table and the honesty box; of outcomes those in ``words``."""
    target = data["target"]
    rule, chosen = (plain(text).strip().rstrip(".") for text in (target["rule"], target["chosen"]))
    text = " ".join(f"{part[:1].upper()}{part[1:]}." for part in (chosen, rule) if part)
    picture = [(f"target {goal(target['accuracy'])}", f"The accuracy to get to. {text}".strip())]
    picture += [(name, _TERMS[name]) for name in _PICTURE]
    names = ("interval", *(name for name in _OUTCOMES if name in words), "full budget", "plain and strong")
    table = [(name, _TERMS[name]) for name in names]
    if any(arm["accuracy"]["vs_strong"] for arm in data["arms"]):
        table.append(("no loss", _margin(target.get("margin"))))
    return {"picture": picture, "table": table, "honesty": [(name, _TERMS[name]) for name in _HONESTY]}


def _margin(margin: float | None) -> str:
    size = (
        "a margin set before the runs"
        if margin is None
        else f"a margin of {100 * margin:g} points set before the runs"
    )
    return f"Said only where the accuracy is shown, at 95%, to lose less than {size}; else a loss is not ruled out. It speaks of the full budget alone."
