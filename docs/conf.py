"""Sphinx's settings: ``make docs`` builds the pages with every warning an error."""

from __future__ import annotations

import inspect
import re
from typing import Any

import hasten

project = "hasten"
author = "the hasten authors"
version = release = hasten.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"hasten {release}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
# types in signatures: other projects' (no inventory is fetched) and those that are not part of the reference
nitpick_ignore_regex = [("py:.*", r"(?!hasten\b).*"), ("py:class", r"hasten\..*")]


def list_parameters(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn a paragraph that begins with ``name: `` of a parameter into a list, an item for each parameter in it."""
    try:
        names = "|".join(map(re.escape, inspect.signature(thing).parameters))
    except (TypeError, ValueError):
        return
    if not names:
        return
    entry = re.compile(rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*)( \([^)]*\))?: ")
    shown = []
    for paragraph in "\n".join(lines).split("\n\n"):
        if entry.match(paragraph):
            text = " ".join(line.strip() for line in paragraph.splitlines())
            shown.append("\n".join(entry.sub(r"\n* ``\1``\2: ", text).strip().splitlines()))
        else:
            shown.append(paragraph)
    lines[:] = "\n\n".join(shown).splitlines()


def shorten(app: Any, what: str, name: str, thing: Any, options: Any, signature: Any, returned: Any) -> Any:
    """Write a default that a dataclass makes anew as ``...``, which Sphinx can read."""
    return (signature.replace("<factory>", "...") if signature else signature), returned


def setup(app: Any) -> None:
    """Connect what is above."""
    app.connect("autodoc-process-docstring", list_parameters)
    app.connect("autodoc-process-signature", shorten)
