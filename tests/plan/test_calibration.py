"""Calibration finds constants it is not told of, and its file is refused where it does not belong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hasten import keyed, models
from hasten.errors import DataError, UnsupportedError
from hasten.kernels.probe import fingerprint
from hasten.plan import Theta, Work, calibrate, load_theta, step_time, store_theta, trace
from hasten.plan.calibration import Timed, fit, fit_steps, time_works
from hasten.plan.epoch_time import work_seconds

TRUE = {
    "output float32": 6e-12, "grad_input float32": 7e-12, "grad_weight float32": 9e-12, "bytes float32": 1.2e-10,
    "norm float32": 8e-11, "pass float32": 5e-11, "call": 2e-5, "fresh": 2e-10, "weights of output float32": 1e-9,
    "weights of grad_input float32": 3e-9, "weights of grad_weight float32": 5e-9,
}  # fmt: skip


@pytest.fixture(scope="module")
def works() -> list[Work]:
    cases = [(name, batch) for name in ("resnet8", "vgg16") for batch in (16, 64, 128)]
    return [w for name, batch in cases for w in trace(models.build(name, seed=0), (batch, 3, 32, 32))]


def timed(works: list[Work], truth: Theta, noise: float = 0.0) -> list[Timed]:
    factors = 1 + noise * torch.randn(len(works), generator=keyed.generator("noise"))
    return [Timed((w,), work_seconds(w, truth) * float(f)) for w, f in zip(works, factors, strict=True)]


@pytest.mark.parametrize("overlap", [False, True])
def test_constants_are_found_again(works: list[Work], overlap: bool) -> None:
    truth = Theta(TRUE, "", 0, overlap)
    found = fit(timed(works, truth), TRUE["bytes float32"])
    assert found.overlap == overlap
    for name, value in TRUE.items():
        assert abs(found.of(name) / value - 1) < 0.02, name
    assert max(found.errors.values()) < 0.01


def test_noise_of_a_tenth_does_not_bend_them(works: list[Work]) -> None:
    truth = Theta(TRUE, "", 0, False)
    found = fit(timed(works, truth, 0.1), overlap=False)
    total = sum(work_seconds(w, truth) for w in works)
    assert abs(sum(work_seconds(w, found) for w in works) / total - 1) < 0.03
    assert all(value < 0.15 for value in found.errors.values())


def test_half_and_twice_count_alike(works: list[Work]) -> None:
    """Times that are too long by 2 and too short by 2 in turn leave no bias."""
    truth = Theta(TRUE, "", 0, False)
    twice = [Timed(t.works, t.seconds * f) for t in timed(works, truth) for f in (0.5, 2.0)]
    found = fit(twice, overlap=False)
    ratios = [work_seconds(w, found) / work_seconds(w, truth) for w in works]
    assert all(0.9 < r < 1.1 for r in ratios)


def test_what_steps_take_beyond_their_operations(works: list[Work]) -> None:
    truth = Theta(TRUE, "", 0, False)
    steps = [
        Timed(tuple(s), 0.9 * sum(work_seconds(w, truth) for w in s) + len(s) * 3e-6 + 1e-3 + 2e-4)
        for s in (works[:20], works[:40], works[:200], works[300:310])
    ]
    found = fit_steps(truth, steps, [2e-4] * 4)
    assert abs(found.within / 0.9 - 1) < 1e-6
    assert abs(found.of("step call") / 3e-6 - 1) < 1e-6
    assert abs(found.of("step") / 1e-3 - 1) < 1e-6


def test_operations_are_timed_in_turn_and_once_each() -> None:
    calls: list[str] = []

    class Fake(Work):
        def replay(self):  # type: ignore[no-untyped-def]
            return lambda: calls.append(self.name)

        def key(self) -> str:
            return self.name

    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 0.25

    tick = ticks()
    given = [Fake(name, "pass float32", 0.0, 1.0) for name in "abca"]
    found = time_works(given, rounds=4, budget=1e9, clock=lambda: next(tick))
    assert [t.works[0].name for t in found] == ["a", "b", "c"]
    assert all(t.seconds == 0.25 for t in found)
    rounds = [calls[i : i + 6] for i in range(0, len(calls), 6)]
    assert len(rounds) == 5
    assert all(sorted(r) == list("aabbcc") for r in rounds), (
        "one for warmth, then one that counts, of each in a round"
    )
    assert len({tuple(r) for r in rounds}) > 1, "each round has an order of its own"


def test_calibrate_runs_and_its_constants_predict() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.Flatten(),
            nn.Linear(128, 2),
        )

    found = calibrate([build], [(2, 3, 8, 8), (4, 3, 8, 8)], rounds=3, budget=1.0)
    found.check()
    assert all(value >= 0 for value in found.seconds.values())
    assert {"step", "step call", "convert", "bytes float32", "bytes bfloat16", "cast"} <= set(found.seconds)
    for dtype in (torch.float32, torch.bfloat16):
        assert step_time(build(), (3, 3, 8, 8), found, dtype=dtype).total > 0


def test_stored_constants(tmp_path: Path) -> None:
    theta = Theta(TRUE, fingerprint(), torch.get_num_threads(), True, 0.9, {"norm float32": 0.1})
    store_theta(theta, tmp_path / "theta.json")
    assert load_theta(tmp_path / "theta.json") == theta
    store_theta(replace(theta, machine="another"), tmp_path / "theta.json")
    with pytest.raises(UnsupportedError, match="another"):
        load_theta(tmp_path / "theta.json")
    for damaged in ("", "[]", "{}", '{"format": 2}', '{"format": 1, "seconds": 3}'):
        (tmp_path / "theta.json").write_text(damaged)
        with pytest.raises(DataError, match="store_theta again"):
            load_theta(tmp_path / "theta.json")
    with pytest.raises(DataError):
        load_theta(tmp_path / "missing.json")
