"""Downloads: only addresses known here, each with its SHA-256; a file is whole and checked or it is not
there.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hasten.errors import DataError

Opener = Callable[[str], IO[bytes]]


@dataclass(frozen=True)
class Remote:
    """A file at a stable home: its address, size in bytes and SHA-256."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Return the file name."""
        return self.url.rsplit("/", 1)[-1]


def fetch(remote: Remote, folder: Path, opener: Opener | None = None) -> Path:
    """Return the path of ``remote`` below ``folder``, downloaded if it is not there yet.

    A file already there is checked too. Raises DataError without network, or where size or SHA-256 differ.
    """
    path = folder / remote.name
    if path.exists():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != remote.sha256:
            raise DataError(
                f"{path} is not the published file (SHA-256 {digest}, not {remote.sha256}): remove it."
            )
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with (opener or _open)(remote.url) as source, part.open("wb") as out:
            digest, size = _copy(source, out, remote.size)
        if size != remote.size or digest != remote.sha256:
            raise DataError(
                f"{remote.url} gave {size:,} bytes with SHA-256 {digest}; expected were "
                f"{remote.size:,} bytes with {remote.sha256}. Nothing was kept."
            )
        part.replace(path)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise DataError(
            f"could not download {remote.url} ({error}): no network? Get the file on another machine and "
            f"put it into {folder}, or use the built-in data set fashion-mnist-12k, which needs none."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _copy(source: IO[bytes], out: IO[bytes], most: int) -> tuple[str, int]:
    """Copy at most one byte more than expected; return SHA-256 and size."""
    digest, size = hashlib.sha256(), 0
    while size <= most and (block := source.read(min(1 << 20, most + 1 - size))):
        digest.update(block)
        out.write(block)
        size += len(block)
    return digest.hexdigest(), size


def _open(url: str) -> IO[bytes]:
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{url} is no web address.")
    request = urllib.request.Request(url, headers={"User-Agent": "hasten"})
    response: IO[bytes] = urllib.request.urlopen(request, timeout=30)
    return response
