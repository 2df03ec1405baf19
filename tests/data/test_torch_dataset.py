from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from hasten.data import from_torch
from hasten.errors import DataError

from .writers import cycle, pixels

X, Y = pixels(20, 6, 5, 3), cycle(20, 4)


class Listed(Dataset[Any]):
    def __init__(self, items: list[Any], classes: list[str] | None = None) -> None:
        self.items = items
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


def pairs(convert: Any) -> Listed:
    return Listed([(convert(x), int(y)) for x, y in zip(X, Y, strict=True)])


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.from_numpy(X).permute(0, 3, 1, 2), torch.from_numpy(Y)),
        TensorDataset(torch.from_numpy(X).permute(0, 3, 1, 2) / 255, torch.from_numpy(Y)),
        pairs(lambda x: x),
        pairs(Image.fromarray),
        pairs(lambda x: (x / 255).astype(np.float32)),
        Listed([(x, y) for x, y in zip(X, Y, strict=True)]),
        Listed([(x, np.array(y)) for x, y in zip(X, Y, strict=True)]),
        Subset(pairs(lambda x: x), range(20)),
    ],
)
def test_all_forms_give_the_same_images(dataset: Dataset[Any]) -> None:
    images = from_torch(dataset)
    assert np.array_equal(images.pixels, X)
    assert np.array_equal(images.labels, Y)
    assert images.classes == ("0", "1", "2", "3")


def test_classes_and_grey_images() -> None:
    images = from_torch(Listed([(x[..., 0], int(y)) for x, y in zip(X, Y, strict=True)], list("wxyz")))
    assert images.shape == (6, 5, 1)
    assert images.classes == ("w", "x", "y", "z")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield X[0], 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "no length"),
        (Listed([]), "empty"),
        (Listed([(X[0], 0), X[1]]), "item 1 is a ndarray"),
        (Listed([(X[0], 0), (X[1][:4], 1)]), r"item 0 has shape \(6, 5, 3\), item 1 \(4, 5, 3\)"),
        (Listed([(X[0], 0), (X[1], 1.5)]), "label 1.5"),
        (Listed([(X[0], 0), (X[1], -1)]), "-1 at image 1"),
        (Listed([(X[0], 0), (X[1], 7)], ["a", "b"]), "outside the 2 classes"),
        (Listed([(X[0], 0), ((X[1] / 255 - 0.5) / 0.25, 1)]), "item 1 has values.*without normalisation"),
        (Listed([(X[0] / 255 * 0.998, 0)]), "not 8-bit"),
        (Listed([(X[0].astype(np.int32), 0)]), "int32"),
        (Listed([(X[0].ravel(), 0)]), "2 or 3 dimensions"),
        (Listed([(np.full((2, 2, 1), np.nan), 0)]), "not 8-bit"),
    ],
)
def test_what_cannot_be_kept_without_loss_is_refused(dataset: Dataset[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_torch(dataset)
