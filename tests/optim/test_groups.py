"""Parameter groups and the decoupled rates (training_recipes.md 9.4)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten import models
from hasten.errors import SettingsError
from hasten.optim import decay_groups, torch_rates


@pytest.mark.parametrize("name", ["resnet8", "lenet", "vgg16", "densenet40", "record-small"])
@pytest.mark.parametrize("everything", [False, True])
def test_every_trainable_parameter_is_in_one_group(name: str, everything: bool) -> None:
    with torch.device("meta"):
        model = models.build(name)
    groups = decay_groups(model, 5e-4, all_parameters=everything)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    by_name = {group["name"]: group for group in groups}
    decayed = {id(p) for p in by_name["decay"]["params"]}
    weights = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.requires_grad
    }
    assert decayed == (set(held) if everything else weights)
    assert by_name["decay"]["weight_decay"] == 5e-4
    assert everything or by_name["no_decay"]["weight_decay"] == 0


def test_a_shared_parameter_is_held_once() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    assert sum(len(g["params"]) for g in decay_groups(nn.Sequential(a, b), 0.1)) == 3


def test_affine_norms_of_any_shape_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.LayerNorm([4, 5, 5]), nn.GroupNorm(2, 4))
    decay = decay_groups(model, 0.1)[0]["params"]
    assert [p is model[0].weight for p in decay] == [True]


@settings(deadline=None)
@given(
    lr=st.floats(0.1, 50),
    wd=st.floats(1e-4, 0.1),
    batch=st.integers(1, 8192),
    momentum=st.floats(0, 0.99),
    scale=st.floats(0.5, 128),
)
def test_decoupled_algebra(lr: float, wd: float, batch: int, momentum: float, scale: float) -> None:
    rates = torch_rates(lr, wd, batch_size=batch, momentum=momentum, bias_scale=scale)
    kilo = 1024 * (1 + 1 / (1 - momentum))
    assert rates.lr == pytest.approx(lr / kilo, rel=1e-9)
    assert rates.bias_lr == pytest.approx(scale * lr / kilo, rel=1e-9)
    assert rates.lr * rates.weight_decay == pytest.approx(wd * batch / kilo, rel=1e-9)
    assert rates.bias_lr * rates.bias_weight_decay == pytest.approx(wd * batch / kilo, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.85])
def test_a_constant_gradient_moves_the_weight_alike_for_any_momentum(momentum: float) -> None:
    """What "decoupled" means: the total move does not depend on momentum, once it has built up.

    PyTorch's Nesterov step at rest is lr * g * (1 + m/(1-m)) = lr * g / (1-m), the recipe counts 1 + 1/(1-m).
    """
    rates = torch_rates(2.0, 0.0, batch_size=1024, momentum=momentum)
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=rates.lr, momentum=momentum, nesterov=momentum > 0)
    for _ in range(200):
        w.grad = torch.ones_like(w)
        before = w.item()
        optimizer.step()
    expected = 2.0 / 1024 * (1 / (1 - momentum)) / (1 + 1 / (1 - momentum))
    assert before - w.item() == pytest.approx(expected, rel=1e-6)


def test_numbers_out_of_range() -> None:
    with pytest.raises(SettingsError):
        decay_groups(nn.Linear(1, 1), -1)
    with pytest.raises(SettingsError):
        torch_rates(0, 0.1, batch_size=1)
    with pytest.raises(SettingsError):
        torch_rates(1, 0.1, batch_size=1, momentum=1)
