"""Refusing an allocation that the machine cannot hold, before it is made."""

from __future__ import annotations

import os

from hasten.errors import DataError


def check_memory(size: int, what: str) -> None:
    """Raise DataError where ``size`` bytes are more than 80% of this machine's memory (where that can be
    known).
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    if size > 0.8 * total:
        raise DataError(
            f"{what} would take {size / 2**30:,.1f} GiB of memory; this machine has {total / 2**30:,.1f} "
            "GiB. Take fewer or smaller images."
        )
