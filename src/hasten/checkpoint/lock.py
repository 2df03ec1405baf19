"""One process at a time in a run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hasten.checkpoint.folder import MARKER
from hasten.errors import CheckpointError

LOCK = f"{MARKER}-lock"
# what file systems without locks answer; a run there goes on without one, as before
_WITHOUT_LOCKS = {"ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL"}


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process while inside; the system gives it up when the process ends in any way.

    Raises CheckpointError, with the number of the other process, while one holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    import errno

    # beside the mark, which is written anew by every process that looks at the folder
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(file, 32).decode("ascii", "replace").strip() or "unknown"
            raise CheckpointError(
                f"process {other} trains in {folder} at this moment. Wait for it, stop it, or give another folder."
            ) from None
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) not in _WITHOUT_LOCKS:
                raise
        with suppress(OSError):  # a full disk: the lock holds, only the number is missing
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)
