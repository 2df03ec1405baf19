"""Unpacking tar and zip archives that may be hostile: only plain files, only below the target, so much."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from hasten.errors import DataError

MOST_MEMBERS = 2_000_000
MOST_BYTES = 1 << 36
MOST_RATIO = 200
_PART = 1 << 20


def extract(
    archive: Path, target: Path, *, most_bytes: int = MOST_BYTES, most_members: int = MOST_MEMBERS
) -> None:
    """Unpack a .tar, .tar.gz or .zip into the folder ``target``, all of it or nothing.

    Raises DataError, leaving nothing behind, for links, devices, absolute names, '..', names that repeat,
    more members or bytes than allowed, or more than 200 times the archive's own size.
    """
    target.mkdir(parents=True, exist_ok=True)
    # A folder of our own, so that no link that already lies in the target is ever followed.
    work = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target))
    most = min(most_bytes, MOST_RATIO * max(archive.stat().st_size, 1 << 16))
    try:
        seen: set[str] = set()
        left = most
        for number, (name, file) in enumerate(_members(archive, most)):
            parts = _checked_name(name)
            if number >= most_members:
                raise DataError(f"more than {most_members:,} members.")
            if file is None:
                continue
            if not parts or "/".join(parts) in seen:
                raise DataError(f"{name!r} is no file name or is there twice.")
            seen.add("/".join(parts))
            left -= _write(file, work.joinpath(*parts), left)
        for entry in sorted(os.listdir(work)):
            if os.path.lexists(target / entry):
                raise DataError(f"{target / entry} exists already; move it away first.")
        for entry in os.listdir(work):
            (work / entry).rename(target / entry)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError,
            RuntimeError, NotImplementedError) as error:  # fmt: skip
        raise DataError(f"{archive}: damaged, truncated or not a tar or zip archive ({error}).") from error
    except DataError as error:
        raise DataError(f"{archive} was not unpacked: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _checked_name(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name)
    parts = tuple(part for part in path.parts if part != ".")
    if path.is_absolute() or ".." in parts or any(c in name for c in "\\:\0") or len(name) > 1024:
        raise DataError(
            f"it has a member named {name[:100]!r}, which does not name a place below the target."
        )
    return parts


def _write(file: IO[bytes], path: Path, most: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("xb") as out:
        while part := file.read(_PART):
            written += len(part)
            if written > most:
                raise DataError("it unpacks to more than is allowed for an archive of its size.")
            out.write(part)
    return written


def _members(archive: Path, most: int) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Yield the name and content of each member (None for folders)."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise DataError(f"{info.filename[:100]!r} is a link or device.")
                if info.is_dir():
                    yield info.filename, None
                else:
                    with bundle.open(info) as file:
                        yield info.filename, file
        return
    with archive.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = _Careful(gzip.GzipFile(fileobj=raw) if zipped else raw, most)
        with tarfile.open(fileobj=stream, mode="r:") as bundle:  # type: ignore[call-overload]
            while (member := bundle.next()) is not None:
                bundle.members = []
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise DataError(f"{member.name[:100]!r} is a link, device or sparse file.")
                content = bundle.extractfile(member) if member.isreg() else None
                if content is not None and member.size > most:
                    raise DataError("it unpacks to more than is allowed for an archive of its size.")
                yield member.name, content


class _Careful:
    """A stream that refuses huge reads and ends at a limit: tar headers can ask for any amount of memory."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, most: int) -> None:
        self._file, self._most = file, most + (1 << 26)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 4 * _PART:
            raise DataError(f"a header asks for {size:,} bytes at once.")
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0:
            self._check(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, position: int) -> None:
        if position > self._most:
            raise DataError("it unpacks to more than is allowed for an archive of its size.")
