"""Raw values on disk: what survives a kill at any byte."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import DataError, SettingsError
from hasten.measure.store import append_jsonl, read_jsonl, result_file

RECORDS = [{"step": 1, "loss": 2.5}, {"name": "é\n{", "values": [1, 2]}, {"step": 3, "nested": {"a": None}}]


def test_records_come_back_in_order_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for record in RECORDS:
        append_jsonl(path, record)
    assert read_jsonl(path) == RECORDS
    assert path.stat().st_mode & 0o077 == 0


def test_a_kill_at_any_byte_loses_at_most_the_last_record(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for record in RECORDS:
        append_jsonl(path, record)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end - 1 <= cut for end in ends)  # a record is whole once its closing brace is there
        assert read_jsonl(path) == RECORDS[:whole]
        append_jsonl(path, {"after": cut})
        assert read_jsonl(path) == [*RECORDS[:whole], {"after": cut}]
        assert path.read_bytes().endswith(b"\n")


def test_a_long_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"x": "' + b"y" * 200_000)
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"b": 2})
    assert read_jsonl(path) == [{"a": 1}, {"b": 2}]


def test_damage_anywhere_else_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_jsonl(path)
    path.write_bytes(b"[1, 2]\n")
    with pytest.raises(DataError, match="line 1"):
        read_jsonl(path)
    with pytest.raises(DataError, match="No such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_infinities_and_arrays_are_written_as_json_can_hold_them(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"hit": math.inf, "bad": math.nan, "array": np.array([1.5, 2.0]), "n": np.int64(3)})
    assert read_jsonl(path) == [{"hit": "inf", "bad": "nan", "array": [1.5, 2.0], "n": 3}]
    with pytest.raises(SettingsError, match="JSON"):
        append_jsonl(path, {"what": object()})
    with pytest.raises(SettingsError, match="mapping"):
        append_jsonl(path, [1, 2])  # type: ignore[arg-type]
    assert len(read_jsonl(path)) == 1


def test_a_result_file_has_machine_commit_date_and_raw_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/quincy")
    path = result_file(
        "resnet20-bf16", {"claim": "step speedup", "raw": [1.0, 2.0], "at": "/home/quincy/x"}, folder=tmp_path
    )
    assert path == tmp_path / "resnet20-bf16.json"
    data = json.loads(path.read_text())
    assert data["raw"] == [1.0, 2.0]
    assert data["at"] == "~/x"
    assert data["environment"]["torch"]
    assert data["date"].endswith("+00:00")
    assert {"commit", "steal_ticks", "load_average", "name"} <= set(data)
    assert os.listdir(tmp_path) == ["resnet20-bf16.json"]


def test_bad_names_reserved_keys_and_missing_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("../x", "a/b", "", ".hidden", "a b"):
        with pytest.raises(SettingsError, match="result name"):
            result_file(name, {}, folder=tmp_path)
    with pytest.raises(SettingsError, match="environment"):
        result_file("x", {"environment": {}}, folder=tmp_path)
    with pytest.raises(SettingsError, match="JSON"):
        result_file("x", {"raw": object()}, folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="benchmarks"):
        result_file("x", {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "benchmarks").mkdir()
    assert result_file("x", {"raw": []}).resolve() == tmp_path / "benchmarks" / "results" / "x.json"
