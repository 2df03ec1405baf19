from __future__ import annotations

import numpy as np
import pytest

from hasten.data import DataSet, Images
from hasten.errors import DataError

ABC = ("a", "b", "c")


def random_images(n: int, seed: int = 0, classes: int = 3) -> Images:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    names = tuple(f"c{k}" for k in range(classes))
    return Images(rng.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8), labels, names)


@pytest.mark.parametrize(
    ("pixels", "labels", "classes", "message"),
    [
        (
            np.zeros((3, 2, 2, 1), np.uint8),
            [0, 1, 3],
            ABC,
            "1 labels lie outside the 3 classes.*3 at image 2",
        ),
        (np.zeros((3, 2, 2, 1), np.uint8), [0, -1, 2], ABC, "-1 at image 1"),
        (np.zeros((0, 2, 2, 1), np.uint8), [], ABC, "no images"),
        (np.zeros((3, 0, 2, 1), np.uint8), [0, 1, 2], ABC, "empty"),
        (np.zeros((3, 2, 2, 1), np.float32), [0, 1, 2], ABC, "uint8.*float32"),
        (np.zeros((3, 2, 2), np.uint8), [0, 1, 2], ABC, "shape"),
        (np.zeros((3, 2, 2, 1), np.uint8), [0, 1], ABC, "3 images but 2 labels"),
        (np.zeros((3, 2, 2, 1), np.uint8), [0.0, 1.0, 2.0], ABC, "integers"),
        (np.zeros((3, 2, 2, 1), np.uint8), [0, 0, 0], ("a",), "two classes"),
        (np.zeros((3, 2, 2, 1), np.uint8), [0, 1, 2], ("a", "b", "a"), "repeat"),
    ],
)
def test_bad_images_are_refused(
    pixels: object, labels: list[int], classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Images(pixels, np.array(labels, dtype=None if labels else np.int64), classes)  # type: ignore[arg-type]


def test_all_problems_come_at_once() -> None:
    with pytest.raises(DataError) as caught:
        Images(np.zeros((2, 2, 2), np.float64), np.array([0, 5, 1]), ABC)
    for part in ("float64", "shape", "outside", "2 images but 3 labels"):
        assert part in str(caught.value)


def test_moments_are_those_of_the_pixels() -> None:
    images = random_images(3000)
    unit = images.pixels.reshape(-1, 3) / 255
    assert images.mean == pytest.approx(unit.mean(0), abs=1e-12)
    assert images.std == pytest.approx(unit.std(0), abs=1e-12)


@pytest.mark.parametrize("n", [3, 10, 61, 300])
def test_stratified_shares_are_equal_and_nested(n: int) -> None:
    images = random_images(1000)
    tagged = Images(
        np.arange(1000, dtype="<u4").view(np.uint8).reshape(-1, 1, 1, 4), images.labels, images.classes
    )

    def numbers(k: int, seed: int) -> set[int]:
        chosen = tagged.stratified(k, seed).pixels.reshape(-1, 4).view("<u4")[:, 0]
        assert (np.diff(chosen.astype(int)) > 0).all()
        return set(chosen.tolist())

    counts = np.bincount(images.stratified(n, 5).labels, minlength=3)
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1
    assert numbers(n, 5) == numbers(n, 5)
    assert numbers(n - n % 3, 5) <= numbers(n, 5) <= numbers(600, 5)
    if n > 3:
        assert numbers(n, 5) != numbers(n, 6)


def test_stratified_says_which_class_is_too_small() -> None:
    images = Images(np.zeros((10, 2, 2, 1), np.uint8), np.array([0] * 8 + [1] * 2), ("many", "few"))
    with pytest.raises(DataError, match="'few' has 2 images"):
        images.stratified(8)
    with pytest.raises(DataError, match=r"2 .* to 10 images, got 11"):
        images.stratified(11)


def test_a_cut_loses_nothing_and_keeps_the_shares() -> None:
    images = random_images(500, 1)
    rest, part = images.cut(0.2, seed=3)

    def key(images: Images) -> list[bytes]:
        return sorted(row.tobytes() for row in images.pixels)

    assert sorted(key(rest) + key(part)) == key(images)
    assert np.abs(np.bincount(part.labels) - 0.2 * np.bincount(images.labels)).max() <= 0.5


def test_data_set_refuses_what_does_not_fit() -> None:
    train = random_images(30)
    with pytest.raises(DataError, match="one class, 'c1'"):
        DataSet("x", train.take(np.flatnonzero(train.labels == 1)), train, True)
    with pytest.raises(DataError, match="differ in classes"):
        DataSet("x", train, random_images(30, classes=2), True)
    with pytest.raises(DataError, match="alike"):
        DataSet("x", train, Images(train.pixels[:, :2], train.labels, train.classes), True)


def test_test_images_are_normalised_like_the_training_images() -> None:
    train = random_images(200)
    dark = Images(train.pixels // 4, train.labels, train.classes)
    data = DataSet("x", train, dark, True)
    assert data.test.mean == train.mean
    small = data.stratified(train=30, test=9)
    assert small.test.mean == small.train.mean != train.mean
    assert (len(small.train), len(small.test)) == (30, 9)
