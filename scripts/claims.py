"""The measured statements of benchmarks/results, and the hand-written part of the cards (scripts/cards.toml)."""

from __future__ import annotations

import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS, WORDS = ROOT / "benchmarks/results", ROOT / "scripts/cards.toml"
NO_GAIN = (
    "does not reach",
    "not measured",
    "not shown",
    "later",
    "too wide",
    "one seed",
    "no figure",
    "at most",
)


class Claim(NamedTuple):
    """One measured statement of a stored result."""

    result: str
    what: str
    text: str
    methods: tuple[str, ...]
    machine: str

    @property
    def command(self) -> str:
        """The command that measures it again."""
        return f"make bench BENCH={self.result}"

    @property
    def is_gain(self) -> bool:
        """Whether it shows something saved: less, or a ratio whose verdict, where there is one, is "faster"."""
        verdict = re.search(r"\d+\.\d+x(?: \[[^\]]*\])?: ([^;(]*)", self.text)
        return not self.text.startswith(NO_GAIN) and (verdict is None or verdict[1].strip() == "faster")


@cache
def words() -> dict[str, Any]:
    """Return the hand-written part."""
    return tomllib.loads(WORDS.read_text(encoding="utf-8"))


def reworded(text: str) -> str:
    """Return a claim's text with the verdict "missed" spelt out: the arm did not get to the target accuracy."""
    return re.sub(r"\bmissed\b", "target accuracy not reached", text)


def machine_of(environment: dict[str, Any]) -> str:
    """Return where a result was measured, in words."""
    gpu = environment.get("gpu")
    name = (gpu["name"] if isinstance(gpu, dict) and "name" in gpu else str(gpu)) if gpu else None
    flags = ", ".join(environment["cpu_flags"])
    where = f"{name}, beside " if name else ""
    return f"{where}{environment['cpu']} ({flags}), {environment['threads']} threads, torch {environment['torch']}"


@cache
def claims(folder: Path = RESULTS) -> list[Claim]:
    """Return every stored claim, by result."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        where = machine_of(content["environment"])
        found += [
            Claim(path.stem, row["what"], reworded(row["text"]), tuple(row["methods"]), where)
            for row in content.get("claims", [])
        ]
    return found


def chosen(selector: dict[str, Any], method: str | None = None) -> Claim | None:
    """Return the first claim that ``selector`` of cards.toml names, or None where that was not measured.

    Of several beginnings of "what", the first that any claim has counts.
    """
    method = selector.get("method", method)
    beginnings = selector["what"] if isinstance(selector["what"], list) else [selector["what"]]
    for begin in beginnings:
        for claim in claims():
            fits = claim.result == selector["result"] and claim.what.startswith(begin)
            if fits and (method is None or method in claim.methods):
                return claim
    return None


def all_of(name: str) -> list[Claim]:
    """Return every claim on the method, those that cards.toml names first."""
    named = [chosen(selector, name) for selector in words()["method"][name]["ours"]]
    first = list(dict.fromkeys(claim for claim in named if claim is not None))
    return first + [claim for claim in claims() if name in claim.methods and claim not in first]
