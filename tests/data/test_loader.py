from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.data import AlternatingFlip, Crop, Cutout, Images, Loader
from hasten.errors import DataError, SettingsError

from .writers import cycle, pixels

AUGMENT = (Crop(2), AlternatingFlip(), Cutout(3))


def make(n: int, channels: int = 3) -> Images:
    return Images(pixels(n, 8, 8, channels), cycle(n, 4), tuple("abcd"))


IMAGES = make(101)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 101),
    epoch=st.integers(0, 9),
    seed=st.integers(0, 99),
    drop=st.booleans(),
    data=st.data(),
)
def test_starting_at_step_k_equals_skipping_k(
    batch: int, epoch: int, seed: int, drop: bool, data: st.DataObject
) -> None:
    loader = Loader(IMAGES, batch, seed=seed, augment=AUGMENT, drop_last=drop)
    all_batches = list(loader.epoch(epoch))
    assert len(all_batches) == len(loader) == (101 // batch if drop else -(-101 // batch))
    start = data.draw(st.integers(0, len(loader)))
    rest = list(Loader(IMAGES, batch, seed=seed, augment=AUGMENT, drop_last=drop).epoch(epoch, start=start))
    assert len(rest) == len(loader) - start
    for one, other in zip(all_batches[start:], rest, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def test_an_epoch_shows_each_sample_once_in_a_keyed_order() -> None:
    orders = []
    for epoch in range(3):
        loader = Loader(IMAGES, 10, seed=1, drop_last=False)
        index = torch.cat([batch.index for batch in loader.epoch(epoch)])
        assert sorted(index.tolist()) == list(range(101))
        orders.append(tuple(index.tolist()))
    assert len(set(orders)) == 3
    assert Loader(IMAGES, 10, seed=2).order(0).tolist() != list(orders[0])


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_batches_are_normalised_and_channels_last(channels: int) -> None:
    images = make(200, channels)
    (batch,) = Loader(images, 200, shuffle=False).epoch(0)
    assert batch.inputs.shape == (200, channels, 8, 8)
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch.inputs.mean((0, 2, 3)), torch.zeros(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        batch.inputs.std((0, 2, 3), correction=0), torch.ones(channels), atol=1e-5, rtol=0
    )
    assert torch.equal(batch.targets, torch.from_numpy(images.labels))
    (plain,) = Loader(images, 200, shuffle=False, normalise=False).epoch(0)
    torch.testing.assert_close(plain.inputs, torch.from_numpy(images.pixels).permute(0, 3, 1, 2) / 255)


def test_a_channel_without_variation_stays_finite() -> None:
    x = pixels(8, 4, 4, 2)
    x[..., 1] = 9
    (batch,) = Loader(Images(x, cycle(8, 2), ("a", "b")), 8).epoch(0)
    assert batch.inputs.isfinite().all()
    assert batch.inputs[:, 1].abs().max() < 1e-5


def test_other_types_and_custom_transforms() -> None:
    seen = []

    def negate(x: torch.Tensor, index: np.ndarray, epoch: int, seed: int) -> torch.Tensor:
        seen.append((index.tolist(), epoch, seed))
        return -x

    kwargs = {"seed": 4, "dtype": torch.bfloat16}
    one = next(Loader(IMAGES, 7, **kwargs).epoch(2))  # type: ignore[arg-type]
    two = next(Loader(IMAGES, 7, augment=(negate,), **kwargs).epoch(2))  # type: ignore[arg-type]
    assert two.inputs.dtype == torch.bfloat16
    assert torch.equal(one.inputs, -two.inputs)
    assert seen == [(one.index.tolist(), 2, 4)]


def test_the_images_are_never_changed() -> None:
    before = IMAGES.pixels.copy()
    for _ in Loader(IMAGES, 10, augment=AUGMENT).epoch(0):
        pass
    assert np.array_equal(before, IMAGES.pixels)


def test_bad_settings() -> None:
    with pytest.raises(DataError, match=r"batch_size 102 is larger than the data .101 images"):
        Loader(IMAGES, 102)
    assert len(Loader(IMAGES, 10**9, drop_last=False)) == 1
    with pytest.raises(SettingsError, match="got 0"):
        Loader(IMAGES, 0)
    with pytest.raises(SettingsError, match=r"0\.\.10 .*got 11"):
        Loader(IMAGES, 10).epoch(0, start=11)
    with pytest.raises(SettingsError, match="got -1"):
        Loader(IMAGES, 10).epoch(-1)
    with pytest.raises(SettingsError, match="before the other"):
        Loader(IMAGES, 10, augment=(Cutout(2), Crop(1)))
    with pytest.raises(SettingsError, match="floating"):
        Loader(IMAGES, 10, dtype=torch.int64)
