"""RandomResizedCrop and RandomErasing against their published definition, drawn one by one in plain Python."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from hasten.data import RandomErasing, RandomResizedCrop
from hasten.errors import SettingsError

from .writers import pixels

N = 4000
INDEX = np.arange(N)


def published_crop(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) as torchvision's RandomResizedCrop.get_params does."""
    for _ in range(10):
        target = height * width * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    ratio = width / height
    if ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif ratio > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(32, 32), (20, 48), (60, 12)])
def test_crops_are_drawn_as_published(size: tuple[int, int]) -> None:
    rng = random.Random(0)
    want = np.array([published_crop(rng, *size) for _ in range(N)])
    start, extent = RandomResizedCrop().boxes(size, INDEX, 2, 5)
    got = np.concatenate([start, extent], 1)
    assert (start >= 0).all()
    assert (start + extent <= size).all()
    for column in range(4):
        # Two samples of 4,000: the 99.99% bound of the Kolmogorov-Smirnov distance is 0.05.
        assert ks_2samp(got[:, column], want[:, column]).statistic < 0.05
    area, target = got[:, 2] * got[:, 3], want[:, 2] * want[:, 3]
    assert ks_2samp(area, target).statistic < 0.05
    assert ks_2samp(got[:, 2] / got[:, 3], want[:, 2] / want[:, 3]).statistic < 0.05


@pytest.mark.parametrize("shape", [(16, 16, 3), (9, 14, 1)])
def test_the_crop_is_resized_as_pillow_does(shape: tuple[int, int, int]) -> None:
    x = pixels(200, *shape)
    start, extent = RandomResizedCrop().boxes(shape[:2], np.arange(200), 1, 0)
    got = RandomResizedCrop()(torch.from_numpy(x), np.arange(200), 1, 0).numpy()
    assert got.dtype == np.uint8
    for image, (top, left), (height, width), out in zip(x, start, extent, got, strict=True):
        cut = Image.fromarray(image[top : top + height, left : left + width].squeeze(2) if shape[2] == 1 else
                              image[top : top + height, left : left + width])  # fmt: skip
        want = np.asarray(cut.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)).reshape(shape)
        assert np.abs(want.astype(int) - out).max() <= 1


def published_erase(
    rng: random.Random, height: int, width: int, ratio: tuple[float, float]
) -> tuple[int, int, int, int] | None:
    """Return (top, left, height, width) as torchvision's RandomErasing does, None for no change."""
    if rng.random() >= 0.5:
        return None
    for _ in range(10):
        target = height * width * rng.uniform(0.02, 0.33)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if h < height and w < width and h > 0 and w > 0:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return None


@pytest.mark.parametrize("ratio", [(0.3, 3.3), (0.3, 0.6)])
@pytest.mark.parametrize("size", [(32, 32), (10, 40)])
def test_erased_rectangles_are_drawn_as_published(size: tuple[int, int], ratio: tuple[float, float]) -> None:
    rng = random.Random(1)
    want = [box for _ in range(N) if (box := published_erase(rng, *size, ratio)) is not None]
    hole = RandomErasing(ratio=ratio)(torch.ones(N, *size, 2), INDEX, 0, 3) == 0
    assert (hole == hole[..., :1]).all()
    hole = hole[..., 0]
    rows, cols = hole.any(2), hole.any(1)
    assert (hole == rows[:, :, None] & cols[:, None, :]).all()
    hit = hole.flatten(1).any(1)
    assert abs(int(hit.sum()) - len(want)) < 130  # Standard deviation of the difference: 45.
    rows, cols = rows[hit].int(), cols[hit].int()
    got = np.stack([rows.argmax(1), cols.argmax(1), rows.sum(1), cols.sum(1)], 1)
    for column in range(4):
        assert ks_2samp(got[:, column], np.array(want)[:, column]).statistic < 0.06
    assert RandomErasing(p=0)(torch.ones(9, 8, 8, 1), np.arange(9), 0, 0).all()
    assert not RandomErasing(p=1)(torch.ones(9, 8, 8, 1), np.arange(9), 0, 0).flatten(1).all(1).any()


@pytest.mark.parametrize("step", [RandomResizedCrop(), RandomErasing()])
def test_keyed_by_seed_epoch_and_sample_alone(step: RandomResizedCrop | RandomErasing) -> None:
    x, index = torch.from_numpy(pixels(60, 12, 10, 3)), np.arange(60)
    whole = step(x, index, 4, 7)
    for part in np.array_split(np.random.default_rng(0).permutation(60), 7):
        assert torch.equal(step(x[part], part, 4, 7), whole[part])
    assert not torch.equal(step(x, index, 5, 7), whole)
    assert not torch.equal(step(x, index, 4, 8), whole)
    assert repr(step) == repr(eval(repr(step)))


def test_bad_settings() -> None:
    with pytest.raises(SettingsError, match=r"scale .*\(0\.5, 0\.2\)"):
        RandomResizedCrop(scale=(0.5, 0.2))
    with pytest.raises(SettingsError, match="ratio"):
        RandomErasing(ratio=(0, 1))
    with pytest.raises(SettingsError, match=r"p .*1\.5"):
        RandomErasing(p=1.5)
