"""The logs of a run: one JSON line a step, one CSV row an evaluation; each exactly once, whatever was killed."""

from __future__ import annotations

import csv
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from hasten.errors import CheckpointError

BUFFER = 1 << 16  # bytes of log lines held back between two writes
CSV_COLUMNS = ("step", "epoch", "samples", "seconds", "accuracy", "loss")


class Logs:
    """Appends to ``steps.jsonl`` and ``evaluations.csv`` below ``folder``; does nothing if it is None.

    A checkpoint stores ``offsets``; ``rewind`` cuts the files back to them on resume, so that steps run again after a
    crash do not appear twice. What a full disk refuses is kept and written with the next flush.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files: dict[str, IO[bytes]] = {}
        self._pending: dict[str, bytearray] = {}
        if folder is not None:
            for name in ("steps.jsonl", "evaluations.csv"):
                try:
                    self._files[name] = (folder / name).open("ab", buffering=0)
                except OSError as error:
                    self.close()
                    raise CheckpointError(
                        f"cannot write {folder / name}: {error.strerror or error}."
                    ) from error
                self._pending[name] = bytearray()

    def step(self, record: dict[str, Any]) -> None:
        """Log one step."""
        if self._files:
            self._add("steps.jsonl", json.dumps(record) + "\n")

    def evaluation(self, record: dict[str, Any]) -> None:
        """Log one evaluation, with the columns of ``CSV_COLUMNS``."""
        if self._files:
            text = io.StringIO()
            writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
            if not self._length("evaluations.csv"):
                writer.writeheader()
            writer.writerow(record)
            self._add("evaluations.csv", text.getvalue())
            with suppress(OSError):  # tried again, and then reported, by the next save
                self._flush("evaluations.csv")

    def offsets(self) -> dict[str, int]:
        """Put all that was logged on disk and return the length of each file. Raises OSError if the disk refuses."""
        for name, file in self._files.items():
            self._flush(name)
            os.fsync(file.fileno())
        return {name: self._length(name) for name in self._files}

    def rewind(self, offsets: dict[str, int]) -> None:
        """Cut the files back to ``offsets``; a file without one is emptied, one that is shorter stays as it is."""
        for name, file in self._files.items():
            self._pending[name].clear()
            size = os.fstat(file.fileno()).st_size
            file.truncate(min(size, offsets.get(name, 0)))
            file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Write what is left and close the files."""
        for name, file in self._files.items():
            with suppress(OSError):  # the save before it has said so
                self._flush(name)
            file.close()
        self._files.clear()

    def _add(self, name: str, text: str) -> None:
        self._pending[name] += text.encode()
        if len(self._pending[name]) >= BUFFER:
            with suppress(OSError):  # as above
                self._flush(name)

    def _flush(self, name: str) -> None:
        pending = self._pending[name]
        while pending:
            written = self._files[name].write(pending)
            del pending[: written or 0]

    def _length(self, name: str) -> int:
        return os.fstat(self._files[name].fileno()).st_size + len(self._pending[name])
