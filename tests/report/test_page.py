"""The page: nothing in the data becomes markup, script, style or a request, and it shows what came in."""

from __future__ import annotations

import ast
import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import cycle
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import hasten.report
from hasten.report import render
from hasten.report.render import environment
from hasten.report.view import view

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
    return Shape(render(hostile(lambda: "harmless words", seeds=2, shares=(0.5, 1.0))))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_changes_the_structure(payload: str, harmless: Shape) -> None:
    """A payload in every string gives the elements and attributes of harmless words: it stays text."""
    page = Shape(render(hostile(lambda: payload, seeds=2, shares=(0.5, 1.0))))
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
    page = Shape(render(hostile(lambda: next(turn), seeds=2, shares=(0.5, 1.0))))
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


def test_small_with_twelve_arms_and_long_texts() -> None:
    """12 arms, 5 budgets, 10 seeds stay below 400 kB, and so do long texts."""
    shares = (0.2, 0.4, 0.6, 0.8, 1.0)
    assert len(render(report(10, shares, 6)).encode()) < 400_000
    wordy = report(5, shares, 6)
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


def test_the_page_says_what_the_data_says() -> None:
    data = report()
    shown = " ".join(Shape(render(data)).text)
    assert data["verdict"]["sentence"] in shown
    for arm in data["arms"]:
        assert arm["label"] in shown
        assert f"{100 * (arm['accuracy']['mean'] or 0):.2f}%" in shown
        for ratio in (arm["vs_plain"], arm["vs_strong"]):
            if ratio is not None and ratio["ratio"] is not None:
                assert f"[{ratio['lo']:.2f}, {ratio['hi']:.2f}]" in shown
    assert data["repeat"]["command"] in shown
    assert str(data["network"]) in shown
    for note in data["notes"]:
        assert note in shown


def test_the_answer_comes_first_then_the_picture_then_the_table() -> None:
    page = render(report()).partition("<main>")[2]
    places = [page.index(text) for text in ("<h1>", "data-picture", "<table", "Where the time went", "really did",
                                            "Predicted and measured", "hold against", "Use it, repeat it")]  # fmt: skip
    assert places == sorted(places)
    assert page.index("<h1>") < 300


def test_no_list_or_dict_is_shown_as_python_writes_it() -> None:
    data = report()
    data["environment"] |= {"a": "{'x': [1, 2], 'y': {'z': None}}", "b": "['p', 'q']", "c": "('m', 1.5)"}
    data["arms"][2]["settings"]["betas"] = "(0.9, 0.999)"
    data["arms"][2]["effects"][0]["saves"] = "{'forward': 0.5}"
    data["notes"].append("[1, 2]")
    shown = " ".join(Shape(render(data)).text)
    assert not re.search(r"\{[^}]*:|\['|\('|\bTrue\b|\bFalse\b|\bNone\b", shown)
    for words in ("x 1, 2, y z none", "p, q", "m, 1.5", "betas 0.9, 0.999", "forward 0.5"):
        assert words in shown


def test_every_term_of_the_answer_is_explained_where_it_stands() -> None:
    data = report(seeds=3)
    data["arms"][2]["vs_strong"] = {**(data["arms"][2]["vs_strong"] or {}), "lo": 0.2, "verdict": "too wide"}  # type: ignore[typeddict-item]
    data["arms"][3]["time"] = {
        "seconds": None,
        "lo": None,
        "hi": None,
        "state": "below the smallest budget",
        "note": "",
    }
    page = render(data)
    for term in ("target 90%", "sooner", "interval", "too wide to say", "not reached", "already at the smallest budget",
                 "full budget", "no loss", "block", "A/A test"):  # fmt: skip
        assert f"<summary>{term}</summary>" in page, term
    assert "0.3 points" in page
    assert "<summary>one seed</summary>" not in page


def test_the_plan_says_what_was_predicted_and_what_was_reused() -> None:
    data = report()
    assert data["plan"] is not None
    assert "−6%" in render(data)
    data["plan"] |= {"runs": 16, "reused": 12}
    page = render(data)
    assert "12 of 16 taken from an earlier call" in page
    assert "says nothing" in page
    data["plan"] = None
    assert "Predicted and measured" not in render(data)


def test_predictions_are_shown_with_their_error() -> None:
    data = report()
    data["predicted"] = [
        {"arm": "select", "quantity": "time", "unit": "s", "predicted": 40.0, "measured": 50.0}
    ]
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
