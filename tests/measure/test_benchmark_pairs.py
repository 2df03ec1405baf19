"""What the benchmarks make of a machine that is never quiet: a smoke run ends well, a real one claims nothing."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.common import Unjudged, pairs, ratio_claim

from hasten.measure.load import Limits, Load, Watch
from hasten.measure.paired import paired_steps


def step() -> None:
    torch.ones(1000).sum()


@pytest.fixture(autouse=True)
def never_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def disturbed(self: Load, limits: Limits) -> list[str]:
        return ["other processes"]

    monkeypatch.setattr(Load, "disturbed", disturbed)


def test_a_smoke_run_has_figures_to_go_on_with() -> None:
    timed = pairs("busy", {"a": step, "b": step}, baseline="a", seconds=1.0, smoke=True)
    assert timed["n"] >= 2
    assert timed["n_dropped"] == 0
    for arm in ("A/A", "b"):
        assert all(math.isfinite(timed["ratios"][arm][end]) for end in ("ratio", "low", "high"))


def test_a_real_run_claims_nothing() -> None:
    assert Unjudged().stop()[1] == []
    assert Watch().stop()[1]
    timed = paired_steps({"a": step, "b": step}, baseline="a", seconds=0.1, chunk_s=(0.01, 0.02)).to_json()
    row = ratio_claim("m", "a step", timed, "b", 1.0)
    assert row["text"] == "not measured: the machine was never quiet"
    assert row["target"] == ">= 1x"
    assert row["met"] is False
