"""How often a run tried to go on from a checkpoint without getting one step further.

A checkpoint that loads but stops the run at once would restart it for ever. The count is kept beside the
checkpoints. The same error twice is enough; being killed without a word (which other causes have too: a
stopped machine, too little memory) takes `SILENT` times in a row.
"""

from __future__ import annotations

import json
import secrets
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hasten.checkpoint.files import Files

FILE = ".attempts.json"
SAME_ERROR = 2
SILENT = 8
REMEMBERED = 16  # checkpoints, and errors of each


@dataclass
class Record:
    """The attempts at one checkpoint: starts that ended without a word, and the errors of the others."""

    silent: int = 0
    errors: list[str] = field(default_factory=list)


class Attempts:
    """The attempts at each checkpoint, in ``root/.attempts.json``. Losing the file only loses the count."""

    def __init__(self, root: Path, files: Files) -> None:
        self.path = root / FILE
        self.files = files

    def begin(self, name: str) -> None:
        """Note that the run now starts from the checkpoint ``name``."""
        records = self._load()
        record = records.pop(name, Record())
        record.silent += 1
        self._store({**records, name: record})

    def crashed(self, error: BaseException) -> None:
        """Note with which error the attempt that began last ended."""
        records = self._load()
        if records:
            record = records[next(reversed(records))]
            record.silent = max(record.silent - 1, 0)  # it said a word
            record.errors = [*record.errors, fingerprint(error)][-REMEMBERED:]
            self._store(records)

    def clear(self) -> None:
        """Forget the attempt that began last: the run got further."""
        records = self._load()
        if records:
            records.popitem()
            self._store(records)

    def verdict(self, name: str) -> str | None:
        """Return why ``name`` should not be tried again, or None if it may."""
        record = self._load().get(name, Record())
        for error in record.errors:
            if record.errors.count(error) >= SAME_ERROR:
                return f"the run failed {SAME_ERROR} times within a step of loading it, with {error}"
        if record.silent >= SILENT:
            return f"the run was killed {SILENT} times in a row within a step of loading it"
        return None

    def _load(self) -> dict[str, Record]:
        """Return the records, the one that began last at the end."""
        try:
            found = json.loads(self.files.read(self.path, 1 << 20))
            return {
                str(name): Record(int(item["silent"]), [str(error) for error in item["errors"]])
                for name, item in found.items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}

    def _store(self, records: dict[str, Record]) -> None:
        recent = {name: asdict(records[name]) for name in list(records)[-REMEMBERED:]}
        aside = self.path.with_name(f".staging-{secrets.token_hex(4)}")
        with suppress(OSError):
            self.files.write(aside, json.dumps(recent).encode())
            self.files.rename(aside, self.path)


def fingerprint(error: BaseException) -> str:
    """Return what makes two crashes the same: the error's type and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
