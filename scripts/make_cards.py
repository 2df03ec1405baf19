"""Write docs/methods/NAME.md for every method, and the README's table: what the benchmarks measured.

Usage: python scripts/make_cards.py [--check]     (--check only tells whether the cards are up to date)
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from hasten import registry

ROOT = Path(__file__).resolve().parent.parent
CARDS, RESULTS = ROOT / "docs/methods", ROOT / "benchmarks/results"


def claims_of(name: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (result's name, its content, claim) of every stored claim about the method."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found += [(path.stem, content, row) for row in content.get("claims", []) if name in row["methods"]]
    return found


def card(name: str) -> str:
    """Return the card of a method as Markdown."""
    cls = registry.method_class(name)
    spec = cls.spec
    lines = [f"# {name}: {spec.title}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
    lines += ["| | |", "|---|---|", f"| paper | {spec.paper} |", f"| saves | {spec.saves} |", f"| how | {spec.acts} |",
              f"| writes | {', '.join(sorted(spec.writes))} |", f"| reads | {', '.join(sorted(spec.reads)) or '-'} |",
              f"| works with | {', '.join(sorted(spec.promises))} |", f"| slower when | {spec.slower_when or '-'} |", ""]  # fmt: skip
    lines += ["## Settings", "", "| setting | default |", "|---|---|"]
    lines += [f"| `{key}` | `{value!r}` |" for key, value in registry.method(name).settings().items()]
    lines += ["", "## Measured", ""]
    rows = claims_of(name)
    if rows:
        lines += ["| what | measured | target | with | benchmark |", "|---|---|---|---|---|"]
        for result, _, row in rows:
            verdict = "" if not row["target"] else f"{row['target']}: {'met' if row['met'] else 'missed'}"
            others = ", ".join(other for other in row["methods"] if other != name) or "-"
            lines.append(
                f"| {row['what']} | {row['text']} | {verdict} | {others} | `make bench BENCH={result}` |"
            )
        facts = {
            (c["environment"]["cpu"], c["environment"]["threads"], c["environment"]["torch"])
            for _, c, _ in rows
        }
        lines += [
            "",
            *[
                f"On {cpu}, {threads} threads, torch {torch}."
                for cpu, threads, torch in sorted(facts, key=str)
            ],
        ]
    else:
        lines.append("Nothing yet. On a GPU: not yet measured.")
    return "\n".join(lines).rstrip() + "\n"


BEGIN, END = "<!-- measured: written by scripts/make_cards.py -->", "<!-- end of measured -->"


def table() -> str:
    """Return the README's table: every claim that has a target, of every stored result."""
    lines = [BEGIN, "| what | measured | target | benchmark |", "|---|---|---|---|"]
    machines = set()
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = content["environment"]
        for row in content.get("claims", []):
            if row["target"]:
                what = f"{', '.join(row['methods']) or 'hasten'}: {row['what']}"
                verdict = f"{row['target']}: {'met' if row['met'] else 'missed'}"
                lines.append(f"| {what} | {row['text']} | {verdict} | `{path.stem}` |")
                machines.add(
                    f"{facts['cpu']} ({', '.join(facts['cpu_flags'])}), {facts['threads']} threads, torch {facts['torch']}"
                )
    return "\n".join([*lines, "", *[f"On {machine}." for machine in sorted(machines)], END])


def main() -> int:
    """Write the cards, or check them; return the exit code."""
    stale = []
    for name in registry.available():
        path, text = CARDS / f"{name}.md", card(name)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = old[: old.index(BEGIN)] + table() + old[old.index(END) + len(END) :]
    if new != old:
        stale.append("README.md")
        if "--check" not in sys.argv:
            readme.write_text(new, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"stale cards: {', '.join(stale)}; run python scripts/make_cards.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
