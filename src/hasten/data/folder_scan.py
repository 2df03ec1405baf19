"""What lies in a folder of class folders: image files in ImageFolder's order, and everything else by name."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from hasten.data.image_file import head, special
from hasten.data.image_kinds import FORMATS, READ, UNREAD, is_read, kind
from hasten.errors import DataError

# Folders and files that systems leave behind.
_SYSTEM = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"}
)
HIDDEN = "hidden"
Named = list[tuple[Path, str]]


@dataclass
class Found:
    """The files below one folder of class folders.

    files and labels: the images in ImageFolder's order, and the position of each one's class. bad: what cannot be
    used, left_out: what is not looked at, both with the reason. ignored: files that are no images.
    """

    folder: Path
    classes: tuple[str, ...] = ()
    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    bad: Named = field(default_factory=list)
    left_out: Named = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Return the number of images of each class."""
        numbers = dict.fromkeys(self.classes, 0)
        for label in self.labels:
            numbers[self.classes[label]] += 1
        return numbers


def scan(split: Path) -> Found:
    """Return what lies below ``split``. Nothing but the first bytes of files with other suffixes is read.

    Links are followed, as ImageFolder follows them; a folder that is met again in the same class (by a link to it, or
    to one above it) is left out. Names that begin with a dot, and what systems leave behind, are left out.
    """
    found = Found(split)
    folders, files = _entries(split, found)
    for file in files:
        if file.suffix.lower() in READ or file.suffix.lower() in UNREAD:
            found.bad.append((file, "lies outside of the class folders"))
        else:
            found.ignored.append(file)
    found.classes = tuple(sorted(folder.name for folder in folders))
    for label, name in enumerate(found.classes):
        if not _is_text(name):
            found.bad.append((split / name, "the name of this class is not UTF-8: rename the folder"))
        images = [file for file in _below(split / name, found) if _is_image(file, found)]
        # ImageFolder sorts the folders by their whole path, then the files in each by name.
        images.sort(key=lambda file: (str(file.parent), file.name))
        found.files += images
        found.labels += [label] * len(images)
    return found


def _below(top: Path, found: Found) -> list[Path]:
    """Return the regular files below ``top``."""
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            found.left_out.append((folder, "this folder was met already in its class (by a link)"))
            continue
        seen.add((status.st_dev, status.st_ino))
        inner, own = _entries(folder, found)
        files += own
        waiting += reversed(inner)
    return files


def _entries(folder: Path, found: Found) -> tuple[list[Path], list[Path]]:
    """Return the folders and regular files in ``folder``, each sorted; note everything else."""
    folders: list[Path] = []
    files: list[Path] = []
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        found.bad.append((folder, f"this folder cannot be opened ({error.strerror})"))
        return folders, files
    for name in names:
        path = folder / name
        if name.startswith(".") or name in _SYSTEM:
            found.left_out.append((path, HIDDEN))
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            broken = path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
            found.bad.append(
                (path, "a link that leads nowhere" if broken else f"cannot be opened ({error.strerror})")
            )
            continue
        if stat.S_ISDIR(mode):
            folders.append(path)
        elif (what := special(mode)) is not None:
            found.bad.append((path, f"is {what}, not a file"))
        else:
            files.append(path)
    return folders, files


def _is_image(file: Path, found: Found) -> bool:
    """Return whether the file is to be read; note it otherwise."""
    suffix = file.suffix.lower()
    if suffix in READ:
        return True
    if suffix in UNREAD:
        found.bad.append(
            (file, f"{suffix} images are not read ({', '.join(FORMATS)} are): convert it or move it away")
        )
        return False
    try:
        what = kind(head(file))
    except OSError:
        what = None
    if what is not None and "image" in what:
        advice = "rename" if is_read(what) else "convert"
        found.bad.append((file, f"is {what}, though its name does not say so: {advice} it"))
    else:
        found.ignored.append(file)
    return False


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(path: Path) -> str:
    """Return a path as text that can be printed, whatever its bytes are."""
    return str(path).encode(errors="replace").decode()


def refuse(path: Path, bad: Named) -> DataError:
    """Return the error that lists the files that cannot be used."""
    lines = [f"{shown(file)}: {reason}" for file, reason in bad[:20]]
    more = [f"and {len(bad) - 20} more (hasten data check lists all)"] if len(bad) > 20 else []
    return DataError(
        f"{shown(path)}: {len(bad)} of its files cannot be used:\n  " + "\n  ".join(lines + more)
    )
