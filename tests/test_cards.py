"""The methods' cards say what the methods and the stored results say today."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten import available

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("make_cards", ROOT / "scripts/make_cards.py")
assert _spec is not None
assert _spec.loader is not None
make_cards = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_cards)


@pytest.mark.parametrize("name", available())
def test_card_is_up_to_date(name: str) -> None:
    written = (ROOT / f"docs/methods/{name}.md").read_text(encoding="utf-8")
    assert written == make_cards.card(name), "stale: run python scripts/make_cards.py"


@pytest.mark.parametrize("part", [make_cards.methods, make_cards.table])
def test_readme_tables_are_up_to_date(part: Callable[[], str]) -> None:
    assert part() in (ROOT / "README.md").read_text(encoding="utf-8"), "stale: run scripts/make_cards.py"


def test_the_page_of_all_figures_is_up_to_date() -> None:
    assert make_cards.everything() == (ROOT / "docs/measured.md").read_text(encoding="utf-8"), (
        "stale: run scripts/make_cards.py"
    )
