"""Write what the documents say of measurements: the methods' cards, the tables in README and docs, and measured.json.

Figures of ours come from benchmarks/results alone; the papers' figures and the verdicts from scripts/cards.toml.
A part that is written here stands between ``<!-- NAME: written by scripts/make_cards.py -->`` and ``<!-- end of NAME -->``.

Usage: python scripts/make_cards.py [--check]     (--check only tells what is out of date)
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from claims import ROOT, Claim, all_of, chosen, claims, words

from hasten import registry

DOCS = ROOT / "docs"
SOURCES = {
    "paper": "read in the paper",
    "abstract": "read in its abstract",
    "code": "read in the authors' code or its README",
    "log": "read in the authors' log",
    "memory": "from memory, not checked",
    "peer": "another project's figure",
}
NOT_MEASURED = "not measured here"


# -- a card


def escaped(text: str) -> str:
    """Return a docstring's text as Markdown: what is not code in backticks shows as it stands."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    return "".join(part if i % 2 else re.sub(r"([*<\[\]|])", r"\\\1", part) for i, part in enumerate(parts))


def docstring(cls: type) -> Iterator[str]:
    """Yield a method's docstring as Markdown: its entries for settings as a list with their defaults, the rest as it is."""
    defaults = registry.method(cls.spec.name).settings()  # type: ignore[attr-defined]
    one = "|".join(map(re.escape, defaults))
    entry = re.compile(rf"^((?:{one})(?: \([^)]*\))?(?:, (?:{one})(?: \([^)]*\))?)*): (.*)")
    text = re.sub(
        rf"(?<=[.;] )((?:{one})): ", r"\n\1: ", inspect.cleandoc(cls.__doc__ or "")
    )  # "layers: ... skip: ..."
    told, item = set[str](), ""
    for line in text.splitlines():
        if begun := entry.match(line):
            yield from [f"- {item.strip()}"] * bool(item)
            names = re.findall(rf"\b(?:{one})\b", begun[1])
            told |= {*names}
            item = ", ".join(f"`{name}={defaults[name]!r}`" for name in names) + f": {escaped(begun[2])}"
        elif item and line.strip():
            item += f" {escaped(line.strip())}"
        else:
            yield from [f"- {item}"] * bool(item)
            yield from [""] * bool(item)
            item = ""
            yield line if line.startswith("    ") else escaped(line)
    yield from [f"- {item}"] * bool(item)
    yield from [f"- `{name}={value!r}`" for name, value in defaults.items() if name not in told]


def cell(text: str) -> str:
    """Return ``text`` for a cell of a table."""
    return text.replace("|", "\\|")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return a table in Markdown."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)]


def card(name: str) -> str:
    """Return the card of a method as Markdown."""
    cls, said = registry.method_class(name), words()["method"][name]
    spec, measured = cls.spec, all_of(name)
    head = measured[: max(1, len([s for s in said["ours"] if chosen(s, name)]))] if measured else []
    lines = [f"# {name}", "", f"{spec.title}: it {escaped(spec.acts)}. Source: {escaped(spec.paper)}.", ""]
    lines += ["## The paper's figure and ours", ""]
    rows = [
        ["other" if row["source"] == "peer" else "paper", row["figure"], row["of"], SOURCES[row["source"]]]
        for row in said["paper"]
    ]
    rows += [["ours", claim.text, claim.what, f"`{claim.command}`"] for claim in head]
    rows += [["ours", NOT_MEASURED, "", f"`make bench BENCH={said['ours'][0]['result']}`"]] * (not head)
    lines += [*table(["whose", "figure", "of what", "from"], rows), ""]
    lines += [f"Ours on {where}." for where in dict.fromkeys(claim.machine for claim in measured)]
    lines += ["", "## Verdict", "", f"It bought here: {escaped(said['bought'])}.", ""]
    lines += [
        f"**Use it when** {escaped(said['use_when'])}",
        "",
        f"**Not when** {escaped(said['not_when'])}",
        "",
    ]
    lines += ["## In the step", ""]
    facts = [
        ["saves", spec.saves],
        ["writes", ", ".join(sorted(spec.writes))],
        ["reads", ", ".join(sorted(spec.reads)) or "-"],
        ["works with", ", ".join(sorted(spec.promises)) or "-"],
        ["slower when", spec.slower_when or "-"],
    ]
    lines += [*table(["", ""], facts), "", "## Settings", "", *docstring(cls), ""]
    if rest := measured[len(head) :]:
        others = [
            [c.what, c.text, ", ".join(o for o in c.methods if o != name) or "-", f"`{c.result}`"]
            for c in rest
        ]
        lines += ["## All other figures", "", *table(["what", "measured", "with", "benchmark"], others)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


# -- parts of pages


def markers(what: str) -> tuple[str, str]:
    """Return the lines around a part of a page that is written here."""
    return f"<!-- {what}: written by scripts/make_cards.py -->", f"<!-- end of {what} -->"


def text_of(entry: str | dict[str, Any]) -> str:
    """Return a cell of cards.toml: words as they stand, or the claim that a selector names, in short."""
    if isinstance(entry, str):
        return entry
    claim = chosen(entry)
    if claim is None:
        return NOT_MEASURED
    short = re.split(r"; (?![^(]*\))", claim.text)[0]  # not within brackets
    figure = re.sub(r": faster$", "", short).replace("]: ", "], ")
    return f"{entry.get('label', claim.what)}: {figure}"


def at_equal_accuracy() -> list[Claim]:
    """Return the claims of comparisons that show an accuracy reached sooner, the surest (largest lower bound) first."""
    shown = [
        (float(low[1]), claim)
        for claim in claims()
        if claim.methods and (low := re.match(r"\d+\.\d+x \[(\d+\.\d+), \d+\.\d+\] sooner than", claim.text))
    ]
    return [claim for _, claim in sorted(shown, key=lambda pair: -pair[0])]


def gains() -> list[str]:
    """Return the README's table, at most six rows: what is saved, at which price."""
    rows, found = [], at_equal_accuracy()[:2]
    for claim in found:
        linked = ", ".join(f"[{name}](docs/methods/{name}.md)" for name in claim.methods)
        saves = f"{claim.what}: {claim.text.partition('; ')[0]}"
        rows.append([linked, saves, "nothing in accuracy", f"`{claim.result}`"])
    for row in words()["gain"]:
        if (buys := chosen(row["buys"])) is not None and buys.is_gain and len(rows) < 6:
            rows.append([row["title"], text_of(row["buys"]), text_of(row["price"]), f"`{buys.result}`"])
            found.append(buys)
    where = dict.fromkeys(claim.machine for claim in found)
    return [*table(["what", "saves", "at the price of", "benchmark"], rows), "", *(f"On {w}." for w in where)]


def methods() -> list[str]:
    """Return the table of all methods, those of one folder together."""
    found = [registry.method_class(name) for name in registry.available()]
    rows = sorted((cls.__module__.split(".")[-2], cls.spec.name, cls.spec) for cls in found)
    cells = [
        [f"[{name}](methods/{name}.md)", spec.acts, spec.saves, f"`{room}`"] for room, name, spec in rows
    ]
    return table(["name", "how", "saves", "in `src/hasten/methods`"], cells)


def which() -> list[str]:
    """Return the table of "Which method for me?"."""
    rows = []
    for row in words()["which"]:
        name = row["try"].partition(":")[0]
        rows.append(
            [row["have"], f"[`{row['try']}`](methods/{name}.md)", text_of(row["saved"]), text_of(row["cost"])]
        )
    return table(["you have", "try", "it saved here", "it costs"], rows)


def verdicts() -> list[str]:
    """Return every method's verdict."""
    said = words()["method"]
    rows = [
        [f"[{n}](methods/{n}.md)", said[n]["bought"], said[n]["use_when"], said[n]["not_when"]]
        for n in registry.available()
    ]
    return table(["method", "it bought here", "use it when", "not when"], rows)


def hardware() -> list[str]:
    """Return what was measured on which machine."""
    where: dict[str, list[str]] = {}
    for claim in claims():
        where.setdefault(claim.machine, []).append(claim.result)
    rows = [
        [machine, ", ".join(f"`{r}`" for r in dict.fromkeys(results))] for machine, results in where.items()
    ]
    return table(["machine", "benchmarks"], rows)


def gpu() -> list[str]:
    """Return what was measured on a GPU."""
    rows = [
        [", ".join(c.methods) or "hasten", c.what, c.text, c.machine]
        for c in claims()
        if "beside" in c.machine
    ]
    if not rows:
        return ["Nothing has been measured on a GPU yet."]
    return table(["method", "what", "measured", "machine"], rows)


def everything() -> list[str]:
    """Return every claim."""
    rows = [[", ".join(c.methods) or "hasten", c.what, c.text, f"`{c.result}`"] for c in claims()]
    return table(["method", "what", "measured", "benchmark"], rows)


PARTS: dict[str, Callable[[], list[str]]] = {
    "gains": gains,
    "methods": methods,
    "which": which,
    "verdicts": verdicts,
    "hardware": hardware,
    "gpu": gpu,
    "everything": everything,
}


def filled(page: str) -> str:
    """Return a page with its parts written anew."""
    for name, part in PARTS.items():
        begin, end = markers(name)
        if begin in page:
            page = "\n".join([page[: page.index(begin)] + begin, *part(), page[page.index(end) :]])
    return page


def measured_json() -> str:
    """Return the package's data on what each method was measured to do."""
    rows = {}
    for name in registry.available():
        said, found = words()["method"][name], all_of(name)
        rows[name] = {
            "gain": f"{found[0].text} ({found[0].what})" if found else NOT_MEASURED,
            "paper": f"{said['paper'][0]['figure']} ({said['paper'][0]['of']})",
            "use_when": said["use_when"],
            "not_when": said["not_when"],
            "machine": found[0].machine if found else "",
            "command": found[0].command if found else f"make bench BENCH={said['ours'][0]['result']}",
        }
    return json.dumps({"methods": rows}, indent=1, ensure_ascii=False) + "\n"


def documents() -> dict[Path, str]:
    """Return every file that is written here, with what it should hold."""
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    wanted = {path: filled(path.read_text(encoding="utf-8")) for path in pages}
    wanted |= {DOCS / f"methods/{name}.md": card(name) for name in registry.available()}
    return wanted | {ROOT / "src/hasten/measured.json": measured_json()}


def main() -> int:
    """Write the documents, or check them; return the exit code."""
    stale = [
        path
        for path, text in documents().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        if stale:
            print(
                f"out of date: {', '.join(str(p.relative_to(ROOT)) for p in stale)}; run python scripts/make_cards.py"
            )
        return bool(stale)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(documents()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
