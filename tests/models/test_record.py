"""The record net: whitening, Dirac, frozen parts and test-time views (training_recipes.md 9.1, 9.2, 9.8)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hasten import models
from hasten.errors import DataError, SettingsError
from hasten.models.record import RecordNet, dirac_conv, tta
from hasten.models.whitening import whitening_filters


def images(n: int = 64, channels: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    """Smooth random images: neighbouring pixels and channels are correlated, as in photographs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, size + 4, size + 4, generator=draw)
    x = nn.functional.avg_pool2d(x, 5, stride=1)
    mix = torch.randn(channels, channels, generator=draw) + 2 * torch.eye(channels)
    x = torch.einsum("ij,njhw->nihw", mix, x)
    return (x - x.mean()) / x.std()


def record(name: str = "record-small", channels: int = 3, **options: str) -> RecordNet:
    model = models.build(name, in_channels=channels, seed=0, **options)
    assert isinstance(model, RecordNet)
    return model


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_responses_are_uncorrelated_with_unit_power(channels: int) -> None:
    x = images(256, channels)
    dims = 4 * channels
    filters = whitening_filters(x)
    responses = nn.functional.conv2d(x, filters[:dims]).permute(1, 0, 2, 3).flatten(1).double()
    second = responses @ responses.T / responses.shape[1]
    flat = x.unfold(2, 2, 1).unfold(3, 2, 1).permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2).double()
    eigenvalues = torch.linalg.eigvalsh(flat @ flat.T / flat.shape[1]).flip(0)
    strong = eigenvalues > 20 * 5e-4
    assert int(strong.sum()) >= dims // 2
    assert float((second - torch.diag(second.diag())).abs().max()) < 0.05
    assert float((second.diag()[strong] - 1).abs().max()) < 0.05
    # eps shrinks weak directions: their power is lambda / (lambda + eps), below one
    assert torch.allclose(second.diag(), eigenvalues / (eigenvalues + 5e-4), rtol=1e-3, atol=1e-4)


def test_second_half_of_the_filters_is_the_negative_of_the_first() -> None:
    model = record()
    assert not model.whitened
    model.init_whitening(images())
    weight = model.whiten.weight
    assert weight.shape == (24, 3, 2, 2)
    assert torch.equal(weight[12:], -weight[:12])
    assert model.whitened
    loaded = record()
    loaded.load_state_dict(model.state_dict())
    assert loaded.whitened


def test_whitening_is_deterministic_and_ignores_image_order() -> None:
    x = images(600)
    assert torch.equal(whitening_filters(x), whitening_filters(x.clone()))
    assert torch.allclose(whitening_filters(x), whitening_filters(x.flip(0)), atol=1e-3)


def test_frozen_parts_do_not_move_in_training() -> None:
    model = record()
    model.init_whitening(images())
    whiten = model.whiten.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for seed in range(3):
        model(images(8, size=32, seed=seed)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.whiten.weight, whiten)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in norms)
    assert all(bool(m.bias.any()) for m in norms)
    assert {(m.eps, m.momentum) for m in norms} == {(1e-12, 0.4)}


@pytest.mark.parametrize(("c_in", "c_out"), [(8, 8), (4, 12)])
def test_dirac_conv_is_the_identity_on_its_first_channels(c_in: int, c_out: int) -> None:
    conv = dirac_conv(c_in, c_out)
    x = torch.randn(2, c_in, 7, 7, generator=torch.Generator().manual_seed(0))
    y = conv(x)
    assert torch.allclose(y[:, :c_in], x, atol=1e-6)
    if c_out > c_in:
        assert bool(conv.weight[c_in:].any())
        assert not torch.allclose(y[:, c_in : 2 * c_in], x, atol=1e-2)


def test_global_pool_is_the_recipes_three_by_three_pool_at_32_pixels() -> None:
    model = record().eval()
    x = images(4, size=32)
    with torch.no_grad():
        features = model.layers(model.activ(model.whiten(x)))
        assert features.shape[-2:] == (3, 3)
        by_recipe = model.head(nn.functional.max_pool2d(features, 3).flatten(1)) / 9
        assert torch.allclose(model(x), by_recipe, rtol=1e-6, atol=0)


def test_muon_variant_has_a_unit_head() -> None:
    model = record(variant="muon")
    assert float(model.head.weight.detach().std()) == pytest.approx(1, rel=1e-5)
    assert model.scale == 1 / 128


def test_record96_adds_its_residual_before_the_last_activation() -> None:
    model = record("record96").eval()
    group = model.layers[0]
    x = images(2, 24, 10)
    with torch.no_grad():
        first = group.activ(group.norm1(group.pool(group.conv1(x))))
        inner = group.activ(group.norm2(group.conv2(first)))
        assert torch.allclose(group(x), group.activ(group.norm3(group.conv3(inner)) + first), atol=1e-6)


class Invariant(nn.Module):
    """Logits that do not change under a mirror or any shift that keeps the content inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


@pytest.mark.parametrize("seed", range(3))
def test_views_agree_on_an_invariant_network(seed: int) -> None:
    x = torch.zeros(5, 4, 9, 9)
    x[:, :, 3:6, 3:6] = torch.rand(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    plain = tta(Invariant(), x, 0)
    assert torch.allclose(tta(Invariant(), x, 1), plain)
    assert torch.allclose(tta(Invariant(), x, 2), plain)


def test_views_and_weights_are_the_recipes() -> None:
    """A network that reads one pixel shows which views were taken, and with what weight."""

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, 4, 4]

    x = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    m = x.flip(-1)
    mirror = 0.5 * (x[:, :, 4, 4] + m[:, :, 4, 4])
    up = 0.5 * (x[:, :, 3, 3] + x.roll((1, 1), (2, 3)).flip(-1)[:, :, 4, 4])
    down = 0.5 * (x[:, :, 5, 5] + x.roll((-1, -1), (2, 3)).flip(-1)[:, :, 4, 4])
    assert torch.allclose(tta(Corner(), x, 1), mirror)
    assert torch.allclose(tta(Corner(), x, 2), 0.5 * mirror + 0.25 * up + 0.25 * down)
    with pytest.raises(SettingsError, match="level 3"):
        tta(Corner(), x, 3)


def test_images_that_cannot_be_whitened_are_refused() -> None:
    model = record()
    with pytest.raises(DataError, match="same value"):
        model.init_whitening(torch.full((8, 3, 8, 8), 0.3))
    with pytest.raises(DataError, match="patches"):
        model.init_whitening(images(1, size=4))
    with pytest.raises(DataError, match="normalise"):
        model.init_whitening(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    broken = images()
    broken[3, 1, 2, 2] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        model.init_whitening(broken)
    with pytest.raises(SettingsError, match="channels"):
        model.init_whitening(images(64, 1))
    assert not model.whitened
