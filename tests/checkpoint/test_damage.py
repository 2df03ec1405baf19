"""Changed, cut or missing bytes are found, the previous checkpoint is used, and the user is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hasten.checkpoint import Store
from hasten.checkpoint.files import Files
from hasten.errors import CheckpointError

from .faulty import Simulated
from .trees import RECIPE, equal, state

TRIALS = 500


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store(tmp_path / "run", files=Simulated())
    for step in (1, 2):
        store.save(step, state(step), RECIPE)
    return tmp_path / "run"


def harm(path: Path, random: np.random.Generator) -> str:
    """Flip bits of one byte of the file, or cut it short, or add to it, or remove it."""
    data = bytearray(path.read_bytes())
    kind = random.choice(["flip", "cut", "add", "remove"], p=[0.7, 0.2, 0.05, 0.05])
    match kind:
        case "flip":
            data[random.integers(len(data))] ^= int(random.integers(1, 256))
        case "cut":
            del data[random.integers(len(data)) :]
        case "add":
            data.append(int(random.integers(256)))
        case "remove":
            path.unlink()
            return kind
    path.write_bytes(data)
    return kind


def test_500_random_damages_are_noticed_and_the_previous_one_is_used(root: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    names = sorted(path.name for path in (root / "step-000002").iterdir())
    kinds = set()
    for trial in range(TRIALS):
        copy = tmp_path / "copy"
        shutil.copytree(root, copy)
        name = random.choice(names)
        kinds.add((name, harm(copy / "step-000002" / name, random)))
        loaded = Store(copy).load(RECIPE)
        assert loaded is not None, (trial, name)
        assert loaded.step == 1, (trial, name)
        assert equal(loaded.parts, state(1))
        assert "step-000002 is damaged" in loaded.warnings[-2]
        assert name in loaded.warnings[-2]
        assert "step-000001 is used instead" in loaded.warnings[-1]
        # Renamed, not deleted; and not tried again.
        (kept,) = (copy / "quarantine").iterdir()
        assert kept.name.startswith("step-000002-")
        assert "which is not there" in Store(copy).load(RECIPE).warnings[0]  # type: ignore[union-attr]
        shutil.rmtree(copy)
    assert len(names) == 6
    assert len(kinds) >= 20


def test_if_all_are_damaged_that_is_an_error_and_not_a_fresh_start(root: Path) -> None:
    for step in (1, 2):
        (root / f"step-{step:06d}" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be used.*step-000002.*step-000001"):
        Store(root).load(RECIPE)


def test_a_damaged_pointer_costs_a_warning_only(root: Path) -> None:
    for text in ("", "step-000", "../../etc", "step-000009\n", "\xff"):
        (root / "LATEST").write_text(text, encoding="latin-1")
        loaded = Store(root).load()
        assert loaded is not None
        assert loaded.step == 2
        assert "LATEST" in loaded.warnings[0]


def test_a_folder_that_cannot_be_moved_does_not_stop_the_load(root: Path) -> None:
    class ReadOnly(Files):
        def before(self, operation: str, path: Path) -> None:
            if operation != "read":
                raise PermissionError(13, "Permission denied", str(path))

    (root / "step-000002" / "recipe.json").unlink()
    loaded = Store(root, files=ReadOnly()).load(RECIPE)
    assert loaded is not None
    assert loaded.step == 1
    assert "could not be moved" in loaded.warnings[-2]


def test_a_disk_that_cannot_be_read_now_is_tried_again_and_nothing_is_moved(root: Path) -> None:
    class Flaky(Files):
        failures = 0

        def before(self, operation: str, path: Path) -> None:
            if (
                operation == "read"
                and path.name == "model.safetensors"
                and "2" in path.parent.name
                and self.failures
            ):
                self.failures -= 1
                raise OSError(5, "Input/output error", str(path))

    files = Flaky()
    files.failures = 2
    loaded = Store(root, files=files, sleep=lambda _: None).load(RECIPE)
    assert loaded is not None
    assert (loaded.step, loaded.warnings) == (2, [])
    # Unreadable for good: the previous one is used at once, and after two failed loads it is set aside.
    for attempt in range(3):
        files.failures = 10**6
        loaded = Store(root, files=files, sleep=lambda _: None).begin_load(RECIPE)
        assert loaded is not None
        assert loaded.step == 1
        assert (root / "step-000002").exists() == (attempt < 2)


def test_what_was_written_wrongly_is_not_trusted(root: Path) -> None:
    """A disk that stores other bytes than it was given: the save says so, and the old ones stay."""

    class Lying(Simulated):
        def put(self, fd: int, chunk: memoryview) -> int:
            return super().put(fd, memoryview(bytes(chunk).replace(b"step", b"stop")))

    problems: list[str] = []
    store = Store(root, files=Lying(), sleep=lambda _: None, on_problem=problems.append)
    assert store.save(3, state(3), RECIPE) is None
    assert "what was read back is not what was written" in problems[0]
    loaded = Store(root).load(RECIPE)
    assert loaded is not None
    assert loaded.step == 2
    assert equal(loaded.parts, state(2))


def test_another_recipe_is_refused_with_exactly_the_keys_that_differ(root: Path) -> None:
    other = {"lr": 0.2, "methods": ("x(p=0.5)",), "depth": 3}
    with pytest.raises(CheckpointError) as caught:
        Store(root).load(other)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert lines == [
        "lr: checkpoint 0.1, given 0.2",
        "model: checkpoint 'small', given (absent)",
        "depth: checkpoint (absent), given 3",
    ]
    assert Store(root).load(RECIPE)  # and it is still there


@pytest.mark.parametrize(
    ("saved", "given", "count"),
    [
        ({"a": (1, 2)}, {"a": [1, 2]}, 0),
        ({"a": 1}, {"a": 1.0}, 0),
        ({"a": 1}, {"a": True}, 1),
        ({"a": float("nan")}, {"a": float("nan")}, 0),
        ({"a": None}, {}, 1),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 2, "c": 1}}, 2),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, 1),
        ({"a": "1"}, {"a": 1}, 1),
        ({1: 2}, {"1": 2}, 2),
    ],
)
def test_when_recipes_count_as_the_same(tmp_path: Path, saved: dict, given: dict, count: int) -> None:  # type: ignore[type-arg]
    store = Store(tmp_path / "run", files=Simulated())
    store.save(0, {}, saved)
    if not count:
        assert store.load(given)
        return
    with pytest.raises(CheckpointError) as caught:
        store.load(given)
    assert len(str(caught.value).splitlines()) == count + 2
