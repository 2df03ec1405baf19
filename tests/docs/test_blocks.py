"""Every Python block of the documents runs as it stands, those of a page one after the other.

A comment above a block says what else it is: ``<!-- file: NAME -->`` is the content of a file that the page names,
``<!-- not run: WHY -->`` is no program, and ``<!-- worked example -->`` has a test of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from .pages import PAGES, blocks, name, photos

WITH_PYTHON = [page for page in PAGES if next(blocks(page, "python"), None)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_blocks_run_as_they_stand(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    photos(tmp_path / "photos")
    torch.manual_seed(0)
    before, space = set(sys.modules), {"__name__": "page"}
    for comment, code, line in blocks(page, "python"):
        kind, _, rest = comment.partition(":")
        if kind == "file":
            (tmp_path / rest.strip()).write_text(code, encoding="utf-8")
        elif kind not in ("not run", "worked example"):
            program = compile(
                "\n" * line + code, str(page), "exec"
            )  # so that a traceback names the page's line
            exec(program, space)
    for made in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[made], "__file__", "")):
            del sys.modules[made]


def test_a_page_without_a_reason_runs() -> None:
    reasons = [comment for page in PAGES for comment, _, _ in blocks(page, "python") if comment]
    assert all(r == "worked example" or r.startswith(("file: ", "not run: ")) for r in reasons)
    assert sum(1 for page in PAGES for _ in blocks(page, "python")) >= 15
