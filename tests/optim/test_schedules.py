"""Schedules (training_recipes.md 9.5 and 9.11)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import SettingsError, UnknownName
from hasten.optim import schedules

shares = st.floats(0, 1)


def test_record_end_points() -> None:
    assert schedules.record94(0) == pytest.approx(0.2)
    assert schedules.record94(0.115) == pytest.approx(0.6)
    assert schedules.record94(0.23) == pytest.approx(1.0)
    assert schedules.record94(0.615) == pytest.approx(0.535)
    assert schedules.record94(1) == pytest.approx(0.07)
    assert schedules.record96(0.1) == pytest.approx(1.0)
    assert schedules.record96(1) == 0


@given(progress=shares, warmup=st.floats(0, 0.9))
def test_factors_are_shares_and_warm_up_rises(progress: float, warmup: float) -> None:
    for name in schedules.BY_NAME:
        factor = schedules.schedule(name)(progress, warmup)
        assert 0 <= factor <= 1
        if progress < warmup and name != "one_cycle":
            assert factor == pytest.approx(0.2 + 0.8 * progress / warmup)


@pytest.mark.parametrize(("name", "end"), [("constant", 1), ("step", 0.01), ("cosine", 0), ("linear", 0)])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_peak_after_the_warm_up_and_end(name: str, end: float, warmup: float) -> None:
    schedule = schedules.schedule(name)
    assert schedule(warmup, warmup) == pytest.approx(1)
    assert schedule(1, warmup) == pytest.approx(end, abs=1e-12)


@given(a=shares, b=shares)
def test_after_the_peak_they_never_rise(a: float, b: float) -> None:
    low, high = sorted((a, b))
    for name in schedules.BY_NAME:
        schedule = schedules.schedule(name)
        assert schedule(high, 0.0) <= schedule(low, 0.0) + 1e-12


def test_known_shapes() -> None:
    assert schedules.cosine(0.5) == pytest.approx(0.5)
    assert schedules.linear(0.75) == pytest.approx(0.25)
    assert schedules.step(0.49) == 1
    assert schedules.step(0.5) == pytest.approx(0.1)
    assert schedules.step(0.6, milestones=(0.3, 0.6), gamma=0.2) == pytest.approx(0.04)


def test_what_is_refused() -> None:
    for progress in (-0.01, 1.01, float("nan")):
        with pytest.raises(SettingsError):
            schedules.linear(progress)
    with pytest.raises(SettingsError):
        schedules.cosine(0.5, 1.0)
    with pytest.raises(UnknownName, match="cosine"):
        schedules.schedule("cosin")


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.5])
def test_one_cycle_is_pytorchs(warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    total = 1000
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total + 1, pct_start=warmup
    )
    for step in range(total + 1):
        # PyTorch's phases end one step before the shares say
        assert schedules.one_cycle(step / total, warmup) == pytest.approx(theirs.get_last_lr()[0], abs=0.02)
        optimizer.step()
        if step < total:
            theirs.step()
    assert schedules.one_cycle(0.0, warmup) == pytest.approx(1 / 25)
    assert schedules.one_cycle(warmup, warmup) == 1
    assert schedules.one_cycle(1.0, warmup) == pytest.approx(1 / 25e4)
