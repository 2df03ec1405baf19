"""The clock: spans sum to wall, the device is waited for at span ends, time survives restarts."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import CheckpointError, SettingsError
from hasten.measure.clock import Clock, device_sync, process_seconds


class FakeTime:
    """A host clock, and a device that runs behind it: work is queued at once and done later."""

    def __init__(self) -> None:
        self.t = 100.0
        self.device_free_at = 0.0
        self.syncs = 0

    def now(self) -> float:
        return self.t

    def host(self, seconds: float) -> None:
        self.t += seconds

    def launch(self, seconds: float) -> None:
        self.host(0.001)
        self.device_free_at = max(self.device_free_at, self.t) + seconds

    def sync(self) -> None:
        self.syncs += 1
        self.t = max(self.t, self.device_free_at)


NAMES = st.sampled_from(["data", "forward", "backward", "method", "eval", "other"])
SECONDS = st.floats(0.0, 10.0)
TREES = st.recursive(
    st.tuples(NAMES, SECONDS, st.just([])),
    lambda inner: st.tuples(NAMES, SECONDS, st.lists(inner, max_size=3)),
    max_leaves=12,
)


@given(st.lists(TREES, max_size=4))
def test_nested_spans_sum_to_the_wall_time_and_keep_their_own(trees: list) -> None:
    time = FakeTime()
    clock = Clock(now=time.now, cpu=lambda: 0.0)
    expected: dict[str, float] = {}

    def run(tree: tuple) -> None:
        name, seconds, inner = tree
        with clock.span(name):
            time.host(seconds / 2)
            for child in inner:
                run(child)
            time.host(seconds / 2)
        expected[name] = expected.get(name, 0.0) + seconds

    for tree in trees:
        run(tree)
    totals = clock.totals()
    assert totals.keys() == expected.keys()
    for name, seconds in expected.items():
        assert totals[name] == pytest.approx(seconds, abs=1e-9)
    assert math.fsum(totals.values()) == pytest.approx(clock.wall(), abs=1e-9)


def test_an_asynchronous_device_is_charged_to_the_span_that_launched_it() -> None:
    device = FakeTime()
    clock = Clock(now=device.now, sync=device.sync)
    with clock.span("forward"):
        device.launch(2.0)
    with clock.span("backward"):
        device.launch(4.0)
    assert clock.totals()["forward"] == pytest.approx(2.001)
    assert clock.totals()["backward"] == pytest.approx(4.001)

    # Without waiting, the same work looks like its launch: the fake device does run behind.
    device = FakeTime()
    blind = Clock(now=device.now)
    with blind.span("forward"):
        device.launch(2.0)
    assert blind.totals()["forward"] == pytest.approx(0.001)


def test_an_inner_span_does_not_pay_for_what_the_outer_one_launched() -> None:
    device = FakeTime()
    clock = Clock(now=device.now, sync=device.sync)
    with clock.span("forward"):
        device.launch(3.0)
        with clock.span("method"):
            device.launch(0.5)
        device.launch(1.0)
    assert clock.totals()["forward"] == pytest.approx(4.002)
    assert clock.totals()["method"] == pytest.approx(0.501)


def test_the_device_is_waited_for_at_span_ends_only() -> None:
    device = FakeTime()
    clock = Clock(now=device.now, sync=device.sync)
    with clock.span("forward"):
        assert device.syncs == 0
        for _ in range(50):
            device.launch(0.01)
        clock.totals()
        clock.state_dict()
        clock.add("data", 0.0)
        assert device.syncs == 0
    assert device.syncs == 1


def test_work_launched_outside_all_spans_is_not_lost() -> None:
    device = FakeTime()
    clock = Clock(now=device.now, sync=device.sync)
    device.launch(5.0)
    with clock.span("forward"):
        device.launch(1.0)
    assert clock.totals()["forward"] == pytest.approx(6.0, abs=0.01)


def test_a_span_is_charged_and_closed_when_its_body_or_the_device_fails() -> None:
    time = FakeTime()

    def broken() -> None:
        raise RuntimeError("device lost")

    def body(clock: Clock) -> None:
        with clock.span("forward"), clock.span("method"):
            time.host(1.0)
            raise ValueError("body")

    clock = Clock(now=time.now)
    with pytest.raises(ValueError, match="body"):
        body(clock)
    assert clock.totals() == {"forward": 0.0, "method": 1.0}

    clock = Clock(now=time.now, sync=broken)
    with pytest.raises(RuntimeError, match="device lost"), clock.span("forward"):
        time.host(2.0)
    time.host(7.0)
    assert clock.totals() == {"forward": 2.0}


def test_added_seconds_are_taken_out_of_the_open_span() -> None:
    time = FakeTime()
    clock = Clock(now=time.now)
    clock.add("setup", 9.0)
    with clock.span("forward"):
        time.host(3.0)
        clock.add("method", 1.0)
        with pytest.raises(SettingsError, match="open span 'forward' has only"):
            clock.add("method", 2.5)
        time.host(1.0)
    assert clock.totals() == {"setup": 9.0, "forward": 3.0, "method": 1.0}
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(SettingsError, match="finite number"):
            clock.add("data", bad)


def test_time_is_carried_over_a_restart_and_counted_once_on_going_back() -> None:
    time = FakeTime()
    first = Clock(now=time.now, cpu=time.now)
    with first.span("forward"):
        time.host(3.0)
        saved = json.loads(json.dumps(first.state_dict()))
        time.host(2.0)
    first.load_state_dict(saved)  # back to an earlier step of the same run: the 2 s were spent all the same
    assert first.totals() == {"forward": 5.0}

    second = Clock(now=time.now, cpu=time.now)
    with second.span("setup"):
        time.host(1.0)
    second.load_state_dict(saved)
    with second.span("forward"):
        time.host(4.0)
    third = Clock(now=time.now, cpu=time.now)
    third.load_state_dict(second.state_dict())
    with third.span("forward"):
        time.host(0.5)
    assert second.totals() == {"forward": 7.0, "setup": 1.0}
    assert third.totals() == {"forward": 7.5, "setup": 1.0}
    assert third.wall() == pytest.approx(8.5)
    assert third.cpu_seconds() == pytest.approx(8.5)


@pytest.mark.parametrize(
    "damage", [{"totals": None}, {"totals": {"x": -1.0}}, {"wall": "long"}, {"cpu": math.nan}, {"clock": 3}]
)
def test_a_damaged_state_is_refused(damage: dict) -> None:
    state = Clock().state_dict() | damage
    with pytest.raises(CheckpointError, match="clock state"):
        Clock().load_state_dict(state)


def test_columns_follow_the_protocol() -> None:
    time = FakeTime()
    clock = Clock(now=time.now)
    spent = dict(
        data=1, forward=2, backward=4, optimizer=8, method=16, typo=32, final=64, eval=128, compile=256
    )
    spent |= dict(setup=512, prepare=1024, save=2048)
    for name, seconds in spent.items():
        with clock.span(name):
            time.host(seconds)
    time.host(4096)
    columns = clock.columns()
    assert columns["t_train"] == 1 + 2 + 4 + 8 + 16 + 32
    assert columns["t_method"] == 16
    assert columns["t_headline"] == 63 + 64
    assert (columns["t_eval"], columns["t_compile"], columns["t_setup"]) == (128, 256, 512)
    assert (columns["t_prepare"], columns["t_save"], columns["t_other"]) == (1024, 2048, 4096)
    assert columns["t_total"] == 8191


def test_a_disabled_clock_reads_no_time_and_waits_for_nothing() -> None:
    calls = []
    clock = Clock(enabled=False, now=lambda: float(len(calls)), sync=lambda: calls.append("sync"))
    with clock.span("forward"), clock.span("method"):
        clock.add("data", 1.0)
    assert clock.totals() == {}
    assert calls == []


def test_device_sync_waits_only_where_there_is_a_queue() -> None:
    assert device_sync("cpu") is None
    assert callable(device_sync("cuda:0"))


def test_process_seconds_only_grow() -> None:
    first, second = process_seconds(), process_seconds()
    assert (first is None) == (second is None)
    assert first is None or 0.0 <= first <= second < 7 * 86400
