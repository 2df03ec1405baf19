"""The part around an exported network: pixels of any size and kind become what the network saw in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hasten.data import Loader
from hasten.data.image_file import read_image
from hasten.errors import UnsupportedError
from hasten.exporting.pixels import Pixels

from .support import data


def around(
    network: nn.Module, size: tuple[int, int], channels: int = 3, shorter: int | None = None
) -> Pixels:
    resize = None if shorter is None else {"shorter_side": shorter}
    known = {"size": list(size), "mean": [0.0] * channels, "std": [1.0] * channels, "resize": resize}
    return Pixels(network, known)


def levels(x: Tensor) -> Tensor:
    """Return what reached the network, as levels from 0 to 255."""
    return (x * 255).round()


def test_images_of_the_right_size_reach_the_network_as_the_loader_gave_them() -> None:
    whole = data()
    pixels = torch.from_numpy(whole.test.pixels).permute(0, 3, 1, 2)
    net = Pixels(nn.Identity(), whole.preprocessing())
    batch = next(whole.evaluation().epoch(0))
    assert torch.equal(net(pixels[: len(batch.inputs)]), batch.inputs)
    assert isinstance(whole.evaluation(), Loader)


def test_every_level_is_the_same_in_uint8_and_in_floats() -> None:
    net = around(nn.Identity(), (16, 16), channels=1)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(levels(net(every)), every.float())
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(net(every.to(dtype) / 255), net(every))


@pytest.mark.parametrize("side", [8, 11])
def test_other_sizes_are_brought_to_size_as_the_reader_of_folders_does(side: int, tmp_path: Path) -> None:
    """Of two sides at once, up and down. Where the sizes fit, levels may differ by one: ties of the rounding."""
    net = around(nn.Identity(), (side, side), shorter=side)
    g = np.random.default_rng(0)
    other, count = 0, 0
    for height, width in ((20, 31), (9, 8), (5, 7), (64, 13), (8, 30), (40, 40), (3, 200), (21, 13)):
        pixels = g.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        wanted = read_image(tmp_path / "image.png", side)
        found = levels(net(torch.from_numpy(pixels).permute(2, 0, 1)[None]))[0].permute(1, 2, 0).numpy()
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 1, (height, width)
        other, count = other + int((found != wanted).sum()), count + wanted.size
    assert other < 0.1 * count


def test_an_oblong_network_gets_what_covers_it() -> None:
    net = around(nn.Identity(), (6, 12), channels=1)
    ramp = torch.linspace(0, 1, 48).expand(1, 1, 24, 48)
    seen = net(ramp)
    assert seen.shape == (1, 1, 6, 12)
    assert float((seen[0, 0] - torch.linspace(0, 1, 12)).abs().max()) < 0.05
    assert net(torch.zeros(1, 1, 100, 3)).shape == (1, 1, 6, 12)


def test_the_right_size_is_not_resized_though_files_were() -> None:
    pixels = torch.randint(
        0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(levels(around(nn.Identity(), (8, 8), shorter=11)(pixels)), pixels.float())


@pytest.mark.parametrize("wrong", [
    torch.full((1, 3, 8, 8), 200.0), torch.full((1, 3, 8, 8), -0.5), torch.full((1, 3, 8, 8), float("nan")),
    torch.full((1, 3, 8, 8), 7, dtype=torch.int64),
])  # fmt: skip
def test_anything_else_is_refused_and_not_guessed(wrong: Tensor) -> None:
    with pytest.raises(RuntimeError, match="pixels must be uint8, or floating point in"):
        around(nn.Identity(), (8, 8))(wrong)


def test_images_normalised_by_a_loader_of_the_users_need_raw() -> None:
    known: dict[str, Any] = {"size": [8, 8], "mean": None, "std": None, "resize": None}
    with pytest.raises(UnsupportedError, match="--raw"):
        Pixels(nn.Identity(), known)
