"""Data: readers of the field's formats, images in memory, a user's own datasets and loaders, keyed augmentation, and
loaders that can begin anywhere.
"""

from __future__ import annotations

from hasten.data.augment import AlternatingFlip, Crop, Cutout, Flip
from hasten.data.dataset import DataSet
from hasten.data.folder import FolderReport, check_folder
from hasten.data.given import as_data
from hasten.data.images import Images
from hasten.data.loader import Batch, Loader
from hasten.data.registry import available, load
from hasten.data.streams import Streams
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
    "Streams",
    "as_data",
    "available",
    "check_folder",
    "from_torch",
    "load",
]
