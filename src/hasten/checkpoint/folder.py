"""Names and folders that hasten may use, and how it knows its own."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from pathlib import Path

from hasten.checkpoint.files import Files
from hasten.errors import CheckpointError

MARKER = ".hasten"
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def safe_name(name: str, what: str = "name") -> str:
    """Return ``name`` if it can be one file or folder name everywhere; else raise CheckpointError.

    Allowed are 1 to 128 of ``A-Z a-z 0-9 . _ -``, and neither ``.`` nor ``..``.
    """
    if not SAFE_NAME.fullmatch(name) or name in (".", ".."):
        raise CheckpointError(f"the {what} {name!r} is not allowed: use 1 to 128 of A-Z a-z 0-9 . _ - only.")
    return name


def claim_folder(
    path: str | os.PathLike[str],
    kind: str = "hasten run",
    *,
    root: str | os.PathLike[str] | None = None,
    files: Files | None = None,
) -> Path:
    """Return ``path``, made absolute, as a folder this program owns and can write to.

    A missing folder is created, an empty one is marked with a ``.hasten`` file that says ``kind``, and one
    that carries the mark of the same kind is accepted. Raises CheckpointError for everything else: a folder
    with other content, a mark of another kind, a file, a link, a folder that cannot be written, a new name
    outside ``[A-Za-z0-9._-]``, and a place outside ``root`` when one is given. Nothing is deleted.
    """
    files = files or Files()
    given = Path(path)
    if ".." in given.parts and root is not None:
        raise CheckpointError(f"the folder {str(given)!r} must not contain '..': it has to lie in {root}.")
    full = Path(os.path.abspath(given if root is None else Path(root) / given))
    if full.is_symlink():
        raise CheckpointError(f"{full} is a link; give the folder it points to ({full.resolve()}) instead.")
    if root is not None and not full.resolve().is_relative_to(Path(root).resolve()):
        raise CheckpointError(f"{full} lies outside {Path(root).resolve()}; choose a folder inside it.")
    try:
        _create(full, files)
        _mark(full, kind, files)
    except OSError as error:
        raise CheckpointError(
            f"cannot use {full} as the folder of a {kind}: {_reason(error)}. Choose one you can write to."
        ) from error
    return full


def _create(full: Path, files: Files) -> None:
    missing = []
    place = full
    while not os.path.lexists(place):
        missing.append(place)
        place = place.parent
    for folder in reversed(missing):
        safe_name(folder.name, "folder name")
        try:
            files.before("mkdir", folder)
            os.mkdir(folder)
        except FileExistsError:  # another rank was faster
            if not folder.is_dir():
                raise
    if not full.is_dir():
        raise OSError(errno.ENOTDIR, "it is a file")


def _mark(full: Path, kind: str, files: Files) -> None:
    marker = full / MARKER
    try:
        found = json.loads(files.read(marker, 4096))["kind"]
    except FileNotFoundError:
        others = sorted(name for name in os.listdir(full) if not name.startswith(MARKER))
        if others:
            shown = ", ".join(repr(name) for name in others[:3])
            raise CheckpointError(
                f"{full} is not the folder of a {kind}: it already holds {len(others)} other "
                f"entries such as {shown}. Give a new or an empty folder."
            ) from None
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{marker} is not a mark that hasten wrote; use another folder.") from error
    else:
        if found != kind:
            raise CheckpointError(f"{full} holds a {found!r}, not a {kind!r}; give a new or an empty folder.")
    # Written every time, also when it is there: this is the test that the folder can be written.
    aside = full / f"{MARKER}-{secrets.token_hex(4)}"
    files.write(aside, json.dumps({"kind": kind}).encode())
    files.rename(aside, marker)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
