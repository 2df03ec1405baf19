"""What the tests of the documents share: the pages, their blocks, and what a reader of them has in the folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> Iterator[tuple[str, str, int]]:
    """Yield (comment above it or "", code, line of its first line in the page) of each fenced block of ``language``."""
    text = page.read_text(encoding="utf-8")
    for hit in _BLOCK.finditer(text):
        if hit[2] == language:
            yield hit[1] or "", hit[3], text.count("\n", 0, hit.start(3))


def name(page: Path) -> str:
    """Return a page's name for the tests' names."""
    return page.relative_to(ROOT).as_posix()


def photos(folder: Path) -> None:
    """Write the reader's pictures: two classes that differ in brightness, 12 to train on and 6 to test, 40x32."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for label, kind in enumerate(("cat", "dog")):
            (folder / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = (rng.random((32, 40, 3)) * 100 + 120 * label).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{i}.png")
