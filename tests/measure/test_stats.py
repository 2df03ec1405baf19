"""The statistics: intervals cover, no false claims, exact permutation p, and agreement with scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hasten.errors import SettingsError
from hasten.measure.stats import (
    bca_interval,
    blocks_needed,
    geometric_mean,
    noninferior,
    sign_flip_p,
    speedup,
    t_interval,
    welch_half_width,
)
from hasten.measure.verdict import Ratio, ratio_text


def test_the_interval_covers_the_true_speedup_19_times_in_20() -> None:
    rng = np.random.default_rng(1)
    runs, true = 2000, 1.07
    covered = 0
    for _ in range(runs):
        machine = rng.lognormal(0.0, 0.3, 8)  # a slow block slows both arms
        a = machine * true * rng.lognormal(0.0, 0.04, 8)
        b = machine * rng.lognormal(0.0, 0.04, 8)
        ratio = speedup(a, b)
        covered += ratio.low <= true <= ratio.high
    assert abs(covered / runs - 0.95) <= 0.025


@pytest.mark.parametrize("n", [3, 5, 8, 12])
def test_an_arm_against_itself_is_not_claimed_more_often_than_5_percent(n: int) -> None:
    rng = np.random.default_rng(n)
    runs = 1500
    verdicts = [speedup(rng.lognormal(0, 0.1, n), rng.lognormal(0, 0.1, n)).verdict for _ in range(runs)]
    # 5% in both directions together; 1.8 points are 3 standard errors of this simulation
    assert sum(verdict != "not shown" for verdict in verdicts) / runs <= 0.05 + 0.018
    assert verdicts.count("faster") / runs <= 0.025 + 0.013


def test_power_is_what_blocks_needed_promises() -> None:
    rng = np.random.default_rng(5)
    for s, true in ((0.05, 1.05), (0.05, 1.10), (0.10, 1.10)):
        n = blocks_needed(s, true)
        shown = sum(speedup(np.exp(rng.normal(math.log(true), s, n)), np.ones(n)).low > 1 for _ in range(800))
        assert shown / 800 >= 0.72, (s, true, n)


def test_blocks_needed_is_the_protocol_table() -> None:
    table = {(0.02, 1.05): 5, (0.05, 1.05): 11, (0.10, 1.05): 35}
    table |= {(0.02, 1.10): 5, (0.05, 1.10): 5, (0.10, 1.10): 11}
    table |= {(0.02, 1.30): 5, (0.05, 1.30): 5, (0.10, 1.30): 5}
    assert {key: blocks_needed(*key) for key in table} == table
    assert blocks_needed(0.1, 1 / 1.05) == 35
    with pytest.raises(SettingsError, match="other than 1"):
        blocks_needed(0.1, 1.0)


def test_a_hand_made_case() -> None:
    # d = log 2, log 2, log 4 -> mean = 4/3 log 2, sd = log 2 / sqrt 3, t(0.975, 2) = 4.302653
    ratio = speedup([2.0, 4.0, 4.0], [1.0, 2.0, 1.0])
    mean, half = 4 / 3 * math.log(2), 4.302653 * math.log(2) / 3
    assert ratio.ratio == pytest.approx(math.exp(mean))
    assert ratio.low == pytest.approx(math.exp(mean - half), rel=1e-6)
    assert ratio.high == pytest.approx(math.exp(mean + half), rel=1e-6)
    assert ratio.median == pytest.approx(2.0)
    assert ratio.s == pytest.approx(math.log(2) / math.sqrt(3))
    assert ratio.p == 0.25
    assert (ratio.n, ratio.small_n, ratio.interval, ratio.verdict) == (3, True, "t", "not shown")


def test_swapping_the_arms_inverts_the_ratio_and_its_ends() -> None:
    rng = np.random.default_rng(2)
    for n in (2, 5, 9, 20):
        a, b = rng.lognormal(0, 0.2, n), rng.lognormal(0.1, 0.2, n)
        there, back = speedup(a, b), speedup(b, a)
        assert back.ratio == pytest.approx(1 / there.ratio)
        assert (back.low, back.high) == pytest.approx((1 / there.high, 1 / there.low))
        assert there.small_n == (n < 8)


def test_one_block_shows_nothing() -> None:
    ratio = speedup([10.0], [1.0])
    assert ratio.ratio == pytest.approx(10.0)
    assert (ratio.low, ratio.high, ratio.p) == (0.0, math.inf, 1.0)
    assert ratio.text() == "10.00x [no interval]: not shown"
    assert ratio.to_json()["high"] is None


@pytest.mark.parametrize(
    "bad", [([], []), ([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0]), ([math.nan], [1.0])]
)
def test_impossible_times_are_refused(bad: tuple) -> None:
    with pytest.raises(SettingsError):
        speedup(*bad)


def test_exact_permutation_p_on_hand_cases() -> None:
    assert sign_flip_p([0.3]) == 1.0
    assert sign_flip_p([0.1, 0.2, 0.4]) == 2 / 8  # only +++ and --- are as extreme
    assert sign_flip_p([1.0, 1.0, -1.0]) == 1.0  # every flip sums to at least 1 in size
    assert sign_flip_p([3.0, 2.0, -1.0]) == 4 / 8  # |sum| = 4: {6, 4, -4, -6}
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p(np.full(12, 0.1)) == 2 / 4096


def test_permutation_p_agrees_with_enumeration_and_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    for n in (4, 7, 10):
        d = rng.normal(0.3, 1.0, n)
        sums = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=n)]
        assert sign_flip_p(d) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))
    d = rng.normal(0.35, 1.0, 16)
    test = stats.permutation_test(
        (d,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=70000,
        vectorized=True,
    )
    assert sign_flip_p(d, resamples=40000) == pytest.approx(float(test.pvalue), abs=0.012)


def test_bca_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    for _ in range(4):
        x = rng.exponential(1.0, 15)  # skewed, so that bias and acceleration matter
        known = stats.bootstrap((x,), np.mean, n_resamples=20000, method="BCa", rng=np.random.default_rng(0))
        low, high = bca_interval(x, resamples=20000)
        width = known.confidence_interval.high - known.confidence_interval.low
        assert low == pytest.approx(known.confidence_interval.low, abs=0.03 * width)
        assert high == pytest.approx(known.confidence_interval.high, abs=0.03 * width)
        plain = np.quantile(x[rng.integers(0, 15, (20000, 15))].mean(axis=1), 0.975)
        assert high > plain  # the correction is there: a right-skewed mean needs a longer right end


def test_small_samples_are_why_bca_is_not_the_default() -> None:
    rng = np.random.default_rng(6)
    samples = rng.normal(0.0, 1.0, (500, 5))
    bca = np.mean([low <= 0 <= high for low, high in (bca_interval(x, resamples=999) for x in samples)])
    t = np.mean([low <= 0 <= high for low, high in (t_interval(x) for x in samples)])
    assert bca < 0.90 < t


def test_bca_of_equal_values_is_a_point_and_can_be_asked_for() -> None:
    assert bca_interval([0.5] * 9) == (0.5, 0.5)
    rng = np.random.default_rng(7)
    ratio = speedup(rng.lognormal(0.2, 0.05, 10), np.ones(10), interval="bca")
    assert (ratio.interval, ratio.verdict) == ("bca", "faster")


def test_texts_say_what_the_interval_allows() -> None:
    def make(ratio: float, low: float, high: float) -> Ratio:
        return Ratio(ratio, low, high, 0.5, ratio, 9, 0.1, False, "t", 0.95)

    assert make(1.04, 0.98, 1.10).text() == "1.04x [0.98, 1.10]: not shown"
    assert make(1.30, 1.25, 1.36).text() == "1.30x [1.25, 1.36]: faster"
    assert make(0.90, 0.85, 0.95).text() == "0.90x [0.85, 0.95]: slower"
    assert make(1.04, 1.0, 1.10).verdict == "not shown"
    assert make(1.002, 1.0008, 1.0031).text() == "1.002x [1.001, 1.003]: faster"
    assert ratio_text(1.1, 0.9, math.inf) == "1.10x [0.90, inf]: not shown"


def test_noninferior_agrees_with_scipy_and_holds_its_level() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(8)
    a, b = rng.normal(94.0, 0.2, 6), rng.normal(94.1, 0.3, 9)
    difference = noninferior(a, b)
    known = stats.ttest_ind(b, a, equal_var=False, alternative="greater").confidence_interval(0.95)
    assert difference.lower == pytest.approx(known.low)
    assert difference.mean == pytest.approx(b.mean() - a.mean())

    # exactly at the margin, "no loss" must be claimed in at most 1 of 20
    claims = [noninferior(rng.normal(94, 0.2, 5), rng.normal(93.7, 0.3, 5)).no_loss for _ in range(1500)]
    assert np.mean(claims) <= 0.05 + 0.018


def test_noninferior_needs_two_runs_and_points() -> None:
    one = noninferior([94.0, 94.1], [96.0])
    assert not one.no_loss
    assert "none (needs 2 runs" in one.text()
    assert noninferior([94.0, 94.0], [93.8, 93.8]).no_loss
    assert not noninferior([94.0, 94.0], [93.6, 93.6]).no_loss
    with pytest.raises(SettingsError, match="points"):
        noninferior([0.94, 0.93], [0.94, 0.95])


def test_the_interval_of_a_difference_holds_it_in_95_of_100() -> None:
    rng = np.random.default_rng(3)
    held = [abs(float(a.mean() - b.mean()) - 0.3) <= welch_half_width(a, b)
            for a, b in ((rng.normal(0.3, 1.0, 5), rng.normal(0.0, 2.0, 4)) for _ in range(2000))]  # fmt: skip
    assert 0.935 <= np.mean(held) <= 0.965
    assert welch_half_width([1.0], [1.0, 2.0]) == math.inf
    assert welch_half_width([1.0, 1.0], [2.0, 2.0]) == 0.0


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 0.5, 4.0]) == pytest.approx(4 ** (1 / 3))
    with pytest.raises(SettingsError):
        geometric_mean([1.0, 0.0])
