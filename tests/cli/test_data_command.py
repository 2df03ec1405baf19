"""``hasten data``: what it says, in text and JSON, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hasten.cli import main


class Outcome:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs ``hasten data check`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            main(["data", "check", *(str(a) for a in arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def picture(path: Path, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def folder(root: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for number in range(3):
                picture(root / part / name / f"{number}.png")


def test_a_good_folder(check: Any, tmp_path: Path) -> None:
    folder(tmp_path / "d")
    shown = check("d")
    assert shown.code == 0
    for words in ("train: 6 images in 2 classes, 3 to 3 a class", "16x16 (12)", "fine"):
        assert words in shown.out
    assert [line.split() for line in shown.out.splitlines() if line.split()[0] in ("class", "cat", "dog")] == [
        ["class", "train", "test"], ["cat", "3", "3"], ["dog", "3", "3"],
    ]  # fmt: skip
    told = check("d", "--json")
    assert told.code == 0
    found = json.loads(told.out)
    assert found["ok"] is True
    assert found["classes"] == ["cat", "dog"]
    assert found["counts"] == {"train": {"cat": 3, "dog": 3}, "test": {"cat": 3, "dog": 3}}
    assert found["sizes"] == [{"height": 16, "width": 16, "images": 12}]
    assert (found["bad"], found["left_out"], found["not_images"], found["advice"]) == ([], [], [], None)


def test_mixed_sizes_end_with_code_1_and_the_size_to_give(check: Any, tmp_path: Path) -> None:
    folder(tmp_path / "d")
    picture(tmp_path / "d/train/dog/wide.png", (40, 20))
    shown = check("d")
    assert shown.code == 1
    assert "to do: the images have 2 sizes: add --size 16" in shown.out
    found = json.loads(check("d", "--json").out)
    assert (found["ok"], len(found["sizes"])) == (False, 2)
    assert "--size 16" in found["advice"]
    given = check("d", "--size", "16", "--json")
    assert (given.code, json.loads(given.out)["ok"], json.loads(given.out)["size"]) == (0, True, 16)
    refused = check("d", "--size", "0")
    assert (refused.code, "between 1 and 4096" in refused.err) == (2, True)


def test_everything_odd_is_named(check: Any, tmp_path: Path) -> None:
    folder(tmp_path / "d")
    picture(tmp_path / "d/train/.ipynb_checkpoints/0.png")
    (tmp_path / "d/train/cat/x.heic").write_bytes(b"x")
    (tmp_path / "d/train/cat/notes.txt").write_text("x")
    (tmp_path / "d/val/dog/0.png").write_bytes((tmp_path / "d/val/dog/0.png").read_bytes()[:45])
    shown = check("d")
    assert shown.code == 1
    for words in (
        "left out: d/train/.ipynb_checkpoints: hidden", "bad: d/train/cat/x.heic: .heic images are not read",
        "not an image: d/train/cat/notes.txt", "bad: d/val/dog/0.png: ", "damaged", "not usable as it is",
    ):  # fmt: skip
        assert words in shown.out
    found = json.loads(check("d", "--json").out)
    assert {Path(entry["file"]).name for entry in found["bad"]} == {"x.heic", "0.png"}
    assert found["left_out"] == [{"file": "d/train/.ipynb_checkpoints", "reason": "hidden"}]


def test_class_folders_without_parts(check: Any, tmp_path: Path) -> None:
    folder(tmp_path / "d")
    shown = check("d/train")
    assert shown.code == 0
    assert "there is no test part: 10% of each class will be held out as one" in shown.out
    loose = check("d/train/cat")
    assert loose.code == 2
    assert "arrange the images as train/CLASS/file" in loose.err
    assert "Traceback" not in loose.err


def test_turned_photographs_are_counted(check: Any, tmp_path: Path) -> None:
    folder(tmp_path / "d")
    image = Image.new("RGB", (16, 16))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "d/train/cat/turned.jpg", exif=exif)
    assert "turned: 1 images have an EXIF orientation; they are read as stored" in check("d").out
    assert json.loads(check("d", "--json").out)["turned"] == 1


def test_npz_and_named_sets(check: Any, tmp_path: Path) -> None:
    x, y = np.zeros((8, 4, 4, 3), np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array([b"cat", b"dog"]))
    shown = check("d.npz")
    assert shown.code == 0
    assert "8 train / 8 test" in shown.out
    assert "b'cat'" not in shown.out
    found = json.loads(check("d.npz", "--json").out)
    assert found["counts"] == {"train": {"cat": 4, "dog": 4}, "test": {"cat": 4, "dog": 4}}
    refused = check("d.npz", "--size", "8")
    assert (refused.code, "size is for image folders" in refused.err) == (2, True)
    assert check("fashion-mnist-12k").code == 0
    missing = check("nowhere/at-all")
    assert (missing.code, "there is no file or folder" in missing.err) == (2, True)


def test_a_long_check_says_how_far_it_is(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "d")
    monkeypatch.setattr("hasten.cli.data.EVERY", 0.0)
    shown = check("d", "--json")
    assert shown.err.splitlines()[-1] == "12 of 12 images read"
    assert json.loads(shown.out)["ok"]
