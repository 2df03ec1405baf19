"""The parts of a training state as the files of a checkpoint, and back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from hasten.checkpoint.files import Files
from hasten.checkpoint.folder import safe_name
from hasten.checkpoint.manifest import (
    MANIFEST,
    MAX_TENSORS,
    DamagedCheckpoint,
    cap_of,
    check_bytes,
    dump_json,
    load_json,
    make_manifest,
    read_manifest,
    read_plain,
)
from hasten.checkpoint.tree import pack, unpack
from hasten.errors import CheckpointError

STATE, RECIPE = "state.json", "recipe.json"


def encode(step: int, parts: dict[str, dict[Any, Any]], recipe: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a checkpoint, name to bytes, the manifest last.

    Each part's tensors go to ``PART.safetensors`` (no file if it has none), all other values of all parts to
    ``state.json``. Raises CheckpointError if something in them cannot be saved.
    """
    contents: dict[str, bytes] = {}
    skeletons = {}
    if len({name.lower() for name in parts}) != len(parts):  # some file systems do not tell A from a
        raise CheckpointError(f"the parts {sorted(parts)} must differ in more than upper and lower case.")
    for name, state in parts.items():
        file = safe_name(f"{name}.safetensors", "part name")
        tensors, skeletons[name] = pack(state, name)
        if tensors:
            contents[file] = safetensors.torch.save(tensors)
            if len(contents[file]) > MAX_TENSORS:
                raise CheckpointError(f"{file} would take more than the {MAX_TENSORS} bytes allowed.")
    contents[STATE] = dump_json({"step": step, "parts": skeletons}, STATE)
    contents[RECIPE] = dump_json(pack_recipe(recipe), RECIPE)
    contents[MANIFEST] = make_manifest(step, contents)
    return contents


def pack_recipe(recipe: dict[str, Any]) -> Any:
    """Return a recipe as JSON; raise CheckpointError if it holds anything but plain values."""
    tensors, skeleton = pack(recipe, "recipe")
    if tensors:
        raise CheckpointError(
            f"a recipe holds plain values only, not arrays: {', '.join(sorted(tensors)[:5])}."
        )
    return skeleton


def decode(
    folder: Path, files: Files
) -> tuple[int, dict[str, dict[Any, Any]], dict[str, Any], dict[str, Any]]:
    """Read a checkpoint: its step, parts, recipe and the environment it was made in.

    Every byte that is used has passed its checksum. Raises DamagedCheckpoint for any difference from what was
    saved, CheckpointError for a newer format, OSError when the disk cannot be read.
    """
    manifest = read_manifest(folder, files)
    contents = {}
    for name, entry in manifest["files"].items():
        data = read_plain(folder / name, cap_of(name), files)
        check_bytes(name, len(data), hashlib.sha256(data).hexdigest(), entry)
        contents[name] = data
    if STATE not in contents or RECIPE not in contents:
        raise DamagedCheckpoint(f"{STATE} or {RECIPE} is not part of it")
    state = load_json(contents.pop(STATE), STATE)
    if not isinstance(state, dict) or not isinstance(state.get("parts"), dict):
        raise DamagedCheckpoint(f"{STATE} lists no parts")
    if state.get("step") != manifest["step"]:
        raise DamagedCheckpoint(f"{STATE} and {MANIFEST} name different steps")
    recipe = _rebuild({}, load_json(contents.pop(RECIPE), RECIPE), RECIPE)
    parts = {}
    for name, skeleton in state["parts"].items():
        data = contents.pop(f"{name}.safetensors", b"")
        parts[name] = _rebuild(_tensors(name, data), skeleton, name)
    if contents:
        raise DamagedCheckpoint(f"files that belong to no part: {', '.join(sorted(contents))}")
    return manifest["step"], parts, recipe, manifest["environment"]


def _tensors(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data) if data else {}
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise DamagedCheckpoint(f"{name}.safetensors cannot be read ({error})") from error


def _rebuild(tensors: dict[str, Tensor], skeleton: Any, name: str) -> dict[Any, Any]:
    try:
        part = unpack(tensors, skeleton)
    except CheckpointError as error:
        raise DamagedCheckpoint(f"{name}: {error}") from error
    if not isinstance(part, dict):
        raise DamagedCheckpoint(f"{name} is not a dict")
    return part
