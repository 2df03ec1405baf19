from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from hasten.data import Crop, Cutmix, Cutout, Images, Loader, Mixup
from hasten.data.augment import BY_NAME
from hasten.data.mix import mixed
from hasten.errors import SettingsError

from .writers import cycle, pixels

N = 3000
INDEX = np.arange(N)
# Image n is n everywhere, so that a mixed pixel tells its shares.
X = torch.arange(N, dtype=torch.float32)[:, None, None, None].expand(N, 8, 6, 1).contiguous()
LABELS = torch.from_numpy(cycle(N, 5))


def shares(x: torch.Tensor) -> torch.Tensor:
    """Return the share of its own that each pixel kept: image n is mixed with image n - 1, the first with the last."""
    partner = X.roll(1, 0)
    return (x - partner) / (X - partner)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_a_beta_share_of_the_image_and_its_label(alpha: float) -> None:
    x, soft = mixed([Mixup(alpha)], X, LABELS, 5, INDEX, 1, 2)
    lam = shares(x)
    torch.testing.assert_close(lam, lam[:, :1, :1].expand_as(lam), atol=2e-3, rtol=0)
    lam = lam[:, 0, 0, 0]
    own = soft[
        INDEX, LABELS
    ]  # Neighbours differ in label, so this is lam itself, and more exact than from pixels.
    assert kstest(own.numpy(), beta(alpha, alpha).cdf).statistic < 0.05
    want = torch.zeros(N, 5)
    want[INDEX, LABELS] += lam
    want[INDEX, LABELS.roll(1)] += 1 - lam
    torch.testing.assert_close(soft, want, atol=2e-3, rtol=0)
    assert soft.dtype == torch.float32


def test_cutmix_is_a_rectangle_and_the_label_the_area_that_is_left() -> None:
    x, soft = mixed([Cutmix()], X, LABELS, 5, INDEX, 0, 0)
    own = shares(x)[..., 0] > 0.5
    assert ((x == X) | (x == X.roll(1, 0))).all()
    hole = ~own
    rows, cols = hole.any(2), hole.any(1)
    assert (hole == rows[:, :, None] & cols[:, None, :]).all()
    left = own.float().mean((1, 2))
    torch.testing.assert_close(
        soft[INDEX, LABELS], left
    )  # Neighbours differ in label, so nothing else adds to it.
    torch.testing.assert_close(soft.sum(1), torch.ones(N))
    # As torchvision draws it, one by one.
    rng = np.random.default_rng(0)
    want = []
    for _ in range(N):
        half, (row, col) = 0.5 * np.sqrt(1 - rng.beta(1, 1)), (rng.integers(8), rng.integers(6))
        tall, wide = int(half * 8), int(half * 6)
        y1, y2 = max(row - tall, 0), min(row + tall, 8)
        x1, x2 = max(col - wide, 0), min(col + wide, 6)
        want.append(1 - (y2 - y1) * (x2 - x1) / 48)
    grid = np.linspace(0, 1, 41)
    for q in grid:
        assert abs((left.numpy() <= q + 1e-6).mean() - (np.array(want) <= q + 1e-6).mean()) < 0.05


def test_a_share_depends_on_no_batch_and_several_mixes_take_turns() -> None:
    for step in (Mixup(), Cutmix()):
        _, whole = step.shares((8, 6), INDEX, 3, 1)
        part = np.array([7, 2900, 3])
        assert np.array_equal(step.shares((8, 6), part, 3, 1)[1], whole[part])
        assert not np.array_equal(step.shares((8, 6), INDEX, 4, 1)[1], whole)
    x, _ = mixed([Mixup(1.0), Cutmix()], X, LABELS, 5, INDEX, 0, 0)
    pure = ((x == X) | (x == X.roll(1, 0))).flatten(1).all(1)
    assert 0.44 < float(pure.float().mean()) < 0.56


def test_the_loader_gives_soft_targets_and_repeats_them() -> None:
    images = Images(pixels(40, 8, 8, 3), cycle(40, 4), tuple("abcd"))
    augment = (Crop(1), Cutout(2), Mixup(), Cutmix())
    whole = list(Loader(images, 8, seed=1, augment=augment).epoch(2))
    rest = list(Loader(images, 8, seed=1, augment=augment).epoch(2, start=3))
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
    batch = whole[0]
    assert batch.targets.shape == (8, 4)
    torch.testing.assert_close(batch.targets.sum(1), torch.ones(8))
    loss = torch.nn.functional.cross_entropy(torch.zeros(8, 4), batch.targets, label_smoothing=0.1)
    assert loss.item() == pytest.approx(np.log(4), abs=1e-5)


def test_every_named_augmentation_runs_in_a_loader_in_the_tables_order() -> None:
    images = Images(pixels(12, 10, 10, 3), cycle(12, 3), tuple("abc"))
    assert set(BY_NAME) == {
        "crop", "crop2", "flip", "alternating_flip", "cutout", "random_erasing", "randaugment", "trivialaugment",
        "random_resized_crop", "mixup", "cutmix",
    }  # fmt: skip
    for name, step in BY_NAME.items():
        (batch,) = Loader(images, 12, augment=(step,)).epoch(0)
        (plain,) = Loader(images, 12).epoch(0)
        assert batch.inputs.shape == (12, 3, 10, 10), name
        assert not torch.equal(batch.inputs, plain.inputs), name
    (batch,) = Loader(images, 12, augment=tuple(BY_NAME.values())).epoch(0)
    assert batch.inputs.isfinite().all()
    with pytest.raises(SettingsError, match="mixup and cutmix last"):
        Loader(images, 12, augment=(Mixup(), Crop(1)))
    with pytest.raises(SettingsError, match="alpha"):
        Mixup(0)
