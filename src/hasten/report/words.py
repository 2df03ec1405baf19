"""How the report writes numbers, and how it defuses text that came from somewhere else."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping

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


def times(value: float | None, digits: int = 2) -> str:
    """Return a ratio as 1.34x."""
    return DASH if value is None else f"{value:.{digits}f}x"


def ratio_digits(low: float | None, high: float | None) -> int:
    """Return the digits at which no end of an interval of ratios is rounded onto 1, from which it differs."""
    digits = 2
    ends = [end for end in (low, high) if end is not None and end != 1.0]
    while digits < 6 and any(round(end, digits) == 1.0 for end in ends):
        digits += 1
    return digits


def interval(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Return "[1.30, 1.38]", "at least 1.30" or "at most 1.38" where one end has no bound, empty without both."""
    if low is not None and high is not None:
        return f"[{write(low)}, {write(high)}]"
    if low is not None:
        return f"at least {write(low)}"
    return "" if high is None else f"at most {write(high)}"


def bracket(low: float | None, high: float | None) -> str:
    """Return an interval of ratios, written by :func:`interval`; "[1.001, 1.20]" never becomes "[1.00, 1.20]"."""
    digits = ratio_digits(low, high)
    return interval(low, high, lambda end: f"{end:.{digits}f}")


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as 90.6%."""
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def goal(value: float) -> str:
    """Return a target as 90%, 90.5% or 90.58%: as it was set, to a hundredth of a point."""
    return f"{round(100 * value, 2):g}%"


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
    """Return a setting or environment value for reading; text that spells a list or dict is put in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(key)} {scalar(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple | set):
        return ", ".join(scalar(item) for item in value) or "none"
    return plain(str(value))


def plain(text: str) -> str:
    """Return ``text`` on one line; where the whole of it is a Python list, tuple, set or dict, its words."""
    if text.lstrip()[:1] in ("{", "[", "(") and len(text) < 2000:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return visible(text)
        if isinstance(value, dict | list | tuple | set):
            return scalar(value)
    return visible(text)


def called(text: str) -> str:
    """Return a method with its settings in words: "selective_backprop(beta=2.0)" is "selective_backprop, beta 2.0"."""
    found = re.fullmatch(r"\s*([\w.]+)\((.*)\)\s*", text, re.DOTALL)
    if found is None:
        return plain(text)
    inner = visible(re.sub(r"\b([A-Za-z_]\w*)=", r"\1 ", found[2]))
    return f"{visible(found[1])}, {inner}" if inner else visible(found[1])


def pairs(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return a mapping as rows of text; bytes in MB or GB, underscores as spaces."""
    return [_pair(visible(key), value) for key, value in values.items()]


def _pair(key: str, value: object) -> tuple[str, str]:
    if key.endswith("_bytes") and isinstance(value, int) and not isinstance(value, bool):
        return key.removesuffix("_bytes").replace("_", " "), f"{count(value)}B"
    return key.replace("_", " "), scalar(value)


def shortened(text: str, limit: int) -> str:
    """Return ``text`` cut to ``limit`` characters, the cut shown by an ellipsis."""
    return text if len(text) <= limit else text[: max(limit - 1, 0)].rstrip() + "…"


def listed(names: list[str], limit: int = 24) -> str:
    """Return names separated by commas; beyond ``limit`` only how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(visible(name) for name in names[:limit]) + more
