"""What lies where under a store's root, and the moves between these places.

``step-000123/``              a complete checkpoint
``step-000123.old/``          the one it replaces, while a second save of the same step is under way
``LATEST``                    the name of the newest, for people and other tools
``quarantine/``               set aside, never deleted
``.staging-*``, ``.trash-*``  in the making and on the way out; the next save removes what was left
"""

from __future__ import annotations

import errno
import re
import secrets
from pathlib import Path

from hasten.checkpoint.files import Files

LATEST, QUARANTINE = "LATEST", "quarantine"
_LEFTOVER = re.compile(r"\.(staging|trash)-[0-9a-f]{8}")
_STEP = re.compile(r"step-([0-9]{6,15})(\.old)?")


def step_name(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step-{step:06d}"


class Layout:
    """The places under ``root``. Methods raise OSError as the system reports it."""

    def __init__(self, root: Path, files: Files) -> None:
        self.root = root
        self.files = files

    def create(self) -> None:
        """Make the root if it is missing."""
        for folder in [path for path in (*reversed(self.root.parents), self.root) if not path.is_dir()]:
            self.files.make_folder(folder)
            self.files.sync_folder(folder.parent)

    def checkpoints(self) -> list[tuple[int, bool, Path]]:
        """Return (step, whether it is the replaced one, folder), the one to try first at the front."""
        found = []
        for path in self.root.iterdir() if self.root.is_dir() else ():
            match = _STEP.fullmatch(path.name)
            if match and match[1] == f"{int(match[1]):06d}" and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), match[2] is not None, path))
        return sorted(found, key=lambda item: (-item[0], item[1]))

    def aside(self, purpose: str = "staging") -> Path:
        """Return a fresh name for something that is not final."""
        return self.root / f".{purpose}-{secrets.token_hex(4)}"

    def remove_leftovers(self) -> None:
        """Remove what a killed or failed save left behind."""
        for path in sorted(self.root.iterdir()):
            if _LEFTOVER.fullmatch(path.name):
                if path.is_dir() and not path.is_symlink():
                    self.files.remove_folder(path)
                else:
                    self.files.remove(path)

    def remove(self, path: Path) -> None:
        """Delete a checkpoint. It is renamed first: a folder under a final name is never half empty."""
        trash = self.aside("trash")
        self.files.rename(path, trash)
        self.files.remove_folder(trash)

    def set_aside(self, path: Path) -> Path:
        """Move a checkpoint to the quarantine and return where it is now."""
        quarantine = self.root / QUARANTINE
        if quarantine.is_symlink():
            raise OSError(errno.ELOOP, f"{quarantine} is a link")
        if not quarantine.exists():
            self.files.make_folder(quarantine)
        target = quarantine / f"{path.name}-{secrets.token_hex(4)}"
        self.files.rename(path, target)
        return target

    def point_to(self, name: str) -> None:
        """Make ``LATEST`` say ``name``."""
        aside = self.aside()
        self.files.write(aside, f"{name}\n".encode())
        self.files.rename(aside, self.root / LATEST)
        self.files.sync_folder(self.root)

    def latest_problem(self) -> str | None:
        """Return a warning if ``LATEST`` is wrong, else None. Nothing depends on it."""
        path = self.root / LATEST
        try:
            name = self.files.read(path, 256).decode("ascii")
        except FileNotFoundError:
            return None  # killed before the first one was complete
        except (OSError, ValueError) as error:
            return f"{path} cannot be read ({error}); the newest checkpoint by number is used."
        if not name.endswith("\n") or not _STEP.fullmatch(name[:-1]):
            return f"{path} is damaged; the newest checkpoint by number is used."
        if name[:-1] not in {found.name.removesuffix(".old") for _, _, found in self.checkpoints()}:
            return f"{path} names {name[:-1]}, which is not there; the newest checkpoint by number is used."
        return None
