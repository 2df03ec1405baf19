from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hasten.data import check_folder, load
from hasten.errors import DataError

from .writers import pixels


def folder(root: Path, n: int = 4, size: tuple[int, int] = (9, 7)) -> np.ndarray:
    """Write train and val with classes b, a, C of n PNG files each; return the training pixels in order."""
    x = pixels(3 * n, *size, 3)
    for split in ("train", "val"):
        for k, name in enumerate(("C", "a", "b")):  # Sorted as Python and ImageFolder do: capitals first.
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(x[k * n + i]).save(root / split / name / f"{i}.png")
    return x


def test_reads_as_image_folder_does(tmp_path: Path) -> None:
    x = folder(tmp_path)
    nested = tmp_path / "train" / "a" / "deeper"
    nested.mkdir()
    Image.fromarray(x[0]).save(nested / "z.PNG")
    (tmp_path / "train" / "b" / "notes.txt").write_text("hello")
    data = load(tmp_path)
    assert data.classes == ("C", "a", "b")
    assert data.train.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4
    assert np.array_equal(data.train.pixels, np.concatenate([x[:8], x[:1], x[8:]]))
    assert np.array_equal(data.test.pixels, x)
    report = check_folder(tmp_path)
    assert report.ok
    assert report.counts["train"] == {"C": 4, "a": 5, "b": 4}
    assert report.sizes == {(9, 7): 25}
    assert [path.name for path in report.ignored] == ["notes.txt"]
    assert "13 images in 3 classes" in str(report)


def test_jpeg_grey_palette_and_alpha_become_rgb(tmp_path: Path) -> None:
    folder(tmp_path)
    x = Image.fromarray(pixels(1, 9, 7, 3)[0])
    for mode, name in (("L", "g.jpeg"), ("P", "p.png"), ("RGBA", "r.png"), ("LA", "l.png"), ("1", "o.png")):
        x.convert(mode).save(tmp_path / "train" / "a" / name)
    data = load(tmp_path)
    assert len(data.train) == 17
    names = sorted(path.name for path in (tmp_path / "train" / "a").iterdir())
    grey = data.train.pixels[4 + names.index("g.jpeg")]
    with Image.open(tmp_path / "train" / "a" / "g.jpeg") as image:
        assert np.array_equal(grey[..., 0], np.asarray(image))
    assert (grey == grey[..., :1]).all()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG whose header tells of width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def test_every_bad_file_is_named(tmp_path: Path) -> None:
    folder(tmp_path)
    a = tmp_path / "train" / "a"
    whole = (a / "1.png").read_bytes()
    (a / "1.png").write_bytes(whole[: len(whole) // 2])
    (a / "2.png").write_bytes(b"")
    (a / "3.png").write_bytes(bomb(30_000, 30_000))
    (tmp_path / "train" / "b" / "0.png").write_bytes(bomb(9_000, 9_000))
    (tmp_path / "train" / "b" / "1.png").write_text("<svg/>")
    stream = io.BytesIO()
    Image.fromarray(np.zeros((9, 7), np.uint16)).save(stream, "PNG")
    (tmp_path / "train" / "b" / "2.png").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="6 of its files") as caught:
        load(tmp_path)
    bad = [a / "1.png", a / "2.png", a / "3.png", *(tmp_path / "train" / "b" / f"{k}.png" for k in (0, 1, 2))]
    for path in bad:
        assert str(path) in str(caught.value)
    report = check_folder(tmp_path)
    assert not report.ok
    assert [path for path, _ in report.bad] == bad
    assert report.counts["train"]["a"] == 4


def test_a_bad_first_file_does_not_hide_the_others(tmp_path: Path) -> None:
    folder(tmp_path)
    for name in ("C/0.png", "b/3.png"):
        (tmp_path / "train" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"(?s)C/0\.png.*b/3\.png"):
        load(tmp_path)


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    folder(tmp_path)
    gradient = np.linspace(0, 255, 40).astype(np.uint8)[None, :, None].repeat(20, 0).repeat(3, 2)
    Image.fromarray(gradient).save(tmp_path / "train" / "b" / "2.png")
    with pytest.raises(DataError, match=r"mixed size: .*C/0\.png is 9x7 and .*b/2\.png is 20x40.*size=N"):
        load(tmp_path)
    data = load(tmp_path, size=10)
    assert data.train.shape == data.test.shape == (10, 10, 3)
    # The centre of a 20 x 40 gradient at half size: the middle half of its range, rising.
    row = data.train.pixels[10, 5, :, 0].astype(int)
    assert row.tolist() == sorted(row)
    assert row[0] == pytest.approx(255 * (5.5 * 2 - 0.5) / 40, abs=5)
    assert row[-1] == pytest.approx(255 - row[0], abs=5)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold train/CLASS"):
        load(tmp_path)
    folder(tmp_path)
    (tmp_path / "val" / "new").mkdir()
    with pytest.raises(DataError, match="val/new: a class that the training images have not"):
        load(tmp_path)
    (tmp_path / "val" / "new").rmdir()
    (tmp_path / "train" / "zero").mkdir()
    with pytest.raises(DataError, match="train/zero: no images in this class: fill or remove"):
        load(tmp_path)
    (tmp_path / "train" / "zero").rmdir()
    (tmp_path / "train" / "a" / "scan.tga").write_bytes(b"II")
    with pytest.raises(DataError, match=r"scan\.tga: \.tga images are not read"):
        load(tmp_path)


def test_more_images_than_memory_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path)
    monkeypatch.setattr("hasten.data.memory.os.sysconf", lambda name: 40)
    with pytest.raises(DataError, match="GiB of memory"):
        load(tmp_path)


def image(path: Path, shade: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def two_classes(root: Path, parts: tuple[str, ...] = ("train", "val"), n: int = 2) -> None:
    for part in parts:
        for name in ("cat", "dog"):
            for number in range(n):
                image(root / part / name / f"{number}.png")


def test_hidden_and_system_entries_are_left_out_and_named(tmp_path: Path) -> None:
    two_classes(tmp_path)
    hidden = (
        ".ipynb_checkpoints/0-checkpoint.png", "cat/.DS_Store", "cat/._0.png", "dog/.cache/1.png", "__MACOSX/cat/._0.png",
        "dog/Thumbs.db", "cat/@eaDir/0.png",
    )  # fmt: skip
    for name in hidden:
        image(tmp_path / "train" / name)
    data = load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert len(data.train) == 4
    assert any(note.startswith("hidden files and folders left out (7): ") for note in data.notes)
    report = check_folder(tmp_path)
    assert report.ok
    named = {
        path.relative_to(tmp_path / "train").as_posix()
        for path, reason in report.left_out
        if reason == "hidden"
    }
    assert named == {
        ".ipynb_checkpoints",
        "cat/.DS_Store",
        "cat/._0.png",
        "dog/.cache",
        "__MACOSX",
        "dog/Thumbs.db",
        "cat/@eaDir",
    }
    assert ".ipynb_checkpoints: hidden" in str(report)


def test_digits_and_letters_are_not_flipped(tmp_path: Path) -> None:
    two_classes(tmp_path / "things")
    assert load(tmp_path / "things").flip_ok
    for name in "6b":
        for part in ("train", "val"):
            image(tmp_path / "signs" / part / name / "0.png")
    data = load(tmp_path / "signs")
    assert not data.flip_ok
    assert any("flips are left out" in note for note in data.notes)


def test_nested_folders_come_in_the_order_of_image_folder(tmp_path: Path) -> None:
    names = ("b/1", "b/0", "b-2/0", "b 3/1", "b/c/0", "a/x", "z", "B/0", "b.d/0", "A")
    two_classes(tmp_path, n=1)
    for shade, name in enumerate(names):
        image(tmp_path / "train/dog" / f"{name}.png", shade=shade + 1)
    # torchvision: for root, _, files in sorted(os.walk(folder)): for file in sorted(files)
    walked = [
        Path(where, file)
        for where, _, files in sorted(os.walk(tmp_path / "train/dog"))
        for file in sorted(files)
    ]
    want = []
    for file in walked:
        with Image.open(file) as opened:
            want.append(opened.getpixel((0, 0))[0])
    assert load(tmp_path).train.pixels[1:, 0, 0, 0].tolist() == want


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    root = tmp_path / "data"
    two_classes(root)
    for number in range(5):
        image(tmp_path / f"more/{number}.png", shade=number + 1)
    image(tmp_path / "bird/0.png")
    cat = root / "train" / "cat"
    (cat / "more").symlink_to(tmp_path / "more")
    (cat / "one.png").symlink_to(tmp_path / "more" / "0.png")
    (tmp_path / "more" / "up").symlink_to(cat)
    (cat / "self").symlink_to(".")
    for part in ("train", "val"):
        (root / part / "bird").symlink_to(tmp_path / "bird")
    # Links that double at each level would make 2 ** 30 visits.
    for level in range(30):
        (tmp_path / f"deep/{level}").mkdir(parents=True)
        for name in "ab":
            (tmp_path / f"deep/{level}/{name}").symlink_to(tmp_path / f"deep/{level + 1}")
    image(tmp_path / "deep/30/end.png")
    (cat / "deep").symlink_to(tmp_path / "deep/0")
    data = load(root)
    assert data.classes == ("bird", "cat", "dog")
    assert data.train.labels.tolist() == [0] + [1] * 9 + [2] * 2
    # In the order of ImageFolder: by the whole path of the folder, then by name.
    assert data.train.pixels[1:10, 0, 0, 0].tolist() == [0, 0, 1, 0, 1, 2, 3, 4, 5]
    report = check_folder(root)
    assert report.ok
    again = {path.name for path, reason in report.left_out if "met already" in reason}
    assert again == {"up", "self", "b"}


def test_whatever_cannot_be_read_is_named_and_refused(tmp_path: Path) -> None:
    two_classes(tmp_path)
    cat = tmp_path / "train" / "cat"
    os.mkfifo(cat / "pipe.png")
    os.mkfifo(cat / "pipe")
    (cat / "broken.png").symlink_to(tmp_path / "none")
    (cat / "circle").symlink_to(cat / "circle")
    for suffix in ("heif", "heic", "avif", "jxl", "tga", "jp2", "HEIC", "ppm", "cr2"):
        (cat / f"x.{suffix}").write_bytes(b"anything")
    image(cat / "without_suffix")
    image(cat / "a.jpg.bak")
    image(tmp_path / "train" / "loose.png")
    (cat / "page.jpg").write_text("<html>404</html>")
    (cat / "notes.txt").write_text("hello")
    want = {
        "pipe.png": "is a named pipe, not a file", "pipe": "is a named pipe, not a file",
        "broken.png": "a link that leads nowhere", "circle": "a link that leads nowhere",
        "x.heif": ".heif images are not read", "x.heic": ".heic images", "x.avif": ".avif images", "x.jxl": ".jxl images",
        "x.tga": ".tga images", "x.jp2": ".jp2 images", "x.HEIC": ".heic images", "x.ppm": ".ppm images",
        "x.cr2": ".cr2 images", "without_suffix": "is a JPEG image, though its name does not say so: rename it",
        "a.jpg.bak": "is a JPEG image", "loose.png": "lies outside of the class folders",
    }  # fmt: skip
    with pytest.raises(DataError, match=f"{len(want)} of its files cannot be used") as caught:
        load(tmp_path)
    for name, reason in want.items():
        assert f"/{name}: {reason}" in str(caught.value), name
    report = check_folder(tmp_path)
    assert not report.ok
    bad = {path.name: reason for path, reason in report.bad}
    assert set(bad) == {*want, "page.jpg"}
    assert bad["page.jpg"] == "is a web page, not a JPEG image"
    assert [path.name for path in report.ignored] == ["notes.txt"]


def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(tmp_path)
    image(tmp_path / "train/cat/locked/0.png")
    listdir = os.listdir

    def refused(path: Path) -> list[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr("hasten.data.folder_scan.os.listdir", refused)
    with pytest.raises(DataError, match=r"cat/locked: this folder cannot be opened \(Permission denied\)"):
        load(tmp_path)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    two_classes(tmp_path)
    image(tmp_path / "train/cat/x.png")
    os.rename(tmp_path / "train/cat/x.png", os.fsencode(tmp_path / "train/cat") + b"/\xff.png")
    assert len(load(tmp_path).train) == 5
    (tmp_path / "train/cat/0.png").write_bytes(b"")
    os.rename(tmp_path / "train/cat/1.png", os.fsencode(tmp_path / "train/cat") + b"/\xfe.tga")
    report = check_folder(tmp_path)
    str(report).encode()
    with pytest.raises(DataError, match=r"\?\.tga: \.tga images") as caught:
        load(tmp_path)
    str(caught.value).encode()
    os.mkdir(os.fsencode(tmp_path / "train") + b"/\xfd")
    with pytest.raises(DataError, match="not UTF-8: rename the folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        (("train", "val"), (4, 4, None)), (("train", "test"), (4, 4, None)), (("Train", "Test"), (4, 4, None)),
        (("training", "validation"), (4, 4, None)), (("train", "val", "test"), (4, 4, 4)),
        (("train_set", "valid", "testing"), (4, 4, 4)),
    ],
)  # fmt: skip
def test_parts_by_their_usual_names(
    tmp_path: Path, parts: tuple[str, ...], counts: tuple[int | None, ...]
) -> None:
    two_classes(tmp_path, parts)
    if len(parts) == 3:
        image(tmp_path / parts[1] / "cat" / "only.png", shade=200)
    data = load(tmp_path)
    assert (data.train_count, data.test_count) == (4, 4)
    assert data.has_validation == (len(parts) == 3)
    if data.validation is not None:
        assert len(data.validation) == 5
        assert data.validation.pixels.max() == 200


@pytest.mark.parametrize("inside", [".", "train"])
def test_without_a_test_part_a_stratified_tenth_is_held_out(tmp_path: Path, inside: str) -> None:
    for name, n in (("cat", 30), ("dog", 20), ("owl", 3)):
        for number in range(n):
            image(tmp_path / "photos" / inside / name / f"{number:02}.png", shade=number + 1)
    data = load(tmp_path / "photos")
    assert data.name == "photos (10% held out)"
    assert np.bincount(data.test.labels).tolist() == [3, 2, 1]
    assert np.bincount(data.train.labels).tolist() == [27, 18, 2]
    seen = [
        sorted((int(y), int(x[0, 0, 0])) for x, y in zip(i.pixels, i.labels, strict=True))
        for i in (data.train, data.test)
    ]
    assert sorted(seen[0] + seen[1]) == [(y, s) for y, n in enumerate((30, 20, 3)) for s in range(1, n + 1)]
    assert load(tmp_path / "photos").identity() == data.identity()
    assert any("6 samples (10% of each class) were held out" in note for note in data.notes)
    report = check_folder(tmp_path / "photos")
    assert report.ok
    assert "10% of each class will be held out" in str(report)
    image(tmp_path / "photos" / inside / "fox" / "0.png")
    with pytest.raises(DataError, match="one training image of class 'fox' is too few"):
        load(tmp_path / "photos")


def test_folders_of_other_shapes_say_how_to_arrange(tmp_path: Path) -> None:
    def refused(root: Path, words: str) -> None:
        for read in (load, check_folder):
            with pytest.raises(DataError, match=words):
                read(root)

    (tmp_path / "a/images").mkdir(parents=True)
    two_classes(tmp_path / "a", ("images",))
    refused(tmp_path / "a", r"it has: images; perhaps .*a/images is meant")
    image(tmp_path / "b/0.png")
    refused(tmp_path / "b", r"image files that lie loose: 1\)\. To use it, arrange")
    two_classes(tmp_path / "c", ("val",))
    refused(tmp_path / "c", "must hold train/CLASS")
    two_classes(tmp_path / "d", ("seg_train", "seg_test"))
    refused(tmp_path / "d", "lie deeper than seg_test, seg_train/FILE")
    two_classes(tmp_path / "e", ("train", "val", "valid"))
    refused(tmp_path / "e", "val/ and valid/, which mean the same part")
    two_classes(tmp_path / "f", ("train",))
    (tmp_path / "f/val").write_text("")
    refused(tmp_path / "f", r"f/val is a file, where a folder of class folders is expected")
    two_classes(tmp_path / "g", ("val",))
    (tmp_path / "g/train").mkdir()
    with pytest.raises(DataError, match="g/train: no images in class folders"):
        load(tmp_path / "g")
    assert not check_folder(tmp_path / "g").ok
    two_classes(tmp_path / "h", ("train",))
    (tmp_path / "h/val").mkdir()
    with pytest.raises(DataError, match="h/val: no images in class folders"):
        load(tmp_path / "h")
    assert not check_folder(tmp_path / "h").ok
    two_classes(tmp_path / "i")
    image(tmp_path / "i/val/owl/0.png")
    with pytest.raises(DataError, match="val/owl: a class that the training images have not"):
        load(tmp_path / "i")
    assert [reason for _, reason in check_folder(tmp_path / "i").bad] == [
        "a class that the training images have not"
    ]


def test_a_class_without_test_images_is_told(tmp_path: Path) -> None:
    two_classes(tmp_path)
    image(tmp_path / "train/ant/0.png")
    data = load(tmp_path)
    assert data.classes == ("ant", "cat", "dog")
    assert data.test.labels.tolist() == [1, 1, 2, 2]
    assert data.notes == ("classes without test images (1): ant",)
    assert check_folder(tmp_path).ok


def test_size_is_checked_and_part_of_the_identity(tmp_path: Path) -> None:
    two_classes(tmp_path)
    for bad in (0, -3, 5000):
        with pytest.raises(DataError, match=f"between 1 and 4096 pixels, got {bad}"):
            load(tmp_path, size=bad)
    plain, same, small = load(tmp_path), load(tmp_path, size=8), load(tmp_path, size=4)
    assert np.array_equal(plain.train.pixels, same.train.pixels)
    assert len({str(data.identity()) for data in (plain, same, small)}) == 3
    assert plain.preprocessing()["resize"] is None
    assert small.preprocessing()["resize"] == {
        "shorter_side": 4,
        "interpolation": "bilinear",
        "antialias": True,
    }
    assert small.preprocessing()["size"] == [4, 4]


def test_one_thin_image_among_others_is_no_harm(tmp_path: Path) -> None:
    two_classes(tmp_path)
    Image.new("RGB", (60_000, 2)).save(tmp_path / "train/cat/thin.png")
    assert load(tmp_path, size=16).train.shape == (16, 16, 3)
