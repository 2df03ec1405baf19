"""Real processes, really killed, at random instants of their saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from hasten.checkpoint import Store

from .kill_child import consistent

KILLS = 60


def completed_saves(log: Path) -> int:
    """Return how many saves the children have reported as complete."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(log: Path, count: int) -> float:
    """Wait until ``count`` saves are complete; return about how long one takes, in seconds."""
    begin, start = time.monotonic(), completed_saves(log)
    while (now := completed_saves(log)) < count:
        assert time.monotonic() - begin < 60, "the child does not save"
        time.sleep(0.001)
    return (time.monotonic() - begin) / (now - start) if now > start else 0.02


def test_60_kills_lose_no_completed_save(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    root, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, str(Path(__file__).with_name("kill_child.py")), str(root), str(log)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    interrupted, last, asked = 0, 0, 0
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as forker:
        assert forker.stdin
        assert forker.stdout
        assert forker.stdout.readline() == "ready\n"
        for kill in range(KILLS):
            forker.stdin.write("go\n")
            forker.stdin.flush()
            pid = int(forker.stdout.readline())
            # Some completed saves first, however slow the machine is, then a random instant.
            more = int(random.integers(0, 4))
            asked += more
            pause = wait_for(log, completed_saves(log) + more)
            time.sleep(random.uniform(0, 2 * pause))
            os.kill(pid, signal.SIGKILL)
            assert int(forker.stdout.readline()) == signal.SIGKILL, "the child ended by itself"
            names = {path.name for path in root.iterdir()} if root.exists() else set()
            interrupted += any(name.startswith((".staging", ".trash")) for name in names)
            assert "quarantine" not in names
            assert len(names) <= 7, names
            completed = int(log.read_text().split()[-1]) if completed_saves(log) else 0
            loaded = Store(root).load({"run": 1})
            if loaded is None:
                assert completed == 0
                continue
            assert consistent(loaded.step, loaded.parts), kill
            assert not [line for line in loaded.warnings if "thread" not in line]
            # Nothing that was reported as saved is lost, and at most the save under way is ahead of it.
            assert max(completed, last) <= loaded.step <= max(completed, last) + 1
            # LATEST may lag behind (killed before it was replaced), but names a checkpoint that is there.
            if (root / "LATEST").exists():
                assert (root / (root / "LATEST").read_text().removesuffix("\n")).is_dir()
            last = loaded.step
        forker.stdin.close()
    assert last >= asked > KILLS  # the children did save
    assert interrupted > KILLS // 6  # and many were killed in the middle of it
