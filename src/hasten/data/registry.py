"""Finding a data set by name or path."""

from __future__ import annotations

import os
from pathlib import Path

from hasten import errors
from hasten.data import embedded_set
from hasten.data.archive import extract
from hasten.data.dataset import DataSet
from hasten.data.fetch import fetch
from hasten.data.folder import load_folder
from hasten.data.npz import load_npz
from hasten.data.standard import STANDARD, Standard
from hasten.errors import DataError

DEFAULT = embedded_set.NAME
_SYSTEM = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}


def available() -> dict[str, str]:
    """Return the named data sets, each with one line on what it is."""
    lines = {DEFAULT: "clothes, 10,000 + 2,000 of Fashion-MNIST, 28x28 grey, 10 classes; built in"}
    return lines | {name: standard.line for name, standard in STANDARD.items()}


def load(
    name: str | Path = DEFAULT,
    root: str | Path | None = None,
    *,
    download: bool = False,
    size: int | None = None,
) -> DataSet:
    """Return a data set by name, or that of a path: an image folder (see ``load_folder``) or an .npz file.

    root: the folder in or below which a standard set lies; without it the environment variable HASTEN_DATA,
    else ~/.cache/hasten (fashion-mnist is also found where Debian installs it). download: get a standard set
    that is not there from its home, checked by SHA-256. size: for image folders, resize the shorter side to
    this many pixels and cut out the centre. Raises DataError: unknown name, nothing found, damaged files, wrong
    counts, no network.
    """
    text = str(name)
    if text == DEFAULT or text in STANDARD:
        if size is not None:
            raise DataError(f"size is for image folders; {text} has its own size.")
        if text == DEFAULT:
            return embedded_set.load_embedded()
        return _load_standard(text, STANDARD[text], None if root is None else Path(root), download)
    path = Path(name).expanduser()
    looks_like_path = isinstance(name, Path) or os.sep in text or "/" in text or text.endswith(".npz")
    # An empty name would be the current folder.
    if not text.strip() or not (looks_like_path or os.path.exists(path)):
        known = errors.unknown("data set", text[:200], available(), DataError)
        raise DataError(
            f"there is no file or folder {text[:200]!r} here, and it is no known data set: {known}"
        )
    if root is not None or download:
        raise DataError(f"root and download are for named data sets, not for the path {path}.")
    return _load_path(path, size)


def _load_path(path: Path, size: int | None) -> DataSet:
    if not os.path.exists(path):
        raise DataError(f"there is no file or folder {path}. Named data sets: {', '.join(available())}.")
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"{path} is not read: give an image folder or an .npz file.")
        if size is not None:
            raise DataError("size is for image folders; the images of an .npz file have their own size.")
        return load_npz(path)
    if not (path / "train").is_dir():
        for known, standard in STANDARD.items():
            if any((path / mark).is_file() for mark in standard.marks):
                raise DataError(f"{path} looks like {known}: load({known!r}, root={str(path)!r}).")
    return load_folder(path, size)


def _load_standard(name: str, standard: Standard, root: Path | None, download: bool) -> DataSet:
    roots = [root.expanduser() if root is not None else default_root()]
    if root is None and name in _SYSTEM:
        roots.append(_SYSTEM[name])
    folder = next((found for place in roots if (found := standard.find(place)) is not None), None)
    if folder is None and download:
        _download(standard, roots[0])
        folder = standard.find(roots[0])
    if folder is None:
        home = standard.remotes[0].url.split("/")[2]
        places = ", ".join(f"{place} (and its {', '.join(standard.folders[:2])})" for place in roots)
        raise DataError(
            f"{name} was not found in {places}: no {standard.marks[0]} there. Give root=FOLDER or "
            f"set HASTEN_DATA, or download=True to get it from {home}; {DEFAULT} is built in."
        )
    train, test = standard.read(folder)
    if (len(train), len(test)) != standard.counts:
        raise DataError(
            f"{folder} has {len(train):,} + {len(test):,} images, {name} has {standard.counts[0]:,} + "
            f"{standard.counts[1]:,}: a file is truncated or of another set."
        )
    return DataSet(name, train, test, standard.flip_ok)


def default_root() -> Path:
    """Return the folder of data sets: HASTEN_DATA, else ~/.cache/hasten."""
    given = os.environ.get("HASTEN_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "hasten"


def _download(standard: Standard, root: Path) -> None:
    for remote in standard.remotes:
        file = fetch(remote, root / standard.into)
        if remote.name.endswith(".tar.gz"):
            extract(file, root)
