"""Error-map pruning: which channels are kept, and that the gradients are those of a pruned error map."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten import keyed
from hasten.errors import ConflictError, NoEffectError, SettingsError, UnsupportedError
from hasten.methods.products.approximate_tensor_ops import ApproximateTensorOps
from hasten.methods.products.error_map_pruning import ErrorMapPruning, error_scores, kept_channels
from hasten.session import Session


def rand(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("test", key))


def network(o: int = 48) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, o, 3, stride=2, padding=1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(o, 4),
    )  # fmt: skip
    for i, p in enumerate(model.parameters()):
        p.data = rand(*p.shape, key=i) / math.sqrt(max(1, p[0].numel()))
    return model


def session(model: nn.Module, *methods: Any, **settings: Any) -> Session:
    x, y = rand(8, 3, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Session(model, optimizer, [*methods, ErrorMapPruning(**settings)], sample=(x, y))


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    layer.zero_grad()
    y.backward(g)
    found = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]
    return [t.clone() for t in found if isinstance(t, Tensor)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("gammas", [(0.0, 1.0), (1.0, 0.0), (1.0, 2.0)])
def test_gradients_are_those_of_the_pruned_error_map(
    gammas: tuple[float, float], block: int, layout: torch.memory_format
) -> None:
    plain, model = network(), network().to(memory_format=layout)  # type: ignore[call-overload]
    session(model, keep=0.5, gamma1=gammas[0], gamma2=gammas[1], block=block, score_images=None)
    x = rand(8, 32, 8, 8).contiguous(memory_format=layout)
    g = rand(8, 48, 4, 4, key=3) * torch.linspace(0.2, 2, 48).roll(11)[:, None, None]
    g = g.contiguous(memory_format=layout)
    score = 8 * gammas[0] * plain[2].weight.abs().sum((1, 2, 3)) + gammas[1] * g.abs().sum((0, 2, 3))
    units = score.view(-1, block).sum(1).topk(24 // block).indices
    kept = torch.zeros(48, dtype=torch.bool).view(-1, block).index_fill_(0, units, True).view(-1)
    got = gradients(model[2], x, g)
    expected = gradients(plain[2], x, g * kept[:, None, None])
    for name, a, b in zip(("output", "grad_input", "grad_weight", "grad_bias"), got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4), name
    assert torch.equal((got[2] != 0).flatten(1).any(1), kept), "the rows of channels left out are exactly 0"
    assert torch.equal(got[3] != 0, kept)


def test_keep_one_is_bit_identical() -> None:
    plain, model = network(), network()
    session(model, keep=1.0)
    x, g = rand(8, 32, 8, 8), rand(8, 48, 4, 4, key=3)
    for a, b in zip(gradients(model[2], x, g), gradients(plain[2], x, g), strict=True):
        assert torch.equal(a, b)


def test_forward_is_exact() -> None:
    plain, model = network(), network()
    session(model)
    x = rand(8, 3, 8, 8)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("n", [32, 33, 64, 100, 257])
def test_number_of_channels_kept(n: int) -> None:
    for percent in range(1, 101):
        exact = -(-n * percent // 100)
        assert kept_channels(n, percent / 100, 1) == exact
        eight = kept_channels(n, percent / 100, 8)
        assert exact <= eight <= min(exact + 7, n)
        assert eight % 8 == 0 or eight == n


def test_exactly_that_many_rows_are_kept_and_ties_are_deterministic() -> None:
    model = network()
    session(model, keep=0.3, round_to=1, block=1)
    even = torch.ones(8, 48, 4, 4)
    rows = (gradients(model[2], rand(8, 32, 8, 8), even)[2] != 0).flatten(1).any(1)
    assert rows.nonzero().view(-1).tolist() == list(range(15)), "of equal scores the first are kept"


def test_estimated_scores_rank_like_the_full_ones() -> None:
    scale = torch.linspace(0.5, 1.5, 64)[torch.randperm(64, generator=keyed.generator("p"))]
    g = rand(64, 64, 16, 16) * scale[:, None, None]
    w = rand(64, 8, 3, 3, key=1)
    for gammas in ((0.0, 1.0), (0.5, 1.0)):
        full, part = error_scores(g, w, *gammas), error_scores(g, w, *gammas, 8)
        assert (part / full - 1).abs().max() < 0.1
        shared = set(full.topk(32).indices.tolist()) & set(part.topk(32).indices.tolist())
        assert len(shared) >= 30


def test_work_counts_the_backward_macs() -> None:
    stem, conv, head = 3 * 32 * 9 * 64, 32 * 48 * 9 * 16, 48 * 4
    effect = session(network(), keep=0.5).effects["error_map_pruning"]
    total = 2 * stem + 3 * conv + 3 * head
    assert effect.work is not None
    assert abs(effect.work - (total - conv) / total) < 1e-9


def test_what_is_left_out_and_why() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 16, 3), nn.Conv2d(16, 128, 5, padding=2),
        nn.Conv2d(128, 36, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(36, 4),
    )  # fmt: skip
    x, y = rand(4, 3, 12, 12), torch.zeros(4).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    effect = Session(model, optimizer, [ErrorMapPruning(keep=0.9)], sample=(x, y)).effects[
        "error_map_pruning"
    ]
    assert set(effect.touched) == {"3"}
    for name, word in {"0": "MACs", "1": "groups", "2": "min_channels", "4": "all of its"}.items():
        assert word in effect.skipped[name]
    with pytest.raises(NoEffectError, match="min_channels"):
        session(network(o=16))


def test_window_follows_the_run() -> None:
    model = network()
    x, y = rand(8, 3, 8, 8), torch.arange(8) % 4
    with pytest.raises(UnsupportedError, match="total_samples"):
        session(model, start_at=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    s = Session(model, optimizer, [ErrorMapPruning(start_at=0.5)], sample=(x, y), total_samples=64)
    dropped = []
    for _ in range(8):
        s.step(x, y)
        gradient = model[2].weight.grad
        assert gradient is not None
        dropped.append(int((gradient == 0).flatten(1).all(1).sum()))
    assert dropped[:3] == [0] * 3
    assert dropped[3:] == [24] * 5
    assert s.witness()["error_map_pruning"] == {"steps": 5, "products_shrunk": 10, "channels_dropped": 120}


def test_shares_a_layer_with_input_channels_and_not_with_output_channels() -> None:
    s = session(network(), ApproximateTensorOps(stop_at=1.0, layers=("2",)))
    s.step(rand(8, 3, 8, 8), torch.arange(8) % 4)
    gradient = s.model.get_submodule("2").weight.grad
    assert isinstance(gradient, Tensor)
    assert int((gradient != 0).flatten(1).any(1).sum()) == 24
    assert int((gradient != 0).any(0).flatten(1).any(1).sum()) == 16
    with pytest.raises(ConflictError, match="error_map_pruning"):
        session(network(), ApproximateTensorOps(stop_at=1.0, mode="backward", min_macs=0))


@pytest.mark.parametrize(
    "settings",
    [{"keep": 0.0}, {"keep": 1.5}, {"gamma1": -1.0}, {"gamma1": 0.0, "gamma2": 0.0}, {"min_channels": 0},
     {"round_to": 0}, {"block": 0}, {"score_images": 0}, {"start_at": 1.0, "stop_at": 0.5}],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ErrorMapPruning(**settings)
