"""A save that dies anywhere leaves the previous checkpoint whole and the new one whole or ignored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hasten.checkpoint import Store
from hasten.checkpoint.codec import encode

from .faulty import Crash, Crashing, Simulated
from .trees import RECIPE, equal, state

# What is on the disk before, and the step whose save dies: the first, one more, one that removes an old
# one, the same step again with other content, and a step before the newest.
SAVES = {
    "first": ([], 1),
    "second": ([1], 2),
    "third": ([1, 2], 3),
    "fifth": ([1, 2, 3, 4], 5),
    "same step": ([1, 2, 2], 2),
    "only step again": ([1], 1),
    "set back": ([1, 8], 4),
}


def content(step: int, version: int) -> dict[str, dict[object, object]]:
    """Two saves of one step differ, as the clock's total in them does."""
    parts = state(step)
    parts["state"]["version"] = version
    return parts


def prepare(root: Path, steps: list[int]) -> None:
    store = Store(root, files=Simulated())
    for version, step in enumerate(steps):
        assert store.save(step, content(step, version), RECIPE)


def sweep(tmp_path: Path, name: str, power_cut: bool) -> int:
    before, step = SAVES[name]
    start = tmp_path / "start"
    start.mkdir()
    prepare(start, before)
    new = content(step, 99)
    old = {before[-1]: content(before[-1], len(before) - 1)} if before else {}
    if (
        name == "set back"
    ):  # the later step belongs to a run that was given up; until the end it is what loads
        assert step < before[-1]
    count = 0
    while True:
        count += 1
        root = tmp_path / f"{count}"
        shutil.copytree(start, root)
        try:
            assert Store(root, files=Crashing(count, power_cut), on_problem=print).save(step, new, RECIPE)
            finished = True
        except Crash:
            finished = False
        # Nothing half made under a final name, and a restarted process that loads something whole.
        for folder in root.glob("step-*"):
            assert (folder / "manifest.json").is_file()
        loaded = Store(root, files=Simulated()).load(RECIPE)
        if loaded is None:
            assert not before
        else:
            assert not loaded.warnings, loaded.warnings
            expected = new if equal(loaded.parts, new) else old.get(loaded.step)
            assert expected is not None
            assert equal(loaded.parts, expected)
        # The restarted process saves again: that works, and the folder holds no more than it should.
        store = Store(root, files=Simulated())
        assert store.save(step + 1, content(step + 1, 0), RECIPE)
        names = sorted(path.name for path in root.iterdir() if path.name != "quarantine")
        assert names[0] == "LATEST"
        assert len(names) <= 3, names
        assert (root / "LATEST").read_text() == f"step-{step + 1:06d}\n"
        assert equal(Store(root).load(RECIPE).parts, content(step + 1, 0))  # type: ignore[union-attr]
        shutil.rmtree(root)
        if finished:
            assert loaded is not None
            assert equal(loaded.parts, new)
            return count - 1


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_dying_at_every_operation_loses_nothing(tmp_path: Path, power_cut: bool) -> None:
    counts = {}
    for name in SAVES:
        (tmp_path / name).mkdir()
        counts[name] = sweep(tmp_path / name, name, power_cut)
    assert sum(counts.values()) >= 200, counts


def test_the_power_cut_sweep_notices_a_missing_sync(tmp_path: Path) -> None:
    """With the syncs left out, the disk of the sweep above must lose a checkpoint at some operation."""

    class Forgetful(Crashing):
        def sync(self, fd: int, path: Path) -> None:
            return

    lost = 0
    for at in range(1, 60):
        root = tmp_path / f"{at}"
        try:
            Store(root, files=Forgetful(at, power_cut=True)).save(1, state(1), RECIPE)
        except Crash:
            for folder in root.glob("step-*"):
                lost += any(path.stat().st_size != size_of(path.name) for path in folder.iterdir())
    assert lost > 0


def test_everything_is_on_the_disk_before_the_next_thing_relies_on_it(tmp_path: Path) -> None:
    """Files, then their folder, then the rename, then the root, then LATEST, then the removal of an old one."""
    prepare(tmp_path, [1, 2])
    files = Simulated()
    final = Store(tmp_path, files=files).save(3, state(3), RECIPE)
    assert final is not None
    calls = [(operation, path.name.split("-")[0], path.parent.name[:8]) for operation, path in files.calls]
    inside = [i for i, call in enumerate(calls) if call[2] == ".staging"]
    renamed = calls.index(("rename", "step", tmp_path.name[:8]))
    latest = calls.index(("rename", "LATEST", tmp_path.name[:8]))
    removed = calls.index(("rename", ".trash", tmp_path.name[:8]))
    for name in ("model.safetensors", "state.json", "manifest.json"):
        (synced,) = (i for i in inside if files.calls[i][0] == "fsync" and files.calls[i][1].name == name)
        assert synced > max(
            i for i in inside if files.calls[i][0] == "write" and files.calls[i][1].name == name
        )
    folder = calls.index(("fsync", ".staging", tmp_path.name[:8]))
    roots = [
        i for i, (operation, path) in enumerate(files.calls) if operation == "fsync" and path == tmp_path
    ]
    assert max(inside) < folder < renamed < roots[0] < latest < roots[1] < removed


def size_of(name: str) -> int:
    """Return the size the file ``name`` of the checkpoint of step 1 should have."""
    return len(encode(1, state(1), RECIPE)[name])
