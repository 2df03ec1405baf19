"""The field's standard sets: where their files usually lie, what they hold, and where they can be had."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hasten.data.cifar import read_cifar10, read_cifar100
from hasten.data.fetch import Remote
from hasten.data.idx import CLOTHES, DAMAGE, DIGITS, open_maybe_gz, read_idx_pair
from hasten.data.images import Images
from hasten.data.norb import STEMS, read_norb
from hasten.data.stl10 import read_stl10
from hasten.errors import DataError

_IDX = ("train-images", "train-labels", "t10k-images", "t10k-labels")
# SHA-256 of the unpacked test labels. MNIST and Fashion-MNIST have the same file names and sizes, so this
# alone tells that the wrong one of the two lies in a folder.
_TEST_LABELS = {
    "mnist": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion-mnist": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@dataclass(frozen=True)
class Standard:
    """A standard set.

    line: what it is. read: its reader, from a folder. folders: the usual folders below a root. marks: files
    of which one shows that the set lies in a folder. counts: training and test images. flip_ok: see DataSet.
    remotes: the files at its home. into: the folder below the root for downloads that need no unpacking.
    """

    line: str
    read: Callable[[Path], tuple[Images, Images]]
    folders: tuple[str, ...]
    marks: tuple[str, ...]
    counts: tuple[int, int]
    flip_ok: bool
    remotes: tuple[Remote, ...]
    into: str = "."

    def find(self, root: Path) -> Path | None:
        """Return the folder of this set at or below ``root``, or None."""
        for sub in self.folders:
            if any((root / sub / mark).is_file() for mark in self.marks):
                return root / sub
        return None


def _idx_reader(name: str, classes: tuple[str, ...]) -> Callable[[Path], tuple[Images, Images]]:
    def read(folder: Path) -> tuple[Images, Images]:
        files = [_idx_file(folder, stem) for stem in _IDX]
        with open_maybe_gz(files[3]) as file:
            try:
                digest = hashlib.sha256(file.read(1 << 20)).hexdigest()
            except DAMAGE:
                digest = ""  # A damaged file gets its plain error from the reader below.
        for other, known in _TEST_LABELS.items():
            if digest == known and other != name:
                raise DataError(f"{folder} holds {other}, not {name}: load it by that name.")
        return read_idx_pair(files[0], files[1], classes), read_idx_pair(files[2], files[3], classes)

    return read


def _idx_spellings(stem: str) -> tuple[str, ...]:
    kind = "idx3" if stem.endswith("images") else "idx1"
    return tuple(f"{stem}{dot}{kind}-ubyte{gz}" for dot in "-." for gz in ("", ".gz"))


def _idx_file(folder: Path, stem: str) -> Path:
    for name in _idx_spellings(stem):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no file {_idx_spellings(stem)[0]} (nor with .gz).")


def _idx_remotes(home: str, *files: tuple[int, str]) -> tuple[Remote, ...]:
    names = (_idx_spellings(stem)[1] for stem in _IDX)
    return tuple(Remote(home + name, *file) for name, file in zip(names, files, strict=True))


_NORB_HOME = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"

# Sizes and SHA-256 as the TensorFlow Datasets project publishes them.
STANDARD = {
    "mnist": Standard(
        "handwritten digits, 60,000 + 10,000, 28x28 grey, 10 classes",
        _idx_reader("mnist", DIGITS),
        ("MNIST/raw", "MNIST", "mnist/raw", "mnist", "."),
        _idx_spellings("train-images"),
        (60_000, 10_000),
        False,
        _idx_remotes(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
        "MNIST/raw",
    ),
    "fashion-mnist": Standard(
        "clothes, 60,000 + 10,000, 28x28 grey, 10 classes",
        _idx_reader("fashion-mnist", CLOTHES),
        ("FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "fashion_mnist", "fashion", "."),
        _idx_spellings("train-images"),
        (60_000, 10_000),
        True,
        _idx_remotes(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
        "FashionMNIST/raw",
    ),
    "cifar10": Standard(
        "small photographs, 50,000 + 10,000, 32x32 colour, 10 classes",
        read_cifar10,
        ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar10", "CIFAR10", "cifar-10", "."),
        ("test_batch.bin", "test_batch"),
        (50_000, 10_000),
        True,
        (
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
    ),
    "cifar100": Standard(
        "small photographs, 50,000 + 10,000, 32x32 colour, 100 classes",
        read_cifar100,
        ("cifar-100-binary", "cifar-100-python", "cifar100", "CIFAR100", "cifar-100", "."),
        ("fine_label_names.txt", "test.bin", "meta"),
        (50_000, 10_000),
        True,
        (
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                168513733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
    ),
    "stl10": Standard(
        "photographs, 5,000 + 8,000 with labels, 96x96 colour, 10 classes",
        read_stl10,
        ("stl10_binary", "stl10", "STL10", "stl-10", "."),
        ("train_X.bin",),
        (5_000, 8_000),
        True,
        (
            Remote(
                "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                2640397119,
                "f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
            ),
        ),
    ),
    "small-norb": Standard(
        "toys in stereo, 24,300 + 24,300, 96x96, 2 channels (left and right camera), 5 classes",
        read_norb,
        ("small-norb", "smallnorb", "SmallNORB", "small_norb", "norb", "norb-v1.0-small", "."),
        (f"{STEMS[0]}-dat.mat", f"{STEMS[0]}-dat.mat.gz"),
        (24_300, 24_300),
        # Mirrored images of both cameras, left still first, are a stereo pair that no cameras could take.
        False,
        tuple(
            Remote(f"{_NORB_HOME}{stem}-{kind}.mat.gz", size, digest)
            for stem, kind, size, digest in (
                (
                    STEMS[0],
                    "dat",
                    131896188,
                    "5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873",
                ),
                (STEMS[0], "cat", 348, "2784e542c1922060691090952b6cd6278879a216c90f81476f0f00256d42cdaa"),
                (
                    STEMS[1],
                    "dat",
                    130799817,
                    "cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474",
                ),
                (STEMS[1], "cat", 347, "ecaf6d5bb8c3bc5eab9cf0258f6d2198dd474e016e374836fc097f2e5ff509ff"),
            )
        ),
        "small-norb",
    ),
}
