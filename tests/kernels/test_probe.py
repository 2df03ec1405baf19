"""The probe picks what is faster by far, stays with the first otherwise, and remembers by machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.kernels import probe


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home" / "probes.json"
    monkeypatch.setenv("HASTEN_PROBES", str(path))
    monkeypatch.setattr(probe, "_FOUND", {})
    return path


def forbidden() -> None:
    raise AssertionError("a probe ran where the answer was known")


def sleeps(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_the_faster_wins_and_is_remembered(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.choose("a", {"safe": sleeps(0.05), "fast": sleeps(0.001)}) == "fast"
    assert probe.choose("b", {"safe": sleeps(0.001), "slow": sleeps(0.05)}) == "safe"
    monkeypatch.setattr(probe, "_FOUND", {})  # as in a new process
    assert probe.choose("a", {"safe": forbidden, "fast": forbidden}) == "fast"
    assert probe.choose("b", {"safe": forbidden, "slow": forbidden}) == "safe"
    (machine,) = json.loads(memory.read_text())
    assert machine.startswith(probe.fingerprint())


def test_near_ties_stay_with_the_first(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "seconds", lambda candidates, rounds: {"safe": 1.0, "fast": 0.96})
    assert probe.choose("tie", {"safe": forbidden, "fast": forbidden}) == "safe"
    monkeypatch.setattr(probe, "seconds", lambda candidates, rounds: {"safe": 1.0, "fast": 0.94})
    assert probe.choose("won", {"safe": forbidden, "fast": forbidden}) == "fast"


def test_an_answer_that_is_no_candidate_any_more_is_asked_again(memory: Path) -> None:
    assert probe.choose("a", {"safe": sleeps(0.05), "old": sleeps(0.001)}) == "old"
    assert probe.choose("a", {"safe": sleeps(0.02), "new": sleeps(0.001)}) == "new"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', "\x00\x01"])
def test_a_damaged_file_costs_a_probe_only(memory: Path, content: str) -> None:
    memory.parent.mkdir()
    memory.write_text(content)
    assert probe.choose("a", {"safe": sleeps(0.05), "fast": sleeps(0.001)}) == "fast"
    assert "fast" in memory.read_text()


def test_a_place_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_PROBES", str(tmp_path / "file" / "probes.json"))
    monkeypatch.setattr(probe, "_FOUND", {})
    assert probe.choose("a", {"safe": sleeps(0.05), "fast": sleeps(0.001)}) == "fast"


def test_one_candidate_needs_no_probe(memory: Path) -> None:
    assert probe.choose("a", {"only": forbidden}) == "only"


def test_seconds_calls_every_candidate_in_turn() -> None:
    calls: list[str] = []
    taken = probe.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert set(taken) == {"a", "b"}
