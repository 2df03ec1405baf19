"""``hasten export``, ``predict`` and ``evaluate``, on image files as a user has them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hasten as library
from cli.test_cli import hasten
from hasten.data import as_data
from hasten.loop import Result

from .support import CLASSES, NETWORK, RECIPE, SIZE, images

__all__ = ["hasten"]  # the fixture


def write_photos(folder: Path, counts: dict[str, int]) -> Path:
    """Write image folders of several sizes and kinds: a pattern of the class in the middle of each."""
    for split, count in counts.items():
        made = images(count, count)
        for number, (pixels, label) in enumerate(zip(made.pixels, made.labels, strict=True)):
            where = folder / split / CLASSES[label]
            where.mkdir(parents=True, exist_ok=True)
            size = (SIZE + 3 * (number % 5), SIZE + 7 * (number % 3))
            photo = Image.fromarray(pixels).resize(size)
            photo.save(where / f"{number:03}.{('png', 'jpg', 'bmp')[number % 3]}")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of code of the user's that prints, on a folder of photos of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "net.py").write_text(NETWORK)
    photos = as_data(write_photos(folder / "photos", {"train": 160, "val": 90}), size=SIZE)
    result = library.fit(f"{folder / 'net.py'}:make", photos, recipe=RECIPE, out=folder / "run", device="cpu")
    return folder, result


def test_evaluate_repeats_the_runs_accuracy_to_the_last_image(run: tuple[Path, Result], hasten: Any) -> None:
    folder, result = run
    told = hasten("evaluate", folder / "run", folder / "photos", "--trust-code", "--json", "--device", "cpu")
    assert told.code == 0, told.err
    assert "net.py makes a network" in told.err  # and not among the JSON
    found = told.json()
    assert found["accuracy"] == result.accuracy
    assert found["count"] == 90
    assert 0 < found["right"] < 90
    assert sum(row["right"] for row in found["classes"].values()) == found["right"]
    assert list(found["classes"]) == list(CLASSES)
    shown = hasten("evaluate", folder / "run", folder / "photos", "--trust-code", "--size", SIZE).out
    assert f"accuracy {100 * result.accuracy:.2f}% ({found['right']} of 90 images)" in shown
    assert f"The run itself: {100 * result.accuracy:.2f}%" in shown


def test_evaluate_matches_classes_by_name(run: tuple[Path, Result], hasten: Any, tmp_path: Path) -> None:
    folder, result = run
    whole = as_data(folder / "photos", size=SIZE)
    order = [3, 1, 0, 2]  # the same images under the same names, numbered otherwise
    place = np.argsort(order)
    names = np.array([CLASSES[i] for i in order])
    np.savez(tmp_path / "turned.npz", x_train=whole.train.pixels, y_train=place[whole.train.labels], x_test=whole.test.pixels,
             y_test=place[whole.test.labels], classes=names)  # fmt: skip
    found = hasten("evaluate", folder / "run", "turned.npz", "--trust-code", "--json").json()
    assert found["accuracy"] == result.accuracy
    names[0] = "elk"
    np.savez(tmp_path / "other.npz", x_train=whole.train.pixels, y_train=place[whole.train.labels], x_test=whole.test.pixels,
             y_test=place[whole.test.labels], classes=names)  # fmt: skip
    refused = hasten("evaluate", folder / "run", "other.npz", "--trust-code")
    assert refused.code == 2
    assert "does not know 1 of the data's classes: elk. It knows: ant, bee, cat, dog" in refused.err
    grey = hasten("evaluate", folder / "run", "fashion-mnist-12k", "--trust-code")
    assert grey.code == 2
    assert "does not know" in grey.err


def test_data_without_a_test_part_count_whole_unless_they_trained_the_network(
    run: tuple[Path, Result], hasten: Any, tmp_path: Path
) -> None:
    folder, _ = run
    new = write_photos(tmp_path / "new", {"all": 44}) / "all"
    told = hasten("evaluate", folder / "run", new, "--trust-code", "--json").json()
    assert told["count"] == 44
    seen = write_photos(tmp_path / "seen", {"all": 160}) / "all"
    result = library.fit(
        "resnet8", as_data(seen, size=SIZE), recipe=RECIPE.with_(epochs=1), out=tmp_path / "run", device="cpu"
    )
    told = hasten("evaluate", "run", seen, "--json").json()
    assert told["count"] == 16
    assert told["accuracy"] == result.accuracy


def test_predict_tells_class_and_chances_as_evaluate_counts_them(
    run: tuple[Path, Result], hasten: Any
) -> None:
    folder, result = run
    told = hasten("predict", folder / "run", folder / "photos" / "val", "--trust-code", "--json")
    assert told.code == 0, told.err
    rows = told.json()["images"]
    assert len(rows) == 90
    assert sum(row["class"] == Path(row["file"]).parent.name for row in rows) == round(90 * result.accuracy)
    for row in rows:
        assert row["class"] == row["top"][0]["class"]
        assert row["probability"] == row["top"][0]["probability"]
        assert len(row["top"]) == 3
        chances = [one["probability"] for one in row["top"]]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) <= 1.0001
    in_python = library.load(folder / "run", trust_code=True).predict([row["file"] for row in rows])
    assert in_python.classes == [row["class"] for row in rows]
    one = rows[0]
    shown = hasten("predict", folder / "run", one["file"], "--trust-code", "--device", "cpu").out
    assert shown.startswith("net.py") or one["file"] in shown
    assert f"{one['file']}  {one['class']} {100 * one['probability']:.1f}%  (" in shown


def test_predict_names_every_file_that_it_cannot_use(
    run: tuple[Path, Result], hasten: Any, tmp_path: Path
) -> None:
    folder, _ = run
    good = next((folder / "photos/val/ant").iterdir())
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:40])
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    bad = ("notes.txt", "cut.png", "gone.png", "pipe.png")
    told = hasten("predict", folder / "run", good, *bad, "--trust-code", "--json")
    assert told.code == 1
    assert set(told.json()["unread"]) == set(bad)
    assert len(told.json()["images"]) == 1
    for name in bad:
        assert f"{name}: " in told.err
    assert "4 of 5 files could not be used" in told.err
    assert "Traceback" not in told.err
    nothing = hasten("predict", folder / "run", "empty", "--trust-code")
    assert nothing.code == 2
    assert "there are no files in empty" in nothing.err


def test_grey_images_go_to_a_network_of_one_channel(hasten: Any, tmp_path: Path) -> None:
    data = as_data(
        ((images(160, 1, 1).pixels, images(160, 1).labels), (images(90, 2, 1).pixels, images(90, 2).labels))
    )
    result = library.fit("resnet8", data, recipe=RECIPE.with_(epochs=1), out=tmp_path / "run", device="cpu")
    for number, pixels in enumerate(data.test.pixels):
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"{number:03}.png")
    rows = hasten("predict", "run", *sorted(tmp_path.glob("*.png")), "--json").json()["images"]
    answers = [int(row["class"]) for row in rows]
    assert sum(a == b for a, b in zip(answers, data.test.labels, strict=True)) == round(90 * result.accuracy)


def test_export_prints_how_to_use_what_it_wrote(
    run: tuple[Path, Result], hasten: Any, tmp_path: Path
) -> None:
    folder, _ = run
    shown = hasten("export", folder / "run", "net.pt2", "--trust-code")
    assert shown.code == 0, shown.err
    assert "wrote net.pt2 (" in shown.out
    assert "net.labels.json; largest difference from the network's outputs 0" in shown.out
    code = shown.out.split("Use it, in Python:\n")[1]
    assert code.count("\n") == 4
    assert "torch.export.load('net.pt2')" in code
    told = hasten("export", folder / "run", "net.safetensors", "--json").json()
    assert told["labels"]["resize"]["shorter_side"] == SIZE
    assert told["error"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "net.labels.json",
        "net.pt2",
        "net.safetensors",
    ]
    program = torch.export.load(tmp_path / "net.pt2").module()
    files = sorted((folder / "photos/val").glob("*/*"))
    answers = hasten("predict", folder / "run", *files, "--trust-code", "--json").json()["images"]
    same = 0
    for file, row in zip(
        files, answers, strict=True
    ):  # the files as they are: the program resizes them itself
        pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1)
        same += CLASSES[int(program(pixels[None]).argmax())] == row["class"]
    assert same >= len(files) - 2


def test_the_winner_that_a_comparison_kept_is_a_run(
    run: tuple[Path, Result], hasten: Any, tmp_path: Path
) -> None:
    folder, result = run
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "network").symlink_to(folder / "run")
    found = hasten("evaluate", "comparison", folder / "photos", "--trust-code", "--json")
    assert found.json()["accuracy"] == result.accuracy


@pytest.mark.parametrize(
    "command",
    [["export", "nowhere", "net.pt2"], ["predict", "nowhere", "a.png"], ["evaluate", "nowhere", "d"]],
)
def test_a_folder_that_holds_no_run_is_one_clear_error(command: list[str], hasten: Any) -> None:
    told = hasten(*command)
    assert told.code == 2
    assert "nowhere holds no good checkpoint" in told.err
    assert "Traceback" not in told.err


def test_wrong_requests_are_one_clear_error(run: tuple[Path, Result], hasten: Any) -> None:
    folder, _ = run
    cases = [
        (("export", folder / "run", "net.pth"), "end it in .pt2, .safetensors, .onnx"),
        (("export", folder / "run", "net.pt2"), "--trust-code"),
        (("predict", folder / "run", "a.png"), "--trust-code"),
        (
            ("evaluate", folder / "run", folder / "photos", "--trust-code", "--device", "quantum"),
            "cannot be used here",
        ),
        (("evaluate", folder / "run", "fashion-mnist-12", "--trust-code"), "fashion-mnist-12k"),
        (
            ("export", folder / "run", "missing/net.safetensors"),
            "cannot write missing/net.safetensors: No such",
        ),
        (("export", folder / "run", Path(json.__file__) / "net.safetensors"), "Not a dir"),
    ]
    for arguments, words in cases:
        result = hasten(*arguments)
        assert result.code == 2, (arguments, result.err)
        assert words in result.err
        assert "Traceback" not in result.err
