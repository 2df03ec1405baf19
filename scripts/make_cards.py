"""Write docs/methods/NAME.md for every method, and the README's tables: the methods, and what the benchmarks measured.

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


def markers(what: str) -> tuple[str, str]:
    """Return the lines around a part of the README that is written here."""
    return f"<!-- {what}: written by scripts/make_cards.py -->", f"<!-- end of {what} -->"


def methods() -> str:
    """Return the README's table of the methods, those of one folder together."""
    begin, end = markers("methods")
    found = [registry.method_class(name) for name in registry.available()]
    rows = sorted((cls.__module__.split(".")[-2], cls.spec.name, cls.spec) for cls in found)
    lines = [begin, "| name | how | saves | in `src/hasten/methods` |", "|---|---|---|---|"]
    lines += [
        f"| [{name}](docs/methods/{name}.md) | {spec.acts} | {spec.saves} | `{room}` |"
        for room, name, spec in rows
    ]
    return "\n".join([*lines, end])


def results() -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Return (name, content, claims with a target) of every stored result that has such."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if rows := [row for row in content.get("claims", []) if row["target"]]:
            found.append((path.stem, content, rows))
    return found


def line(row: dict[str, Any], last: str) -> str:
    """Return a claim as a row of a table."""
    verdict = f"{row['target']}: {'met' if row['met'] else 'missed'}"
    return f"| {', '.join(row['methods']) or 'hasten'}: {row['what']} | {row['text']} | {verdict} | {last} |"


def machines() -> list[str]:
    """Return where the results were measured, a line each."""
    facts = [content["environment"] for _, content, _ in results()]
    return sorted(
        {
            f"On {f['cpu']} ({', '.join(f['cpu_flags'])}), {f['threads']} threads, torch {f['torch']}."
            for f in facts
        }
    )


def table() -> str:
    """Return the README's table: the first claim of every result, and how many of all its targets were met."""
    begin, end = markers("measured")
    lines = [begin, "| first claim | measured | target | all targets of the benchmark |", "|---|---|---|---|"]
    for name, _, rows in results():
        met = sum(bool(row["met"]) for row in rows)
        lines.append(line(rows[0], f"{met} of {len(rows)} met, `{name}`"))
    return "\n".join([*lines, "", *machines(), end])


def everything() -> str:
    """Return the page with every claim that has a target."""
    lines = ["# Measured", "", "Every claim that has a target, met or missed; written by scripts/make_cards.py.", "",
             "| what | measured | target | benchmark |", "|---|---|---|---|"]  # fmt: skip
    lines += [line(row, f"`{name}`") for name, _, rows in results() for row in rows]
    return "\n".join([*lines, "", *machines(), ""])


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
    page = ROOT / "docs/measured.md"
    if not page.exists() or page.read_text(encoding="utf-8") != everything():
        stale.append("docs/measured.md")
        if "--check" not in sys.argv:
            page.write_text(everything(), encoding="utf-8")
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = old
    for text in (methods(), table()):
        begin, *_, end = text.splitlines()
        new = new[: new.index(begin)] + text + new[new.index(end) + len(end) :]
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
