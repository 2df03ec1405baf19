"""Single image files: every format by its content, everything else refused by name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from hasten.data import read_image
from hasten.data.image_file import measure
from hasten.errors import DataError

from .writers import pixels

X = pixels(1, 21, 33, 3)[0]


@pytest.mark.parametrize(
    ("suffix", "form", "exact"),
    [
        (".jpg", "JPEG", False), (".jpeg", "JPEG", False), (".jpe", "JPEG", False), (".jfif", "JPEG", False),
        (".JPG", "JPEG", False), (".png", "PNG", True), (".PnG", "PNG", True), (".webp", "WEBP", True),
        (".bmp", "BMP", True), (".tif", "TIFF", True), (".tiff", "TIFF", True), (".gif", "GIF", False),
    ],
)  # fmt: skip
def test_every_format_is_read_as_pillow_reads_it(tmp_path: Path, suffix: str, form: str, exact: bool) -> None:
    path = tmp_path / f"x{suffix}"
    Image.fromarray(X).save(path, form, **({"lossless": True} if form == "WEBP" else {}))
    got = read_image(path)
    assert got.dtype == np.uint8
    with Image.open(path) as image:
        assert np.array_equal(got, np.asarray(image.convert("RGB")))
    if exact:
        assert np.array_equal(got, X)
    assert measure(path) == ((21, 33), False)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, form: str) -> None:
    first, second = (Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    path = tmp_path / f"x.{form.lower()}"
    first.save(path, form, save_all=True, append_images=[second, second])
    assert (np.abs(read_image(path).astype(int) - [255, 0, 0]) < 4).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb_as_convert_does(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.fromarray(X).convert(mode).save(path)
    with Image.open(path) as image:
        assert np.array_equal(read_image(path), np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(X).quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    image.save(tmp_path / "x.png", transparency=bytes(range(0, 256, 16)))
    assert np.array_equal(
        read_image(tmp_path / "x.png"), np.asarray(Image.fromarray(X).quantize(16).convert("RGB"))
    )


def test_the_exif_orientation_is_not_applied_but_known(tmp_path: Path) -> None:
    image = Image.fromarray(X)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    got = read_image(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as stored:
        assert np.array_equal(got, np.asarray(stored))
        assert ImageOps.exif_transpose(stored).size == (21, 33)
    assert got.shape == (21, 33, 3)
    assert measure(tmp_path / "x.jpg") == ((21, 33), True)


@pytest.mark.parametrize("size", [1, 7, 16, 21, 40])
@pytest.mark.parametrize("shape", [(21, 33), (33, 21), (50, 50), (64, 9), (100, 37)])
def test_size_is_resize_and_centre_crop_as_in_torchvision(
    tmp_path: Path, size: int, shape: tuple[int, int]
) -> None:
    image = Image.fromarray(pixels(1, *shape, 3)[0])
    image.save(tmp_path / "x.png")
    height, width = shape
    # Resize(size): the longer side is cut to a whole number; CenterCrop(size): the border is rounded, half to even.
    long = int(size * max(shape) / min(shape))
    new = (size, long) if width <= height else (long, size)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    whole = image.resize(new, Image.Resampling.BILINEAR)
    want = np.asarray(whole.crop((left, top, left + size, top + size))).astype(int)
    assert np.abs(read_image(tmp_path / "x.png", size).astype(int) - want).max() <= 1


def test_a_thin_giant_takes_no_more_memory_than_its_pixels(tmp_path: Path) -> None:
    for number, shape in enumerate(((60_000, 2), (2, 60_000), (2_000_000, 2))):
        Image.new("RGB", shape, (9, 99, 199)).save(tmp_path / f"{number}.png")
    code = (
        "import resource, sys; from hasten.data import read_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); images = [read_image(path, 64) for path in sys.argv[1:]]\n"
        "assert all(i.shape == (64, 64, 3) and (i == (9, 99, 199)).all() for i in images)\n"
        "print(peak() - before)"
    )
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    grown = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, check=True
    ).stdout
    assert int(grown) < 60  # MB; resizing the whole 60000x2 image to a side of 64 takes 490.


def test_wrong_suffixes_are_read_where_the_content_is(tmp_path: Path) -> None:
    for form, name in (
        ("WEBP", "a.jpg"),
        ("GIF", "b.jpg"),
        ("PNG", "c.jpeg"),
        ("JPEG", "d.png"),
        ("BMP", "e.tiff"),
    ):
        Image.fromarray(X).save(tmp_path / name, form)
        assert read_image(tmp_path / name).shape == X.shape


NOT_IMAGES = {
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "x.jpg", "is a HEIC image, not a JPEG image"),
    "avif": (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "x.png", "is an AVIF image, not a PNG image"),
    "jxl": (b"\xff\x0a\x00\x90\x01", "x.webp", "is a JPEG XL image, not a WEBP image"),
    "jp2": (b"\0\0\0\x0cjP  \r\n\x87\n....", "x.jpg", "is a JPEG 2000 image, not a JPEG image"),
    "svg": (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "x.png", "is an SVG drawing, not a PNG"),
    "html": (b"<!DOCTYPE html><html>404 Not Found", "x.jpg", "is a web page, not a JPEG image"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "x.jpg",
        "Git LFS pointer .*git lfs pull",
    ),
    "pdf": (b"%PDF-1.7", "x.tif", "is a PDF document, not a TIFF image"),
    "empty": (b"", "x.jpg", r"is empty \(0 bytes\)"),
    "text": (
        b"hello world",
        "x.jpg",
        r"is no image of a kind that is read \(JPEG, PNG, WEBP, BMP, TIFF, GIF\)",
    ),
    "header alone": (b"\x89PNG\r\n\x1a\n", "x.png", "damaged"),
    "jpeg start alone": (b"\xff\xd8\xff\xe0", "x.jpg", "damaged"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_such_image_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    content, file, message = NOT_IMAGES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=f"{file}: .*{message}") as caught:
        read_image(tmp_path / file)
    if "is a" in message:
        assert "damaged" not in str(caught.value)


def test_truncated_files_and_many_bits_are_refused(tmp_path: Path) -> None:
    for form, suffix in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("GIF", "gif"),
    ):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(X).save(path, form)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"x\.{suffix}: (is .*damaged|damaged or truncated|its pixels)"):
            read_image(path)
    for array, name in ((X[..., 0].astype(np.uint16), "a.png"), (X[..., 0].astype(np.float32), "b.tif")):
        Image.fromarray(array).save(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: .*8 bits"):
            read_image(tmp_path / name)


def test_pipes_sockets_devices_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.png")
    with socket.socket(socket.AF_UNIX) as listener:
        cwd = Path.cwd()
        os.chdir(tmp_path)  # The path of a socket has a short limit.
        try:
            listener.bind("s.png")
        finally:
            os.chdir(cwd)
    (tmp_path / "d.png").mkdir()
    (tmp_path / "z.png").symlink_to("/dev/zero")
    for name, what in (("p", "a named pipe"), ("s", "a socket"), ("d", "a folder"), ("z", "a device")):
        with pytest.raises(DataError, match=rf"{name}\.png: is {what}, not a file"):
            read_image(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match=r"cannot be opened \(No such file"):
        read_image(tmp_path / "none.png")
