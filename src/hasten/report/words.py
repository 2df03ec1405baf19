"""How the report writes numbers, and how it defuses text that came from somewhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

DASH = "–"


def _whole(text: str) -> str:
    """Return ``text`` with surrogates paired up, and those left alone (odd file names have them) replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def visible(text: object) -> str:
    """Return ``text`` on one line without control, zero-width or direction-changing characters."""
    given = str(text)
    if given.isprintable():
        return given
    kept = (char if char.isprintable() else " " if char.isspace() else "" for char in _whole(given))
    return re.sub(" {2,}", " ", "".join(kept)).strip()


def block(text: str) -> str:
    """Return ``text`` of several lines with each line made visible; indentation stays."""
    indents = ((line, len(line) - len(line.lstrip(" \t"))) for line in text.splitlines())
    return "\n".join(line[:n].expandtabs(4) + visible(line[n:]) for line, n in indents)


def seconds(value: float | None) -> str:
    """Return a duration with three digits and its unit: 0.42 s, 8.24 s, 51.3 s, 607 s, 23 min 10 s."""
    if value is None:
        return DASH
    if value >= 999.5:
        whole = round(value)
        hours, rest = divmod(whole, 3600)
        if hours:
            return f"{hours} h {rest // 60:02d} min"
        return f"{rest // 60} min {rest % 60:02d} s"
    return f"{value:.{_digits(value)}f} s"


def bare_seconds(value: float) -> str:
    """Return a duration in seconds without its unit, for use in a column or an interval."""
    return f"{value:.{_digits(value)}f}"


def _digits(value: float) -> int:
    return 2 if value < 9.995 else 1 if value < 99.95 else 0


def times(value: float | None) -> str:
    """Return a ratio as 1.34×."""
    return DASH if value is None else f"{value:.2f}×"


def bracket(low: float | None, high: float | None) -> str:
    """Return an interval of ratios as [1.30, 1.38], empty where there is none."""
    return "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as 90.6%."""
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def points(value: float, digits: int = 2) -> str:
    """Return a difference of fractions in percentage points, signed, with a true minus."""
    return f"{100 * value:+.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """Return a count with separators below a million and a prefix from there: 77,850; 12.3 M; 3.7 T."""
    if value is None:
        return DASH
    if abs(value) < 1e6:
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"
    power = min(int(math.log10(abs(value)) // 3), 5)
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}"


def scalar(value: object) -> str:
    """Return a setting or environment value for reading."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:.6g}"
    return visible(value)


def pairs(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return a mapping as rows of text."""
    return [(visible(key), scalar(value)) for key, value in values.items()]


def shortened(text: str, limit: int) -> str:
    """Return ``text`` cut to ``limit`` characters, the cut shown by an ellipsis."""
    return text if len(text) <= limit else text[: max(limit - 1, 0)].rstrip() + "…"


def listed(names: list[str], limit: int = 24) -> str:
    """Return names separated by commas; beyond ``limit`` only how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(visible(name) for name in names[:limit]) + more
