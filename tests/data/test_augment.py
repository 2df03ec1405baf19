from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.data import AlternatingFlip, Crop, Cutout, Flip, Images, Loader
from hasten.errors import SettingsError

from .writers import cycle, pixels

N = 300
X = torch.from_numpy(pixels(N, 12, 10, 3))
INDEX = np.arange(N)


@pytest.mark.parametrize("step", [Crop(3), Crop(3, "zeros"), Flip(), AlternatingFlip(), Cutout(5)])
def test_a_sample_does_not_depend_on_its_batch(step: Crop | Flip | AlternatingFlip | Cutout) -> None:
    whole = step(X, INDEX, 4, 7)
    assert whole.shape == X.shape
    assert whole.dtype == X.dtype
    order = np.random.default_rng(0).permutation(N)
    for part in np.array_split(order, 7):
        torch.testing.assert_close(step(X[part], part, 4, 7), whole[part], rtol=0, atol=0)
    assert repr(step) == repr(eval(repr(step)))


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
def test_every_crop_is_a_window_of_the_padded_image(mode: str) -> None:
    pad = 3
    out = Crop(pad, mode)(X, INDEX, 0, 1).numpy()  # type: ignore[arg-type]
    spec = {"mode": "reflect"} if mode == "reflect" else {"mode": "constant"}
    padded = np.pad(X.numpy(), ((0, 0), (pad, pad), (pad, pad), (0, 0)), **spec)  # type: ignore[call-overload]
    seen = np.zeros((7, 7), int)
    for i in range(N):
        hits = [
            (dy, dx) for dy in range(7) for dx in range(7)
            if np.array_equal(padded[i, dy : dy + 12, dx : dx + 10], out[i])
        ]  # fmt: skip
        assert len(hits) == 1
        seen[hits[0]] += 1
    # 300 draws over 49 places: each is expected 6.1 times; a missing row or column would be no chance.
    assert seen.sum(0).min() > 15
    assert seen.sum(1).min() > 15


def is_flipped(out: Tensor) -> Tensor:
    same = (out == X).flatten(1).all(1)
    mirrored = (out == X.flip(2)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    return mirrored


def test_alternating_flip_shows_both_orientations_in_any_two_epochs() -> None:
    for epoch in range(5):
        first, second = (is_flipped(AlternatingFlip()(X, INDEX, e, 0)) for e in (epoch, epoch + 1))
        assert (first ^ second).all()
        assert 110 < int(first.sum()) < 190
    assert (
        is_flipped(AlternatingFlip()(X, INDEX, 0, 0)) != is_flipped(AlternatingFlip()(X, INDEX, 0, 1))
    ).any()


def test_random_flip_repeats_half_of_the_images() -> None:
    first, second = (is_flipped(Flip()(X, INDEX, e, 0)) for e in (1, 2))
    assert 0.35 < (first == second).float().mean() < 0.65


def test_draws_do_not_repeat_over_epochs_and_samples() -> None:
    images = Images(
        np.random.default_rng(1).integers(0, 256, (500, 9, 9, 1), dtype=np.uint8), cycle(500, 2), ("a", "b")
    )
    x = torch.from_numpy(images.pixels)
    # The same two draws for two (epoch, sample) places would make equal columns over many seeds.
    places = torch.stack([
        torch.cat([_shift(Crop(4)(x[:40], np.arange(40), epoch, seed), x[:40]) for epoch in range(3)])
        for seed in range(25)
    ])  # fmt: skip
    columns = {tuple(column.flatten().tolist()) for column in places.transpose(0, 1)}
    assert len(columns) == 120


def _shift(out: Tensor, x: Tensor) -> Tensor:
    """Return the centre pixel's value, which tells the shift of a random image apart from others."""
    return out[:, 4, 4].to(torch.int64) * 256 + out[:, 4, 5].to(torch.int64)


def test_cutout_removes_one_square_and_keeps_the_rest() -> None:
    x = torch.ones(N, 12, 10, 3)
    out = Cutout(5)(x, INDEX, 0, 0)
    assert (out == out[..., :1]).all()
    hole = out[..., 0] == 0
    rows, cols = hole.any(2), hole.any(1)
    assert (hole == rows[:, :, None] & cols[:, None, :]).all()
    assert rows.sum(1).max() == cols.sum(1).max() == 5
    # The centre lies inside, so at the border at least two of the five rows remain.
    assert rows.sum(1).min() >= 2
    assert hole.any(0).all()
    assert (x == 1).all()


def test_steps_compose_like_one_after_the_other() -> None:
    images = Images(X.numpy(), cycle(N, 3), ("a", "b", "c"))
    steps = (Crop(2), AlternatingFlip(), Crop(1, "zeros"), Flip())
    loader = Loader(images, N, seed=3, augment=steps, shuffle=False, normalise=False)
    x = X
    for step in steps:
        x = step(x, INDEX, 5, 3)
    got = next(loader.epoch(5)).inputs.permute(0, 2, 3, 1) * 255
    torch.testing.assert_close(got, x.float(), rtol=0, atol=1e-3)


def test_bad_settings() -> None:
    with pytest.raises(SettingsError, match="-1"):
        Crop(-1)
    with pytest.raises(SettingsError, match="'wrap'"):
        Crop(1, "wrap")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="smaller than the image"):
        Crop(10)(X, INDEX, 0, 0)
    with pytest.raises(SettingsError, match="0"):
        Cutout(0)
