"""The errors hasten raises: one base class, messages that say what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HastenError(Exception):
    """Base class of every error that hasten raises on purpose."""


class SettingsError(HastenError, ValueError):
    """A setting is unknown or out of range."""


class UnknownName(HastenError, LookupError):
    """A method, model, data set or other named thing does not exist."""


class ConflictError(HastenError):
    """Two methods claim the same place in the training step."""


class NoEffectError(HastenError):
    """A method would change nothing on this model."""


class UnsupportedError(HastenError):
    """A method or format cannot work here: on this layer, machine or loss."""


class DataError(HastenError):
    """A data set is missing, damaged or not usable."""


class NonFiniteError(HastenError):
    """A loss or gradient became NaN or infinite; raised before any weight changed."""


class CheckpointError(HastenError):
    """A checkpoint is missing, damaged or belongs to another recipe."""


class SurgeryError(HastenError):
    """A change of the network's structure did not happen; the network is as it was."""


class UnsupportedSurgeryError(SurgeryError):
    """This network, layer or optimizer cannot be changed in this way."""


class OverPruneError(SurgeryError):
    """A change would leave a layer without channels or a stage without blocks."""


class SurgeryDesyncError(SurgeryError):
    """The ranks of a distributed run asked for different changes."""


def unknown(
    kind: str, given: str, allowed: Iterable[str], error: type[HastenError] = UnknownName
) -> HastenError:
    """Return the error for an unknown name, with the nearest known one suggested."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return error(f"unknown {kind} {given!r}.{hint} Known: {', '.join(names) or 'none'}.")
