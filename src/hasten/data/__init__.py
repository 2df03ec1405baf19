"""Data: readers of the field's formats, images in memory, a user's own datasets and loaders, keyed augmentation, and
loaders that can begin anywhere.
"""

from __future__ import annotations

from hasten.data.boxes import RandomResizedCrop
from hasten.data.dataset import DataSet
from hasten.data.erase import Cutout, RandomErasing
from hasten.data.folder_report import FolderReport, check_folder
from hasten.data.geometric import AlternatingFlip, Crop, Flip
from hasten.data.given import as_data
from hasten.data.image_file import read_image
from hasten.data.images import Images
from hasten.data.loader import Batch, Loader
from hasten.data.mix import Cutmix, Mixup
from hasten.data.policies import RandAugment, TrivialAugmentWide
from hasten.data.registry import available, load
from hasten.data.streams import Streams
from hasten.data.torch_dataset import from_torch

__all__ = [
    "AlternatingFlip",
    "Batch",
    "Crop",
    "Cutmix",
    "Cutout",
    "DataSet",
    "Flip",
    "FolderReport",
    "Images",
    "Loader",
    "Mixup",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCrop",
    "Streams",
    "TrivialAugmentWide",
    "as_data",
    "available",
    "check_folder",
    "from_torch",
    "load",
    "read_image",
]
