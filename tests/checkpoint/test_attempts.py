"""A checkpoint that stops the run at once is not tried for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.checkpoint import Store
from hasten.checkpoint.attempts import SILENT
from hasten.errors import CheckpointError

from .faulty import Simulated
from .trees import RECIPE, state


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store(tmp_path / "run", files=Simulated())
    for step in (1, 2):
        store.save(step, state(step), RECIPE)
    return tmp_path / "run"


def start(root: Path, error: Exception | None = None) -> int:
    """Begin from the newest checkpoint as a new process would; end with ``error`` or without a word."""
    store = Store(root)
    loaded = store.begin_load(RECIPE)
    assert loaded is not None
    if error is not None:
        try:
            raise error
        except Exception as caught:
            store.crashed(caught)
    return loaded.step


def test_the_same_crash_twice_sets_it_aside(root: Path) -> None:
    assert [start(root, ValueError("first")) for _ in range(3)] == [2, 2, 1]
    (kept,) = (root / "quarantine").iterdir()
    assert kept.name.startswith("step-000002")
    assert start(root, ValueError("again")) == 1
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        start(root)


def test_two_different_crashes_do_not(root: Path) -> None:
    assert [start(root, error) for error in (ValueError("a"), KeyError("b"))] == [2, 2]
    assert start(root) == 2


def test_a_step_that_worked_clears_the_count(root: Path) -> None:
    for _ in range(5):
        assert start(root, ValueError("late")) == 2
        store = Store(root)
        assert store.begin_load(RECIPE).step == 2  # type: ignore[union-attr]
        store.confirm()


def test_being_killed_takes_longer_and_ends_too(root: Path) -> None:
    assert [start(root) for _ in range(SILENT + 1)] == [2] * SILENT + [1]


def test_looking_at_a_checkpoint_counts_nothing(root: Path) -> None:
    for _ in range(3 * SILENT):
        assert Store(root).load(RECIPE).step == 2  # type: ignore[union-attr]
    assert not (root / ".attempts.json").exists()


def test_another_recipe_counts_nothing(root: Path) -> None:
    for _ in range(3 * SILENT):
        with pytest.raises(CheckpointError, match="other settings"):
            Store(root).begin_load({"lr": 7})
    assert start(root) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"step-000002": 3}', '{"step-000002": {"silent": "x", "errors": 1}}']
)
def test_a_damaged_count_only_loses_the_count(root: Path, text: str) -> None:
    (root / ".attempts.json").write_text(text)
    assert [start(root, ValueError("first")) for _ in range(3)] == [2, 2, 1]
