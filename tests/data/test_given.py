"""as_data: everything a user may give, and one clear message for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from hasten.data import DataSet, Streams, as_data
from hasten.errors import DataError, HastenError, UnsupportedError

from .writers import cycle, pixels

X, Y = pixels(60, 8, 6, 3), cycle(60, 4)
CHW = X.transpose(0, 3, 1, 2)


class Items(Dataset[Any]):
    """Items of a function of their number."""

    def __init__(self, make: Any, count: int = 60) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(torch.randn(60, 3, 8, 6), Y.tolist(), strict=True))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 60


def same(images: Any, x: np.ndarray, y: np.ndarray) -> None:
    assert np.array_equal(images.pixels, x)
    assert np.array_equal(images.labels, y)


@pytest.mark.parametrize(
    "x",
    [X, torch.from_numpy(X), CHW, torch.from_numpy(CHW.copy()), X / 255, (X / 255).astype(np.float32),
     torch.from_numpy(CHW / 255), torch.from_numpy(CHW / 255).float()],
)  # fmt: skip
@pytest.mark.parametrize("y", [Y, torch.from_numpy(Y), Y.astype(np.uint8), Y[:, None]])
def test_arrays_in_all_their_forms(x: Any, y: Any) -> None:
    data = as_data(((x, y), (x[:20], y[:20])))
    assert isinstance(data, DataSet)
    assert (data.name, data.classes, data.flip_ok) == ("arrays", ("0", "1", "2", "3"), False)
    same(data.train, X, Y)
    same(data.test, X[:20], Y[:20])
    assert not any("rounded" in note for note in data.notes)


def test_grey_arrays_and_rounded_floats() -> None:
    grey = as_data((X[..., 0], Y))
    assert grey.shape == (8, 6, 1)
    # Where both ends could be channels, an array has them last and a tensor first, as is usual for each.
    narrow = np.zeros((60, 3, 9, 2), np.uint8)
    assert as_data((narrow, Y)).shape == (3, 9, 2)
    assert as_data((torch.from_numpy(narrow), Y)).shape == (9, 2, 3)
    values = np.random.default_rng(0).random((60, 8, 6, 3))
    data = as_data(((values, Y), (values, Y)))
    assert isinstance(data, DataSet)
    assert np.abs(data.train.pixels / 255 - values).max() <= 0.5 / 255 + 1e-6
    assert "the images were rounded to 8 bits" in data.notes


def test_a_single_pair_gives_up_a_tenth_for_the_test() -> None:
    for given in ((X, Y), TensorDataset(torch.from_numpy(CHW.copy()), torch.from_numpy(Y))):
        data = as_data(given)
        assert isinstance(data, DataSet)
        assert data.name.endswith(" (10% held out)")
        assert np.bincount(data.test.labels).tolist() == [2, 2, 2, 2]
        rows = [row.tobytes() for images in (data.train, data.test) for row in images.pixels]
        assert sorted(rows) == sorted(row.tobytes() for row in X)
        assert as_data(given).identity() == data.identity()
        assert any("8 samples (10% of each class) were held out" in note for note in data.notes)
        assert any("flips are left out" in note for note in data.notes)


def test_eight_bit_datasets_become_images_in_memory() -> None:
    plain = [
        Items(lambda n: (X[n], int(Y[n]))), Items(lambda n: (Image.fromarray(X[n]), int(Y[n]))),
        Items(lambda n: (torch.from_numpy(CHW[n] / 255), int(Y[n]))),
    ]  # fmt: skip
    for dataset in plain:
        data = as_data((dataset, Subset(dataset, range(10, 30))))
        assert isinstance(data, DataSet)
        same(data.train, X, Y)
        same(data.test, X[10:30], Y[10:30])
    one_class = as_data((plain[0], Subset(plain[0], [0, 4, 8])))
    assert one_class.classes == ("0", "1", "2", "3")
    named = Items(lambda n: (X[n], int(Y[n])))
    named.classes = ["w", "x", "y", "z"]  # type: ignore[attr-defined]
    assert as_data((named, named)).classes == ("w", "x", "y", "z")


def flipped(n: int, coin: bool) -> tuple[np.ndarray, int]:
    return (X[n, :, ::-1] if coin else X[n]), int(Y[n])


OWN = np.random.default_rng(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: (torch.from_numpy(CHW[n] / 255 - 0.5) / 0.25, int(Y[n])),
        lambda n: flipped(n, torch.rand(()) < 0.5),
        lambda n: flipped(n, np.random.random() < 0.05),  # noqa: NPY002
        lambda n: flipped(n, __import__("random").random() < 0.0),
        lambda n: (
            np.clip(X[n].astype(int) + OWN.integers(-9, 9, X[n].shape), 0, 255).astype(np.uint8),
            int(Y[n]),
        ),
    ],
)
def test_normalised_and_random_datasets_become_streams(make: Any) -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data = as_data((Items(make), Items(make)))
    assert isinstance(data, Streams)
    assert (data.shape, data.classes, data.train_count, data.test_count) == (
        (8, 6, 3),
        ("0", "1", "2", "3"),
        60,
        60,
    )
    assert data.owns_augmentation
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])  # noqa: NPY002


def test_names_paths_and_sets_pass_through(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "d.npz",
        x_train=X,
        y_train=Y,
        x_test=X,
        y_test=Y,
        classes=np.array([b"cat", b"dog", b"\xc3\xa4", b"d"]),
    )
    for given in (tmp_path / "d.npz", str(tmp_path / "d.npz")):
        data = as_data(given)
        assert data.classes == ("cat", "dog", "ä", "d")
        assert as_data(data) is data
    np.savez(
        tmp_path / "e.npz",
        x_train=X,
        y_train=Y,
        x_test=X,
        y_test=Y,
        classes=np.array([b"\xff", b"b", b"c", b"d"]),
    )
    with pytest.raises(DataError, match=r"e\.npz: classes holds a name that is not UTF-8"):
        as_data(tmp_path / "e.npz")
    with pytest.raises(DataError, match="Did you mean 'cifar10'"):
        as_data("cifar11")
    for name in ("", "  ", "x" * 5000):
        with pytest.raises(DataError, match="unknown data set"):
            as_data(name)
    with pytest.raises(DataError, match="there is no file or folder"):
        as_data("y/" + "x" * 5000)
    with pytest.raises(DataError, match="for names and paths"):
        as_data((X, Y), size=32)


T = TensorDataset(torch.randn(60, 3, 8, 6), torch.from_numpy(Y))
WRONG: dict[str, tuple[Any, str]] = {
    "no labels": (X, r"labels are missing: give \(x, y\)"),
    "one array in a tuple": ((X,), "tuple of 1 .ndarray"),
    "four arrays": ((X, Y, X, Y), r"tuple of 4 .*it may be a name or path"),
    "None": (None, "NoneType; it may be"),
    "dictionary": ({"x": X}, "dict; it may be"),
    "labels first": ((Y, X), "y_train must have shape"),
    "fewer labels": ((X, Y[:50]), "60 images but 50 labels"),
    "float labels": ((X, Y.astype(float)), "y_train must be integers, got float64"),
    "one-hot labels": ((X, np.eye(4, dtype=int)[Y]), r"y_train must have shape .*argmax\(1\)"),
    "one-hot float labels": ((X, np.eye(4)[Y]), r"y_train must be integers.*argmax\(1\)"),
    "text labels": ((X, np.array(list("abcd"))[Y]), "y_train must be integers, got <U1; class names go into classes"),
    "negative labels": ((X, Y - 1), "labels must count from 0, got -1"),
    "huge label": ((X, Y * 10**6), "more than a million classes"),
    "one class": ((X, Y * 0), "at least two classes"),
    "floats to 255": ((X.astype(np.float32), Y), r"from 0 to 255; it must lie in \[0, 1\]"),
    "normalised": ((torch.randn(60, 3, 8, 6), Y), "as a TensorDataset"),
    "NaN": ((np.full(X.shape, np.nan), Y), "from nan to nan"),
    "int32": ((X.astype(np.int32), Y), "uint8, got int32"),
    "flat": ((X.reshape(60, -1), Y), r"must have shape \(N, H, W\).*got \(60, 144\)"),
    "empty": ((X[:0], Y[:0]), r"got \(0, 8, 6, 3\)|must have shape"),
    "shapes differ": (((X, Y), (X[:, :4], Y)), "must be alike"),
    "one a class": ((X[:4], Y[:4]), "one training image of class '0', '1', '2', '3' is too few"),
    "bare DataLoader": (DataLoader(T, 8), r"no test part: give \(train_loader, test_loader\)"),
    "DataLoader and number": ((DataLoader(T, 8), 5), "beside a DataLoader stands a int"),
    "Dataset and number": ((T, 5), "tuple of 2 .TensorDataset, int"),
    "stream": (Stream(), "IterableDataset, which has no numbered samples: give it in a DataLoader"),
    "sized stream": (SizedStream(), "IterableDataset"),
    "stream in a loader": ((DataLoader(Stream(), 8), DataLoader(T, 8)), "has no length"),
    "empty dataset": (Items(lambda n: None, 0), "Items is empty"),
    "dictionary items": (Items(lambda n: {"image": X[n]}), r"item 0 is a dict, not a pair \(image, label\)"),
    "triples": (Items(lambda n: (X[n], 1, 2)), "item 0 is a tuple of 3"),
    "float label items": (Items(lambda n: (X[n], 0.5)), r"label 0\.5"),
    "text items": (Items(lambda n: ("a.jpg", 1)), "item 0 "),
    "failing items": (Items(lambda n: 1 / 0), r"item 0 of Items cannot be read \(ZeroDivisionError"),
    "mixed sizes": (Items(lambda n: (X[n, : 4 + n % 2], int(Y[n]))), r"item 0 has shape \(4, 6, 3\), item 1 \(5, 6, 3\)"),
    "negative label items": (Items(lambda n: (torch.randn(3, 8, 6), n % 2 - 1)), r"labels from -1 to 0"),
    "other shape": ((T, TensorDataset(torch.randn(9, 3, 8, 8), torch.from_numpy(Y[:9]))), "must be alike"),
    "one class of floats": (TensorDataset(torch.randn(9, 3, 8, 8), torch.zeros(9, dtype=torch.int64)), "of one class"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_easy_mistakes_get_one_clear_message(name: str) -> None:
    data, message = WRONG[name]
    with pytest.raises(HastenError, match=message) as caught:
        as_data(data)
    assert isinstance(caught.value, UnsupportedError if "stream" in name else DataError)
    assert len(str(caught.value)) < 600
