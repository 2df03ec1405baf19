"""Sphinx's settings: ``make docs`` builds the pages with every warning an error."""

from __future__ import annotations

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
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
nitpick_ignore_regex = [("py:.*", r"(?!hasten\b).*")]  # other projects' names: no inventory is fetched
