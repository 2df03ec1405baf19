"""Raw values on disk: JSON lines that survive a kill, and one result file per benchmark."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hasten.errors import DataError, SettingsError
from hasten.measure.environment import environment
from hasten.measure.load import load_average, steal_ticks

RESULTS = Path("benchmarks/results")


def append_jsonl(path: str | Path, record: Mapping[str, object]) -> None:
    """Append ``record`` as one line, in one write, creating the file readable by its owner only.

    A torn last line, left by a kill in the middle of a write, is cut off first. One writer at a time.

    Raises:
        SettingsError: ``record`` is not a mapping or holds something JSON cannot.
    """
    if not isinstance(record, Mapping):
        raise SettingsError(f"a record must be a mapping, got {type(record).__name__}.")
    line = _dumps(record).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        end, complete = _whole_until(handle)
        os.ftruncate(handle, end)
        left = line if complete else b"\n" + line
        while left:  # A full disk writes a part, and the next attempt raises.
            left = left[os.write(handle, left) :]
    finally:
        os.close(handle)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines; one torn last line is left out.

    Raises:
        DataError: the file is missing, or a line other than a torn last one is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {Path(path).name}: {error.strerror}.") from error
    *lines, tail = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            raise DataError(
                f"{Path(path).name}: line {number} is damaged; only a torn last line can be left out."
            )
        records.append(record)
    last = _record(tail)
    return records if last is None else [*records, last]


def result_file(name: str, values: Mapping[str, object], *, folder: str | Path | None = None) -> Path:
    """Write ``values`` with environment, commit and date to ``folder/NAME.json`` and return its path.

    ``folder`` is ``benchmarks/results`` under the working directory unless given. The file appears whole or
    not at all.

    Raises:
        SettingsError: ``name`` has other characters than letters, digits, ``.``, ``_``, ``-``, the default
        folder's
            parent does not exist here, or a value cannot be written as JSON.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise SettingsError(
            f"result name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter."
        )
    if folder is None and not RESULTS.parent.is_dir():
        raise SettingsError(
            "there is no benchmarks folder here; run from the project's root or give folder=."
        )
    target = RESULTS if folder is None else Path(folder)
    facts = environment()
    source = facts["source"]
    reserved = {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": source["commit"] if isinstance(source, dict) else None,
        "environment": facts,
        "steal_ticks": steal_ticks(),
        "load_average": load_average(),
    }
    clash = sorted(set(reserved) & set(values))
    if clash:
        raise SettingsError(
            f"result {name!r}: the keys {', '.join(clash)} are filled in by hasten; rename yours."
        )
    text = _dumps({**reserved, **values}, indent=1) + "\n"
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{name}.json"
    handle, temporary = tempfile.mkstemp(dir=target, prefix=f".{name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def _dumps(record: Mapping[str, object], indent: int | None = None) -> str:
    try:
        return json.dumps(_plain(record), allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"a record must hold only JSON values: {error}.") from error


def _plain(value: object) -> object:
    """Return ``value`` as JSON can hold it: infinities and nan as text, the home folder in texts as ``~``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        home = os.path.expanduser("~")
        return value.replace(home, "~") if len(home) > 1 else value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())  # numpy and torch values
    return value


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _whole_until(handle: int) -> tuple[int, bool]:
    """Return the length of the whole records in the file and whether a line end closes them."""
    end = position = os.fstat(handle).st_size
    if end == 0 or os.pread(handle, 1, end - 1) == b"\n":
        return end, True
    tail = b""
    while position > 0 and b"\n" not in tail:
        step = min(65536, position)
        position -= step
        tail = os.pread(handle, step, position) + tail
    tail = tail.rpartition(b"\n")[2]
    return (end, False) if _record(tail) is not None else (end - len(tail), True)
