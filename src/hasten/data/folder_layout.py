"""Which folders of an image folder are its training, validation and test parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hasten.data.folder_scan import Found, scan, shown
from hasten.data.image_kinds import READ
from hasten.errors import DataError

# Usual names, in lower case.
_NAMES = {
    "train": ("train", "training", "train_set", "training_set"),
    "validation": ("val", "validation", "valid", "val_set", "validation_set"),
    "test": ("test", "testing", "test_set"),
}
ADVICE = (
    "arrange the images as train/CLASS/file and val/CLASS/file (or test/), or as CLASS/file, of which a tenth is then "
    "held out as the test part"
)


@dataclass(frozen=True)
class Layout:
    """The scanned parts of an image folder; where test is None, a tenth of train is to be held out."""

    train: Found
    test: Found | None
    validation: Found | None

    def parts(self) -> dict[str, Found]:
        """Return the parts there are, by the names of their folders' roles."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}


def layout(path: Path) -> Layout:
    """Return the parts of an image folder, with what lies in them.

    One folder beside train/ is the test part, whether it is called val/ or test/; of two, test/ is the test part and
    val/ the validation part. Without any, class folders (in train/, or in ``path`` itself) are all training images.
    Raises DataError, saying how to arrange the folder, where there is nothing of the kind.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {shown(path)}.")
    roles = {role: _named(path, role) for role in _NAMES}
    train, test, validation = roles["train"], roles["test"], roles["validation"]
    if train is not None:
        if test is None:
            test, validation = validation, None
        test_found, validation_found = (None if part is None else scan(part) for part in (test, validation))
        return Layout(scan(train), test_found, validation_found)
    if test is not None or validation is not None:
        raise DataError(_misfit(path))
    found = scan(path)
    if len(found.classes) < 2:
        raise DataError(_misfit(path))
    # A folder of folders of classes would otherwise pass for classes named after its parts.
    if found.files and not any(file.parent.parent == path for file in found.files):
        raise DataError(
            f"{shown(path)}: the images lie deeper than {', '.join(found.classes[:5])}/FILE, so it is not clear which "
            f"folders are the classes: {ADVICE}."
        )
    return Layout(found, None, None)


def _named(path: Path, role: str) -> Path | None:
    fits = sorted(entry for entry in path.iterdir() if entry.name.lower() in _NAMES[role])
    if files := [
        entry for entry in fits if not entry.is_dir() and entry.name.lower() in ("train", "val", "test")
    ]:
        raise DataError(f"{shown(files[0])} is a file, where a folder of class folders is expected.")
    folders = [entry for entry in fits if entry.is_dir()]
    if len(folders) > 1:
        names = " and ".join(f"{entry.name}/" for entry in folders)
        raise DataError(f"{shown(path)} has {names}, which mean the same part: keep one of them.")
    return folders[0] if folders else None


def _misfit(path: Path) -> str:
    entries = sorted(path.iterdir())
    names = ", ".join(shown(Path(entry.name)) for entry in entries[:8]) or "nothing"
    loose = sum(entry.suffix.lower() in READ for entry in entries)
    hint = f" (image files that lie loose: {loose:,})" if loose else ""
    inside = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if len(inside) == 1 and not loose:
        hint = f"; perhaps {shown(inside[0])} is meant"
    return (
        f"{shown(path)} must hold train/CLASS/image files and val/CLASS/image files (or test/), or at least two class "
        f"folders; it has: {names}{', ...' if len(entries) > 8 else ''}{hint}. To use it, {ADVICE}."
    )
