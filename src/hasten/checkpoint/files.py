"""The few file operations a checkpoint needs, behind one class.

Everything that changes a disk goes through `Files`, and every method first calls `before`. A test overrides
`before` to stop the world, or to report a full disk, at exactly the n-th operation of a save.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path

CHUNK = 1 << 20  # bytes per write and per read


class Files:
    """Create, write, sync, rename and remove. All methods raise `OSError` as the system reports it."""

    def before(self, operation: str, path: Path) -> None:
        """Called before each operation that touches the disk."""

    def write(self, path: Path, data: bytes) -> None:
        """Create ``path`` (it must not exist; mode 0600), write ``data`` and bring it to the disk."""
        self.before("create", path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self._write_all(fd, path, memoryview(data))
            self.before("fsync", path)
            self.sync(fd, path)
        finally:
            os.close(fd)

    def _write_all(self, fd: int, path: Path, rest: memoryview) -> None:
        while rest:
            self.before("write", path)
            rest = rest[self.put(fd, rest[:CHUNK]) :]

    def put(self, fd: int, chunk: memoryview) -> int:
        """Write a part of ``chunk``; return how many bytes went out."""
        return os.write(fd, chunk)

    def sync(self, fd: int, path: Path) -> None:
        """Bring an open file or folder to the disk."""
        os.fsync(fd)

    def sync_folder(self, path: Path) -> None:
        """Bring a folder's list of names to the disk, so that a rename in it survives a power cut."""
        self.before("fsync", path)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(fd, path)
        except OSError as error:
            # Some network and FUSE file systems cannot sync folders; there is nothing better to do there.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)

    def make_folder(self, path: Path) -> None:
        """Create ``path``, which must not exist, readable by its owner alone."""
        self.before("mkdir", path)
        os.mkdir(path, 0o700)

    def rename(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target`` in one indivisible step; a file there is replaced."""
        self.before("rename", target)
        os.replace(source, target)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder and what it holds; links in it are removed, never followed."""
        with os.scandir(path) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                self.remove_folder(path / entry.name)
            else:
                self.remove(path / entry.name)
        self.before("rmdir", path)
        os.rmdir(path)

    def remove(self, path: Path) -> None:
        """Remove one file or link."""
        self.before("unlink", path)
        os.unlink(path)

    def free(self, path: Path) -> int:
        """Return the bytes this user may still write on the disk that holds ``path``."""
        return shutil.disk_usage(path).free

    def read(self, path: Path, cap: int) -> bytes:
        """Return the contents of the plain file ``path``.

        Links are not followed and devices and pipes not opened (`OSError` with errno ELOOP or EINVAL); more
        than ``cap`` bytes are refused with EFBIG before any is read.
        """
        with os.fdopen(self._open_plain(path, cap), "rb", buffering=0) as file:
            return file.readall()

    def sha256(self, path: Path, cap: int) -> tuple[int, str]:
        """Return size and SHA-256 of a plain file without holding it in memory; same errors as `read`."""
        digest, size = hashlib.sha256(), 0
        with os.fdopen(self._open_plain(path, cap), "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    def _open_plain(self, path: Path, cap: int) -> int:
        self.before("read", path)
        # O_NONBLOCK: opening a pipe somebody put there must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise OSError(errno.EINVAL, "not a plain file", str(path))
            if info.st_size > cap:
                raise OSError(errno.EFBIG, f"{info.st_size} bytes, more than the {cap} allowed", str(path))
        except BaseException:
            os.close(fd)
            raise
        return fd
