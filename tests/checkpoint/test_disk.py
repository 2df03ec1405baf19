"""A disk that is full or fails for a moment never stops the training."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from hasten.checkpoint import Store
from hasten.errors import CheckpointError, SettingsError

from .faulty import Failing, Simulated
from .trees import RECIPE, equal, state

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("times", [1, 3, 10**9], ids=["once", "thrice", "for good"])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_an_error_at_every_operation_never_escapes(
    tmp_path: Path, number: int, times: int, before: int
) -> None:
    start = tmp_path / "start"
    ready = Store(start, files=Simulated())
    for step in range(before):
        ready.save(step, state(step), RECIPE)
    start.mkdir(exist_ok=True)
    at, failed = 0, 0
    while True:
        at += 1
        root = tmp_path / "run"
        shutil.copytree(start, root)
        problems: list[str] = []
        files = Failing(at, number, times)
        store = Store(root, files=files, on_problem=problems.append, sleep=lambda _: None)
        path = store.save(before, state(before), RECIPE)
        loaded = Store(root).load(RECIPE)
        if path is None:
            failed += 1
            assert times > 1
            assert store.never_saved
            assert f"step {before}" in problems[0]
            assert str(store.last_failure) == problems[0]
            if number == errno.ENOSPC:  # what was half written must not keep the disk full
                assert not list(root.glob(".staging*"))
            # The previous one is untouched; the new one may be complete (only its sync failed), never half.
            assert loaded is None if not before and not list(root.glob("step-*")) else loaded is not None
        else:
            assert not store.never_saved
            assert loaded is not None
            assert loaded.step == before
        if loaded is not None:
            assert equal(loaded.parts, state(loaded.step))
            assert loaded.step >= before - 1
        # The trouble is over: the next interval's save works, and leaves nothing lying about.
        files.times = 0
        assert store.save(before + 1, state(before + 1), RECIPE)
        assert not store.never_saved
        assert not list(root.glob(".*"))
        assert len(list(root.glob("step-*"))) <= 2
        shutil.rmtree(root)
        if not files.raised:
            break
    assert at > 25
    assert (failed == 0) == (times == 1)
    assert times <= 3 or failed > 20


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Simulated()
    problems: list[str] = []
    waits: list[float] = []
    store = Store(tmp_path / "run", files=files, on_problem=problems.append, sleep=waits.append)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9 - 2000, 2000))
    assert store.save(1, state(1), RECIPE) is None
    assert not [call for call in files.calls if call[0] in ("create", "write")]
    assert "MB free" in problems[0]
    assert "1.2 times" in problems[0]
    assert len(waits) == 2
    assert waits[1] > waits[0] > 0
    assert store.never_saved


def test_how_much_free_space_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Store(tmp_path / "reference", files=Simulated()).save(1, state(1), RECIPE)
    assert reference is not None
    size = sum(path.stat().st_size for path in reference.iterdir())
    for free, works in ((1.19 * size, False), (1.21 * size, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: Usage(10**9, 0, int(free)))
        store = Store(
            tmp_path / f"{works}", files=Simulated(), sleep=lambda _: None, on_problem=lambda _: None
        )
        assert (store.save(1, state(1), RECIPE) is not None) == works


def test_by_default_a_problem_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    store = Store(tmp_path / "run", sleep=lambda _: None)
    assert store.save(1, state(1), RECIPE) is None
    assert "could not save the checkpoint of step 1" in caplog.text


def test_a_folder_removed_while_training_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "run")
    assert store.save(1, state(1), RECIPE)
    shutil.rmtree(tmp_path / "a")
    assert store.save(2, state(2), RECIPE)
    assert store.load(RECIPE).step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("keep", [2, 3, 5])
def test_as_many_as_asked_for_are_kept(tmp_path: Path, keep: int) -> None:
    store = Store(tmp_path / "run", keep, files=Simulated())
    for step in range(9):
        store.save(step, state(step), RECIPE)
        left = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
        assert left == [f"step-{s:06d}" for s in range(max(0, step - keep + 1), step + 1)]


def test_saving_the_same_state_twice_writes_it_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", files=Simulated())
    store.save(1, state(1), RECIPE)
    files = Simulated()
    assert Store(tmp_path / "run", files=files).save(1, state(1), RECIPE)
    assert not [path for _, path in files.calls if path.name == "model.safetensors"]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least 2"):
        Store(tmp_path, keep=1)
    store = Store(tmp_path)
    for step in (-1, True, 1.0, 10**15):
        with pytest.raises(SettingsError, match="integer"):
            store.save(step, {}, {})  # type: ignore[arg-type]
    for parts in (
        {"../model": {}},
        {"a/b": {}},
        {"": {}, "a\0": {}},
        {"a": {}, "A": {}},
        {"x": {"y": object()}},
    ):
        with pytest.raises(CheckpointError):
            store.save(1, parts, {})
    with pytest.raises(CheckpointError, match="plain values"):
        store.save(1, {}, {"w": state(1)["model"]["head"]})
    assert not list(tmp_path.glob("step-*"))
    assert not store.never_saved
