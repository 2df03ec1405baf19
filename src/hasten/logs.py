"""The logs of a run: one JSON line a step, one CSV row an evaluation; each exactly once, whatever was killed."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import IO, Any

CSV_COLUMNS = ("step", "epoch", "samples", "seconds", "accuracy", "loss")


class Logs:
    """Appends to ``steps.jsonl`` and ``evaluations.csv`` below ``folder``; does nothing if it is None.

    A checkpoint stores ``offsets``; ``rewind`` cuts the files back to them on resume, so that steps run again after a
    crash do not appear twice.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files: dict[str, IO[str]] = {}
        if folder is not None:
            for name in ("steps.jsonl", "evaluations.csv"):
                self._files[name] = (folder / name).open("a", encoding="utf-8", newline="")

    def step(self, record: dict[str, Any]) -> None:
        """Log one step."""
        if self._files:
            self._files["steps.jsonl"].write(json.dumps(record) + "\n")

    def evaluation(self, record: dict[str, Any]) -> None:
        """Log one evaluation, with the columns of ``CSV_COLUMNS``."""
        if self._files:
            file, text = self._files["evaluations.csv"], io.StringIO()
            writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(record)
            file.write(text.getvalue())
            file.flush()

    def offsets(self) -> dict[str, int]:
        """Put all that was logged on disk and return the length of each file."""
        lengths = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            lengths[name] = file.tell()
        return lengths

    def rewind(self, offsets: dict[str, int]) -> None:
        """Cut the files back to ``offsets``; a file without one is emptied."""
        for name, file in self._files.items():
            file.flush()
            file.truncate(offsets.get(name, 0))
            file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
