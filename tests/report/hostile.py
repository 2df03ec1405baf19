"""Forty strings that attack a page, a script block, a style, a template, a terminal or a spreadsheet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from hasten.report.schema import ReportData

from .fixture import report

DO = "document.title='PWNED'"

PAYLOADS = [
    f"<script>{DO}</script>",
    f"</script><script>{DO}</script>",
    f"</title><script>{DO}</script>",
    f"</style><script>{DO}</script>",
    f"</pre><script>{DO}</script>",
    f"</svg><script>{DO}</script>",
    f"</text></svg><svg onload={DO}>",
    f"]]><script>{DO}</script>",
    f"--><script>{DO}</script>",
    f"<!--<script>{DO}</script>",
    f'"><script>{DO}</script>',
    f"'><script>{DO}</script>",
    f'"><img src=x onerror="{DO}">',
    f"<img src=x onerror={DO}>",
    "<img src=http://127.0.0.1:PORT/a>",
    "<link rel=stylesheet href=http://127.0.0.1:PORT/b>",
    "<style>@import 'http://127.0.0.1:PORT/c';</style>",
    "<style>body{background:url(http://127.0.0.1:PORT/d)}</style>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:PORT/e'>",
    "<base href=http://127.0.0.1:PORT/>",
    "<iframe src=http://127.0.0.1:PORT/f></iframe>",
    f'<iframe srcdoc="<script>parent.{DO}</script>"></iframe>',
    "<object data=http://127.0.0.1:PORT/g></object>",
    "<form action=http://127.0.0.1:PORT/h><button autofocus>x</button></form>",
    f"<svg><animate onbegin={DO} attributeName=x dur=1s>",
    f'<svg><a href="javascript:{DO}"><text y=20>x</text></a></svg>',
    f"<details open ontoggle={DO}>x</details>",
    f"<body onload={DO}>",
    f"<input autofocus onfocus={DO}>",
    f'" onmouseover="{DO}" x="',
    f"' onfocus='{DO}' autofocus tabindex=1 x='",
    f"` onload=`{DO}`",
    "{{ 7 * 191 }}{% for x in y %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    f"\u2028{DO}//\u2029x",
    f'\\u003cscript>{DO}\\u003c/script>"}}];{DO}//',
    f"&lt;script&gt;{DO}&lt;/script&gt;&#60;script&#62;",
    "\x1b]0;PWNED\x07\x1b[2J\x1b[31mred\x00\x08\x7f\x9b31m",
    '=HYPERLINK("http://127.0.0.1:PORT/i","x")',
    "\u202egpj.exe\u202c\u200b\ufeffhidden \ud83d\ude00",
]

# Strings whose values the schema fixes, or that other fields refer to.
_FIXED = {"created", "kind", "verdict", "name", "claim", "against", "state"}


def _spread(value: Any, text: Callable[[], str]) -> Any:
    if isinstance(value, str):
        return text()
    if isinstance(value, list):
        return [_spread(item, text) for item in value]
    if isinstance(value, dict):
        return {
            key: item if isinstance(item, str) and key in _FIXED else _spread(item, text)
            for key, item in value.items()
        }
    return value


def hostile(text: Callable[[], str], **shape: Any) -> ReportData:
    """Return the invented report with every free string replaced by what ``text`` gives next.

    Names of the free dictionaries (environment, settings, witnesses, spans) are replaced too, and a failure,
    a prediction and extra settings are added, so that every branch of the page is shown.
    """
    data = cast(dict[str, Any], copy.deepcopy(report(**shape)))
    data["failures"] = [{"arm": "sb", "seed": 1, "text": "x"}, {"arm": "sb", "seed": None, "text": "x"}]
    data["predicted"] = [{"arm": "zz", "quantity": "x", "unit": "s", "predicted": 1.0, "measured": 2.0}]
    data["settings"]["extra"] = {"x": "y"}
    data = _spread(data, text)
    data["environment"] = {text(): value for value in data["environment"].values()} | {"x": text()}
    data["settings"]["extra"] = {text(): text()}
    for i, arm in enumerate(data["arms"]):
        old, arm["name"] = arm["name"], f"{i} {text()}"
        for key in ("claim", "against"):
            if data["verdict"][key] == old:
                data["verdict"][key] = arm["name"]
        arm["settings"] = {text(): text()}
        arm["witness"] = {text(): 3.0}
        arm["points"][-1]["runs"][0]["spans"][text()] = 0.1
        arm["points"][0]["runs"][0]["disturbed"] = [text()]
        arm["time"]["note"] = text()
        for key in ("vs_plain", "vs_strong"):
            if arm[key] is not None:
                arm[key]["note"] = text()
    return cast(ReportData, data)
