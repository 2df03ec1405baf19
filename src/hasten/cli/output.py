"""What commands print: text for people, JSON for programs, never both on one stream."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Return ``text`` without control characters, which names from files could carry; line ends stay."""
    return _CONTROL.sub("�", text)


def say(text: str = "") -> None:
    """Print a line for a person."""
    print(visible(text), flush=True)


def note(text: str) -> None:
    """Print a line on standard error."""
    print(visible(text), file=sys.stderr, flush=True)


def starting(text: str) -> None:
    """Say on a terminal what goes on, before the imports that take a second or two."""
    if sys.stderr.isatty():
        note(f"{text} ...")


def say_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=2, allow_nan=False, default=str), flush=True)


@contextmanager
def program_output(on: bool = True) -> Iterator[None]:
    """Send what the user's own code prints, and what the processes print that it starts, to standard error.

    Standard output is then left to ``say_json``, which is called outside. Nothing happens where ``on`` is false.
    """
    if not on:
        yield
        return
    kept = None
    with suppress(OSError, ValueError):  # closed, or not a file, as in a notebook
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def header() -> str:
    """Return one line that says what runs where."""
    import torch

    from hasten import __version__
    from hasten.measure.environment import environment

    facts = environment()
    where = "CUDA" if torch.cuda.is_available() else "CPU"
    return f"hasten {__version__}  ·  torch {torch.__version__} {where}  ·  {facts['cores']} cores, {torch.get_num_threads()} threads"
