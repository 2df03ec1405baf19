"""Activation gradient pruning: thresholds, placement, unbiased weight gradients, state, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten import keyed
from hasten.errors import NoEffectError, SettingsError, UnsupportedError
from hasten.kernels.native import extension
from hasten.kernels.prune_gradient import prune_gradient
from hasten.methods.products import gradient_pieces as pieces
from hasten.methods.products import gradient_threshold as thresholds
from hasten.methods.products.activation_gradient_pruning import ActivationGradientPruning
from hasten.methods.products.gradient_sites import find_sites
from hasten.session import Session

NAME = "activation_gradient_pruning"
TABLE = {  # p: (tau / sigma, density, added variance / sigma**2)
    0.5: (0.6745, 0.7407, 0.038), 0.7: (1.0364, 0.6199, 0.127), 0.8: (1.2816, 0.5487, 0.223),
    0.9: (1.6449, 0.4597, 0.412), 0.95: (1.9600, 0.3975, 0.614), 0.99: (2.5758, 0.3085, 1.065),
}  # fmt: skip


def rand(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("test", key))


def with_norm() -> nn.Sequential:
    return filled(nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ))  # fmt: skip


def without_norm() -> nn.Sequential:
    return filled(nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(256, 4),
    ))  # fmt: skip


def filled(model: nn.Sequential) -> nn.Sequential:
    for i, p in enumerate(model.parameters()):
        if p.dim() > 1:
            p.data = rand(*p.shape, key=i) / math.sqrt(p[0].numel())
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            layer.bias.data = 0.1 * rand(len(layer.bias), key=100 + i)
    return model


X, Y = rand(16, 3, 8, 8), torch.arange(16) % 4


def session(model: nn.Module, seed: int = 0, lr: float = 0.1, **settings: Any) -> Session:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Session(model, optimizer, [ActivationGradientPruning(**settings)], sample=(X, Y), seed=seed)


def method_of(s: Session) -> ActivationGradientPruning:
    method = s.methods[0]
    assert isinstance(method, ActivationGradientPruning)
    return method


def gradients(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> list[Tensor]:
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# -- thresholds
@pytest.mark.parametrize("p", TABLE)
def test_table_of_thresholds_densities_and_variances(p: float) -> None:
    g = rand(1_000_000, key=7)
    level, density, variance = TABLE[p]
    tau = thresholds.threshold(p, float(g.abs().double().mean()))
    assert abs(tau / level - 1) < 0.005, "sqrt(2/pi) in the place of sqrt(pi/2) would be 36% off"
    assert abs(thresholds.expected_density(p) - density) < 1e-4
    assert abs(thresholds.added_variance(p) - variance) < 1e-3
    pruned, totals = prune_gradient(g, tau, keyed.key64("draw", str(p)))
    assert abs((pruned != 0).double().mean() / density - 1) < 0.01
    added = (pruned.double() - g.double()).square().mean()
    assert abs(added / variance - 1) < 0.025 if p <= 0.5 else abs(added / variance - 1) < 0.01
    assert totals[2] + totals[3] == (g.abs() < torch.tensor(tau)).sum()


def test_empirical_threshold_reaches_its_share_where_the_normal_one_does_not() -> None:
    sizes = torch.exp(2 * rand(200_000, key=3))
    tau = thresholds.quantile(sizes, 0.7, "test", 1)
    assert abs((sizes < tau).double().mean() - 0.7) < 5 * math.sqrt(0.7 * 0.3 / thresholds.SAMPLES)
    normal = thresholds.threshold(0.7, float(sizes.mean()))
    assert (sizes < normal).double().mean() > 0.85


def test_block_level_is_the_quantile_of_norms() -> None:
    norms = rand(200_000, 16, key=5).norm(dim=1)
    for p in (0.5, 0.9, 0.99):
        tau = thresholds.norm_level(p, 16) * float(norms.mean())
        assert abs((norms < tau).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / len(norms)) + 1e-3


@pytest.mark.parametrize("unit", ["strip", "map"])
def test_block_pruning_is_unbiased_and_drops_wholes(unit: str) -> None:
    g = rand(8, 32, 4, 4, key=6)
    rows = pieces.blocks_of(g, unit)
    assert torch.equal(pieces.unblocked(rows, g, unit), g)
    tau, draws = float(rows.norm(dim=1).mean()) * 1.2, 3000
    total = torch.zeros_like(rows, dtype=torch.float64)
    for draw in range(draws):
        pruned, norms, _ = pieces.prune_blocks(rows, tau, keyed.key64("blocks", draw))
        total += pruned
        if draw == 0:
            after = pruned.norm(dim=1)
            small = norms < tau
            assert ((after[small] == 0) | ((after[small] / tau - 1).abs() < 1e-5)).all()
            assert torch.equal(pruned[~small], rows[~small])
            assert 0 < (after == 0).sum() < small.sum()
    q = (norms / tau).clamp(max=1)[:, None].double()
    spread = rows.abs().double() * ((1 - q) / q / draws).sqrt()
    assert ((total / draws - rows).abs() <= 5.5 * spread + 1e-4).all()


# -- first-in first-out prediction
def test_prediction_waits_then_takes_the_mean_of_the_last() -> None:
    past: list[float] = []
    predictions = []
    for tau in (1.0, 2.0, math.nan, 6.0, math.inf, 7.0):
        predictions.append(thresholds.predicted(past, 2))
        past = thresholds.pushed(past, tau, 2)
    assert predictions == [None, None, 1.5, 1.5, 4.0, 4.0]
    assert past == [6.0, 7.0]


def test_first_batches_are_exact_and_then_the_prediction_prunes() -> None:
    plain, model = with_norm(), with_norm()
    s = session(model, n_f=2, kernel="dense", lr=0.0)
    seen: list[Tensor] = []
    model[1].register_full_backward_hook(lambda _, given, __: seen.append(given[0].clone()))
    for step in range(4):
        s.step(X, Y)
        same = all(
            torch.equal(a, b)
            for a, b in zip([p.grad for p in model.parameters()], gradients(plain), strict=True)
        )
        assert same == (step < 2)
    method = method_of(s)
    taus = [thresholds.threshold(0.9, float(g.abs().double().mean())) for g in seen]
    assert method.fifo_["0"] == pytest.approx(taus[2:], rel=1e-5)
    assert s.witness()[NAME]["gradients pruned"] == 4
    model_pruner = method._pruners[0]
    assert model_pruner._tau == pytest.approx(sum(taus[1:3]) / 2, rel=1e-5)


def test_a_batch_with_nan_is_not_remembered() -> None:
    model = with_norm()
    s = session(model, n_f=1, kernel="dense", lr=0.0)
    s.step(X, Y)
    before = {k: list(v) for k, v in method_of(s).fifo_.items()}
    x = X.clone()
    x[0] = torch.nan
    s.counters["updates"] += 1
    functional.cross_entropy(model(x), Y).backward()
    assert method_of(s).fifo_ == before
    assert set(before) == {"0", "3"}


# -- placement
def test_placement_after_batch_norm_and_after_relu() -> None:
    effect = session(with_norm(), kernel="dense").effects[NAME]
    assert set(effect.touched) == {"0", "3"}
    assert all("grad_output" in note for note in effect.touched.values())
    assert "neither batch norm nor ReLU" in effect.skipped["8"]
    effect = session(without_norm(), kernel="dense").effects[NAME]
    assert set(effect.touched) == {"3", "5"}
    assert all("grad_input" in note for note in effect.touched.values())
    assert "no gradient to prune" in effect.skipped["0"]


def test_functional_relu_and_norm_are_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.relu(self.a(x))
            return self.c(self.norm(self.b(x)).relu())

    net = Net()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    sites = find_sites(net, X)
    assert [sites[n].after for n in "abc"] == ["relu", "bn", ""]
    assert [sites[n].input_needs_gradient for n in "abc"] == [False, True, True]
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_both_products_see_the_same_pruned_gradient() -> None:
    plain, model = with_norm(), with_norm()
    s = session(model, n_f=0, kernel="dense", lr=0.0)
    before: dict[str, Tensor] = {}
    model[4].register_full_backward_hook(lambda _, given, __: before.update(g=given[0].clone()))
    model[2].register_full_backward_hook(lambda _, __, out: before.update(gi=out[0].clone()))
    model[3].register_forward_pre_hook(lambda _, given: before.update(x=given[0].detach().clone()))
    s.step(X, Y)
    g = before["g"]
    tau = method_of(s)._pruners[1]._tau
    assert tau is not None
    pruned, _ = prune_gradient(g, tau, keyed.key64(0, NAME, "noise", "3", 0, 0, 0))
    assert 0.2 < (pruned == 0).double().mean() < 0.8
    wanted = torch.ops.aten.convolution_backward(
        pruned,
        before["x"],
        plain[3].weight,
        None,
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
        (True, True, False),
    )
    assert torch.allclose(before["gi"], wanted[0], atol=1e-6)
    assert torch.allclose(model[3].weight.grad, wanted[1], atol=1e-5)  # type: ignore[arg-type]


def test_the_transform_is_drawn_once_also_when_others_make_new_tensors() -> None:
    model = with_norm()
    s = session(model, n_f=1, kernel="dense", lr=0.0)
    s.step(X, Y)
    pruner = method_of(s)._pruners[0]
    g = rand(16, 16, 8, 8, key=1)
    one, two = pruner(g), pruner(g.clone())
    assert torch.equal(one, two)
    assert not torch.equal(one, g)
    assert method_of(s).counts_["0"][0] == 1
    assert len(method_of(s).fifo_["0"]) == 1


class Residual(nn.Module):
    """A branch with batch norm beside a skip path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv, self.norm, self.head = (
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = functional.relu(self.norm(self.conv(x)) + self.skip(x))
        result: Tensor = self.head(out.mean((2, 3)))
        return result

    def skip(self, x: Tensor) -> Tensor:
        return x


def test_the_skip_path_keeps_its_gradient() -> None:
    found = []
    for pruned in (False, True):
        model = Residual()
        for i, p in enumerate(model.parameters()):
            p.data = 0.1 * rand(*p.shape, key=i)
        kept: list[Tensor] = []
        model.skip = lambda x, kept=kept: (x.register_hook(lambda _: None), _tap(x, kept))[1]  # type: ignore[method-assign, misc]
        if pruned:
            effect = session(model, n_f=0, kernel="dense").effects[NAME]
            assert set(effect.touched) == {"conv"}
        gradients(model)
        found.append((kept[-1], model.conv.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]


def _tap(x: Tensor, kept: list[Tensor]) -> Tensor:
    y = x.view_as(x)
    if y.requires_grad:
        y.register_hook(lambda g: kept.append(g.clone()))
    return y


# -- unbiased through the network
@pytest.mark.parametrize("make", [with_norm, without_norm])
@pytest.mark.parametrize("unit", ["element", "strip"])
def test_weight_gradients_are_unbiased_also_through_two_prunings(make: Any, unit: str) -> None:
    exact = [g.double() for g in gradients(make())]
    model = make()
    s = session(model, n_f=0, kernel="dense", unit=unit, p=0.8)
    draws = 1200
    sums = [torch.zeros_like(g) for g in exact]
    squares = [torch.zeros_like(g) for g in exact]
    for draw in range(draws):
        s.counters["updates"] = draw
        for i, g in enumerate(gradients(model)):
            sums[i] += g.double()
            squares[i] += g.double() ** 2
    noisy = 0
    for total, square, wanted in zip(sums, squares, exact, strict=True):
        mean = total / draws
        error = ((square / draws - mean**2).clamp(min=0) / draws).sqrt()
        if float(error.max()) <= 1e-6 * float(wanted.abs().max()):
            assert torch.allclose(mean, wanted, rtol=1e-4, atol=1e-7)
            continue
        noisy += 1
        z = ((mean - wanted) / error.clamp(min=1e-12)).flatten()
        # a sum of squares of correlated z is about their number; a bias of one error in each would double it
        assert float(z.square().mean()) < 1.6
        assert float(z.abs().max()) < 6.0
    assert noisy >= 2


# -- exactness
def test_p_zero_is_bit_identical() -> None:
    for make in (with_norm, without_norm):
        plain, model = make(), make()
        session(model, p=0.0, kernel="dense")
        for a, b in zip(gradients(model), gradients(plain), strict=True):
            assert torch.equal(a, b)


def test_p_zero_skips_natural_zeros_exactly() -> None:
    if extension() is None:
        pytest.skip("the extension is not built")
    plain, model = without_norm(), without_norm()
    s = session(model, p=0.0, kernel="native", lr=0.0)
    assert set(s.effects[NAME].touched) == {"0", "3", "5"}
    s.step(X, Y)
    for p, b in zip(model.parameters(), gradients(plain), strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-8)
    assert s.witness()[NAME]["grad_input skipping zeros"] == 2
    assert s.witness()[NAME]["grad_weight skipping zeros"] == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_native_products_agree_with_dense_ones(layout: torch.memory_format) -> None:
    if extension() is None:
        pytest.skip("the extension is not built")
    found = []
    for kernel in ("dense", "native"):
        model = without_norm().to(memory_format=layout)  # type: ignore[call-overload]
        s = session(model, n_f=0, kernel=kernel)
        s.step(X.contiguous(memory_format=layout), Y)
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))


def test_evaluation_and_no_grad_run_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_norm()
    session(model, n_f=0)
    wanted = with_norm().eval()(X)
    monkeypatch.setattr(pieces.Pruner, "__call__", lambda *_: pytest.fail("it pruned"))
    assert torch.equal(model.eval()(X), wanted)
    model.train()
    with torch.no_grad():
        model(X)


# -- what it tells and keeps
def test_densities_tell_natural_zeros_from_pruned_ones() -> None:
    model = with_norm()
    s = session(model, n_f=0, kernel="dense")
    s.step(X, Y)
    for found in method_of(s).densities().values():
        assert found["natural_zeros"] == 0
        assert 0.3 < found["pruned_zeros"] < 0.7
        assert found["density"] == pytest.approx(1 - found["pruned_zeros"])
    pruner = method_of(s)._pruners[0]
    s.counters["updates"] += 1
    g = rand(16, 16, 8, 8, key=2)
    g[:8] = 0
    method_of(s).counts_.clear()
    out = pruner(g)
    found = method_of(s).densities()["0"]
    assert found["natural_zeros"] == 0.5
    assert found["pruned_zeros"] == pytest.approx(float((out[8:] == 0).double().mean()) / 2)


def test_auto_remembers_its_choice_in_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    if extension() is None:
        pytest.skip("the extension is not built")
    asked: list[str] = []
    monkeypatch.setattr(pieces, "choose", lambda key, _, **__: (asked.append(key), "native")[1])
    s = session(without_norm(), n_f=1, lr=0.0)
    s.step(X, Y)
    s.step(X, Y)
    assert asked
    state = s.state_dict()
    monkeypatch.setattr(pieces, "choose", lambda *_, **__: pytest.fail("it asked again"))
    again = session(without_norm(), n_f=1, lr=0.0)
    again.load_state_dict(state)
    again.step(X, Y)
    s.step(X, Y)
    for a, b in zip(s.model.parameters(), again.model.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_removed_batch_norm_moves_the_pruning() -> None:
    from hasten.methods.loss.standardization_loss import StandardizationLoss

    model = with_norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    methods = [ActivationGradientPruning(kernel="dense"), StandardizationLoss()]
    s = Session(model, optimizer, methods, sample=(X, Y))
    assert set(s.effects[NAME].touched) == {"3"}
    assert "grad_input" in s.effects[NAME].touched["3"]


# -- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"p": 1.0}, "infinite threshold"), ({"p": -0.1}, r"\[0, 1\)"), ({"n_f": -1}, "whole number from 0"),
     ({"dist": "laplace"}, "allowed"), ({"unit": "row"}, "allowed"), ({"kernel": "fast"}, "allowed"),
     ({"layers": "conv"}, "tuple of patterns")],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ActivationGradientPruning(**settings)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv(functional.relu(self.conv(self.stem(x)))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def test_a_layer_used_twice_needs_leave() -> None:
    with pytest.raises(SettingsError, match=r"2 times.*shared=True"):
        session(Twice())
    s = session(Twice(), shared=True, n_f=2, kernel="dense")
    s.step(X, Y)
    assert len(method_of(s).fifo_["conv"]) == 2, "each run counts"
    s.step(X, Y)
    assert s.witness()[NAME]["gradients pruned"] == 2


def test_double_backward_is_refused() -> None:
    model = with_norm()
    session(model, n_f=0, kernel="dense")
    with pytest.raises(UnsupportedError, match="gradient of a gradient"):
        torch.autograd.grad(
            functional.cross_entropy(model(X), Y), list(model.parameters()), create_graph=True
        )


def test_what_is_left_out_and_why() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    x, y = rand(4, 3, 8, 8), torch.zeros(4).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NoEffectError, match="fewer than 1024"):
        Session(model, optimizer, [ActivationGradientPruning()], sample=(x, y))
    model = with_norm()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    s = Session(model, optimizer, [ActivationGradientPruning(skip=("nothing",))], sample=(X, Y))
    assert "no gradient" in s.effects[NAME].skipped["0"]
    assert "3" in s.effects[NAME].touched
    assert "among those to skip" in session(with_norm(), skip=("0",)).effects[NAME].skipped["0"]


def test_small_and_zero_gradients_pass() -> None:
    s = session(with_norm(), n_f=0, kernel="dense")
    pruner = method_of(s)._pruners[0]
    small, zero = rand(4, 16, 3, 3), torch.zeros(16, 16, 8, 8)
    assert pruner(small) is small
    assert pruner(zero) is zero
    assert method_of(s).fifo_.get("0", []) == []


def test_grouped_layers_are_pruned_by_dense_products() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
                          nn.Flatten(), nn.Linear(1024, 4))  # fmt: skip
    s = session(model, n_f=0)
    assert s.effects[NAME].touched["2"].startswith("prunes grad_input")
    assert "skips" not in s.effects[NAME].touched["2"]
    s.step(X, Y)
    assert s.witness()[NAME]["gradients pruned"] == 1
