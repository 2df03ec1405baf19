"""The checkpoints of one run: each whole or absent, the previous one kept until the new one is proved."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hasten.checkpoint.attempts import Attempts
from hasten.checkpoint.codec import decode, encode, pack_recipe
from hasten.checkpoint.files import Files
from hasten.checkpoint.layout import QUARANTINE, Layout, step_name
from hasten.checkpoint.manifest import (
    MANIFEST,
    MAX_MANIFEST,
    DamagedCheckpoint,
    changed_environment,
    verify_folder,
)
from hasten.checkpoint.recipe import differences
from hasten.checkpoint.tree import unpack
from hasten.errors import CheckpointError, SettingsError

Parts = dict[str, dict[Any, Any]]
T = TypeVar("T")

BACKOFF = (0.1, 0.4)  # seconds before the second and the third try; short, since SIGTERM waits for the save
SPACE = 1.2  # free space asked for, as a multiple of the checkpoint's size


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that verified. ``warnings`` is for the user's eyes: show every line of it."""

    step: int
    parts: Parts
    recipe: dict[str, Any]
    path: Path
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SaveFailed:
    """A save that did not work, and why; training goes on."""

    step: int
    tries: int
    reason: str

    def __str__(self) -> str:
        return (
            f"could not save the checkpoint of step {self.step} ({self.tries} tries): {self.reason}. "
            "Training goes on; the next save will be tried as planned."
        )


class Store:
    """Save and load checkpoints under ``root``, which one process at a time may write to.

    ``keep`` (at least 2) is how many stay on the disk. ``on_problem`` gets a sentence for the user whenever a
    save does not fully work; by default it goes to the ``hasten`` logger. ``files`` and ``sleep`` exist for
    tests.
    """

    def __init__(
        self,
        root: Path | str,
        keep: int = 2,
        *,
        on_problem: Callable[[str], None] | None = None,
        files: Files | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if keep < 2:
            raise SettingsError(f"keep (={keep}) must be at least 2: one checkpoint alone may be damaged.")
        self.root = Path(root).absolute()
        if self.root.is_symlink():
            raise CheckpointError(f"{self.root} is a link; give the folder it points to instead.")
        self.keep = keep
        self.last_failure: SaveFailed | None = None
        self._on_problem = on_problem or logging.getLogger("hasten").warning
        self._files = files or Files()
        self._layout = Layout(self.root, self._files)
        self._attempts = Attempts(self.root, self._files)
        self._sleep = sleep
        self._tried = self._saved = 0

    @property
    def never_saved(self) -> bool:
        """Whether saves were tried and not one has worked; a run that ends so should exit with an error."""
        return self._tried > 0 and self._saved == 0

    def save(self, step: int, parts: Parts, recipe: dict[str, Any]) -> Path | None:
        """Write a checkpoint and return its folder, or None if the disk did not let it (see `last_failure`).

        ``parts`` maps a name to a tree that `pack` accepts, such as ``{"model": ..., "optim": ..., "state":
        ...}``; ``recipe`` is the plain settings that must be equal when the run is resumed. No OSError
        escapes: full disks and I/O errors are tried three times and then reported. Raises CheckpointError for
        content that cannot be saved at all.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**15:
            raise SettingsError(f"step (={step!r}) must be an integer from 0 to 10^15 - 1.")
        contents = encode(step, parts, recipe)
        self._tried += 1
        target = self.root / step_name(step)
        try:
            self._retry(lambda: self._publish(target, contents))
        except OSError as error:
            self.last_failure = SaveFailed(step, len(BACKOFF) + 1, _reason(error))
            with suppress(OSError):  # a half-written copy must not keep the disk full
                self._layout.remove_leftovers()
            self._on_problem(str(self.last_failure))
            return None
        self._saved += 1
        self.last_failure = None
        # From here on the checkpoint is safe; what is left is order.
        try:
            self._retry(lambda: self._layout.point_to(target.name))
            self._retry(lambda: self._remove_old(step))
        except OSError as error:
            self._on_problem(
                f"{target.name} is saved, but {self.root} could not be tidied up: {_reason(error)}."
            )
        return target

    def load(self, recipe: dict[str, Any] | None = None) -> Loaded | None:
        """Return the newest checkpoint that verifies, with tensors on the CPU; None if there is none at all.

        A damaged one is moved to ``quarantine/`` and the one before it is used; `Loaded.warnings` says so.
        Raises CheckpointError if all are damaged, if one was written by a newer hasten, or if ``recipe`` is
        given and differs from the checkpoint's (the message lists the keys that differ, with both values).
        """
        return self._load(recipe, count=False)

    def begin_load(self, recipe: dict[str, Any] | None = None) -> Loaded | None:
        """As `load`, for a run that goes on training from it: counts the attempt until `confirm` is called.

        A checkpoint at which the run crashed twice with the same error (see `crashed`), or was killed without
        a word eight times in a row, is moved to ``quarantine/`` and the one before it is used. One process of
        a run calls this; the others call `load`.
        """
        return self._load(recipe, count=True)

    def confirm(self) -> None:
        """Say that the first step after `begin_load` succeeded: the checkpoint is good."""
        self._attempts.clear()

    def crashed(self, error: BaseException) -> None:
        """Say that the run ended with ``error`` between `begin_load` and `confirm`."""
        self._attempts.crashed(error)

    def _retry(self, action: Callable[[], T]) -> T:
        for pause in BACKOFF:
            try:
                return action()
            except OSError:
                self._sleep(pause)
        return action()

    def _publish(self, target: Path, contents: dict[str, bytes]) -> None:
        """Bring ``contents`` to the disk under the name ``target``, verified, or raise OSError."""
        files, layout = self._files, self._layout
        layout.create()
        with suppress(OSError):
            layout.remove_leftovers()
        if not self._is_there(target, contents[MANIFEST]):
            self._check_space(sum(len(data) for data in contents.values()))
            staging = layout.aside()
            files.make_folder(staging)
            for name, data in contents.items():
                files.write(staging / name, data)
            files.sync_folder(staging)
            if target.exists():
                self._step_aside(target)
            files.rename(staging, target)
        files.sync_folder(self.root)
        try:
            verify_folder(target, files)
        except DamagedCheckpoint as error:
            layout.set_aside(target)
            raise OSError(errno.EIO, f"what was read back is not what was written: {error}") from error

    def _check_space(self, size: int) -> None:
        if (free := self._files.free(self.root)) < SPACE * size:
            raise OSError(
                errno.ENOSPC,
                f"the disk of {self.root} has {free / 1e6:.1f} MB free, and a checkpoint of {size / 1e6:.1f} "
                f"MB needs {SPACE:g} times its size",
            )

    def _is_there(self, target: Path, manifest: bytes) -> bool:
        """Whether this very checkpoint is in place: an earlier try got as far, or nothing changed."""
        try:
            same = self._files.read(target / MANIFEST, MAX_MANIFEST) == manifest
            return same and bool(verify_folder(target, self._files))
        except (OSError, CheckpointError):
            return False

    def _step_aside(self, target: Path) -> None:
        """Make room for another save of this step; at each instant a whole one can be loaded."""
        old = target.with_name(f"{target.name}.old")
        try:
            verify_folder(target, self._files)
        except (OSError, CheckpointError):
            self._layout.set_aside(target)
            return
        if old.exists():
            self._layout.remove(old)
        self._files.rename(target, old)
        self._files.sync_folder(self.root)

    def _remove_old(self, newest: int) -> None:
        kept = 0
        for step, old, path in self._layout.checkpoints():
            if step > newest:  # left by a run that was later set back: it must not be the one that is resumed
                moved = self._layout.set_aside(path)
                self._on_problem(f"{path.name} is later than step {newest} saved just now; moved to {moved}.")
            elif old or kept >= self.keep:
                self._layout.remove(path)
            else:
                kept += 1

    def _load(self, recipe: dict[str, Any] | None, count: bool) -> Loaded | None:
        wanted = None if recipe is None else unpack({}, pack_recipe(recipe))
        try:
            problem, found = self._layout.latest_problem(), self._layout.checkpoints()
        except OSError as error:
            raise CheckpointError(f"cannot look for checkpoints in {self.root}: {_reason(error)}.") from error
        bad: list[str] = []
        for _, _, path in found:
            loaded = self._try(path, bad, count)
            if loaded is None:
                continue
            if wanted is not None and (lines := differences(loaded.recipe, wanted)):
                if count:
                    self._attempts.clear()
                raise CheckpointError(
                    f"the checkpoint {path} was made with other settings:\n  "
                    + "\n  ".join(lines)
                    + "\nGive the same settings to resume it, or another folder to begin anew."
                )
            if bad:
                bad.append(f"{path.name} is used instead; the steps after {loaded.step} are done again.")
            loaded.warnings[:0] = [*([problem] if problem else []), *bad]
            return loaded
        if bad:
            raise CheckpointError("no checkpoint can be used:\n  " + "\n  ".join(bad))
        return None

    def _try(self, path: Path, bad: list[str], count: bool) -> Loaded | None:
        """Load one checkpoint; if it is no good add the reason to ``bad`` and return None."""
        if count:
            if verdict := self._attempts.verdict(path.name):
                bad.append(f"checkpoint {path.name} is not used again: {verdict}; {self._put_away(path)}.")
                return None
            self._attempts.begin(path.name)
        try:
            step, parts, recipe, environment = self._retry(lambda: decode(path, self._files))
            if step_name(step) != path.name.removesuffix(".old"):
                raise DamagedCheckpoint(f"it is of step {step}, which is not what its folder says")
        except DamagedCheckpoint as error:
            bad.append(f"checkpoint {path.name} is damaged: {error}; {self._put_away(path)}.")
        except OSError as error:
            bad.append(f"checkpoint {path.name} cannot be read now: {_reason(error)}; it stays where it is.")
            if count:
                self._attempts.crashed(error)
        else:
            return Loaded(step, parts, recipe, path, changed_environment(environment))
        return None

    def _put_away(self, path: Path) -> str:
        try:
            return f"moved to {self._layout.set_aside(path)}"
        except OSError as error:
            return f"it could not be moved to {self.root / QUARANTINE} ({_reason(error)})"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)) + (f" ({error.filename})" if error.filename else "")
