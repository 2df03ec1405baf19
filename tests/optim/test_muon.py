"""Muon (training_recipes.md 9.7)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.errors import SettingsError, UnsupportedError
from hasten.optim import Muon, orthogonalise


def gaussian(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("shape", [(64, 216), (24, 576), (128, 32), (64, 64), (256, 24)])
@pytest.mark.parametrize("seed", range(3))
def test_singular_values_of_the_update(shape: tuple[int, int], steps: int, seed: int) -> None:
    values = torch.linalg.svdvals(orthogonalise(gaussian(*shape, seed), steps).double())
    assert float(values.max()) < 1.25
    if max(shape) >= 3 * min(shape):
        assert float(values.min()) > 0.5


def test_the_update_keeps_singular_vectors_and_ignores_scale() -> None:
    g = gaussian(32, 128, 0).double()
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    inner = u.T @ orthogonalise(g, dtype=torch.float64) @ v.T
    assert float((inner - torch.diag(inner.diag())).abs().max()) < 1e-10
    exact = orthogonalise(g, dtype=torch.float64)
    assert torch.allclose(orthogonalise(1000 * g, dtype=torch.float64), exact, atol=1e-6)
    assert not orthogonalise(torch.zeros(4, 8)).any()


def test_tall_is_the_transpose_of_wide() -> None:
    g = gaussian(96, 20, 1)
    assert torch.equal(orthogonalise(g), orthogonalise(g.T).T)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_steps_match_the_formula(momentum: float) -> None:
    filters = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = Muon([filters], lr=0.24, momentum=momentum, nesterov=momentum > 0)
    weight, buffer = filters.detach().clone(), torch.zeros(16, 8, 3, 3)
    for seed in range(4):
        grad = gaussian(16, 72, 10 + seed).reshape(16, 8, 3, 3)
        filters.grad = grad.clone()
        optimizer.step()
        buffer = momentum * buffer + grad
        direction = grad + momentum * buffer if momentum else buffer
        weight = weight * 4 / weight.norm()  # norm sqrt(16) before the update
        weight = weight - 0.24 * orthogonalise(direction.reshape(16, 72)).float().reshape(16, 8, 3, 3)
        assert torch.allclose(filters, weight, atol=2e-3)


def test_weight_norm_stays_at_the_square_root_of_the_filters() -> None:
    filters = nn.Parameter(5 * torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = Muon([filters], lr=0.01)
    for seed in range(20):
        filters.grad = gaussian(16, 72, seed).reshape(16, 8, 3, 3)
        optimizer.step()
        # the step itself is at most 1.25 * lr in each of 16 singular directions
        assert abs(float(filters.norm().detach()) - 4) <= 0.01 * 1.25 * 4 + 1e-5
    filters.grad = torch.zeros_like(filters)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert float(filters.norm().detach()) == pytest.approx(4, rel=1e-6)


def test_resume_is_exact() -> None:
    def make() -> tuple[nn.Conv2d, Muon]:
        conv = nn.Conv2d(4, 8, 3, bias=False)
        with torch.no_grad():
            conv.weight.copy_(gaussian(8, 36, 0).reshape(8, 4, 3, 3))
        return conv, Muon(conv.parameters(), lr=0.1)

    def step(conv: nn.Conv2d, optimizer: Muon, seed: int) -> None:
        conv.weight.grad = gaussian(8, 36, seed).reshape(8, 4, 3, 3)
        optimizer.step()

    whole, optimizer = make()
    for seed in range(6):
        step(whole, optimizer, seed)
        if seed == 2:
            middle, state = whole.weight.detach().clone(), optimizer.state_dict()
            state = {"state": {k: {n: t.clone() for n, t in v.items()} for k, v in state["state"].items()},
                     "param_groups": state["param_groups"]}  # fmt: skip
    resumed, second = make()
    with torch.no_grad():
        resumed.weight.copy_(middle)
    second.load_state_dict(state)
    for seed in range(3, 6):
        step(resumed, second, seed)
    assert torch.equal(resumed.weight, whole.weight)


def test_only_filters_are_taken() -> None:
    with pytest.raises(UnsupportedError, match=r"\(10, 4\)"):
        Muon(nn.Linear(4, 10).parameters())
    optimizer = Muon(nn.Conv2d(2, 2, 3, bias=False).parameters())
    with pytest.raises(UnsupportedError, match="heads"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(SettingsError) as problem:
        Muon(nn.Conv2d(2, 2, 3, bias=False).parameters(), lr=-1, momentum=1, steps=0)
    assert all(word in str(problem.value) for word in ("lr", "momentum", "steps"))
