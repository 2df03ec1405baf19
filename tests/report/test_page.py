"""The page: nothing in the data becomes markup, script, style or a request, and it shows what came in."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import cycle
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import hasten.report
from hasten.report import render
from hasten.report.render import environment, json_block
from hasten.report.view import plotted, view

from .fixture import report
from .hostile import PAYLOADS, hostile

HERE = Path(hasten.report.__file__).parent


class Shape(HTMLParser):
    """Collects elements with the names of their attributes, attributes, and the text of raw elements."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.text: list[str] = []
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in ("script", "style"):
            self._open = (tag, dict(attrs))
            self.raw.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[0]:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            tag, attrs, text = self.raw[-1]
            self.raw[-1] = (tag, attrs, text + data)
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def harmless() -> Shape:
    return Shape(render(hostile(lambda: "harmless words", seeds=2, evals=3)))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_changes_the_structure(payload: str, harmless: Shape) -> None:
    """A payload in every string gives the elements and attributes of harmless words: it stays text."""
    page = Shape(render(hostile(lambda: payload, seeds=2, evals=3)))
    assert page.elements == harmless.elements
    assert [raw[:2] for raw in page.raw] == [raw[:2] for raw in harmless.raw]
    assert [r[2] for r in page.raw if "type" not in r[1]] == [
        r[2] for r in harmless.raw if "type" not in r[1]
    ]


def test_forty_payloads() -> None:
    assert len(set(PAYLOADS)) == 40


def test_mixed_payloads_are_shown_as_text(harmless: Shape) -> None:
    """The strings are not lost either: each can be read on the page, but for characters nobody sees."""
    turn = cycle(PAYLOADS)
    page = Shape(render(hostile(lambda: next(turn), seeds=2, evals=3)))
    shown = re.sub(r"\s", "", "".join(page.text))
    for payload in PAYLOADS:
        whole = payload.encode("utf-16", "surrogatepass").decode("utf-16")
        visible = "".join(char for char in whole if char.isprintable() and not char.isspace())
        assert visible in shown, payload


def test_policy_holds_the_hashes_of_the_only_style_and_script() -> None:
    page = Shape(render(report()))
    policy = next(
        v for t, n, v in page.attributes if t == "meta" and n == "content" and v and "default-src" in v
    )
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        texts = [text for name, attrs, text in page.raw if name == tag and "type" not in attrs]
        assert len(texts) == 1
        digest = base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()
        assert re.search(rf"{tag}-src 'sha256-{re.escape(digest)}'(;|$)", policy)


def test_nothing_inline_and_nothing_fetched() -> None:
    page = Shape(render(report()))
    names = {name for _, name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} | (
        names & {"style", "src", "href", "srcset", "action"}
    )
    assert not {tag for tag, _ in page.elements} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
    }
    css = next(text for tag, _, text in page.raw if tag == "style")
    assert "url(" not in css
    assert "@import" not in css


def test_small_with_twelve_arms_and_long_runs() -> None:
    """12 arms, 5 seeds, 20 evaluations stay below 400 kB, and so do long runs and long texts."""
    assert len(render(report(5, 20, 2)).encode()) < 400_000
    assert len(render(report(5, 200, 2)).encode()) < 400_000
    wordy = report(5, 20, 2)
    for i, arm in enumerate(wordy["arms"]):
        layers = [f"stage{i}.block{j}.conv" for j in range(60)]
        arm["effects"] = [
            {
                "method": f"Method{k}(a={i})",
                "touched": [
                    {"layer": layer, "note": f"keeps {j} of 256 channels"} for j, layer in enumerate(layers)
                ],
                "skipped": [{"layer": layer, "reason": "too small"} for layer in layers],
                "saves": "backward work",
            }
            for k in range(3)
        ]
    wordy["failures"] = [
        {"arm": "sb", "seed": i, "text": "a line of a traceback\n" * 4000} for i in range(10)
    ]
    assert len(render(wordy).encode()) < 400_000


def test_json_block_cannot_end_its_element_and_is_the_same_data() -> None:
    value = {"</script>": "<!-- & \u2028\u2029 -->"}
    text = str(json_block(value))
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


def test_drawn_curves_are_the_given_ones() -> None:
    data = report()
    page = Shape(render(data))
    block = json.loads(next(text for _, attrs, text in page.raw if attrs.get("type") == "application/json"))
    assert block == json.loads(json.dumps(plotted(data)))
    for arm, shown in zip(data["arms"], block["arms"], strict=True):
        for run, seed in zip(arm["runs"], shown["seeds"], strict=True):
            for given, drawn in zip(run["curve"], seed["curve"], strict=True):
                assert drawn == pytest.approx(given, abs=0.05)
                assert drawn[2] == pytest.approx(given[2], abs=1e-5)


def test_the_page_says_what_the_data_says() -> None:
    data = report()
    shown = " ".join(Shape(render(data)).text)
    assert data["verdict"]["sentence"] in shown
    for arm in data["arms"]:
        assert arm["label"] in shown
        assert f"{100 * (arm['accuracy']['mean'] or 0):.2f}%" in shown
        for key in ("vs_plain", "vs_strong"):
            ratio = arm[key]  # type: ignore[literal-required]
            if ratio is not None:
                assert f"[{ratio['lo']:.2f}, {ratio['hi']:.2f}]" in shown
    assert data["repeat"]["command"] in shown
    for note in data["notes"]:
        assert note in shown


def test_prediction_only_where_there_is_one() -> None:
    data = report()
    assert "Predicted and measured" not in render(data)
    data["predicted"] = [{"arm": "sb", "quantity": "time", "unit": "s", "predicted": 40.0, "measured": 50.0}]
    assert "−20%" in render(data)


def test_a_name_the_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        environment().from_string("{{ nothing }}").render()
    given = view(report())
    given.pop("sentence")
    with pytest.raises(UndefinedError):
        environment().from_string((HERE / "page.html.jinja").read_text()).render(**given, policy="", css="")


def test_only_our_own_markup_is_trusted() -> None:
    """No ``safe`` in the template, and outside the builder and the page only literal Markup."""
    template = (HERE / "page.html.jinja").read_text()
    assert not re.search(r"\|\s*safe\b|autoescape|tojson", template)
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Markup":
                assert path.name in ("svg.py", "render.py") or isinstance(node.args[0], ast.Constant), path
