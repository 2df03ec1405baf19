"""`hasten train` as a person, a scheduler and a script meet it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from hasten import models
from hasten.checkpoint import Store
from hasten.progress import Lines
from loop.support import write_npz

from .test_cli import SMALL, hasten  # noqa: F401

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "my photos.npz")


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start `hasten train` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hasten", "train", *map(str, arguments)], cwd=folder, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


# -- what is said


def test_the_recipe_is_printed_and_strong_by_default(hasten: Any, data: Path) -> None:  # noqa: F811
    shown = hasten("train", "--model", "lenet", "--data", data, "--epochs", "0.25", "--batch-size", "16", "--lr", "0.01", "--threads", "1", "--device", "cpu")  # fmt: skip
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].startswith("hasten ")
    assert "training lenet on" in lines[0]
    recipe = next(line for line in lines if line.startswith("Recipe"))
    assert recipe in (
        "Recipe strong: SGD lr 0.01, bf16, batch 16, 0.25 epochs",
        "Recipe strong: SGD lr 0.01, fp32, batch 16, 0.25 epochs",  # a processor without bfloat16
    )
    assert any(line.startswith("Effect mixed_precision:") for line in lines)


@pytest.mark.parametrize(
    ("flags", "recipe", "methods"),
    [
        (("--plain",), "plain: SGD lr 0.01, fp32, batch 16", []),
        (
            ("--recipe", "plain", "--method", "selective_backprop"),
            "plain: SGD lr 0.01, fp32",
            ["selective_backprop"],
        ),
        (("--optimizer", "adamw"), "strong: AdamW lr 0.01", ["mixed_precision"]),
        (("--method", "selective_backprop"), "strong: SGD", ["mixed_precision", "selective_backprop"]),
        (("--method", "mixed_precision:dtype=float32"), "strong: SGD lr 0.01, fp32", ["mixed_precision"]),
    ],
)
def test_what_a_recipe_brings(
    hasten: Any,  # noqa: F811
    data: Path,
    flags: tuple[str, ...],
    recipe: str,
    methods: list[str],
) -> None:
    command = ("train", *SMALL, "--data", data, "--epochs", "0.25", *flags)
    shown = hasten(*command)
    assert shown.code == 0, shown.err
    assert f"Recipe {recipe}" in shown.out
    assert sorted(hasten(*command, "--json").json()["effects"]) == methods


def test_a_method_that_rules_mixed_precision_out_runs_without_it(hasten: Any, data: Path) -> None:  # noqa: F811
    shown = hasten("train", *SMALL, "--data", data, "--epochs", "0.125", "--method", "limited_precision")
    assert shown.code == 0, shown.err
    assert "without mixed_precision, which limited_precision rules out" in shown.out
    assert "Effect mixed_precision" not in shown.out


def test_all_settings_are_listed(hasten: Any) -> None:  # noqa: F811
    import dataclasses

    from hasten.recipe import STRONG

    shown = hasten("train", "--set", "help")
    assert shown.code == 0
    for field in dataclasses.fields(STRONG):
        value = getattr(STRONG, field.name)
        assert f"  {field.name}={'[' + ', '.join(value) + ']' if field.name == 'augment' else '' if field.name == 'betas' else value}" in shown.out  # fmt: skip
    assert "schedule=linear" in shown.out
    assert "one_cycle" in shown.out
    assert not Path("runs").exists()


def test_the_next_command_is_quoted_and_keeps_the_flags(hasten: Any, data: Path) -> None:  # noqa: F811
    shown = hasten(
        "train",
        *SMALL,
        "--data",
        data,
        "--epochs",
        "0.25",
        "--method",
        "selective_backprop:beta=0.5",
        "--out",
        "run",
    )
    line = next(line for line in shown.out.splitlines() if line.startswith("Next"))
    parts = shlex.split(line.removeprefix("Next"))
    assert parts[:2] == ["hasten", "compare"]
    assert parts[parts.index("--data") + 1] == str(data)
    assert parts[parts.index("--epochs") + 1] == "0.25"
    assert parts[parts.index("--method") + 1] == "selective_backprop:beta=0.5"
    assert [parts[i + 1] for i, part in enumerate(parts) if part == "--set"] == ["batch_size=16", "lr=0.01"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "meta"), "device 'meta' cannot be used here"),
        (("--optimizer", "adam"), "optimizer (='adam') must be one of 'sgd', 'adamw', 'rmsprop', 'muon'"),
        (("--set", "history=2.5"), "unknown recipe setting 'history'"),
        (("--set", "nesterov=maybe"), "nesterov (='maybe') must be True or False"),
        (("--plain", "--recipe", "strong"), "give one of them"),
        (("--init", "missing.pt"), "init: there is no file missing.pt"),
        (("--size", "8"), "size"),
    ],
)
def test_wrong_flags_are_one_line(hasten: Any, data: Path, flags: tuple[str, ...], words: str) -> None:  # noqa: F811
    shown = hasten("train", *SMALL, "--data", data, "--epochs", "0.25", *flags)
    assert shown.code == 2
    assert words in shown.err
    assert "Traceback" not in shown.err


def test_weights_are_loaded_and_a_fresh_head_is_named(hasten: Any, data: Path, tmp_path: Path) -> None:  # noqa: F811
    state = models.build("lenet", num_classes=7, in_channels=3, image_size=16, seed=9).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    shown = hasten("train", *SMALL, "--data", data, "--epochs", "0.125", "--init", "w.safetensors")
    assert shown.code == 0, shown.err
    assert "initial weights:" in shown.err
    assert "in the weights, 4" in shown.err


def test_continuing_is_said_at_once(hasten: Any, data: Path) -> None:  # noqa: F811
    command = ("train", *SMALL, "--data", data, "--epochs", "0.25", "--out", "run")
    assert "continued" not in hasten(*command).err
    again = hasten(*command)
    assert "continued from step 2 of 2" in again.err
    assert "Result accuracy" in again.out


def test_tensorboard_logs(hasten: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    command = ("train", *SMALL, "--data", data, "--epochs", "0.25", "--out", "run", "--tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    missing = hasten(*command)
    assert missing.code == 2
    assert "pip install 'hasten[tensorboard]'" in missing.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("tensorboard")
    run = start(tmp_path, *command[1:])
    assert run.wait(120) == 0, run.communicate()[0]
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))
    run.communicate()


# -- processes


def test_a_closed_terminal_and_a_scheduler_save_as_a_stop_does(data: Path, tmp_path: Path) -> None:
    for name, code in (("SIGHUP", 129), ("SIGUSR1", 138), ("SIGXCPU", 152)):
        out = tmp_path / name
        run = start(tmp_path, *SMALL, "--plain", "--data", data, "--epochs", "5000", "--lr", "1e-6", "--out", out, "--save-every", "1e9", "--set", "eval_every=0")  # fmt: skip
        deadline = time.monotonic() + 120
        while not (out / "config.toml").exists() and time.monotonic() < deadline:  # written at the first step
            time.sleep(0.05)
        run.send_signal(getattr(signal, name))
        text = run.communicate(timeout=120)[0]
        assert run.returncode == code, text
        assert "saved; the same command continues" in text
        loaded = Store(out / "checkpoints").load()
        assert loaded is not None
        assert loaded.step >= 1


def test_the_same_command_twice_at_once_trains_once(data: Path, tmp_path: Path) -> None:
    command = (*SMALL, "--plain", "--data", data, "--epochs", "5000", "--lr", "1e-6", "--out", tmp_path / "run", "--set", "eval_every=0", "--save-every", "0.2")  # fmt: skip
    first = start(tmp_path, *command)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/config.toml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = start(tmp_path, *command)
    text = second.communicate(timeout=120)[0]
    first.terminate()
    first.communicate(timeout=120)
    assert first.returncode == 143
    assert second.returncode == 2
    assert f"process {first.pid} trains in" in text
    lines = (tmp_path / "run/steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


def test_a_full_disk_is_told_while_training_goes_on_and_the_accuracy_comes_too(
    data: Path, tmp_path: Path
) -> None:
    script = f"ulimit -f 40; exec {sys.executable} -m hasten train {shlex.join(map(str, SMALL))} --plain --data {shlex.quote(str(data))} --epochs 3 --out run --save-every 0"  # fmt: skip
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True, timeout=200, check=False)  # fmt: skip
    assert run.returncode == 1, run.stdout + run.stderr
    told = run.stderr.splitlines()
    first = next(i for i, line in enumerate(told) if "could not save the checkpoint of step 1 " in line)
    assert first < next(i for i, line in enumerate(told) if "accuracy" in line)
    assert sum("could not save" in line for line in told) == 1
    assert "Result accuracy" in run.stdout
    assert "is not saved; make room in run" in run.stderr


# -- lines


def test_lines_come_in_time_even_when_nothing_happens(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(interval=0.02, beat=True)
    for _ in range(500):
        time.sleep(0.01)
        if "setting up" in capsys.readouterr().err:
            break
    else:
        pytest.fail("no line came")
    lines.close()
    lines.evaluation(3, 4, 0.5)
    assert "step 3/4  accuracy 50.00%" in capsys.readouterr().err
