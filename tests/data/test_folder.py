from __future__ import annotations

import io
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
    with pytest.raises(DataError, match="classes that the training images have not: new"):
        load(tmp_path)
    (tmp_path / "val" / "new").rmdir()
    (tmp_path / "train" / "zero").mkdir()
    with pytest.raises(DataError, match="no images for zero"):
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
