"""Random report data that passes the check: any mixture of times, intervals, states, failures and claims."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from hasten.report.schema import Arm, ReportData, TimeTo, Versus

from .fixture import outcome, report

BASE = report(seeds=2, shares=(0.5, 1.0), extra=2)
_ratio = st.floats(0.05, 30)
_wide = st.floats(0.001, 2.5)


@st.composite
def _versus(draw: st.DrawFn) -> Versus:
    kind = draw(st.sampled_from(["both", "both", "low", "high", "none", "unbounded base", "unmeasured"]))
    ratio = draw(_ratio)
    low, high = ratio / (1 + draw(_wide)), ratio * (1 + draw(_wide))
    given: Versus = {"ratio": ratio, "lo": low, "hi": high, "reason": None, "n": 3, "blocks": 3,
                     "verdict": "not shown", "note": draw(st.sampled_from(["", "a note"]))}  # fmt: skip
    if kind == "low":
        given["hi"] = None
    elif kind == "high":
        given["lo"] = None
    elif kind == "none":
        given["lo"] = given["hi"] = None
    elif kind == "unbounded base":
        given["ratio"], given["hi"], given["reason"] = None, None, "the baseline never gets there"
    elif kind == "unmeasured":
        given["ratio"] = given["lo"] = given["hi"] = None
        given["reason"] = draw(st.sampled_from(["no quiet block", "an emulated format"]))
    found = outcome(given["lo"], given["hi"])
    if kind in ("none", "unmeasured"):
        found = draw(
            st.sampled_from(["too wide", "one seed"] if kind == "none" else ["not measured", "not reached"])
        )
    elif found == "not shown":
        found = draw(st.sampled_from(["not shown", "too wide"]))
    given["verdict"] = found
    return given


@st.composite
def _time(draw: st.DrawFn, arm: Arm) -> TimeTo:
    state = draw(
        st.sampled_from(
            ["reached", "reached", "reached", "not reached", "below the smallest budget", "not measured"]
        )
    )
    first, last = (point["seconds"] or 1.0 for point in (arm["points"][0], arm["points"][-1]))
    seconds = draw(st.floats(first, last)) if state == "reached" else None
    bounded = seconds is not None and draw(st.booleans())
    low, high = (seconds * 0.9, seconds * 1.2) if bounded and seconds else (None, None)
    return {"seconds": seconds, "lo": low, "hi": high, "state": state, "note": ""}


@st.composite
def reports(draw: st.DrawFn) -> ReportData:
    """Draw report data; a claim is one of the rows that are sooner, its interval at most as wide as the row's to 1."""
    data: Any = copy.deepcopy(BASE)
    data["target"]["accuracy"] = draw(st.floats(0.5, 1.0))
    data["arms"] = data["arms"][: draw(st.integers(1, len(data["arms"])))]
    if draw(st.booleans()):
        data["arms"] = data["arms"][1:] or data["arms"]
    kinds = {arm["kind"]: arm["name"] for arm in data["arms"]}
    possible = []
    for arm in data["arms"]:
        arm["time"] = draw(_time(arm))
        arm["sets_target"] = draw(st.booleans())
        for key, kind in (("vs_plain", "baseline"), ("vs_strong", "strong")):
            arm[key] = draw(_versus()) if arm["kind"] != kind and kind in kinds else None
            if arm[key] and arm[key]["verdict"] == "sooner":
                possible.append((arm["name"], kinds[kind], arm[key]))
    data["aa"] = draw(st.sampled_from([data["aa"], None, {**data["aa"], "lo": 1.001, "ok": False}]))
    allowed = possible if data["aa"] and data["aa"]["ok"] else []
    claim = draw(st.sampled_from([*allowed, *allowed, None]))
    data["verdict"] = {
        "sentence": "A sentence.",
        "claim": None,
        "against": None,
        "ratio": None,
        "ci": None,
        "best_of": 3,
    }
    if claim:
        name, against, versus = claim
        low = (1 + versus["lo"]) / 2
        data["verdict"] |= {
            "claim": name,
            "against": against,
            "ratio": versus["ratio"],
            "ci": [low, versus["hi"]],
        }
    for failing in draw(st.lists(st.integers(0, len(data["arms"]) - 1), max_size=2)):
        point = data["arms"][failing]["points"][draw(st.integers(0, 1))]
        for run in point["runs"]:
            run["failure"], run["accuracy"] = "out of memory", None
        point["seconds"] = point["accuracy"] = point["sd"] = None
        point["n"] = 0
    for disturbed in draw(st.lists(st.integers(0, len(data["arms"]) - 1), max_size=3)):
        data["arms"][disturbed]["points"][draw(st.integers(0, 1))]["runs"][0]["disturbed"] = ["steal 3%"]
    return data
