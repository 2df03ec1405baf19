"""Which of several ways to compute the same thing is fastest here: found by a timed probe, remembered by machine."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from hasten.measure.environment import environment

ROUNDS = 7
MARGIN = 0.95
"""The first candidate is kept unless another takes at most this share of its time (our choice)."""


def choose(key: str, candidates: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS) -> str:
    """Return the name of the fastest candidate; the first, the safe one, unless another is faster by `MARGIN`.

    key: says what is computed, with shapes and dtypes; an answer found for it before on this machine, with these
    versions and threads, is returned without a probe. The file is ``~/.cache/hasten/probes.json``
    (HASTEN_PROBES=FILE another, HASTEN_PROBES=off none).
    """
    names = list(candidates)
    if len(names) == 1:
        return names[0]
    known = _remembered().get(key)
    if known in names:
        return str(known)
    taken = seconds(candidates, rounds=rounds)
    best = min(names, key=taken.__getitem__)
    chosen = best if taken[best] <= MARGIN * taken[names[0]] else names[0]
    _remember(key, chosen)
    return chosen


def seconds(candidates: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median seconds of one call of each candidate, run in turn ``rounds`` times after one for warmth."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, call in candidates.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def fingerprint() -> str:
    """Return a short name of what decides how fast kernels are: machine, versions, instruction set."""
    facts = environment()
    parts = ("machine", "cpu", "cores_allowed", "cpu_flags", "torch", "hasten", "variables", "gpu", "kernels")
    told = {part: facts[part] for part in parts}
    return hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _file() -> Path | None:
    given = os.environ.get("HASTEN_PROBES", "")
    if given == "off":
        return None
    return Path(given).expanduser() if given else Path.home() / ".cache" / "hasten" / "probes.json"


def _place() -> str:
    return f"{fingerprint()}-{torch.get_num_threads()}"


_FOUND: dict[str, dict[str, str]] = {}


def _remembered() -> dict[str, str]:
    place = _place()
    if place not in _FOUND:
        stored = _stored().get(place, {})
        _FOUND[place] = {str(k): str(v) for k, v in stored.items()} if isinstance(stored, dict) else {}
    return _FOUND[place]


def _stored() -> dict[str, object]:
    """Return what the file holds; a file that cannot be read counts as empty, for a probe can always be run again."""
    path = _file()
    try:
        held = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _remember(key: str, chosen: str) -> None:
    found = _remembered()
    found[key] = chosen
    path = _file()
    if path is None:
        return
    held = _stored()
    ours = held.get(_place())
    held[_place()] = {**(ours if isinstance(ours, dict) else {}), **found}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(held, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(part, path)
    except OSError:
        return  # a full disk or a read-only home costs a probe in the next process, nothing else
