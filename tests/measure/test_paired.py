"""Paired step times on a fake machine whose true speeds are known."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable

import numpy as np
import pytest

from hasten.errors import SettingsError
from hasten.measure.clock import Clock
from hasten.measure.load import Limits, Load, Watch
from hasten.measure.paired import AA, PairedResult, paired_steps


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection per block takes longer than the whole fake run."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


class Machine:
    """A fake time source; its mood (a slow drift shared by all arms) and noise are set by the test."""

    def __init__(self, noise: float = 0.0, drift: float = 0.0, seed: int = 0) -> None:
        self.t = 0.0
        self.rng = np.random.default_rng(seed)
        self.noise, self.drift = noise, drift
        self.log: list[str] = []
        self.gc_on: set[bool] = set()

    def arm(self, name: str, seconds: float) -> Callable[[], None]:
        def step() -> None:
            self.log.append(name)
            self.gc_on.add(gc.isenabled())
            self.t += seconds * (1 + self.drift * self.t) * self.rng.lognormal(0.0, self.noise)

        return step

    def clock(self) -> Clock:
        return Clock(now=lambda: self.t, cpu=lambda: self.t)


class Quiet:
    """A watch on a machine where nobody else works."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def stop(self) -> tuple[Load, list[str]]:
        return Load(1.0, 0.0, 0.0, 0), []


def run(machine: Machine, arms: dict[str, float], seconds: float = 40.0, **options: object) -> PairedResult:
    steps = {name: machine.arm(name, took) for name, took in arms.items()}
    settings: dict = {"clock": machine.clock(), "watch": Quiet} | options
    return paired_steps(steps, baseline=next(iter(arms)), seconds=seconds, **settings)


def test_it_finds_the_true_ratio_under_noise_and_drift() -> None:
    machine = Machine(noise=0.05, drift=0.005)
    result = run(machine, {"plain": 0.02, "fast": 0.016, "slow": 0.025})
    assert result.aa_ok
    assert result.ratios["fast"].low <= 1.25 <= result.ratios["fast"].high
    assert (result.ratios["fast"].verdict, result.ratios["slow"].verdict) == ("faster", "slower")
    assert set(result.ratios) == {AA, "fast", "slow"}
    assert len(result.blocks) >= 8
    assert result.seconds_per_step("fast") < result.seconds_per_step("plain")


def test_equal_arms_are_claimed_in_at_most_1_of_20() -> None:
    claims = failures = 0
    for seed in range(300):
        result = run(Machine(noise=0.1, drift=0.002, seed=seed), {"plain": 0.2, "same": 0.2}, 30.0, seed=seed)
        claims += result.ratios["same"].verdict != "not shown"
        failures += not result.aa_ok
    assert claims / 300 <= 0.05 + 0.038
    assert failures / 300 <= 0.05 + 0.038


def test_chunks_alternate_in_an_order_drawn_per_block_and_keyed_by_seed() -> None:
    arms = {"plain": 0.05, "a": 0.05, "b": 0.05}
    result = run(Machine(), arms, seed=3)
    for block in result.blocks:
        assert sorted(block.order) == sorted(["plain", "a", "b", AA])
        assert set(block.seconds) == set(block.order)
    assert len({block.order for block in result.blocks}) >= 4
    again, other = run(Machine(), arms, seed=3), run(Machine(), arms, seed=4)
    assert [block.order for block in again.blocks] == [block.order for block in result.blocks]
    assert [block.order for block in other.blocks] != [block.order for block in result.blocks]


def test_chunks_keep_to_their_length_and_the_run_to_its_time() -> None:
    machine = Machine()
    result = run(machine, {"plain": 0.01, "slow": 0.03}, 24.0)
    for arm, per_step in (("plain", 0.01), ("slow", 0.03), (AA, 0.01)):
        assert 0.5 <= result.steps_per_chunk[arm] * per_step <= 2.0
    assert machine.t <= 24.0 + 4.0  # plus warm-up and finding the chunk length
    slow = run(Machine(), {"plain": 7.0, "other": 7.0}, 1.0)
    assert set(slow.steps_per_chunk.values()) == {1}
    assert len(slow.blocks) == 2


def test_the_first_steps_are_not_counted() -> None:
    machine = Machine()
    fast, calls = machine.arm("fast", 0.1), []

    def cold() -> None:
        calls.append(1)
        machine.t += 50.0 if len(calls) <= 5 else 0.0
        fast()

    result = paired_steps(
        {"plain": machine.arm("plain", 0.1), "cold": cold},
        baseline="plain",
        seconds=10.0,
        clock=machine.clock(),
        watch=Quiet,
    )
    assert result.ratios["cold"].ratio == pytest.approx(1.0)


def test_a_device_that_runs_behind_is_timed_by_its_work() -> None:
    state = {"host": 0.0, "free": 0.0, "syncs": 0}

    def launch(seconds: float) -> Callable[[], None]:
        def step() -> None:
            state["host"] += 1e-4
            state["free"] = max(state["free"], state["host"]) + seconds

        return step

    def sync() -> None:
        state["syncs"] += 1
        state["host"] = max(state["host"], state["free"])

    arms = {"plain": launch(0.04), "fast": launch(0.02)}
    clock = Clock(now=lambda: state["host"], sync=sync)
    result = paired_steps(arms, baseline="plain", seconds=20.0, clock=clock, watch=Quiet)
    assert result.ratios["fast"].ratio == pytest.approx(2.0, rel=0.01)
    steps = sum(result.steps_per_chunk.values()) * len(result.blocks)
    assert state["syncs"] < steps / 5


def test_blocks_are_dropped_by_the_environment_and_counted() -> None:
    class Busy(Quiet):
        made = 0

        def stop(self) -> tuple[Load, list[str]]:
            Busy.made += 1
            load = Load(1.0, 0.03 if Busy.made % 2 else 0.0, 0.0, 0)
            return load, load.disturbed(self.limits)

    result = run(Machine(noise=0.02), {"plain": 0.1, "fast": 0.05}, watch=Busy)
    assert result.n_dropped == (len(result.blocks) + 1) // 2
    assert result.ratios["fast"].n == len(result.kept()) == len(result.blocks) - result.n_dropped
    assert f"dropped for steal: {result.n_dropped}" in result.table()
    loose = run(Machine(noise=0.02), {"plain": 0.1, "fast": 0.05}, watch=Busy, limits=Limits(steal=0.05))
    assert loose.n_dropped == 0
    assert loose.to_json()["limits"]["steal"] == 0.05


def test_a_run_with_every_block_dropped_claims_nothing() -> None:
    class Swamped(Quiet):
        def stop(self) -> tuple[Load, list[str]]:
            load = Load(1.0, 0.5, None, 0)
            return load, load.disturbed(self.limits)

    result = run(Machine(), {"plain": 0.1, "fast": 0.05}, watch=Swamped)
    assert result.ratios == {}
    assert not result.aa_ok
    text = "\n".join(result.table())
    assert "no block kept" in text
    assert "nothing is claimed" in text
    assert "could not be checked on this system: other processes" in text
    json.dumps(result.to_json(), allow_nan=False)


def test_a_harness_that_favours_the_baseline_fails_the_aa_test() -> None:
    result = run(Machine(noise=0.01), {"plain": 0.1, "x": 0.1})
    # what a harness that always ran "A/A" on a warm cache would have measured
    blocks = [
        type(block)(block.order, {**block.seconds, AA: block.seconds[AA] * 0.9}, block.load, block.dropped)
        for block in result.blocks
    ]
    biased = PairedResult("plain", ("plain", "x"), tuple(blocks), result.steps_per_chunk, 5, 0, Limits())
    assert not biased.aa_ok
    assert any("A/A failed" in line for line in biased.table())


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_inside_chunks_and_put_back(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        machine = Machine()
        run(machine, {"plain": 0.3, "b": 0.3}, 3.0)
        assert machine.gc_on == {False}
        assert gc.isenabled() == enabled

        def broken() -> None:
            raise RuntimeError("step failed")

        with pytest.raises(RuntimeError, match="step failed"):
            paired_steps({"plain": broken}, baseline="plain", seconds=1.0, clock=machine.clock())
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_json_holds_every_raw_value() -> None:
    result = run(Machine(noise=0.1), {"plain": 0.1, "fast": 0.05})
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert len(data["blocks"]) == len(result.blocks)
    logs = [np.log(b["seconds_per_step"]["plain"] / b["seconds_per_step"]["fast"]) for b in data["blocks"]]
    assert data["ratios"]["fast"]["ratio"] == pytest.approx(float(np.exp(np.mean(logs))))
    assert data["aa_ok"] == result.aa_ok


def test_it_runs_on_the_real_clock() -> None:
    def step() -> None:
        sum(range(2000))

    result = paired_steps({"plain": step}, baseline="plain", seconds=0.2, chunk_s=(0.02, 0.05), watch=Watch)
    assert result.ratios == {} or set(result.ratios) == {AA}
    assert len(result.blocks) >= 2


@pytest.mark.parametrize(
    "bad",
    [
        {"baseline": "none"},
        {"seconds": 0.0},
        {"chunk_s": (2.0, 0.5)},
        {"warmup": 1},
    ],
)
def test_bad_settings_are_refused(bad: dict) -> None:
    settings = {"baseline": "plain", "seconds": 1.0} | bad
    with pytest.raises(SettingsError):
        paired_steps({"plain": lambda: None}, **settings)
    with pytest.raises(SettingsError, match="A/A"):
        paired_steps({"plain": lambda: None, AA: lambda: None}, baseline="plain", seconds=1.0)
