"""Real processes of `hasten train`, really killed at random instants, given the same command again until they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hasten.checkpoint import Store

from .support import assert_same, final, steps, write_npz

KILLS, EPOCHS, PER_EPOCH = 60, 24, 8
STEPS = EPOCHS * PER_EPOCH
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
METHODS = {
    "plain": [],
    "selective_backprop+s3pool+mixed_precision": [
        "selective_backprop:prime_epochs=1,beta=1.0", "s3pool", "mixed_precision",
    ],
    "early_instance_filtering": ["early_instance_filtering:warmup=2,min_keep=4,round_to=16"],
}  # fmt: skip
FACTORY = """
from torch import nn


def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, num_classes),
    )
"""


def command(
    folder: Path, out: str, methods: list[str], epochs: float = EPOCHS, save_every: float = 0
) -> list[str]:
    if not (folder / "net.py").exists():
        (folder / "net.py").write_text(FACTORY)
        write_npz(folder / "patterns.npz", train=16 * PER_EPOCH + 5)
    return ["train", "--model", f"{folder / 'net.py'}:make", "--data", str(folder / "patterns.npz"), "--epochs", str(epochs),
            "--set", "batch_size=16", "--set", "eval_every=0.75", "--out", str(folder / out), "--threads", "1",
            "--save-every", str(save_every), *(part for m in methods for part in ("--method", m))]  # fmt: skip


class Forker:
    """Starts `hasten ...` in forked processes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forker.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        assert self._read() == "ready"

    def start(self, arguments: list[str]) -> int:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        return int(self._read())

    def ended(self) -> int:
        return int(self._read())

    def _read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.close()


def newest(out: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 without one."""
    found = [int(p.name[5:]) for p in out.glob("checkpoints/step-*") if p.name[5:].isdigit()]
    return max(found, default=0)


def alive(pid: int) -> bool:
    """Return whether the process runs: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("stack", METHODS)
def test_kills_at_random_instants_lose_nothing(stack: str, tmp_path: Path, forker: Forker) -> None:
    """20 kills for each of three stacks of methods, 60 in all."""
    random = np.random.default_rng(list(METHODS).index(stack))
    whole = command(tmp_path, "whole", METHODS[stack], save_every=1e9)
    forker.start(whole)
    assert forker.ended() == 0
    out, again = tmp_path / "killed", command(tmp_path, "killed", METHODS[stack])
    starting = 0.5
    for _ in range(KILLS // len(METHODS)):
        before, more, began = newest(out), int(random.integers(0, 9)), time.monotonic()
        pid, first = forker.start(again), 0.0
        while newest(out) < before + more:
            assert time.monotonic() - began < 60, "the run does not get on"
            assert alive(pid), f"the run ended by itself with {forker.ended()} at step {newest(out)}"
            if not first and newest(out) > before:
                first = time.monotonic()
            time.sleep(0.002)
        now = time.monotonic()
        if more:  # some completed saves, then a random instant of a step or a save
            starting = min(starting, now - began)
            # by the pace of the steps alone: on a busy machine the start takes longer than the rest of the run
            time.sleep(random.uniform(0, (now - first) / (more - 1) if more > 1 and first else 0.02))
        else:  # anywhere in the start
            time.sleep(random.uniform(0, starting))
        completed = newest(out)
        os.kill(pid, signal.SIGKILL)
        assert forker.ended() == -signal.SIGKILL
        loaded = Store(out / "checkpoints").load() if (out / "checkpoints").is_dir() else None
        assert (0 if loaded is None else loaded.step) >= completed
        assert not (out / "checkpoints" / "quarantine").exists()
    assert 0 < newest(out) < STEPS
    forker.start(again)
    assert forker.ended() == 0
    assert newest(out) == STEPS
    assert [row["step"] for row in steps(out)] == list(range(1, STEPS + 1))
    assert_same(final(out), final(tmp_path / "whole"), stack)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_stop_saves_and_the_same_command_continues(
    number: signal.Signals, code: int, tmp_path: Path, forker: Forker
) -> None:
    methods = METHODS["selective_backprop+s3pool+mixed_precision"]
    forker.start(command(tmp_path, "whole", methods, epochs=12))
    assert forker.ended() == 0
    out, again = tmp_path / "stopped", command(tmp_path, "stopped", methods, epochs=12, save_every=1e9)
    stops: list[int] = []
    for _ in range(4):
        before = newest(out)
        pid = forker.start(again)
        evaluated = (out / "evaluations.csv").stat().st_size if before else 0
        while not (out / "evaluations.csv").exists() or (out / "evaluations.csv").stat().st_size <= evaluated:
            assert alive(pid), f"the run ended by itself with {forker.ended()}"
            time.sleep(0.002)
        os.kill(pid, number)
        assert forker.ended() == code
        assert newest(out) > before  # saved where it stopped, though no save was due
        assert steps(out)[-1]["step"] == newest(out)
        stops.append(newest(out))
    assert stops == sorted(set(stops))
    assert stops[-1] < 12 * PER_EPOCH
    forker.start(again)
    assert forker.ended() == 0
    assert_same(final(out), final(tmp_path / "whole"), stops)


@pytest.mark.slow
def test_kill_9_of_a_fresh_process_and_the_same_command_again(tmp_path: Path) -> None:
    """As a user does it: `hasten train`, kill -9, the same command; with a signal before training has begun, too."""
    hasten = [sys.executable, "-c", "from hasten.cli import main; main()"]
    again = [*hasten, *command(tmp_path, "killed", [], epochs=16)]
    quiet = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(again, **quiet) as process:  # type: ignore[call-overload]
        while newest(tmp_path / "killed") < 20:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    reached = newest(tmp_path / "killed")
    ended = subprocess.run(again, **quiet, timeout=100, check=False)  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stderr
    assert f"continued from step {reached} of {16 * PER_EPOCH}" in ended.stderr
    subprocess.run([*hasten, *command(tmp_path, "whole", [], epochs=16)], **quiet, timeout=100, check=True)  # type: ignore[call-overload]
    assert_same(final(tmp_path / "killed"), final(tmp_path / "whole"), "kill -9")
