"""Checkpoints: safetensors and JSON, whole or absent, checked by SHA-256; no code in them ever runs."""

from __future__ import annotations

from hasten.checkpoint.folder import claim_folder, safe_name
from hasten.checkpoint.lock import folder_lock
from hasten.checkpoint.manifest import DamagedCheckpoint
from hasten.checkpoint.signals import StopSignal
from hasten.checkpoint.store import Loaded, SaveFailed, Store
from hasten.checkpoint.tree import pack, unpack

__all__ = [
    "DamagedCheckpoint",
    "Loaded",
    "SaveFailed",
    "StopSignal",
    "Store",
    "claim_folder",
    "folder_lock",
    "pack",
    "safe_name",
    "unpack",
]
