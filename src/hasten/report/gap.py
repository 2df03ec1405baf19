"""The gap in the picture: the times of two arms to the target, and what may be said of their ratio."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.report.outcome import WORDS, versus_answer
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
    for key, kind in (("vs_strong", "strong"), ("vs_plain", "baseline")):
        versus: Versus | None = arm[key]  # type: ignore[literal-required]
        base = next((other for other in data["arms"] if other["kind"] == kind), None)
        if versus is not None and base is not None and arm["kind"] != "baseline":
            known = versus["ratio"] is not None and None not in (
                arm["time"]["seconds"],
                base["time"]["seconds"],
            )
            return [(versus, base)] if known else []
    return []
