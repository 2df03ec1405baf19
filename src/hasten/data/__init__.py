"""Data: readers of the field's formats, images in memory, keyed augmentation, and a loader that can begin
anywhere.
"""

from __future__ import annotations

from hasten.data.augment import AlternatingFlip, Crop, Cutout, Flip
from hasten.data.folder import FolderReport, check_folder
from hasten.data.images import DataSet, Images
from hasten.data.loader import Batch, Loader
from hasten.data.registry import available, load
from hasten.data.torch_dataset import from_torch

__all__ = [
    "AlternatingFlip",
    "Batch",
    "Crop",
    "Cutout",
    "DataSet",
    "Flip",
    "FolderReport",
    "Images",
    "Loader",
    "available",
    "check_folder",
    "from_torch",
    "load",
]
