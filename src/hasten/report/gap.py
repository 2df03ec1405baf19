"""The gap in the picture: the times of two arms to the target, and what may be said of their ratio."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.report.outcome import WORDS, deciding, reference, versus_answer
from hasten.report.schema import Arm, ReportData, Versus
from hasten.report.words import bracket, ratio_digits, times, visible


@dataclass(frozen=True)
class Gap:
    """``arm`` against ``base``: shown as a gain only where ``claimed``. ``text`` is the label, ``span`` what stands below it."""

    arm: Arm
    base: Arm
    claimed: bool
    text: str
    span: str


def gap(data: ReportData) -> Gap | None:
    """Return the gap to draw: that of the claim; without one the largest that was measured, marked as not shown.

    None where no arm's ratio to a baseline was measured.
    """
    verdict = data["verdict"]
    by_name = {arm["name"]: arm for arm in data["arms"]}
    if verdict["claim"] is not None and verdict["against"] is not None and verdict["ci"] is not None:
        low, high = verdict["ci"]
        span = f"{bracket(low, high)} against {visible(by_name[verdict['against']]['label'])}"
        ratio = verdict["ratio"]
        text = times(ratio) if ratio is not None else f"at least {times(low, ratio_digits(low, None))}"
        return Gap(by_name[verdict["claim"]], by_name[verdict["against"]], True, f"{text} sooner", span)
    found = [(versus, arm, base) for arm in data["arms"] for versus, base in _measured(data, arm)]
    if not found:
        return None
    versus, arm, base = max(found, key=lambda item: item[0]["ratio"] or 0.0)
    word = {"sooner": "not claimed"}.get(versus["verdict"], WORDS[versus["verdict"]])
    span = f"{versus_answer(versus).span} {visible(arm['label'])} against {visible(base['label'])}".strip()
    return Gap(arm, base, False, f"{times(versus['ratio'])}, {word}", span)


def _measured(data: ReportData, arm: Arm) -> list[tuple[Versus, Arm]]:
    """Return the ratio by which an arm is judged with its baseline, if it was measured and both times are known."""
    versus = deciding(arm)
    base = reference(data, "strong" if arm["vs_strong"] is not None else "baseline")
    if versus is None or base is None or versus["ratio"] is None:
        return []
    return (
        [(versus, base)] if arm["time"]["seconds"] is not None and base["time"]["seconds"] is not None else []
    )
