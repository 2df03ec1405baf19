"""Two real ranks of a distributed run, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def two_ranks(code: str, folder: Path) -> list[Any]:
    """Run ``code`` as rank 0 and rank 1 and return what each saved in ``folder``/RANK.pt.

    Its arguments are the project's root, the rank and the folder. Fails if a rank does.
    """
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, root, str(rank), str(folder)], env=environment,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        complaints = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], complaints
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
