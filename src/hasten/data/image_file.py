"""One image file as RGB pixels."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.data.image_kinds import FORMATS, HEAD, READ, is_read, kind
from hasten.data.images import blame
from hasten.errors import DataError, UnsupportedError

MOST_PIXELS = 1 << 26
# Modes of Pillow that become RGB as it is usual (grey repeated, palettes looked up, transparency dropped).
_CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_SPECIAL = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip
_ORIENTATION = 0x0112


def read_image(path: str | Path, size: int | None = None) -> NDArray[np.uint8]:
    """Return an image file as RGB, uint8 (H, W, 3), as torchvision's ImageFolder reads it.

    JPEG, PNG, WebP, BMP, TIFF and GIF (of several frames or pages the first) are told by their content, whatever the
    suffix. Transparency is dropped. The EXIF orientation is not applied, since ImageFolder does not: a photograph
    that the camera marked as turned comes as it is stored (``PIL.ImageOps.exif_transpose`` turns it).
    size: where given, the shorter side is brought to ``size`` pixels and the centre size x size is cut out
    (antialiased bilinear; to the pixel what torchvision's Resize(size), CenterCrop(size) give).
    Raises DataError, naming the file, for what is damaged, no such image, no regular file, larger than 67 million
    pixels, or has more than 8 bits a value; UnsupportedError without Pillow.
    """
    with blame(path), quiet():
        return decode(Path(path), size)


def decode(file: Path, size: int | None) -> NDArray[np.uint8]:
    """Return what ``read_image`` does; the DataError gives the reason alone."""
    image_module = pillow()
    with _opened(file) as image:
        check_pixels(*image.size)
        if image.mode not in _CONVERTED:
            raise DataError(
                f"its pixels (mode {image.mode}) do not fit into 8 bits: convert it to 8 bits a value"
            )
        rgb = image.convert("RGB")
    return np.asarray(rgb if size is None else _fitted(rgb, size, image_module))


def measure(file: Path) -> tuple[tuple[int, int], bool]:
    """Decode a file; return its (height, width) and whether its EXIF orientation says that it is stored turned."""
    shape = decode(file, None).shape
    with _opened(file) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    return (shape[0], shape[1]), turned


def special(mode: int) -> str | None:
    """Return what a file of this ``st_mode`` is if it is no regular file."""
    return None if stat.S_ISREG(mode) else _SPECIAL.get(stat.S_IFMT(mode), "no regular file")


def head(file: Path) -> bytes:
    """Return the first bytes of a regular file."""
    with file.open("rb") as content:
        return content.read(HEAD)


def check_pixels(width: int, height: int) -> None:
    """Raise DataError for an image that would take too much memory."""
    if width * height > MOST_PIXELS:
        raise DataError(f"{width}x{height} pixels are more than the {MOST_PIXELS:,} that are allowed")


def pillow() -> ModuleType:
    """Return PIL.Image. Raises UnsupportedError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError("image files need Pillow: pip install 'hasten[images]'.") from error
    return Image


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings (odd metadata, large images) from the user: what matters is checked here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open an image; whatever Pillow raises, here or in the body, becomes a DataError with the reason."""
    image_module = pillow()
    try:
        # A named pipe would be waited for, and a device can do anything.
        if (what := special(os.stat(file).st_mode)) is not None:
            raise DataError(f"is {what}, not a file")
        with image_module.open(file, formats=FORMATS) as image:
            yield image
    except DataError:
        raise
    except image_module.DecompressionBombError as error:
        raise DataError(f"it has more than the {MOST_PIXELS:,} pixels that are allowed ({error})") from error
    except image_module.UnidentifiedImageError as error:
        raise DataError(_why_not(file)) from error
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"cannot be opened ({error.strerror})") from error
        raise DataError(f"damaged or truncated ({error})") from error
    except (
        Exception
    ) as error:  # A decoder raises nearly anything on a damaged file; all of it is about this file.
        raise DataError(f"damaged or truncated ({type(error).__name__}: {error})") from error


def _why_not(file: Path) -> str:
    first = head(file)
    if not first:
        return "is empty (0 bytes)"
    what, named = kind(first), READ.get(file.suffix.lower())
    if what is not None and is_read(what):
        return f"is {what}, but damaged"
    if what is not None:
        return f"is {what}, not {f'a {named} image' if named else 'an image that is read'}"
    return f"is no image of a kind that is read ({', '.join(FORMATS)}), or damaged from its first bytes on"


def _fitted(image: Any, size: int, image_module: ModuleType) -> Any:
    """Return the centre of ``image`` with its shorter side at ``size``, without making the rest of a long image."""
    short = min(image.size)
    # The longer side and the place of the cut are rounded as torchvision rounds them.
    whole = [size if side == short else int(size * side / short) for side in image.size]
    first = [round((length - size) / 2) for length in whole]
    low = [begin * side / length for begin, side, length in zip(first, image.size, whole, strict=True)]
    high = [
        min(side, (begin + size) * side / length)
        for begin, side, length in zip(first, image.size, whole, strict=True)
    ]
    return image.resize((size, size), image_module.Resampling.BILINEAR, box=(*low, *high))
