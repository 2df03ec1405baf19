"""The manifest: what a checkpoint consists of, and the proof that nothing in it has changed.

``manifest.json`` lists size and SHA-256 of each file, and its own SHA-256 over its canonical text. A manifest
whose bytes differ in any way from the canonical text of its content is damaged.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from hasten.checkpoint.files import Files
from hasten.checkpoint.folder import safe_name
from hasten.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 1 << 20  # bytes
MAX_JSON = 64 << 20  # bytes of any other JSON file
MAX_TENSORS = 32 << 30  # bytes of one safetensors file


class DamagedCheckpoint(CheckpointError):
    """A checkpoint differs from what was saved: a file is missing, cut, changed or makes no sense."""


def dump_json(value: object, what: str, cap: int = MAX_JSON) -> bytes:
    """Return ``value`` as canonical JSON text; raise CheckpointError if it is longer than ``cap`` bytes."""
    data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    if len(data) > cap:
        raise CheckpointError(
            f"{what} would take {len(data)} bytes of JSON, more than the {cap} allowed; keep long lists of "
            "numbers as tensors."
        )
    return data


def load_json(data: bytes, what: str) -> Any:
    """Return the value of strict JSON text; raise DamagedCheckpoint for any other text."""
    try:
        return json.loads(
            data, object_pairs_hook=_no_repeats, parse_constant=_no_constants, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{what} is not valid JSON ({error})") from error


def environment() -> dict[str, Any]:
    """Return what decides, beside seed and recipe, whether two runs agree bit for bit."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        version = importlib.metadata.version("hasten")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "hasten": version,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "world_size": torch.distributed.get_world_size() if distributed else 1,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def changed_environment(saved: dict[str, Any]) -> list[str]:
    """Return a sentence for each difference that may change the last bits of a result."""
    now = environment()
    words = {
        "torch": "torch version",
        "threads": "thread count",
        "world_size": "number of processes",
        "cpu": "CPU",
    }
    return [
        f"the checkpoint was saved with {word} {saved.get(key)}, now it is {now[key]}: the same samples are "
        "used, but results need not be equal bit for bit."
        for key, word in words.items()
        if saved.get(key) != now[key]
    ]


def make_manifest(step: int, contents: dict[str, bytes]) -> bytes:
    """Return the text of the manifest for the files ``contents`` (name to bytes)."""
    listed = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    return _canonical({"format": FORMAT, "step": step, "environment": environment(), "files": listed})


def read_manifest(folder: Path, files: Files) -> dict[str, Any]:
    """Return the checked content of a checkpoint's manifest.

    Raises DamagedCheckpoint if it is not exactly what was written or names a file outside the folder, and
    CheckpointError if a newer hasten wrote it.
    """
    data = read_plain(folder / MANIFEST, MAX_MANIFEST, files)
    body = load_json(data, MANIFEST)
    if not isinstance(body, dict) or "sha256" not in body:
        raise DamagedCheckpoint(f"{MANIFEST} has no checksum")
    del body["sha256"]
    if _canonical(body) != data:
        raise DamagedCheckpoint(f"{MANIFEST} differs from what was saved")
    if type(body.get("format")) is not int or body["format"] < 1:
        raise DamagedCheckpoint(f"{MANIFEST} names no format version")
    if body["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} has format {body['format']}, this hasten reads up to {FORMAT}; install a newer one."
        )
    listed = body.get("files")
    if type(body.get("step")) is not int or not isinstance(listed, dict):
        raise DamagedCheckpoint(f"{MANIFEST} lists no step or no files")
    if not isinstance(body.get("environment"), dict):
        raise DamagedCheckpoint(f"{MANIFEST} does not say where it was made")
    for name, entry in listed.items():
        try:
            safe_name(name, "file name")
        except CheckpointError as error:
            raise DamagedCheckpoint(f"{MANIFEST}: {error}") from error
        if name == MANIFEST or not isinstance(entry, dict) or type(entry.get("size")) is not int:
            raise DamagedCheckpoint(f"{MANIFEST} has a malformed entry for {name!r}")
    return body


def check_bytes(name: str, size: int, sha256: str, entry: dict[str, Any]) -> None:
    """Raise DamagedCheckpoint unless size and checksum of a file are those of its manifest entry."""
    if size != entry["size"]:
        raise DamagedCheckpoint(f"{name} has {size} bytes where {entry['size']} were saved")
    if sha256 != entry.get("sha256"):
        raise DamagedCheckpoint(f"{name} differs from what was saved (SHA-256)")


def cap_of(name: str) -> int:
    """Return how many bytes the file ``name`` of a checkpoint may have."""
    return MAX_TENSORS if name.endswith(".safetensors") else MAX_JSON


def verify_folder(folder: Path, files: Files) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, without loading it; return the manifest.

    Raises DamagedCheckpoint, or OSError when the disk cannot be read.
    """
    manifest = read_manifest(folder, files)
    for name, entry in manifest["files"].items():
        try:
            size, digest = files.sha256(folder / name, cap_of(name))
        except OSError as error:
            raise as_damage(error, name) from error
        check_bytes(name, size, digest, entry)
    return manifest


def read_plain(path: Path, cap: int, files: Files) -> bytes:
    """Return the bytes of a plain file; a missing, special or oversized one is DamagedCheckpoint."""
    try:
        return files.read(path, cap)
    except OSError as error:
        raise as_damage(error, path.name) from error


def as_damage(error: OSError, name: str) -> Exception:
    """Return DamagedCheckpoint if the file is wrong, or the error if the disk cannot be read now."""
    wrong = {
        errno.ENOENT: "is missing",
        errno.ELOOP: "is a link",
        errno.EINVAL: "is not a plain file",
        errno.EISDIR: "is a folder",
        errno.ENXIO: "is not a plain file",
        errno.EFBIG: "is larger than allowed",
    }
    if error.errno in wrong:
        return DamagedCheckpoint(f"{name} {wrong[error.errno]}")
    return error


def _canonical(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constants(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is out of range")
    return value
