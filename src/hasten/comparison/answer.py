"""The one sentence a comparison ends in, and what may be claimed at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hasten.measure.curve import Span
from hasten.report.schema import Arm, Noise, Outcome, Verdict, Versus

WIDE = 2.0
"""An interval whose ends differ by more than this factor says too little (our choice)."""


def outcome(span: Span) -> Outcome:
    """Return what an interval allows to say of a time ratio."""
    if span.low > 1:
        return "sooner"
    if span.high < 1:
        return "later"
    if span.low <= 0 or not math.isfinite(span.high) or span.high / span.low > WIDE:
        return "too wide"
    return "not shown"


def without_claim(sentence: str) -> Verdict:
    """Return a verdict that claims nothing."""
    return {"sentence": sentence, "claim": None, "against": None, "ratio": None, "ci": None, "best_of": 0}


def verdict(rows: Sequence[Arm], goal: float, corrected: Mapping[str, Span], seeds: int) -> Verdict:
    """Return the headline.

    corrected: each method's and stack's ratio to the strong baseline, with the interval corrected for their number. An
    arm is claimed only if that interval lies above 1; otherwise the strong baseline is, if its own over plain does.
    """
    target = percent(goal)
    plain = next((row for row in rows if row["kind"] == "baseline"), None)
    strong = next((row for row in rows if row["kind"] == "strong"), None)
    tried = [row for row in rows if row["kind"] in ("method", "stack")]
    if seeds < 2:
        return without_claim(_one_seed(rows, target))
    base = strong or plain
    sooner = [row for row in tried if row["name"] in corrected and corrected[row["name"]].low > 1]
    if sooner and base is not None:
        best = max(sooner, key=lambda row: corrected[row["name"]].value or corrected[row["name"]].low)
        span = corrected[best["name"]]
        text = f"Use {named(best)}: this network reaches {target} {_times(span)} sooner than with {named(base)} {_interval(span, len(corrected))}"
        over = best["vs_plain"] if base is not plain else None
        if over is not None and over["verdict"] == "sooner" and over["ratio"] is not None:
            text += f", and {over['ratio']:.2f}x sooner than with plain PyTorch"
        return _claim(text + ".", best, base, span, len(corrected))
    none = _none_of(tried, base, target)
    if strong is not None and plain is not None and strong["vs_plain"] is not None:
        span = _span(strong["vs_plain"])
        if strong["vs_plain"]["verdict"] == "sooner":
            also = f"; {none}" if none else ""
            text = f"Use {named(strong)} as it is: this network reaches {target} {_times(span)} sooner than with plain PyTorch {_interval(span, 1)}{also}."
            return _claim(text, strong, plain, span, 1)
        if strong["vs_plain"]["verdict"] == "later":
            also = f"; {none}" if none else ""
            return without_claim(
                f"Use plain PyTorch: {named(strong)} reaches {target} later, at {_times(span)} its speed {_interval(span, 1)}{also}."
            )
    wide = [
        v
        for row in rows
        for v in (row["vs_strong"], row["vs_plain"])
        if v is not None and v["verdict"] == "too wide"
    ]
    more = " The intervals are too wide to tell: give more seeds or longer budgets." if wide else ""
    if none:
        return without_claim(f"No gain is shown: {none}.{more}")
    return without_claim(
        f"No gain is shown: nothing reaches {target} sooner than plain PyTorch beyond its interval.{more}"
    )


def percent(value: float) -> str:
    """Return an accuracy as it is printed."""
    return f"{100 * value:.2f}%"


def named(row: Arm) -> str:
    """Return what a sentence calls an arm."""
    label = row["label"].removeprefix("+ ")
    if row["kind"] == "strong":
        return (
            f"the {label}"
            if label.startswith("strong without")
            else "the strong baseline" + label.removeprefix("strong").rstrip()
        )
    return label


def blocked(aa: Noise | None, quiet: bool) -> str:
    """Return why nothing may be claimed from these times, or nothing."""
    if not quiet:
        return (
            "No claim: other processes used the machine in all blocks but at most one, so there are no times to trust; "
            "repeat the command when nothing else runs."
        )
    if aa is None:
        return (
            "No claim: the A/A test, whole runs of one arm against themselves, has no result on a quiet machine; repeat "
            "the command when nothing else runs."
        )
    if not aa["ok"]:
        return (
            f"No claim: in the A/A test runs of the same arm differed by {aa['ratio']:.2f}x (95% interval {aa['lo']:.2f} to "
            f"{aa['hi']:.2f}), so times on this machine say nothing now; repeat the command when nothing else runs."
        )
    return ""


def _one_seed(rows: Sequence[Arm], target: str) -> str:
    timed = [row for row in rows if row["time"]["seconds"] is not None]
    if not timed:
        return f"One seed, so no interval and no claim; no arm's curve gives a time for {target}."
    best = min(timed, key=lambda row: row["time"]["seconds"] or math.inf)
    return (
        f"One seed, so no interval and no claim: {named(best)} was at {target} first, after {best['time']['seconds']:.3g} s; "
        f"give 3 seeds or more."
    )


def _none_of(tried: Sequence[Arm], base: Arm | None, target: str) -> str:
    if not tried or base is None:
        return ""
    over = named(base)
    if len(tried) == 1:
        told = tried[0]["vs_strong"] or tried[0]["vs_plain"]
        why = {"later": "is shown to be later", "not reached": f"does not reach {target}"}.get(
            told["verdict"] if told else "", ""
        )
        return (
            f"{named(tried[0])} {why}" if why else f"{named(tried[0])} is not shown to be sooner than {over}"
        )
    return f"none of the {len(tried)} others is shown to be sooner than {over}"


def _claim(text: str, row: Arm, against: Arm, span: Span, best_of: int) -> Verdict:
    high = span.high if math.isfinite(span.high) else None
    return {"sentence": text, "claim": row["name"], "against": against["name"], "ratio": span.value,
            "ci": [span.low or None, high], "best_of": best_of}  # fmt: skip


def _span(versus: Versus) -> Span:
    return Span(versus["ratio"], versus["lo"] or 0.0, versus["hi"] if versus["hi"] is not None else math.inf)


def _times(span: Span) -> str:
    return (
        f"{span.value:.{_digits(span)}f}x"
        if span.value is not None
        else f"at least {span.low:.{_digits(span)}f}x"
    )


def _digits(span: Span) -> int:
    """Return how many digits show on which side of 1 an interval lies."""
    edge = span.low if span.low > 1 else span.high
    return next((d for d in range(2, 6) if round(edge, d) != 1), 6)


def _interval(span: Span, best_of: int) -> str:
    digits = _digits(span)
    high = f"to {span.high:.{digits}f}" if math.isfinite(span.high) else "upwards"
    note = f", corrected for the best of {best_of}" if best_of > 1 else ""
    return f"(95% interval {span.low:.{digits}f} {high}{note})"
