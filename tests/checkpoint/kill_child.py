"""Forks, on each line of input, a process that saves without end until somebody kills it.

The processes are forked from one that has imported torch, so that a kill and a restart take tens of
milliseconds. Each writes the step of every completed save to the file LOG (an append of one line is never
torn).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from hasten.checkpoint import Store


def parts(step: int) -> dict[str, dict[object, object]]:
    """Return a state in which every value follows from ``step``."""
    weight = torch.full((16, 8, 3, 3), float(step)).contiguous(memory_format=torch.channels_last)
    slots = {f"layer{i}": torch.full((i + 1,), step, dtype=torch.int64) for i in range(8)}
    return {"model": {"w": weight}, "optim": slots, "state": {"step": step, "seen": [step] * 20}}


def consistent(step: int, found: dict[str, dict[object, object]]) -> bool:
    """Whether ``found`` is the state of ``step`` in every value."""
    wanted = parts(step)
    same = found["state"] == wanted["state"]
    for name in ("model", "optim"):
        same &= found[name].keys() == wanted[name].keys()
        same &= all(torch.equal(found[name][key], wanted[name][key]) for key in wanted[name])  # type: ignore[arg-type]
    return bool(same)


def child(root: Path, log: Path) -> None:
    torch.set_num_threads(1)
    problems: list[str] = []
    store = Store(root, on_problem=problems.append)
    loaded = store.load({"run": 1})
    step = loaded.step if loaded else 0
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while not problems:
        step += 1
        if store.save(step, parts(step), {"run": 1}):
            os.write(fd, f"{step}\n".encode())


def main() -> None:
    root, log = Path(sys.argv[1]), Path(sys.argv[2])
    print("ready", flush=True)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(root, log)
            finally:
                os._exit(1)  # it should have been killed
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1, flush=True)


if __name__ == "__main__":
    main()
