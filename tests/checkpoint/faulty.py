"""Disks that stop the world, or report an error, at a chosen operation."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hasten.checkpoint.files import Files


class Crash(BaseException):
    """The process dies here. Not an Exception: no handler may clean up after it."""


class Simulated(Files):
    """A disk in memory terms: syncing is noted and not done, so that a thousand saves take seconds."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Path]] = []
        self.unsynced: set[Path] = set()

    def before(self, operation: str, path: Path) -> None:
        if operation == "read":
            return
        self.calls.append((operation, path))
        if operation in ("create", "write"):
            self.unsynced.add(path)

    def sync(self, fd: int, path: Path) -> None:
        self.unsynced.discard(path)


class Crashing(Simulated):
    """Dies at operation ``at``; a write dies half done. With ``power_cut``, what is not synced is lost."""

    def __init__(self, at: int, power_cut: bool = False) -> None:
        super().__init__()
        self.at, self.power_cut, self.dead = at, power_cut, False
        self.half: Path | None = None

    def before(self, operation: str, path: Path) -> None:
        if self.dead:
            raise Crash
        super().before(operation, path)
        if operation != "read" and len(self.calls) == self.at:
            if operation == "write":
                self.half = path
                return
            self.die()

    def put(self, fd: int, chunk: memoryview) -> int:
        if self.half is not None:
            os.write(fd, chunk[: len(chunk) // 2])
            self.die()
        return os.write(fd, chunk)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        # What was lost under the old name is lost under the new one.
        moved = {path for path in self.unsynced if path == source or source in path.parents}
        self.unsynced -= moved
        self.unsynced |= {target / path.relative_to(source) if path != source else target for path in moved}

    def die(self) -> None:
        self.dead = True
        if self.power_cut:
            for path in self.unsynced:
                if path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
        raise Crash


class Failing(Simulated):
    """Reports ``number`` at ``times`` operations from ``at`` on; a write goes half through first."""

    def __init__(self, at: int, number: int = errno.ENOSPC, times: int = 1) -> None:
        super().__init__()
        self.at, self.number, self.times = at, number, times
        self.raised = 0
        self.half = False

    def before(self, operation: str, path: Path) -> None:
        super().before(operation, path)
        # A full disk still lets files be removed.
        hit = operation not in ("read", "unlink", "rmdir") or (
            operation != "read" and self.number == errno.EIO
        )
        if hit and self.at <= len(self.calls) and self.raised < self.times:
            self.raised += 1
            if operation == "write":
                self.half = True
                return
            raise OSError(self.number, os.strerror(self.number), str(path))

    def put(self, fd: int, chunk: memoryview) -> int:
        if self.half:
            self.half = False
            os.write(fd, chunk[: len(chunk) // 2])
            raise OSError(self.number, os.strerror(self.number))
        return os.write(fd, chunk)
