"""Keep freed memory in the process, so that a step does not fault the same pages in again and again.

glibc gives every block above 32 MB back to the system when it is freed. A training step frees and takes such blocks all
the time, and each time the kernel clears their pages anew. On Linux with glibc two calls of ``mallopt`` stop that.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LIMIT = 2**31 - 1


def keep_memory() -> bool:
    """Let this process keep what it frees; return whether the C library took the setting.

    Memory use then stays at its peak. Applies to the whole process, so every arm of a comparison must have it or none.
    """
    if not sys.platform.startswith("linux"):
        return False
    name = ctypes.util.find_library("c")
    if name is None:
        return False
    try:
        mallopt = ctypes.CDLL(name).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LIMIT)) and bool(mallopt(_M_TRIM_THRESHOLD, _LIMIT))
