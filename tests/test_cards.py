"""What the documents say of measurements is what the stored results say, and nothing else."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from hasten import available

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
make_cards = importlib.import_module("make_cards")
sys.path.pop(0)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "docs/methods").glob("*.md"))
WRITTEN = re.compile(
    r"<!-- (\w+): written by scripts/make_cards\.py -->.*?<!-- end of \1 -->|```.*?```|`[^`]*`", re.DOTALL
)
FIGURE = re.compile(
    r"(?<![\w.])\d+(?:\.\d+)?(?:x(?!\d)|×| ?%| points\b| ?(?:ms|s|seconds|minutes|hours|MB|MiB|GB|GiB|kB)\b)"
)
EXPLAINED = {"99%", "95%", "1.25x", "80 s", "100 s"}
"""Figures of an explanation, not of a measurement: the kind of interval, and the example of a ratio."""


def claim_texts() -> set[str]:
    """Return the text of every stored claim, read without the script."""
    contents = [
        json.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "benchmarks/results").glob("*.json")
    ]
    return {row["text"] for content in contents for row in content["claims"]}


def test_every_document_is_up_to_date() -> None:
    stale = [
        path.name for path, text in make_cards.documents().items() if path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run python scripts/make_cards.py"


def test_there_is_a_card_for_each_method_and_no_other() -> None:
    assert [path.stem for path in CARDS] == sorted(available())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_figure_is_typed_by_hand(path: Path) -> None:
    by_hand = {hit.group() for hit in FIGURE.finditer(WRITTEN.sub("", path.read_text(encoding="utf-8")))}
    assert by_hand <= EXPLAINED, (
        "a figure of ours belongs into a result, and its page gets it from make_cards"
    )


@pytest.mark.parametrize("name", available())
def test_a_verdict_has_no_figure_of_ours(name: str) -> None:
    said = make_cards.words()["method"][name]
    assert not FIGURE.findall(said["bought"] + said["use_when"] + said["not_when"])
    assert said["paper"], "a card compares with the paper's figure"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_figures_called_ours_are_stored(path: Path) -> None:
    rows = [
        row.split(" | ") for row in path.read_text(encoding="utf-8").splitlines() if row.startswith("| ours")
    ]
    assert rows
    known = {
        importlib.import_module("claims").reworded(text).replace("|", "\\|") for text in claim_texts()
    } | {"not measured here"}
    assert {row[1] for row in rows} <= known


@pytest.mark.parametrize("path", [*PAGES[:1], *CARDS, ROOT / "docs/measured.md"], ids=lambda path: path.stem)
def test_internal_targets_are_not_told(path: Path) -> None:
    assert not re.findall(r"(?:[:(]|\d,?) ?(?:met|missed)\b", path.read_text(encoding="utf-8"))


def test_every_selector_names_a_benchmark_and_a_claim_where_it_was_measured() -> None:
    words, problems = make_cards.words(), []
    selectors = [(s, name) for name, said in words["method"].items() for s in said["ours"]]
    selectors += [
        (s, None) for row in words["gain"] for s in (row["buys"], row["price"]) if isinstance(s, dict)
    ]
    selectors += [
        (s, None) for row in words["which"] for s in (row["saved"], row["cost"]) if isinstance(s, dict)
    ]
    for selector, name in selectors:
        if not (ROOT / f"benchmarks/{selector['result']}.py").exists():
            problems.append(f"no benchmark {selector['result']}")
        stored = (ROOT / f"benchmarks/results/{selector['result']}.json").exists()
        if stored and make_cards.chosen(selector, name) is None:
            problems.append(f"{selector['result']} has no claim that begins with {selector['what']!r}")
    assert not problems


def test_the_readme_shows_few_gains_each_with_its_interval_or_as_memory() -> None:
    rows = [row for row in make_cards.gains() if row.startswith("|")]
    assert 3 <= len(rows) <= 2 + 6
    assert {row.count(" | ") for row in rows if "---" not in row} == {3}
    assert all(re.search(r"\d\.\d\dx \[\d\.\d\d, \d\.\d\d\]|less", row.split(" | ")[1]) for row in rows[2:])


def test_what_is_sooner_at_equal_accuracy_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def claim(text: str) -> object:
        return make_cards.Claim("result", "time to 70.00%, resnet20", text, ("actnn",), "here")

    texts = [
        "1.2x [1.10, 1.30] sooner than strong",
        "1.5x [1.40, 1.60] sooner than strong; 3x",
        "not shown: 2x [0.90, 3.00]",
    ]
    monkeypatch.setattr(make_cards, "claims", lambda: [claim(text) for text in texts])
    monkeypatch.setattr(make_cards, "chosen", lambda *_: None)
    first, second = [row for row in make_cards.gains() if "resnet20" in row]
    assert "1.5x [1.40, 1.60] sooner than strong |" in first
    assert "1.2x [1.10, 1.30]" in second


@pytest.mark.parametrize(
    ("text", "gain"),
    [
        ("2.55x [2.47, 2.63]: faster", True),
        ("10.7x less (38.3 MB of 408.4 MB)", True),
        ("66 MiB less at the peak of 748", True),
        ("0.86x [0.83, 0.88]: slower", False),
        ("1.03x [0.98, 1.08]: not shown; 0.83x over plain", False),
        ("1.59x: target accuracy not reached; 4.93x over plain", False),
        ("1.25x [1.10, 1.40] sooner than strong; 2.30x [2.11, 2.50] sooner than plain", True),
        ("does not reach it; 2.30x [2.11, 2.50] sooner than plain", False),
        ("not shown: 1.03x [0.98, 1.08] over strong", False),
        ("later: at most 0.90x over strong", False),
        ("one seed, no interval: 1.96x over strong", False),
        ("too wide to say: 1.5x [0.2, 9.0] over strong", False),
        ("1.52x [1.49, 1.56]: faster, not claimed: the A/A test failed", False),
    ],
)
def test_only_what_was_shown_is_a_gain(text: str, gain: bool) -> None:
    assert make_cards.Claim("result", "what", text, (), "here").is_gain is gain


def test_the_package_holds_the_verdicts() -> None:
    held = json.loads((ROOT / "src/hasten/measured.json").read_text(encoding="utf-8"))["methods"]
    assert sorted(held) == sorted(available())
    keys = {"gain", "paper", "use_when", "not_when", "machine", "command"}
    assert all(set(row) == keys and all(isinstance(v, str) for v in row.values()) for row in held.values())


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]
