"""The part of a run in which a method acts: the same two settings and the same rules for every method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hasten.errors import UnsupportedError

if TYPE_CHECKING:
    from hasten.session import Session


def window_problems(start_at: float, stop_at: float) -> list[str]:
    """Return what is wrong with a window given as shares of the run."""
    if 0.0 <= start_at <= 1.0 and 0.0 <= stop_at <= 1.0 and start_at <= stop_at:
        return []
    return [
        f"start_at and stop_at must be shares of the run, 0 <= start_at <= stop_at <= 1, not {start_at}, {stop_at}."
    ]


def follows_progress(start_at: float, stop_at: float) -> bool:
    """Return whether the window leaves out some of the run."""
    return (start_at, stop_at) != (0.0, 1.0)


def check_window(method: str, session: Session, start_at: float, stop_at: float) -> None:
    """Raise UnsupportedError if the window needs the length of the run and the session does not know it."""
    if follows_progress(start_at, stop_at) and session.total_samples is None:
        raise UnsupportedError(
            f"{method} acts from {start_at:.0%} to {stop_at:.0%} of the run: give Session(..., total_samples=epochs * "
            f"samples), or set start_at=0.0 and stop_at=1.0 to have it act in every step."
        )


def inside(session: Session, start_at: float, stop_at: float) -> bool:
    """Return whether this step lies in the window."""
    return not follows_progress(start_at, stop_at) or start_at <= session.progress <= stop_at
