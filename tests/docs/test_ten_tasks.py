"""What a new user does from the documents alone, in her own folder: no task ends in a traceback.

Her own loop and adding a method are `test_blocks` and `test_worked_example`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from hasten.cli import main
from hasten.comparison import Comparison

from .pages import ROOT, blocks, photos

FAST = [
    "--size",
    "32",
    "--model",
    "resnet8",
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--threads",
    "1",
    "--plain",
]


class Said(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def hers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Her folder: pictures, and the network of "Your own images"."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    (code,) = [
        c for comment, c, _ in blocks(ROOT / "docs/your-own-images.md", "python") if comment == "file: net.py"
    ]
    (tmp_path / "net.py").write_text(code, encoding="utf-8")
    return tmp_path


def hasten(capsys: pytest.CaptureFixture[str], *words: str) -> Said:
    """Run a command in this process."""
    capsys.readouterr()
    try:
        main(list(words))
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err, told.err
    return Said(code, told.out, told.err)


def test_own_folder(hers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = hasten(capsys, "data", "check", "photos")
    assert said.code == 0
    assert "cat" in said.out
    assert "dog" in said.out
    said = hasten(capsys, "train", "--data", "photos", *FAST)
    assert said.code == 0
    assert "accuracy" in said.out


def test_own_network_with_adamw_and_label_smoothing(hers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "optimizer=adamw", "--lr", "0.002", "--set", "label_smoothing=0.1"]
    said = hasten(
        capsys, "train", "--data", "photos", *FAST, "--model", "net.py:make", *settings, "--out", "run"
    )
    assert said.code == 0, said.err
    config = (hers / "run/config.toml").read_text(encoding="utf-8")
    assert "adamw" in config
    assert "label_smoothing" in config


@pytest.mark.slow
def test_kill_and_resume(hers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "--data",
        "photos",
        *FAST,
        "--epochs",
        "60",
        "--set",
        "eval_every=0",
        "--save-every",
        "0.2",
        "--out",
        "run",
    ]
    child = subprocess.Popen([sys.executable, "-m", "hasten", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    steps, end = hers / "run/steps.jsonl", time.monotonic() + 100
    while not (steps.exists() and steps.read_bytes().count(b"\n") > 40):
        assert child.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    said = hasten(capsys, *words)
    assert said.code == 0, said.err
    assert "continued" in said.out + said.err
    done = [json.loads(line)["step"] for line in steps.read_text(encoding="utf-8").splitlines()]
    assert done == list(range(1, 3 * 60 + 1)), "each step exactly once"


@pytest.mark.slow
def test_export_and_predict_elsewhere(hers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = hasten(capsys, "train", "--data", "photos", *FAST, "--epochs", "6", "--out", "run", "--json")
    assert said.code == 0, said.err
    accuracy = json.loads(said.out)["accuracy"]
    assert hasten(capsys, "export", "run", "net.pt2").code == 0
    said = hasten(capsys, "predict", "run", "photos/val/cat/0.png", "photos/val/dog/0.png")
    assert said.code == 0, said.err
    assert "cat" in said.out
    said = hasten(capsys, "evaluate", "run", "photos")
    assert said.code == 0, said.err
    assert f"{100 * accuracy:.2f}" in said.out
    labels = json.loads((hers / "net.labels.json").read_text(encoding="utf-8"))
    assert "cat" in str(labels)
    elsewhere = """
import sys, json, torch
from pathlib import Path
from PIL import Image
import numpy as np
right, seen = 0, 0
net = torch.export.load("net.pt2").module()
for number, kind in enumerate(("cat", "dog")):
    for file in sorted(Path("photos/val", kind).iterdir()):
        pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]
        right += int(net(pixels).argmax()) == number
        seen += 1
assert not any(name.split(".")[0] == "hasten" for name in sys.modules)
print(right / seen)
"""
    told = subprocess.run([sys.executable, "-c", elsewhere], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) == pytest.approx(accuracy)


@pytest.mark.slow
def test_compare_two_methods_in_a_notebook(hers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = """
import hasten
from torch import nn


def mine(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(32, 64, 3),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


short = {"epochs": 2, "batch_size": 8}
answer = hasten.compare(
    mine, "photos", ["selective_backprop", "error_map_pruning:keep=0.5"], size=32, isolate=False, threads=1,
    plain=hasten.PLAIN.with_(**short), strong=hasten.STRONG.with_(**short),
    seeds=1, budgets=[0.5, 1.0], aa_pairs=0, compile=False, out="comparison",
)
"""
    space: dict[str, object] = {"__name__": "__main__"}
    exec(compile(cell, "<cell>", "exec"), space)
    answer = space["answer"]
    assert isinstance(answer, Comparison)
    told = "\n".join(answer.lines())
    assert "no claim" in told, "one seed and no A/A test: nothing may be claimed"
    assert "selective_backprop" in told
    assert (hers / "comparison/report.html").exists()
