"""SIGTERM and SIGINT ask once, and end the process when they come twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from hasten.checkpoint import StopSignal


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_only_sets_the_flag(number: signal.Signals, code: int) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert (stop.requested, stop.exit_code) == (None, 0)
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.exit_code) == (number, code)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_handlers_return_after_an_error_and_nest() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as outer:
        with pytest.raises(ValueError, match="x"), StopSignal():
            raise ValueError("x")
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.requested == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def run() -> None:
        with StopSignal() as stop:
            found.append(signal.getsignal(signal.SIGTERM) == before and stop.requested is None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]


CHILD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
with signals.StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    if sys.argv[2] == "slow":
        time.sleep(60)
        print("saved", flush=True)
raise SystemExit(stop.exit_code)
"""


@pytest.mark.parametrize("speed", ["fast", "slow"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_real_process_leaves_with_the_code_and_at_once_on_the_second(
    number: signal.Signals, code: int, speed: str
) -> None:
    source = sys.modules[StopSignal.__module__].__file__
    assert source
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, source, speed], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.stdout.readline() == "saving\n"
        if speed == "slow":
            child.send_signal(number)
        assert child.stdout.read() == ""
        assert child.wait(30) == code
