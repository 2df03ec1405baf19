"""Every reader against tiny files written from the format's description, and against damage."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.data import DataSet, embedded_set, load
from hasten.data.cifar import read_cifar10, read_cifar100
from hasten.data.idx import CLOTHES, read_idx, read_idx_pair
from hasten.data.norb import STEMS, read_matrix, read_norb
from hasten.data.npz import load_npz
from hasten.data.registry import available
from hasten.data.stl10 import read_stl10
from hasten.errors import DataError

from .writers import cifar10_folder, cifar_bin, cycle, idx, norb_matrix, pixels, planes, python2_pickle

# --- IDX ---


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path: Path, zipped: bool) -> None:
    x, y = pixels(12, 7, 5, 1)[..., 0], cycle(12, 10).astype(np.uint8)
    idx(tmp_path / "x", x, zipped)
    idx(tmp_path / "y", y, zipped)
    images = read_idx_pair(tmp_path / "x", tmp_path / "y")
    assert np.array_equal(images.pixels[..., 0], x)
    assert np.array_equal(images.labels, y)
    assert images.shape == (7, 5, 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200), zipped=st.booleans())
def test_no_truncated_idx_is_read(tmp_path: Path, cut: int, zipped: bool) -> None:
    idx(tmp_path / "x", pixels(9, 5, 4, 1)[..., 0], zipped)
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[: cut % len(whole)])
    with pytest.raises(DataError, match=str(tmp_path / "x")):
        read_idx(tmp_path / "x")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.binary(max_size=64),
    start=st.sampled_from([b"", b"\0\0\x08\x01", b"\0\0\x08\x03", b"\x1f\x8b\x08\0"]),
)
def test_random_bytes_are_read_or_refused_plainly(tmp_path: Path, raw: bytes, start: bytes) -> None:
    (tmp_path / "x").write_bytes(start + raw)
    for reader in (read_idx, read_matrix):
        try:
            array = reader(tmp_path / "x")
        except DataError:
            continue
        assert array.nbytes <= len(start + raw)


def test_hostile_idx_headers(tmp_path: Path) -> None:
    def refused(data: bytes, message: str) -> None:
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_idx(tmp_path / "x")

    huge = b"\0\0\x08\x04" + b"\xff" * 16
    refused(huge, "asks for")
    refused(b"\0\0\x08\x03" + struct.pack(">3I", 60000, 200, 200), "truncated: 0 of")
    refused(b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"abcd", "0x0d")
    refused(b"\0\0\x08\x02" + struct.pack(">2I", 1, 1) + b"ab", "goes on after")
    refused(gzip.compress(huge + bytes(1000)), "asks for")
    # A gzip bomb: 300 MB of zeros in 300 kB, of which the header tells 4 bytes.
    refused(gzip.compress(b"\0\0\x08\x01\0\0\0\x04" + bytes(300_000_000), 1), "goes on after")


def test_idx_labels_outside_the_classes(tmp_path: Path) -> None:
    idx(tmp_path / "x", pixels(3, 4, 4, 1)[..., 0])
    idx(tmp_path / "y", np.array([1, 10, 2], np.uint8))
    with pytest.raises(DataError, match=r"x: 1 labels lie outside the 10 classes .*10 at image 1"):
        read_idx_pair(tmp_path / "x", tmp_path / "y")


# --- CIFAR ---


@pytest.mark.parametrize("form", ["bin", "python2", "python3"])
def test_cifar10_in_all_three_forms(tmp_path: Path, form: str) -> None:
    x, y = cifar10_folder(tmp_path, form)
    train, test = read_cifar10(tmp_path)
    assert np.array_equal(np.concatenate([train.pixels, test.pixels]), x)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), y)
    assert train.classes[3] == "cat"


def test_cifar10_takes_the_folder_s_own_names(tmp_path: Path) -> None:
    names = [b"n%d" % k for k in range(10)]
    cifar10_folder(tmp_path, "python2", n=2)
    (tmp_path / "batches.meta").write_bytes(python2_pickle({b"label_names": names, b"num_vis": b"3072"}))
    assert read_cifar10(tmp_path)[0].classes == tuple(name.decode() for name in names)


@pytest.mark.parametrize("form", ["bin", "python"])
def test_cifar100_reads_the_fine_labels(tmp_path: Path, form: str) -> None:
    x, fine, coarse = pixels(200, 32, 32, 3), cycle(200, 100), cycle(200, 20)
    (tmp_path / "fine_label_names.txt").write_text("".join(f"name {k}\n" for k in range(100)))
    for part, stem in ((slice(0, 120), "train"), (slice(120, 200), "test")):
        if form == "bin":
            cifar_bin(tmp_path / f"{stem}.bin", x[part], coarse[part], fine[part])
        else:
            content = {b"fine_labels": fine[part].tolist(), b"coarse_labels": coarse[part].tolist()}
            (tmp_path / stem).write_bytes(pickle.dumps(content | {b"data": planes(x[part])}, protocol=2))
    train, test = read_cifar100(tmp_path)
    assert np.array_equal(np.concatenate([train.pixels, test.pixels]), x)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), fine)
    assert train.classes[7] == "name 7"


def test_damaged_cifar_names_the_file(tmp_path: Path) -> None:
    cifar10_folder(tmp_path, "bin")
    third = tmp_path / "data_batch_3.bin"
    whole = third.read_bytes()
    third.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*truncated"):
        read_cifar10(tmp_path)
    third.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*10 at image 0"):
        read_cifar10(tmp_path)
    third.unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin is missing"):
        read_cifar10(tmp_path)
    cifar10_folder(tmp_path / "py", "python2")
    path = tmp_path / "py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"data_batch_2.*damaged or truncated"):
        read_cifar10(tmp_path / "py")


# --- STL-10 and small NORB ---


def test_stl10(tmp_path: Path) -> None:
    x, y = pixels(15, 96, 96, 3), cycle(15, 10)
    for part, stem in ((slice(0, 10), "train"), (slice(10, 15), "test")):
        # Each channel column by column, as the set's description says.
        (tmp_path / f"{stem}_X.bin").write_bytes(x[part].transpose(0, 3, 2, 1).tobytes())
        (tmp_path / f"{stem}_y.bin").write_bytes((y[part] + 1).astype(np.uint8).tobytes())
    train, test = read_stl10(tmp_path)
    assert np.array_equal(np.concatenate([train.pixels, test.pixels]), x)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), y)
    (tmp_path / "train_y.bin").write_bytes(bytes([1] * 9 + [0]))
    with pytest.raises(DataError, match=r"1\.\.10, image 9 has 0"):
        read_stl10(tmp_path)
    (tmp_path / "train_X.bin").write_bytes(bytes(96 * 96 * 3 + 5))
    with pytest.raises(DataError, match=r"train_X\.bin.*truncated"):
        read_stl10(tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_small_norb(tmp_path: Path, zipped: bool) -> None:
    x, y = pixels(12, 96, 96, 2), cycle(12, 5)
    for part, stem in zip((slice(0, 6), slice(6, 12)), STEMS, strict=True):
        norb_matrix(tmp_path / f"{stem}-dat.mat", np.ascontiguousarray(x[part].transpose(0, 3, 1, 2)))
        norb_matrix(tmp_path / f"{stem}-cat.mat", y[part].astype("<i4"))
    if zipped:
        for path in tmp_path.glob("*.mat"):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    train, test = read_norb(tmp_path)
    assert np.array_equal(np.concatenate([train.pixels, test.pixels]), x)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), y)
    victim = next(tmp_path.glob("*training-dat*"))
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"training-dat.*truncated"):
        read_norb(tmp_path)


# --- NPZ ---


def arrays(n: int = 12) -> dict[str, np.ndarray]:
    x, y = pixels(2 * n, 6, 5, 3), cycle(2 * n, 3)
    return {"x_train": x[:n], "y_train": y[:n], "x_test": x[n:], "y_test": y[n:]}


def saved(path: Path, **changes: object) -> Path:
    np.savez_compressed(path, **(arrays() | changes))  # type: ignore[arg-type]
    return path


def test_npz(tmp_path: Path) -> None:
    data = load(saved(tmp_path / "own.npz"))
    assert data.name == "own"
    assert np.array_equal(data.test.pixels, arrays()["x_test"])
    assert data.classes == ("0", "1", "2")
    grey = saved(tmp_path / "g.npz", x_train=arrays()["x_train"][..., 0], x_test=arrays()["x_test"][..., 0])
    column = arrays()["y_train"][:, None].astype(np.uint8)
    assert load_npz(grey).train.shape == (6, 5, 1)
    assert (
        load_npz(saved(tmp_path / "c.npz", y_train=column, classes=np.array(["x", "y", "z"]))).classes[1]
        == "y"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((12, 6, 5, 3), np.float32)}, "uint8"),
        ({"y_train": np.zeros(12)}, "integers|float"),
        ({"y_test": np.array([0, 1])}, "12 images but 2 labels"),
        ({"x_train": np.zeros((0, 6, 5, 3), np.uint8), "y_train": np.zeros(0, np.int64)}, "no images"),
        ({"y_train": np.zeros(12, np.int64)}, "one class, '0'"),
        ({"x_test": np.zeros((12, 6, 6, 3), np.uint8)}, "alike"),
        ({"y_train": np.full(12, 2**62)}, "believable"),
        ({"y_train": np.full(12, -1)}, "outside"),
        ({"classes": np.array(["a", "b"])}, "outside the 2 classes"),
        (
            {"x_train": np.zeros((12, 3, 32, 30), np.uint8), "x_test": np.zeros((12, 3, 32, 30), np.uint8)},
            "channels",
        ),
    ],
)
def test_bad_npz_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_npz(saved(tmp_path / "bad.npz", **changes))


def test_truncated_and_incomplete_npz(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.npz").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.npz"):
            load_npz(tmp_path / "a.npz")
    for at in range(40, len(whole), 97):
        (tmp_path / "a.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            data: DataSet | None = load_npz(tmp_path / "a.npz")
        except DataError:
            continue
        assert (
            data is not None
        )  # Damage that is not seen may not change a pixel (the archive has a checksum).
        assert np.array_equal(data.train.pixels, arrays()["x_train"])
    np.savez(tmp_path / "b.npz", x_train=arrays()["x_train"])
    with pytest.raises(DataError, match="y_train, x_test, y_test missing"):
        load_npz(tmp_path / "b.npz")


# --- names and places ---


def test_the_built_in_set() -> None:
    data = load()
    assert (len(data.train), len(data.test), data.train.shape) == (10_000, 2_000, (28, 28, 1))
    assert set(np.bincount(data.train.labels)) == {1000}
    assert set(np.bincount(data.test.labels)) == {200}
    assert data.classes == CLOTHES
    unique = {image.tobytes() for image in data.train.pixels} & {
        image.tobytes() for image in data.test.pixels
    }
    assert not unique


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs dataset-fashion-mnist"
)
def test_the_built_in_images_are_those_of_the_full_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    full, small = load("fashion-mnist"), load()
    for part in ("train", "test"):
        all_images, few = getattr(full, part), getattr(small, part)
        where = {
            image.tobytes(): label for image, label in zip(all_images.pixels, all_images.labels, strict=True)
        }
        assert [where[image.tobytes()] for image in few.pixels] == few.labels.tolist()
    with pytest.raises(DataError, match="holds fashion-mnist, not mnist"):
        load("mnist", root="/usr/share/datasets/fashion-mnist")


def test_a_changed_built_in_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_set, "SHA256", "0" * 64)
    with pytest.raises(DataError, match="damaged"):
        load()


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown data set 'cifar-10'.*Did you mean 'cifar10'"):
        load("cifar-10")
    with pytest.raises(DataError, match="no file or folder"):
        load(tmp_path / "nothing")
    assert set(available()) == {
        "fashion-mnist-12k", "mnist", "fashion-mnist", "cifar10", "cifar100", "stl10", "small-norb",
    }  # fmt: skip


def test_a_missing_set_says_where_it_was_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}.*download=True"):
        load("cifar10", root=tmp_path)
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        load("stl10")


@pytest.mark.parametrize("sub", [".", "cifar-10-batches-bin", "cifar10"])
def test_a_standard_set_of_wrong_size_is_refused(tmp_path: Path, sub: str) -> None:
    cifar10_folder(tmp_path / sub, "bin")
    with pytest.raises(DataError, match=r"50 \+ 10 images, cifar10 has 50,000 \+ 10,000"):
        load("cifar10", root=tmp_path)


def test_a_path_to_a_standard_set_names_it(tmp_path: Path) -> None:
    cifar10_folder(tmp_path, "bin")
    with pytest.raises(DataError, match=r"looks like cifar10: load\('cifar10', root="):
        load(tmp_path)
    with pytest.raises(DataError, match="size is for image folders"):
        load("cifar10", root=tmp_path, size=8)
    with pytest.raises(DataError, match="root and download"):
        load(tmp_path, root=tmp_path)


def test_mnist_in_its_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    raw = tmp_path / "MNIST" / "raw"
    os.makedirs(raw)
    for stem, n in (("train", 60_000), ("t10k", 10_000)):
        idx(raw / f"{stem}-images-idx3-ubyte", np.zeros((n, 2, 2), np.uint8))
        idx(raw / f"{stem}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8), zipped=True)
    data = load("mnist")
    assert (len(data.train), len(data.test), data.flip_ok) == (60_000, 10_000, False)
