"""Kinds of files: which images are read, and what a file is that is not, by its name and its first bytes."""

from __future__ import annotations

import re

# Pillow's names of the formats that are read, by the suffixes (in lower case) of their files.
READ = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP",
    ".dib": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF",
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(READ.values()))
# Images that are not read: an error rather than a class that is quietly smaller.
UNREAD = frozenset(
    [
        ".3fr",
        ".ai",
        ".apng",
        ".arw",
        ".avif",
        ".cr2",
        ".cr3",
        ".cur",
        ".dcm",
        ".dds",
        ".dng",
        ".emf",
        ".eps",
        ".exr",
        ".fits",
        ".hdr",
        ".heic",
        ".heif",
        ".hif",
        ".icns",
        ".ico",
        ".j2c",
        ".j2k",
        ".jp2",
        ".jpc",
        ".jpf",
        ".jpm",
        ".jpx",
        ".jxl",
        ".jxr",
        ".mpo",
        ".nef",
        ".nii",
        ".npy",
        ".npz",
        ".orf",
        ".pam",
        ".pbm",
        ".pcx",
        ".pef",
        ".pfm",
        ".pgm",
        ".pict",
        ".pnm",
        ".ppm",
        ".psd",
        ".raf",
        ".raw",
        ".rw2",
        ".sgi",
        ".srw",
        ".svg",
        ".svgz",
        ".tga",
        ".wdp",
        ".wmf",
        ".xbm",
        ".xcf",
        ".xpm",
    ]
)
# First bytes, and what such a file is; the first that fits counts.
_SIGNATURES = tuple((re.compile(pattern, re.DOTALL), what) for pattern, what in (
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG image"),
    (rb"RIFF....WEBP", "a WEBP image"),
    (rb"BM....\0\0\0\0", "a BMP image"),
    (rb"II\*\0|MM\0\*", "a TIFF image"),
    (rb"GIF8[79]a", "a GIF image"),
    (rb"....ftyp(avif|avis)", "an AVIF image"),
    (rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", "a HEIC image"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "a JPEG XL image"),
    (rb"8BPS", "a Photoshop image"),
    (rb"P[1-7]\s", "a PNM image"),
    (rb"DDS ", "a DDS image"),
    (rb"v/1\x01", "an OpenEXR image"),
    (rb"\0\0[\x01\x02]\0[\x01-\x20]\0", "an icon"),
    (rb"....ftyp", "a video"),
    (rb"RIFF....AVI ", "a video"),
    (rb"\xef?\xbb?\xbf?\s*(<\?xml[^>]*>\s*)?<svg", "an SVG drawing"),
    (rb"(?i)\s*(<!doctype html|<html)", "a web page"),
    (rb"version https://git-lfs", "a Git LFS pointer (fetch the files with git lfs pull)"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS", "a PostScript drawing"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"\x93NUMPY", "a NumPy array"),
))  # fmt: skip
HEAD = 64


def kind(head: bytes) -> str | None:
    """Return what a file is that begins with ``head`` (its first 64 bytes), with its article; None if unknown."""
    return next((what for pattern, what in _SIGNATURES if pattern.match(head)), None)


def is_read(what: str) -> bool:
    """Return whether ``what`` (of ``kind``) is an image of a format that is read."""
    return what.endswith(tuple(f" {name} image" for name in FORMATS))
