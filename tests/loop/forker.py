"""Forks, on each line of input, a process that runs the command line given on the line, and tells how it ended.

Forked from a process that has imported torch, a kill and a restart take tens of milliseconds instead of seconds.
Nothing but the import is shared: the child opens everything else itself.
"""

from __future__ import annotations

import json
import os
import sys

import torch._dynamo  # noqa: F401 - an optimizer imports it, which takes a second

import hasten.loop  # noqa: F401
from hasten.cli import main


def child(arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        main(arguments)
    except SystemExit as end:
        os._exit(int(end.code or 0))  # type: ignore[arg-type]
    os._exit(0)


def serve() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(json.loads(line))
            finally:
                os._exit(99)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
