"""What commands print: text for people, JSON for programs, never both on one stream."""

from __future__ import annotations

import json
import re
import sys
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


def say_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=2, allow_nan=False, default=str))


def header() -> str:
    """Return one line that says what runs where."""
    import torch

    from hasten import __version__
    from hasten.measure.environment import environment

    facts = environment()
    where = "CUDA" if torch.cuda.is_available() else "CPU"
    return f"hasten {__version__}  ·  torch {torch.__version__} {where}  ·  {facts['cores']} cores, {torch.get_num_threads()} threads"
