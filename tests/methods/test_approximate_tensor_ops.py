"""Approximate tensor operations: the estimators, which terms they take, and what becomes of the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten import keyed
from hasten.conformance import start
from hasten.errors import NoEffectError, SettingsError, UnsupportedError
from hasten.methods.products import sampling
from hasten.methods.products.approximate_tensor_ops import ApproximateTensorOps, terms
from hasten.methods.products.scores import channel_sums, sample_norms
from hasten.session import Session


def rand(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("test", key))


class Net(nn.Module):
    """Stem, one convolution to look at, classifier."""

    def __init__(self, c: int = 32, o: int = 32, kernel: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.conv = nn.Conv2d(c, o, kernel, padding=kernel // 2)
        self.head = nn.Linear(o, 4)
        for i, p in enumerate(self.parameters()):
            p.data = rand(*p.shape, key=i) / math.sqrt(max(1, p[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.conv(torch.tanh(self.stem(x)))).mean((2, 3)))
        return y


def session(model: nn.Module, **settings: Any) -> Session:
    x, y = rand(8, 3, 6, 6), torch.arange(8) % 4
    method = ApproximateTensorOps(**{"start_at": 0.0, "stop_at": 1.0, "explore": 0.0, **settings})
    return Session(model, torch.optim.SGD(model.parameters(), lr=0.1), [method], sample=(x, y))


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, gradient of x, gradient of the weight."""
    x = x.detach().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(g)
    assert x.grad is not None
    assert isinstance(layer.weight.grad, Tensor)
    return y.detach(), x.grad, layer.weight.grad.clone()


# -- probabilities


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(8))
def test_water_filling_sums_to_k_and_is_optimal(seed: int, epsilon: float) -> None:
    n = 5 + 7 * seed
    w = rand(n, key=seed).exp() ** 2
    w[: seed // 3] = 0
    for k in {1, n // 2, n - 1, n}:
        p = sampling.bernoulli_probabilities(w, k, epsilon)
        assert abs(p.sum().item() - k) < 1e-6
        assert (p > 0).all()
        assert (p <= 1 + 1e-12).all()
        if epsilon == 0 and (w > 0).sum() > k:
            ratio = p / w.double()
            free = (p < 1 - 1e-9) & (w > 0)  # one constant c below 1, and those at 1 would exceed it
            assert torch.allclose(ratio[free], ratio[free][:1].expand(int(free.sum())), rtol=1e-6)
            assert (ratio[(p >= 1 - 1e-9)] <= ratio[free].max() * (1 + 1e-6)).all()


def test_matrix_product_errors_match_their_formulas() -> None:
    a, b = rand(6, 10), rand(10, 5, key=1) * torch.linspace(0.2, 2, 10)[:, None]
    terms_ = a.t()[:, :, None] * b[:, None, :]
    exact, w, k, draws = a @ b, a.norm(dim=0) * b.norm(dim=1), 4, 20_000
    u = torch.rand(draws, 10, generator=keyed.generator("mc"))
    p = sampling.bernoulli_probabilities(w, k, 0.0).float()
    kept = (u < p) / p
    mse = ((torch.einsum("dc,cij->dij", kept, terms_) - exact) ** 2).sum((1, 2)).mean()
    formula = ((1 - p) / p * w**2).sum()
    assert abs(mse / formula - 1) < 0.03

    crs = {}
    for name, q in (("best", sampling.crs_probabilities(w, 0.0)), ("even", torch.full((10,), 0.1).double())):
        edges = q.cumsum(0).float()
        index = torch.searchsorted(edges, u[:, :k].contiguous()).clamp_max(9)
        scale = (1 / (k * q.float()))[index]
        estimate = torch.zeros(draws, 10).scatter_add_(1, index, scale)
        crs[name] = ((torch.einsum("dc,cij->dij", estimate, terms_) - exact) ** 2).sum((1, 2)).mean()
    assert abs(crs["best"] / ((w.sum() ** 2 - (exact**2).sum()) / k) - 1) < 0.03
    assert crs["best"] < 0.98 * crs["even"]


def test_draws_follow_their_probabilities() -> None:
    p = sampling.crs_probabilities(torch.tensor([1.0, 0.0, 3.0, 6.0]), 0.1)
    index, scale = sampling.draw_crs(p, torch.rand(40_000, generator=keyed.generator("crs")))
    share = torch.bincount(index, minlength=4) / len(index)
    assert (share - p).abs().max() < 0.01
    assert torch.allclose(scale, 1 / (len(index) * p[index]))
    index, scale = sampling.draw_bernoulli(torch.tensor([0.5, 1.0, 0.2]), torch.tensor([0.6, 0.99, 0.1]))
    assert index.tolist() == [1, 2]
    assert torch.allclose(scale, torch.tensor([1.0, 5.0]))
    index, scale = sampling.draw_bernoulli(torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.7]))
    assert scale.tolist() == [0.0], "nothing drawn is a term with factor 0"


def test_top_takes_the_largest_and_ties_go_to_the_first() -> None:
    assert sampling.top(torch.tensor([1.0, 5.0, 2.0, 5.0, 0.0]), 3).tolist() == [1, 2, 3]
    assert sampling.top(torch.ones(9), 4).tolist() == [0, 1, 2, 3]


def test_explored_replaces_the_stated_share() -> None:
    scores = torch.arange(40.0)
    replaced = 0
    for i in range(2000):
        u = torch.rand(40, generator=keyed.generator("explore", i))
        index = sampling.top(sampling.explored(scores, 20, 0.05, u), 20)
        assert len(index.unique()) == 20
        replaced += int((index < 20).sum())
    assert abs(replaced / 2000 - 0.05 * 20) < 0.1


# -- scores


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("power", [1, 2])
def test_scores_are_the_norms(layout: torch.memory_format, power: int) -> None:
    x = rand(12, 5, 9, 7).contiguous(memory_format=layout)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        part = x.to(dtype)
        for dim, others in ((0, (1, 2, 3)), (1, (0, 2, 3))):
            expected = (x.abs() ** power).sum(others)
            assert torch.allclose(channel_sums(part, dim, power), expected, rtol=tolerance)
        assert torch.allclose(sample_norms(part), x.flatten(1).norm(dim=1), rtol=tolerance)
    even = torch.ones(64, 3, 32, 32).contiguous(memory_format=layout)
    assert channel_sums(even, 1, power, 8).tolist() == [64.0 * 32 * 32] * 3, (
        "an estimate is scaled to the whole"
    )
    rows = rand(4, 6, 5)
    assert torch.allclose(channel_sums(rows, -1, power), (rows.abs() ** power).sum((0, 1)), rtol=1e-5)


# -- how many


@pytest.mark.parametrize("c", [3, 16, 17, 64, 100])
def test_number_of_terms(c: int) -> None:
    for align in (1, 4, 16):
        for min_k in (1, 10, 40):
            for ratio in (0.1, 0.5, 1.0):
                k = terms(c, ratio, min_k, align)
                assert k == c or (k % align == 0 and k >= min_k and k >= int(c * ratio))
                assert k <= c
                assert k < max(int(c * ratio), min_k) + align


# -- the layer


@pytest.mark.parametrize("mode", ["forward", "backward", "blackbox"])
def test_ratio_one_is_bit_identical(mode: str) -> None:
    plain, model = Net(), Net()
    session(model, ratio=1.0, mode=mode)
    x, g = rand(8, 32, 6, 6), rand(8, 32, 6, 6, key=5)
    for a, b in zip(gradients(plain.conv, x, g), gradients(model.conv, x, g), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [1, 4])
def test_forward_equals_the_small_convolution(block: int, layout: torch.memory_format) -> None:
    model = Net().to(memory_format=layout)  # type: ignore[call-overload]
    session(model, block=block, score_images=None)
    x = (rand(8, 32, 6, 6) * torch.linspace(0.1, 3, 32)[:, None, None].roll(7, 0)).contiguous(
        memory_format=layout
    )
    g, w = rand(8, 32, 6, 6, key=5), model.conv.weight.detach()
    score = (x.square().sum((0, 2, 3)) * w.square().sum((0, 2, 3))).sqrt()
    units = (score.view(-1, block) ** 2).sum(1).sqrt()
    chosen = units.topk(16 // block).indices.sort().values
    s = (chosen[:, None] * block + torch.arange(block)).flatten()
    y, gx, gw = gradients(model.conv, x, g)
    xs, ws = x[:, s].requires_grad_(), w[:, s].requires_grad_()
    small = F.conv2d(xs, ws, model.conv.bias.detach(), 1, 1)
    small.backward(g)
    assert torch.allclose(y, small, atol=1e-5)
    rest = torch.ones(32, dtype=torch.bool).scatter_(0, s, False)
    assert not gx[:, rest].any(), "channels left out have gradients of exactly 0"
    assert not gw[:, rest].any(), "channels left out have gradients of exactly 0"
    assert xs.grad is not None
    assert ws.grad is not None
    assert torch.allclose(gx[:, s], xs.grad, atol=1e-5)
    assert torch.allclose(gw[:, s], ws.grad, atol=1e-4)
    error = ((y - F.conv2d(x, w, model.conv.bias.detach(), 1, 1)) ** 2).sum()
    assert torch.allclose(error, (F.conv2d(x[:, rest], w[:, rest], None, 1, 1) ** 2).sum(), rtol=1e-3)


def test_exact_where_the_channels_taken_hold_everything() -> None:
    model = Net()
    session(model, score_images=None, block=1)
    x = rand(8, 32, 6, 6)
    x[:, torch.randperm(32, generator=keyed.generator("p"))[:16]] = 0
    assert torch.allclose(model.conv(x), F.conv2d(x, model.conv.weight, model.conv.bias, 1, 1), atol=1e-5)
    # nothing to rank by: exact, so that a layer whose weights start at 0 learns in all of them
    model.conv.weight.data.zero_()
    _, _, gw = gradients(model.conv, rand(8, 32, 6, 6), rand(8, 32, 6, 6, key=1))
    assert (gw != 0).all()


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("scheme", ["crs", "bernoulli"])
def test_random_schemes_are_unbiased(scheme: str, mode: str) -> None:
    model = Net(o=16, kernel=1)
    settings = {"scheme": scheme, "mode": mode, "min_macs": 0, "align": 1, "block": 2, "min_k": 1}
    s = session(model, **settings, layers=("conv",))
    method = s.methods[0]
    assert isinstance(method, ApproximateTensorOps)
    x = rand(4, 32, 2, 2) * torch.linspace(0.3, 2, 32)[:, None, None]
    g = rand(4, 16, 2, 2, key=5)
    exact = gradients(Net(o=16, kernel=1).conv, x, g)
    watched = [0] if mode == "forward" else [1, 2]
    sums = {i: torch.zeros_like(exact[i], dtype=torch.float64) for i in watched}
    squares = {i: torch.zeros_like(exact[i], dtype=torch.float64) for i in watched}
    draws = 4000
    for step in range(draws):
        s.counters["step"] = step
        method._prepare()
        got = gradients(model.conv, x, g)
        for i in watched:
            sums[i] += got[i]
            squares[i] += got[i].double() ** 2
    if mode == "backward":
        assert torch.equal(got[0], exact[0]), "the forward pass of mode backward is exact"
    for i in watched:
        mean = sums[i] / draws
        error = ((squares[i] / draws - mean**2) / draws).sqrt() + 1e-6
        assert ((mean - exact[i]).abs() / error).max() < 5
        assert (error > 1e-4).any(), "nothing was sampled"


def test_linear_layers_are_sampled_over_features() -> None:
    class Mlp(nn.Sequential):
        pass

    model = Mlp(
        nn.Flatten(), nn.Linear(108, 256), nn.ReLU(), nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 4)
    )
    s = session(model, align=16, min_k=10, block=1)
    effect = s.effects["approximate_tensor_ops"]
    assert set(effect.touched) == {"1", "3"}
    assert "classifier" in effect.skipped["5"]
    layer = model[3]
    x, g = rand(8, 256), rand(8, 300, key=2)
    y, gx, gw = gradients(layer, x, g)
    keep = (x.norm(dim=0) * layer.weight.detach().norm(dim=0)).topk(128).indices
    assert torch.allclose(y, x[:, keep] @ layer.weight.detach()[:, keep].t() + layer.bias.detach(), atol=1e-4)
    assert int((gx != 0).any(0).sum()) == 128
    assert int((gw != 0).any(0).sum()) == 128


def test_blackbox_samples_output_and_differentiates_the_full_product() -> None:
    plain, model = Net(), Net()
    session(model, mode="blackbox")
    x, g = rand(8, 32, 6, 6), rand(8, 32, 6, 6, key=5)
    exact, got = gradients(plain.conv, x, g), gradients(model.conv, x, g)
    assert not torch.allclose(exact[0], got[0], atol=1e-3)
    assert torch.equal(exact[1], got[1])
    assert torch.equal(exact[2], got[2])


def test_evaluation_is_exact() -> None:
    plain, model = Net().eval(), Net()
    s = session(model)
    x = rand(8, 3, 6, 6)
    with s.inference() as forward, torch.no_grad():
        assert torch.equal(forward(x), plain(x))


def test_weights_only_chooses_the_same_channels_on_every_worker() -> None:
    chosen = []
    for worker in range(3):
        model = Net()
        s = session(model, weights_only=True, explore=0.2)
        s.step(rand(8, 3, 6, 6, key=100 + worker), torch.arange(8) % 4)
        gw = model.conv.weight.grad
        assert gw is not None
        chosen.append((gw != 0).any(0).any(-1).any(-1))
    assert chosen[0].sum() == 16
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])


def test_refresh_keeps_a_choice_and_resumes_it() -> None:
    def gradient_columns(s: Session, i: int) -> Tensor:
        s.step(rand(8, 3, 6, 6, key=i), torch.arange(8) % 4)
        gw = s.model.get_submodule("conv").weight.grad
        assert isinstance(gw, Tensor)
        return (gw != 0).any(0).any(-1).any(-1)

    s = session(Net(), refresh=3, explore=0.5, block=1)
    columns, state = [], None
    for i in range(9):
        if i == 4:
            state = {k: v for k, v in s.state_dict().items()}
            state["model"] = {k: v.clone() for k, v in state["model"].items()}
        columns.append(gradient_columns(s, i))
    for i in range(9):
        assert torch.equal(columns[i], columns[i // 3 * 3])
    assert not torch.equal(columns[0], columns[3])
    assert state is not None
    again = session(Net(), refresh=3, explore=0.5, block=1)
    again.load_state_dict(state)
    assert all(torch.equal(gradient_columns(again, i), columns[i]) for i in range(4, 9))


# -- attaching


def test_schedule_ends_in_exact_steps() -> None:
    s = start([ApproximateTensorOps(stop_at=0.5)])
    plans = s.methods[0]._plans  # type: ignore[attr-defined]
    on = []
    for _ in range(12):
        s.step(rand(32, 3, 16, 16), torch.arange(32) % 4)
        on.append(all(not plan.exact for plan in plans.values()))
    assert on == [True] * 6 + [False] * 6
    assert s.witness()["approximate_tensor_ops"]["steps"] == 6
    model = Net()
    with pytest.raises(UnsupportedError, match="total_samples"):
        session(model, stop_at=0.85)


def test_what_is_left_out_and_why() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 128, 1), nn.Conv2d(128, 256, 1),
        nn.Conv2d(256, 256, 1, stride=2), nn.Conv2d(256, 16, 3), nn.Conv2d(16, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    x = rand(4, 3, 16, 16)
    effect = Session(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [ApproximateTensorOps()], sample=(x, torch.zeros(4).long()),
        total_samples=100,
    ).effects["approximate_tensor_ops"]  # fmt: skip
    assert set(effect.touched) == {"3"}
    for name, word in {
        "0": "stem",
        "1": "groups",
        "2": "MACs",
        "4": "MACs",
        "6": "all of its",
        "9": "classifier",
    }.items():
        assert word in effect.skipped[name]


def test_work_is_the_share_of_macs_that_remains() -> None:
    stem, conv, head = 3 * 32 * 9 * 36, 32 * 32 * 9 * 36, 32 * 4
    total = 2 * stem + 3 * conv + 3 * head
    model = Net()
    work = session(model).effects["approximate_tensor_ops"].work
    assert work is not None
    assert abs(work - (total - 1.5 * conv) / total) < 1e-9


def test_the_stem_on_request_warns() -> None:
    with pytest.warns(UserWarning, match="drop colours"):
        session(Net(), layers=("stem",), align=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.0},
        {"ratio": 1.1},
        {"scheme": "top"},
        {"mode": "both"},
        {"min_k": 0},
        {"align": 0},
        {"epsilon": 1.0},
        {"explore": -0.1},
        {"start_at": 0.9, "stop_at": 0.2},
        {"refresh": 2, "scheme": "crs"},
        {"layers": "conv"},
        {"score_images": 0},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ApproximateTensorOps(**settings)


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(SettingsError, match="convv"):
        session(Net(), layers=("convv",))
    with pytest.raises(NoEffectError):
        session(Net(), skip=("*",))
