"""The report's data: what is refused and how it says so, what is written, what is taken out before."""

from __future__ import annotations

import copy
import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import DataError
from hasten.report import check, from_json, render, to_json, write
from hasten.report.privacy import MASK, masked, masked_text

from .fixture import report


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value inside a nest of dicts and lists, the outermost left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(*at, key), *_paths(item, (*at, key))]]


DATA = report(seeds=2, shares=(0.5, 1.0))
VERSUS = {"ratio": None, "reason": "x", "n": 2, "blocks": 2, "verdict": "not shown", "note": ""}
PLACES = _paths(DATA)
# Places whose names are free: taking one away leaves report data.
FREE = ("environment", "spans", "witness", "settings", "extra")


def _changed(place: tuple[Any, ...], value: Any) -> Any:
    data: Any = copy.deepcopy(DATA)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return data


def test_the_round_trip_is_exact() -> None:
    assert from_json(to_json(DATA)) == DATA


@given(st.sampled_from(PLACES))
def test_a_wrong_type_is_refused_by_its_place(place: tuple[Any, ...]) -> None:
    with pytest.raises(DataError) as error:
        check(_changed(place, {1, 2}))
    named = [key for key in place if isinstance(key, str)]
    assert named[-1] in str(error.value)


@given(
    st.sampled_from(
        [p for p in PLACES if isinstance(p[-1], str) and p[-1] != "margin" and not {*p[:-1]} & {*FREE}]
    )
)
def test_a_missing_field_is_refused_by_name(place: tuple[Any, ...]) -> None:
    data: Any = copy.deepcopy(DATA)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    with pytest.raises(DataError, match=f"{place[-1]}.*missing"):
        check(data)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 10**400, True])
def test_numbers_are_finite(number: float) -> None:
    with pytest.raises(DataError, match="finite"):
        check(_changed(("arms", 0, "points", 0, "runs", 0, "seconds", "train"), number))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("schema_version",), 1, "schema_version"),
        (("created",), "yesterday", "UTC"),
        (("created",), "2026-11-22T09:30:00+02:00", "UTC"),
        (("verdict", "claim"), "nobody", "nobody"),
        (("verdict", "against"), "nobody", "nobody"),
        (("verdict", "against"), None, "against"),
        (("verdict", "ci"), [1.2], "lo, hi"),
        (("verdict", "ci"), None, "above 1"),
        (("verdict", "ci"), [None, 1.9], "above 1"),
        (("verdict", "ci"), [0.97, 1.9], "above 1"),
        (("verdict", "ci"), [1.9, 1.2], "interval"),
        (("verdict", "ratio"), 1.6, "another ratio"),
        (("verdict", "against"), "plain", "another ratio"),
        (("verdict", "against"), "all", "itself"),
        (("arms", 5, "vs_strong"), None, "own row"),
        (("aa", "ok"), False, "A/A"),
        (("aa",), None, "A/A"),
        (("aa", "lo"), 1.001, "does not hold 1"),
        (("target", "accuracy"), 90.0, "fraction"),
        (("arms", 1, "name"), "plain", "differ"),
        (("arms", 2, "vs_strong", "lo"), 9.0, "interval"),
        (("arms", 2, "vs_strong", "lo"), 0.99, "'sooner'"),
        (("arms", 2, "vs_strong", "lo"), None, "'sooner'"),
        (("arms", 0, "vs_strong", "hi"), 1.0, "'later'"),
        (("arms", 5, "vs_strong", "verdict"), "not shown", "does not say"),
        (("arms", 2, "vs_strong"), {**VERSUS, "lo": 1.3, "hi": 1.1}, "swapped"),
        (("arms", 4, "vs_strong", "reason"), None, "reason"),
        (("arms", 2, "vs_strong", "verdict"), "best", "not shown"),
        (("arms", 4, "time", "state"), "reached", "if and only if"),
        (("arms", 2, "time", "seconds"), None, "if and only if"),
        (("arms", 2, "time", "lo"), 99.0, "interval"),
        (("arms", 2, "accuracy", "vs_strong", "hi"), -0.5, "interval"),
        (("arms", 2, "kind"), "magic", "baseline"),
        (("arms", 2, "points", 0, "share"), 2.0, "rise"),
        (("arms", 0, "points", 0, "runs", 0, "seconds", "train"), -1.0, "negative"),
        (("arms",), [], "at least one"),
        (("surprise",), 1, "unknown field"),
    ],
)
def test_a_wrong_value_is_refused_with_the_reason(place: tuple[Any, ...], value: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        check(_changed(place, value))


@pytest.mark.parametrize("text", ["", "[", "[]", "1", "{}", "[" * 100_000, '{"schema_version": NaN}'])
def test_a_file_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        from_json(text)


def test_written_files_hold_the_given_numbers_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    page = write(folder, DATA)
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(DATA))
    assert page.read_text() == render(DATA)
    assert [stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()] == [0o600, 0o600]


def test_a_link_in_the_way_is_replaced_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "report.html").symlink_to(precious)
    write(tmp_path, DATA)
    assert precious.read_text() == "mine"
    assert not (tmp_path / "report.html").is_symlink()


def test_refused_data_leave_the_old_report(tmp_path: Path) -> None:
    write(tmp_path, DATA)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(DataError):
        write(tmp_path, _changed(("arms",), []))
    assert (tmp_path / "report.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("text", "gone", "kept"),
    [
        ("open /home/ada/runs/x.pt", "ada", "open ~/runs/x.pt"),
        ("/Users/ada/x", "ada", "~/x"),
        (r"C:\Users\ada\x", "ada", "~"),
        ("/root/x", "/root", "~/x"),
        ("HF_TOKEN=abcdefgh123 train", "abcdefgh123", "HF_TOKEN="),
        ("--api-key: s3cr3tvalue", "s3cr3tvalue", "api-key"),
        ("password='two words' x", "two words", "x"),
        ("ghp_abcdefghijklmnop1234567890", "ghp_abc", MASK),
        ("AKIAABCDEFGHIJKLMNOP", "AKIAABC", MASK),
        ("https://ada:pw@host/x", "ada:pw", "https://"),
    ],
)
def test_home_folders_and_secrets_are_masked(text: str, gone: str, kept: str) -> None:
    assert gone not in masked_text(text)
    assert kept in masked_text(text)


@pytest.mark.parametrize(
    "text", ["stage1.block1.conv1", "tokens seen 1,200", "LayerFreezing(start=0.5)", "2.13.0+cpu"]
)
def test_plain_words_are_left_alone(text: str) -> None:
    assert masked_text(text) == text


def test_written_reports_do_not_say_who_or_where(tmp_path: Path) -> None:
    data = copy.deepcopy(DATA)
    data["environment"] |= {"hostname": "ada-laptop", "user": "ada", "api_key": "k"}
    data["repeat"]["command"] = "hasten compare --data /home/ada/photos"
    data["failures"] = [
        {"arm": "sb", "seed": 0, "text": 'File "/home/ada/x.py", line 3\nWANDB_API_KEY=0123456789abcdef'}
    ]
    write(tmp_path, data)
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert "ada" not in text.replace("data", "").replace("metadata", "").replace("--data", "")
        assert "0123456789abcdef" not in text
    write(tmp_path, data, show_paths=True)
    assert "/home/ada/photos" in (tmp_path / "report.html").read_text()
    assert data["environment"]["user"] == "ada", "the caller's data must stay as they are"
    assert masked(masked(data)) == masked(data)
