"""The readers on the real sets, where their files are at hand."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hasten.data import DataSet, check_folder, load

SHARED = Path("/work/shared")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHARED / "data/README.md").exists(), reason="needs the real data in /work/shared/data"
    ),
]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("real")

    def unpack(name: str) -> Path:
        command = [sys.executable, str(SHARED / "tools/unpack_data.py"), str(root), name]
        subprocess.run(command, check=True, capture_output=True)
        return root

    return unpack


def digests(data: DataSet) -> tuple[str, str]:
    return hashlib.sha256(data.train.pixels).hexdigest(), hashlib.sha256(data.test.pixels).hexdigest()


def test_cifar10(unpacked: Callable[[str], Path]) -> None:
    data = load("cifar10", root=unpacked("cifar10"))
    assert digests(data) == (
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    )
    assert data.train.mean == pytest.approx((0.49140, 0.48216, 0.44653), abs=1e-5)
    assert data.train.std == pytest.approx((0.24703, 0.24349, 0.26159), abs=1e-5)
    assert set(np.bincount(data.train.labels)) == {5000}
    assert data.classes[6] == "frog"


def test_mnist(unpacked: Callable[[str], Path]) -> None:
    data = load("mnist", root=unpacked("mnist"))
    assert np.bincount(data.train.labels).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert data.train.mean == pytest.approx((0.1307,), abs=1e-4)
    assert data.train.std == pytest.approx((0.3081,), abs=1e-4)


def test_image_folder(unpacked: Callable[[str], Path]) -> None:
    folder = unpacked("tinyimagenet10") / "tiny-imagenet-10"
    data = load(folder)
    assert (len(data.train), len(data.test), data.train.shape) == (5000, 500, (64, 64, 3))
    assert set(np.bincount(data.train.labels)) == {500}
    # 42 training JPEGs are grey and become three equal channels.
    assert int((data.train.pixels == data.train.pixels[..., :1]).all((1, 2, 3)).sum()) >= 42
    assert load(folder, size=32).train.shape == (32, 32, 3)
    assert check_folder(folder).ok
