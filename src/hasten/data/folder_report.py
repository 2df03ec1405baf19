"""What ``hasten data check`` says of an image folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hasten.data.folder import check_size, in_parallel, remarks, unusable
from hasten.data.folder_layout import layout
from hasten.data.folder_scan import shown
from hasten.data.held import HELD
from hasten.data.image_file import measure, pillow

LISTED = 50


@dataclass(frozen=True)
class FolderReport:
    """What lies in an image folder.

    classes: their names in order. counts: images of each class, by part. sizes: how many images have each
    (height, width). bad: every file or folder that cannot be used, left_out: hidden ones and those met twice, both
    with the reason. ignored: files that are no images. turned: images whose EXIF orientation says that they are
    stored turned. size: what every image would be brought to, or None. notes: what a reader of the data is told.
    """

    path: Path
    classes: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    sizes: dict[tuple[int, int], int]
    bad: tuple[tuple[Path, str], ...]
    left_out: tuple[tuple[Path, str], ...]
    ignored: tuple[Path, ...]
    turned: int
    size: int | None
    notes: tuple[str, ...]

    @property
    def mixed(self) -> bool:
        """Return whether the images differ in size and no size to bring them to is given."""
        return len(self.sizes) > 1 and self.size is None

    @property
    def ok(self) -> bool:
        """Return whether the folder can be trained on as it is."""
        return not self.bad and bool(self.sizes) and not self.mixed

    @property
    def advice(self) -> str | None:
        """Return what to do about images of mixed size, or None."""
        if not self.mixed:
            return None
        # Half of the images need not be enlarged; beyond 224 pixels a first network rarely gains.
        shorter = median(min(size) for size, count in self.sizes.items() for _ in range(count))
        n = min(224, int(shorter))
        return f"the images have {len(self.sizes):,} sizes: add --size {n} (or another size) to train, compare and check"

    def as_json(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "path": shown(self.path), "ok": self.ok, "advice": self.advice, "classes": list(self.classes),
            "counts": self.counts, "size": self.size,
            "sizes": [{"height": h, "width": w, "images": n} for (h, w), n in Counter(self.sizes).most_common()],
            "bad": [{"file": shown(file), "reason": reason} for file, reason in self.bad],
            "left_out": [{"file": shown(file), "reason": reason} for file, reason in self.left_out],
            "not_images": [shown(file) for file in self.ignored], "turned": self.turned, "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [shown(self.path)]
        for part, counts in self.counts.items():
            n = list(counts.values()) or [0]
            lines.append(
                f"  {part}: {sum(n):,} images in {len(counts)} classes, {min(n):,} to {max(n):,} a class"
            )
        lines += class_table(self.classes, self.counts)
        common = Counter(self.sizes).most_common(5)
        shapes = ", ".join(f"{h}x{w} ({n:,})" for (h, w), n in common)
        lines.append(f"  sizes: {len(self.sizes)}: {shapes}{', ...' if len(self.sizes) > 5 else ''}")
        if self.turned:
            lines.append(
                f"  turned: {self.turned:,} images have an EXIF orientation; they are read as stored, like ImageFolder "
                "does (PIL.ImageOps.exif_transpose turns them)"
            )
        lines += [f"  bad: {shown(file)}: {reason}" for file, reason in self.bad]
        lines += _first(f"  left out: {shown(file)}: {reason}" for file, reason in self.left_out)
        lines += _first(f"  not an image: {shown(file)}" for file in self.ignored)
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  to do: {self.advice}"] if self.advice else []
        return "\n".join([*lines, f"  {'fine' if self.ok else 'not usable as it is'}"])


def class_table(classes: tuple[str, ...], counts: dict[str, dict[str, int]]) -> list[str]:
    """Return lines with the images of each class in each part, at most 50 classes."""
    names = [shown(Path(name)) for name in classes[:LISTED]]
    width = max(len(name) for name in [*names, "class"])
    lines = [f"  {'class':{width}} " + " ".join(f"{part:>10}" for part in counts)]
    for name, text in zip(classes, names, strict=False):
        lines.append(f"  {text:{width}} " + " ".join(f"{part.get(name, 0):>10,}" for part in counts.values()))
    return lines + ([f"  and {len(classes) - LISTED} more classes"] if len(classes) > LISTED else [])


def _first(lines: Any) -> list[str]:
    every = list(lines)
    return every[:10] + ([f"  and {len(every) - 10} more of these"] if len(every) > 10 else [])


def check_folder(
    path: str | Path, size: int | None = None, *, told: Callable[[int, int], None] = lambda done, total: None
) -> FolderReport:
    """Decode every image below ``path`` and report counts, sizes and everything that cannot be used or is not read.

    told: called with (images done, images in all) after each.
    Raises DataError where the folder is not arranged as one (see ``layout``).
    """
    path = Path(path)
    check_size(size)
    pillow()
    found = layout(path)
    parts = found.parts()
    bad = unusable(found)
    total, done = sum(len(part.files) for part in parts.values()), 0
    sizes: Counter[tuple[int, int]] = Counter()
    turned = 0
    for part in parts.values():
        for file, result in zip(part.files, in_parallel(measure, part.files), strict=True):
            if isinstance(result, str):
                bad.append((file, result))
            else:
                sizes[result[0]] += 1
                turned += result[1]
            done += 1
            told(done, total)
    notes = remarks(found)
    if found.test is None:
        notes.append(f"there is no test part: {HELD:.0%} of each class will be held out as one")
    return FolderReport(
        path, found.train.classes, {role: part.counts() for role, part in parts.items()}, dict(sizes),
        tuple(sorted(bad)), tuple(entry for part in parts.values() for entry in part.left_out),
        tuple(file for part in parts.values() for file in part.ignored), turned, size, tuple(notes),
    )  # fmt: skip
