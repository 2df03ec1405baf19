"""Every wrong input is one clear error: exit code 2, what was given, what is allowed, what to do; nothing is lost."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loop.support import images, write_npz

from .test_cli import SMALL, Outcome, hasten

__all__ = ["hasten"]  # the fixture


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "patterns.npz")


def refused(result: Outcome, *words: str) -> None:
    """Assert one error message with ``words`` in it, and no traceback."""
    assert result.code == 2, (result.code, result.out, result.err)
    assert "Traceback" not in result.err
    text = " ".join(result.err.replace("│", " ").split())
    assert text.count("error: ") <= 1
    for word in words:
        assert word in text, (word, text)


NAMES = [
    (("--method", "s3pol"), ("unknown method 's3pol'", "Did you mean 's3pool'?", "Known: ")),
    (("--method", "s3pool:gird=4"), ("unknown setting of s3pool 'gird'", "Did you mean 'grid'?")),
    (("--method", "s3pool:grid"), ("'grid' is not setting=value",)),
    (("--model", "resnet81"), ("'resnet81'", "Did you mean 'resnet8'?")),
    (("--data", "fashion-mnist-12"), ("'fashion-mnist-12'", "Did you mean 'fashion-mnist-12k'?")),
    (("--recipe", "strng"), ("unknown recipe 'strng'", "Did you mean 'strong'?")),
    (("--set", "momentun=0.5"), ("unknown recipe setting 'momentun'", "Did you mean 'momentum'?")),
    (("--no-such-flag",), ("No such option",)),
    (("--epochs", "many"), ("--epochs",)),
    (("--epochs", "0"), ("epochs (=0.0) must be above 0",)),
    (("--epochs", "nan"), ("epochs (=nan)",)),
    (("--epochs", "inf"), ("epochs (=inf)",)),
    (("--set", "lr=fast"), ("recipe",)),
    (("--set", "batch_size=2.5"), ("batch_size (=2.5)",)),
    (("--set", "momentum=1.5"), ("momentum (=1.5) must be in [0, 1)",)),
    (("--set", "augment=flipp"), ("unknown augmentation 'flipp'", "Did you mean 'flip'?")),
    (("--threads", "0"), ("--threads",)),
    (("--device", "quantum"), ("device 'quantum' cannot be used here",)),
    (("--method", "selective_backprop:beta=-1"), ("beta", "-1")),
    (("--method", "importance_sampling:presample=0.5"), ("presample must be above 1", "0.5")),
    (("--method", "selective_backprop:beta=high"), ("selective_backprop",)),
    (("--method", "selective_backprop", "--method", "importance_sampling"),
     ("selective_backprop", "importance_sampling", "'samples'", "keep one of the two")),
    (("--method", "s3pool", "--method", "s3pool"), ("s3pool is given twice",)),
    (("--set", "batch_size=500"), ("batch_size 500 is larger than the data (133 images)", "take 133 or fewer")),
    (("--model", "gone.py:make"), ("gone.py",)),
    (("--model", "os:system"), ("system",)),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), NAMES, ids=[" ".join(flags) for flags, _ in NAMES])
def test_a_wrong_flag(
    hasten: Any, data: Path, tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    base = ["train", "--data", data, *SMALL]
    refused(hasten(*base, *flags), *words)
    assert not list(tmp_path.rglob("step-*"))


def test_a_method_without_effect_lists_why_layer_by_layer(hasten: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))\n"
    )
    command = ("train", "--model", "net.py:make", "--data", data, "--method", "s3pool", "--epochs", "0.25", "--set",
               "batch_size=16")  # fmt: skip
    result = hasten(*command)
    refused(result, "s3pool has no effect on this model", "allow_no_effect")
    assert "0: skipped, " in result.err
    assert hasten(*command, "--allow-no-effect").code == 0


def test_a_diverging_run(hasten: Any, data: Path, tmp_path: Path) -> None:
    result = hasten("train", *SMALL, "--data", data, "--set", "lr=1e12", "--set", "schedule=constant", "--set", "warmup=0.0",
                    "--epochs", "4", "--out", "run", "--save-every", "0")  # fmt: skip
    refused(result, "became NaN or infinite at step", "first seen in", "Lower the learning rate")
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_folders(hasten: Any, data: Path, tmp_path: Path) -> None:
    command = ("train", *SMALL, "--data", data, "--epochs", "0.25", "--out")
    refused(hasten(*command, data / "run"), "Choose one you can write to")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    refused(hasten(*command, "mine"), "'thesis.tex'", "Give a new or an empty folder")
    refused(hasten(*command, "bad\nname"), "is not allowed")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_checkpoints_of_another_recipe_edited_or_cut_short(hasten: Any, data: Path, tmp_path: Path) -> None:
    command = ("train", *SMALL, "--data", data, "--epochs", "1", "--out", "run", "--save-every", "0")
    assert hasten(*command).code == 0
    refused(
        hasten(*command, "--seed", "1"),
        "made with other settings",
        "seed: checkpoint 0, given 1",
        "another folder",
    )
    write_npz(data, train=140)
    refused(hasten(*command), "content.train: checkpoint", "counts.train: checkpoint 133, given 140")
    write_npz(data)
    newest = tmp_path / "run/checkpoints/step-000008"
    recipe = newest / "recipe.json"
    edited = recipe.read_text().replace('"seed":0', '"seed":1').replace('"seed": 0', '"seed": 1')
    assert edited != recipe.read_text()
    recipe.write_text(edited)
    told = hasten(*command)
    assert told.code == 0
    assert "step-000008" in told.err
    assert "step-000007 is used instead" in told.err
    for file in tmp_path.glob("run/checkpoints/step-*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    refused(hasten(*command), "no checkpoint can be used")


def test_a_disk_full_to_the_end_is_an_error_and_not_a_success(
    hasten: Any, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from functools import partial

    from checkpoint.faulty import Failing
    from hasten import loop
    from hasten.checkpoint import Store

    broken = partial(Store, files=Failing(at=1, times=10**9), sleep=lambda seconds: None)
    monkeypatch.setattr(loop, "Store", broken)
    command = ("train", *SMALL, "--data", data, "--epochs", "1", "--out", "run")
    result = hasten(*command)
    assert result.code == 1
    assert "No space left on device" in result.err
    assert "the state of step 8 is not saved; make room in run" in result.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert hasten(*command).code == 0


def test_hostile_class_names_reach_neither_terminal_nor_files_raw(hasten: Any, tmp_path: Path) -> None:
    whole = images(40, 1)
    names = np.array(
        ["\x1b[2J\x1b]0;owned\x07", "<script>alert(1)</script>", "=cmd|'/c calc'!A0", "../../etc"]
    )
    np.savez(tmp_path / "hostile.npz", x_train=whole.pixels, y_train=whole.labels, x_test=whole.pixels,
             y_test=whole.labels, classes=names)  # fmt: skip
    shown = hasten("data", "check", "hostile.npz")
    assert shown.code == 0
    assert "\x1b" not in shown.out + shown.err
    assert "\x07" not in shown.out
    assert set(json.loads(hasten("data", "check", "hostile.npz", "--json").out)["counts"]["train"]) == set(
        names.tolist()
    )
    trained = hasten("train", *SMALL, "--data", "hostile.npz", "--epochs", "0.5", "--out", "run")
    assert trained.code == 0
    assert "\x1b" not in trained.out + trained.err
    refused(hasten("train", "--method", "\x1b[2Jx"), "unknown method")
    assert "\x1b" not in hasten("train", "--method", "\x1b[2Jx").err


def test_bad_data(hasten: Any, tmp_path: Path) -> None:
    whole = images(40, 1)
    good = {"x_train": whole.pixels, "y_train": whole.labels, "x_test": whole.pixels, "y_test": whole.labels}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"y_train": whole.labels - 1}, "labels lie outside"),
        ({"y_train": whole.labels * 0}, "all training images are of one class"),
        ({"x_train": whole.pixels[:0], "y_train": whole.labels[:0]}, "there are no images"),
        ({"x_train": whole.pixels[:-1]}, "39 images but 40 labels"),
        ({"x_train": whole.pixels / 255}, "pixels are uint8"),
        ({"x_test": whole.pixels[:, :8]}, "must be alike"),
    ]
    for change, words in cases:
        np.savez(tmp_path / "bad.npz", **(good | change))
        refused(hasten("train", *SMALL, "--data", "bad.npz"), "bad.npz", words)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    refused(hasten("train", *SMALL, "--data", "bad.npz"), "damaged or truncated")


def test_no_network(hasten: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **more: object) -> object:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    command = ("train", *SMALL, "--data", "cifar10", "--root", tmp_path / "sets")
    refused(hasten(*command, "--download"), "unreachable")
    refused(hasten(*command), "cifar10 was not found in", "fashion-mnist-12k is built in")
