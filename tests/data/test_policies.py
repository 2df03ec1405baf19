"""RandAugment and TrivialAugment against Pillow, whose operations torchvision uses on PIL images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from hasten.data import RandAugment, TrivialAugmentWide
from hasten.data.pixel_ops import OPERATIONS
from hasten.data.policies import NAMES, SIGNED
from hasten.errors import SettingsError, UnsupportedError

from .writers import pixels

Turn = Callable[[Image.Image, float], Image.Image]


def natural(n: int, height: int, width: int, channels: int) -> np.ndarray:
    """Return smooth images that do not use all 256 values, so that stretching and flattening change them."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = rng.normal(size=(n, 1, 1, channels, 3))
    image = (
        waves[..., 0] * y[None, :, :, None]
        + waves[..., 1] * x[None, :, :, None]
        + 0.3 * np.sin(9 * waves[..., 2] * (x * y)[None, :, :, None])
    )
    low, high = image.min((1, 2), keepdims=True), image.max((1, 2), keepdims=True)
    return (30 + 190 * (image - low) / (high - low)).astype(np.uint8)


def warp(a: float, b: float, c: float, d: float, e: float, f: float) -> Turn:
    return lambda image, _: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


# As torchvision's _apply_op does them on PIL images.
PILLOW: dict[str, Turn] = {
    "Identity": lambda image, m: image,
    "ShearX": lambda image, m: warp(1, math.tan(math.atan(m)), 0, 0, 1, 0)(image, m),
    "ShearY": lambda image, m: warp(1, 0, 0, math.tan(math.atan(m)), 1, 0)(image, m),
    "TranslateX": lambda image, m: warp(1, 0, -int(m), 0, 1, 0)(image, m),
    "TranslateY": lambda image, m: warp(1, 0, 0, 0, 1, -int(m))(image, m),
    "Rotate": lambda image, m: image.rotate(m),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    "Posterize": lambda image, m: ImageOps.posterize(image, int(m)),
    "Solarize": ImageOps.solarize,
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
}  # fmt: skip
MAGNITUDES = {
    "ShearX": (-0.99, -0.09, 0.3, 0.7), "ShearY": (-0.5, 0.09, 0.3, 0.99), "TranslateX": (-8.7, -0.6, 3.0, 32.0),
    "TranslateY": (-32.0, -2.2, 1.9, 5.0), "Rotate": (-130.5, -9.0, 30.0, 77.7), "Posterize": (2.0, 4.0, 7.0, 8.0),
    "Solarize": (0.0, 76.5, 178.5, 255.0),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(40, 33, 3), (16, 20, 1)])
def test_every_operation_is_pillows(name: str, shape: tuple[int, int, int]) -> None:
    magnitudes = MAGNITUDES.get(name, (-0.9, -0.27, 0.27, 0.99))
    x = np.concatenate([natural(6, *shape), pixels(6, *shape), np.full((1, *shape), 77, np.uint8)])
    worst = 0.0
    for magnitude in magnitudes:
        if shape[2] == 1 and name == "Color":
            continue  # Grey has no colour; Pillow's result differs from it by the rounding of its blend alone.
        got = OPERATIONS[name](torch.from_numpy(x), torch.full((len(x),), magnitude)).numpy()
        assert got.dtype == np.uint8
        assert got.shape == x.shape
        for one, out in zip(x, got, strict=True):
            image = Image.fromarray(one.squeeze())
            want = np.asarray(PILLOW[name](image, magnitude)).reshape(shape)
            # Pillow stretches in floating point, and so now and then ends one below.
            most = 1 if name == "AutoContrast" else 0
            worst = max(worst, float((np.abs(want.astype(int) - out) > most).mean()))
    # Nearest-pixel warps may choose the other of two pixels where a place falls on their border (at 45 degrees a whole
    # diagonal does).
    assert worst <= (0.01 if name in ("ShearX", "ShearY", "Rotate") else 0)


def test_a_fault_in_the_operations_would_be_seen() -> None:
    x = torch.from_numpy(pixels(1, 24, 17, 3) // 2)
    for name, magnitude in (
        ("ShearX", 0.3),
        ("Rotate", 30.0),
        ("Color", 0.5),
        ("Sharpness", 0.9),
        ("Equalize", 0.0),
    ):
        assert (OPERATIONS[name](x, torch.tensor([magnitude])) != x).float().mean() > 0.03, name


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """Replace the operations by ones that note the magnitudes they were given and change nothing."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for name in NAMES:
        monkeypatch.setitem(OPERATIONS, name, lambda x, m, name=name: seen[name].append(m.numpy()) or x)
    return seen


N = 14_000
X = torch.zeros(N, 10, 20, 1, dtype=torch.uint8)  # Height 10, width 20.


def test_randaugment_draws_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    RandAugment()(X, np.arange(N), 3, 1)
    share = 9 / 30
    want = {
        "ShearX": 0.3 * share, "ShearY": 0.3 * share, "TranslateX": 150 / 331 * 20 * share,
        "TranslateY": 150 / 331 * 10 * share, "Rotate": 30 * share, "Brightness": 0.9 * share, "Color": 0.9 * share,
        "Contrast": 0.9 * share, "Sharpness": 0.9 * share, "Posterize": 8 - round(9 / (30 / 4)),
        "Solarize": 255 * (1 - share),
    }  # fmt: skip
    for name in NAMES:
        m = np.concatenate(seen[name])
        # 2 x 14,000 draws over 14 operations: 2,000 each, standard deviation 43.
        assert abs(len(m) - 2000) < 200, name
        if name in want:
            np.testing.assert_allclose(np.abs(m), want[name], rtol=1e-6)
        if name in SIGNED:
            assert abs((m < 0).mean() - 0.5) < 0.06, name
        else:
            assert (m >= 0).all()


def test_trivialaugment_draws_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    TrivialAugmentWide()(X, np.arange(N), 3, 1)
    top = {"ShearX": 0.99, "ShearY": 0.99, "TranslateX": 32, "TranslateY": 32, "Rotate": 135, "Brightness": 0.99,
           "Color": 0.99, "Contrast": 0.99, "Sharpness": 0.99}  # fmt: skip
    for name in NAMES:
        m = np.concatenate(seen[name])
        assert abs(len(m) - 1000) < 150, name
        if name in top:
            bins = np.unique(np.rint(np.abs(m) / top[name] * 30))
            np.testing.assert_allclose(
                np.abs(m) / top[name] * 30, np.rint(np.abs(m) / top[name] * 30), atol=1e-4
            )
            assert bins.tolist() == list(range(31)), name
            assert abs((m < 0).mean() - 0.5) < 0.08
    assert set(np.concatenate(seen["Posterize"])) == {2, 3, 4, 5, 6, 7, 8}
    assert (np.concatenate(seen["Solarize"]).min(), np.concatenate(seen["Solarize"]).max()) == (0, 255)


@pytest.mark.parametrize("step", [RandAugment(), TrivialAugmentWide()])
def test_keyed_by_seed_epoch_and_sample_alone(step: RandAugment | TrivialAugmentWide) -> None:
    x, index = torch.from_numpy(natural(60, 12, 10, 3)), np.arange(60)
    before = x.clone()
    whole = step(x, index, 4, 7)
    assert torch.equal(x, before)
    for part in np.array_split(np.random.default_rng(0).permutation(60), 7):
        assert torch.equal(step(x[part], part, 4, 7), whole[part])
    assert not torch.equal(step(x, index, 5, 7), whole)
    assert not torch.equal(step(x, index, 4, 8), whole)
    assert repr(step) == repr(eval(repr(step)))


def test_bad_settings() -> None:
    with pytest.raises(SettingsError, match="31"):
        RandAugment(magnitude=31)
    with pytest.raises(SettingsError, match="got 1"):
        TrivialAugmentWide(1)
    with pytest.raises(UnsupportedError, match="float32"):
        RandAugment()(torch.zeros(2, 4, 4, 3), np.arange(2), 0, 0)
