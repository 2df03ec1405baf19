"""Taking home folders, user and host names, keys and tokens out of report data before it is written."""

from __future__ import annotations

import re
from typing import Any, cast

from hasten.report.schema import ReportData

MASK = "[masked]"

_SECRETS = re.compile(
    r"""\b(?:gh[pousr]_|github_pat_|glpat-|hf_|pypi-|sk-|xox[abprs]-|npm_)[A-Za-z0-9_\-]{8,}
      | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
      | \beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*
      | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----[\s\S]*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)""",
    re.VERBOSE,
)
_NAMED = re.compile(
    r"(?i)\b([\w.\-]*(?:token|secret|passw(?:or)?d|api[_\-]?key|access[_\-]?key|credential)s?)"
    r"(\s*[=:]\s*|\s+(?=['\"]))(\"[^\"]*\"|'[^']*'|[^\s,;\"']+)"
)
_IN_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)[^\s/@:]+:[^\s/@]+@")
_HOMES = re.compile(
    r"""(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)[^\\/\s'":;,<>|&]+|(?<![\w.\-~/])/root(?![\w.\-])"""
)
_WHO = re.compile(r"(?i)^(?:.*[_. \-])?(?:host(?:name)?|node(?:name)?|user(?:name)?|login|home|cwd|ip|mac)$")
_KEYS = re.compile(r"(?i)(?:token|secret|passw|api[_\-. ]?key|access[_\-. ]?key|credential)")


def masked_text(text: str) -> str:
    """Return ``text`` with keys and tokens replaced by ``[masked]`` and home folders by ``~``."""
    text = _SECRETS.sub(MASK, text)
    text = _NAMED.sub(lambda found: f"{found[1]}{found[2]}{MASK}", text)
    text = _IN_URL.sub(lambda found: f"{found[1]}{MASK}@", text)
    return _HOMES.sub("~", text)


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return masked_text(value)
    if isinstance(value, list):
        return [_masked(item) for item in value]
    if isinstance(value, dict):
        return {masked_text(key): _masked(item) for key, item in value.items()}
    return value


def masked(data: ReportData) -> ReportData:
    """Return a copy of ``data`` that can be mailed: no home folder, key, token, user or host name.

    Environment entries and settings whose *name* speaks of a user, a host or a key lose their value.
    """
    copy = cast(ReportData, _masked(data))
    tables: list[dict[str, Any]] = [copy["environment"], copy["settings"].get("extra", {})]
    tables.extend(cast(dict[str, Any], arm["settings"]) for arm in copy["arms"])
    for table in tables:
        for key in table:
            if _WHO.search(key) or _KEYS.search(key):
                table[key] = MASK
    return copy
