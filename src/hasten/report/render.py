"""Making the report: one HTML file that needs no network and runs nothing from its data, and its JSON."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from hasten.report.bars import bars
from hasten.report.curves import curves
from hasten.report.privacy import masked
from hasten.report.schema import ReportData, check, to_json
from hasten.report.view import view


def _own(name: str) -> str:
    """Return one of the files that are part of this package."""
    return files("hasten.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the CSP source of an inline style or script."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def environment() -> Environment:
    """Return the Jinja environment: everything escaped, a name that is not given is an error."""
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(data: ReportData) -> str:
    """Return the page for ``data``.

    All text of ``data`` is escaped; the page allows only its own style and script, by their hashes, and no
    request. Raises ``DataError`` where ``data`` is not report data.
    """
    check(data)
    css, js = _own("page.css"), _own("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(js)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    drawings = {
        f"{name}_{shape}": draw(data, shape)
        for name, draw in (("curves", curves), ("bars", bars))
        for shape in ("wide", "narrow")
    }
    return (
        environment()
        .from_string(_own("page.html.jinja"))
        .render(
            **view(data),
            **drawings,
            policy=policy,
            css=Markup(css),
            js=Markup(js),
        )
    )


def write(folder: str | os.PathLike[str], data: ReportData, *, show_paths: bool = False) -> Path:
    """Write ``report.html`` and ``report.json`` into ``folder`` and return the path of the page.

    Both files are readable by their owner only and appear whole or not at all. Home folders, keys, tokens and
    the names of hosts and users are masked in both unless ``show_paths``. Raises ``DataError`` where ``data``
    is not report data, before anything is written.
    """
    shown = check(data) if show_paths else masked(check(data))
    page, numbers = render(shown), to_json(shown)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _replace(place / "report.json", numbers)
    _replace(place / "report.html", page)
    return place / "report.html"


def _replace(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` in one move, mode 0600, whatever was there before."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    handle = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
