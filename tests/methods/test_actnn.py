"""ActNN: what is exact is exact, what is rounded is unbiased, and the memory goes where it says."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten import keyed, method
from hasten.conformance import advance, differences, start, through_file_format
from hasten.errors import ConflictError, NonFiniteError, SettingsError, UnsupportedError
from hasten.measure.memory import SavedActivations
from hasten.methods.products.actnn import ActNN
from hasten.methods.products.compressed_allocation import (
    allocate,
    norm_sensitivity,
    objective,
    product_sensitivity,
)
from hasten.methods.products.compressed_codec import CompressedActivationError, GroupCodec, Run
from hasten.methods.products.compressed_layers import compress, restore
from hasten.session import Session


def rand(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("test", key))


def filled(model: nn.Module) -> nn.Module:
    for i, p in enumerate(model.parameters()):
        p.data = rand(*p.shape, key=i) / math.sqrt(max(1, p[0].numel())) + (p.dim() == 1)
    return model


def blocks(count: int = 6, width: int = 32, inplace: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(count):
        c_in = 3 if i == 0 else width
        layers += [nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    filled(model)
    return model


X, Y = rand(8, 3, 16, 16), torch.arange(8) % 4


def session(model: nn.Module, x: Tensor = X, y: Tensor = Y, **settings: Any) -> Session:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return Session(model, optimizer, [ActNN(**settings)], sample=(x, y), seed=7, total_samples=10_000)


def actnn(s: Session) -> ActNN:
    (found,) = s.methods
    assert isinstance(found, ActNN)
    return found


def gradients(model: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Return the output, and the gradients of the input and of all parameters, for a fixed gradient of the output."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x * 1)
    y.backward(rand(*y.shape, key=99).to(y))
    assert x.grad is not None
    return [y.detach().clone(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# -- exact parts
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_level_0_is_plain_training_bit_for_bit(layout: torch.memory_format, autocast: bool) -> None:
    plain = blocks().to(memory_format=layout)  # type: ignore[call-overload]
    wrapped = copy.deepcopy(plain)
    session(wrapped, level="L0")
    plain.train()
    x = X.contiguous(memory_format=layout)
    assert same(gradients(wrapped, x, autocast), gradients(plain, x, autocast))
    assert not differences(plain.state_dict(), wrapped.state_dict()), "running statistics differ"


EXACT = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "max 2": nn.MaxPool2d(2),
    "max 3 over 2": nn.MaxPool2d(3, 2, padding=1),
    "max 3 dilated": nn.MaxPool2d((3, 2), (2, 1), padding=(1, 0), dilation=(2, 3), ceil_mode=True),
    "average": nn.AvgPool2d(2),
    "average 3": nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
    "average divided": nn.AvgPool2d((2, 3), divisor_override=5),
    "dropout": nn.Dropout(0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", EXACT)
def test_exact_layers_give_pytorchs_gradients(
    name: str, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    plain = EXACT[name]
    small = copy.deepcopy(plain)
    compress(small)
    x = rand(3, 5, 11, 13).relu() if name.startswith("max") else rand(3, 5, 11, 13)  # ties among the zeros
    x = x.to(dtype).contiguous(memory_format=layout)
    found = []
    for module in (plain, small):
        torch.manual_seed(5)
        found.append(gradients(module, x))
    assert same(*found)
    assert torch.rand(()) == (torch.manual_seed(5), gradients(plain, x), torch.rand(()))[2], "the same draws"
    with SavedActivations() as kept:
        small(x.clone().requires_grad_() * 1)
    most = {"relu": x.numel() / 8, "dropo": x.numel() / 8, "max 2": 3 * 5 * 5 * 6, "avera": 0}.get(
        name[:5], x.numel()
    )
    assert kept.bytes <= most + 1
    assert "forward" in small.__dict__
    restore(small)
    assert "forward" not in small.__dict__


def test_pooling_an_infinite_or_missing_number() -> None:
    x = rand(2, 2, 8, 8)
    x[0, 0, 1, 1], x[1, 0, 3, 4], x[1, 1] = math.nan, math.inf, -math.inf
    small = nn.MaxPool2d(3, 2, padding=1)
    compress(small)
    for a, b in zip(gradients(small, x), gradients(nn.MaxPool2d(3, 2, padding=1), x), strict=True):
        assert torch.equal(a.nan_to_num(77), b.nan_to_num(77))


def test_batch_norm_forward_and_statistics_are_exact() -> None:
    plain = filled(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=None), nn.BatchNorm2d(16, affine=False),
                                 nn.BatchNorm2d(16, track_running_stats=False), nn.Flatten(), nn.Linear(16 * 14 * 14, 4)))  # fmt: skip
    model = copy.deepcopy(plain)
    s = session(model)
    assert sum("statistics" in note for note in s.effects["actnn"].touched.values()) == 3
    for key in range(3):
        x = rand(8, 3, 16, 16, key=key)
        assert torch.equal(model(x), plain(x))
    assert not differences(plain.state_dict(), model.state_dict())


def test_data_gradients_of_products_are_exact() -> None:
    for layer, shape in ((nn.Conv2d(8, 16, 3, padding=1), (8, 8, 16, 16)), (nn.Linear(64, 32), (4, 64, 64))):
        plain = nn.Sequential(filled(layer))
        model = copy.deepcopy(plain)
        session(model, rand(*shape), allocation="fixed")
        x = rand(*shape)
        wanted, found = gradients(plain, x), gradients(model, x)
        assert torch.equal(wanted[0], found[0])
        assert torch.equal(wanted[1], found[1])
        assert not torch.equal(wanted[2], found[2]), "grad_weight is that of rounded inputs"
        assert torch.equal(wanted[3], found[3])


# -- rounded parts
@pytest.mark.parametrize("settings", [{"allocation": "fixed"}, {"allocation": "samples", "bits": 2.5}])
@pytest.mark.parametrize("autocast", [False, True])
def test_weight_gradient_is_unbiased(settings: dict[str, Any], autocast: bool) -> None:
    draws = 500
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    filled(plain)
    model, x = copy.deepcopy(plain), rand(8, 8, 12, 16)
    s = session(model, x, min_bytes=0, **settings)
    exact = gradients(plain, x, autocast)[2].double()
    each = torch.stack([gradients(model, x, autocast)[2].double() for _ in range(draws)])
    one = (each - exact).norm() / draws**0.5 / exact.norm()
    mean = (each.mean(0) - exact).norm() / exact.norm()
    assert one > 0.01
    rounding = 0.004 if autocast else 0.0  # the weight's gradient itself is bfloat16 there
    assert mean < 1.3 * one / draws**0.5 + rounding
    assert s.witness()["actnn"]["tensors"] == draws


def test_nearest_is_biased() -> None:
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    filled(plain)
    model, x = copy.deepcopy(plain), rand(8, 8, 16, 16)
    session(model, x, allocation="fixed", rounding="nearest")
    exact = gradients(plain, x)[2]
    first, second = gradients(model, x)[2], gradients(model, x)[2]
    assert torch.equal(first, second)
    assert (first - exact).norm() / exact.norm() > 0.05


def test_small_maps_whose_channels_differ_in_scale_do_not_blow_up_gradients() -> None:
    """A group spans 64 channels here; codes of the input itself would put noise of 100 deviations into the quietest."""
    norm = nn.BatchNorm2d(64)
    x = (rand(64, 64, 2, 2) * torch.logspace(-2, 1, 64)[:, None, None]).requires_grad_()
    g = rand(64, 64, 2, 2, key=1)
    (exact,) = torch.autograd.grad(norm(x), x, g)
    compress(norm, GroupCodec(Run(("scales",), lambda: 0, 256, 0), "norm", 2))
    (ours,) = torch.autograd.grad(norm(x), x, g)
    error = (ours - exact).pow(2).sum((0, 2, 3)).sqrt() / exact.pow(2).sum((0, 2, 3)).sqrt()
    assert 0 < error.max() < 0.5


@pytest.mark.parametrize("inplace", [False, True])
def test_no_stale_memory_meets_a_gradient(inplace: bool) -> None:
    """A cache keyed by addresses, which are reused once codes are stored, would be off by 6% and more."""
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace), nn.Conv2d(16, 16, 3, padding=1)
    )
    filled(plain)
    model, x = copy.deepcopy(plain), rand(8, 3, 16, 16)
    session(model, x, level="L2")
    exact = gradients(plain, x)
    draws = [gradients(model, x) for _ in range(200)]
    assert torch.equal(draws[0][0], exact[0])
    for i, wanted in enumerate(exact):
        mean = torch.stack([d[i].double() for d in draws]).mean(0)
        if wanted.norm() > 1e-3:  # the bias before a batch norm has no gradient
            assert (mean - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("settings", [{}, {"allocation": "samples"}])
def test_memory_falls(settings: dict[str, Any], layout: torch.memory_format, autocast: bool) -> None:
    x = rand(16, 3, 16, 16).contiguous(memory_format=layout)
    y = torch.arange(16) % 4
    plain = blocks().to(memory_format=layout)  # type: ignore[call-overload]
    kept = []
    for s in (Session(plain, torch.optim.SGD(plain.parameters(), lr=0.1), sample=(x, y)),
              session(copy.deepcopy(plain), x, y, every=1, **settings)):  # fmt: skip
        for step in range(3):
            if step:
                s.step(x, y)
            with (
                SavedActivations(s.model) as saved,
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                s.forward(x)
        kept.append(saved.bytes)
    assert kept[0] / kept[1] >= (5.0 if autocast else 10.0)


def test_the_effect_says_what_is_kept() -> None:
    x = rand(16, 3, 16, 16)
    model = blocks()
    s = session(model, x, torch.arange(16) % 4, allocation="fixed")
    with SavedActivations(model) as saved:
        s.forward(x)
    said = float(s.effects["actnn"].saves.split("samples, ")[1].split(" MB")[0]) * 1e6
    assert abs(said / saved.bytes - 1) < 0.02


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.gelu, self.fc = nn.GELU(), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = self.gelu(self.conv2(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_functions_and_other_activations_are_told_with_their_bytes() -> None:
    skipped = session(Functional()).effects["actnn"].skipped
    size = 8 * 32 * 16 * 16 * 4 / 1e6
    assert f"keeps {size:.3g} MB" in skipped["the model"]
    assert f"as a GELU it keeps {size:.3g} MB" in skipped["gelu"]
    assert "2 dimensions" in skipped["fc"]


def test_small_frozen_and_foreign_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.MaxPool2d(8), nn.Conv2d(16, 8, 1),
        nn.Flatten(2), nn.Conv1d(8, 64, 1), nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    model[1].requires_grad_(False)
    s = session(model)
    effect = s.effects["actnn"]
    assert "frozen" in effect.touched["1"]
    assert "fewer than min_bytes" in effect.skipped["3"]
    assert "neither Conv2d nor Linear" in effect.skipped["5"]
    s.step(X, Y)
    assert s.witness()["actnn"]["tensors"] == 1, "of the frozen layer nothing is kept"
    s.step(X[:2], Y[:2])
    assert s.witness()["actnn"]["exact"] == 1, "a smaller batch falls below min_bytes"


def test_bad_numbers_come_back_as_such_or_raise() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    filled(model)
    x = rand(8, 8, 16, 16)
    session(model, x, allocation="fixed")
    x[0, 0, 5, 5] = math.inf
    assert gradients(model, x)[2].isnan().any()
    model = copy.deepcopy(nn.Sequential(nn.Conv2d(8, 8, 3)))
    session(model, x.nan_to_num(), allocation="fixed", debug=True)
    with pytest.raises(NonFiniteError, match="input of 0"):
        gradients(model, x)


# -- bits
def test_greedy_is_the_best_of_all_choices() -> None:
    g = keyed.generator("allocation")
    for case in range(20):
        c = torch.rand(5, generator=g) ** 4 * 100
        for budget in (5, 9, 12, 16):
            bits = allocate(c, None, budget, most=4)
            assert int(bits.sum()) == budget
            assert bits.min() >= 1
            assert bits.max() <= 4
            best = min(
                float(objective(c, torch.tensor(b)))
                for b in itertools.product(range(1, 5), repeat=5)
                if sum(b) <= budget
            )
            assert float(objective(c, bits)) <= best * (1 + 1e-9), case


def heap(c: list[float], w: list[float], budget: float) -> list[int]:
    """The authors' loop: from the least loss per unit weight, one bit at a time."""
    bits = [8] * len(c)
    while sum(b * x for b, x in zip(bits, w, strict=True)) > budget:
        losses = [
            (c[i] * ((2.0 ** (b - 1) - 1) ** -2 - (2.0**b - 1) ** -2) / w[i], -b, i)
            for i, b in enumerate(bits)
            if b > 1
        ]
        bits[min(losses)[2]] -= 1
    return bits


def test_one_sort_is_the_greedy_loop() -> None:
    g = keyed.generator("heap")
    for _ in range(20):
        c = (torch.rand(7, generator=g) ** 3).double()
        w = torch.randint(1, 50, (7,), generator=g).double()
        for average in (1.0, 1.7, 2.0, 3.3, 8.0):
            budget = average * float(w.sum())
            bits = allocate(c, w, budget)
            assert bits.tolist() == heap(c.tolist(), w.tolist(), budget)
            assert float((bits * w).sum()) <= budget + 1e-9


def test_equal_sensitivities_share_evenly() -> None:
    for value in (0.0, 3.0):
        for budget in (8, 13, 16, 30):
            bits = allocate(torch.full((8,), value), None, budget)
            assert int(bits.sum()) == budget
            assert int(bits.max() - bits.min()) <= 1


def test_sensitivities_follow_their_formulas() -> None:
    spread, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    got = product_sensitivity(spread, g, group=256, positions=64, kernel=9, groups=2)
    assert torch.allclose(got, 9 / 4 / 2 * (256 * spread / 64) * g)
    assert torch.allclose(norm_sensitivity(spread, group=256, positions=64), 256 * spread / 64)


def test_layers_share_the_budget_by_what_was_measured() -> None:
    model = blocks(4)
    s = session(model, every=2, bits=2.5, initial_bits=8)
    method_ = actnn(s)
    assert set(method_.bits_by_layer().values()) == {8}
    s.step(X, Y)
    bits = method_.bits_by_layer()
    weights = {"0": 3.0, "3": 32.0, "6": 32.0, "9": 32.0}
    assert sum(bits[n] * w for n, w in weights.items()) <= 2.5 * sum(weights.values())
    assert all(isinstance(b, int) for b in bits.values())
    for conv, norm in (("0", "1"), ("3", "4"), ("6", "7"), ("9", "10")):
        assert bits[conv] == bits[norm], "a norm follows the layer before it"
    assert s.witness()["actnn"]["allocations"] == 1
    s.step(X, Y)
    assert s.witness()["actnn"]["allocations"] == 1
    assert len(set(bits.values())) > 1, "a budget of a half bit is shared unevenly"


def test_measured_sensitivity_is_that_of_the_tensors() -> None:
    plain = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1))
    filled(plain)
    x = rand(8, 8, 16, 16)
    model = copy.deepcopy(plain)
    s = session(model, x, bits=8)
    method_ = actnn(s)
    method_._run.measuring = True
    y = model(x)
    g = rand(*y.shape, key=4)
    y.backward(g)
    groups = x.view(8, -1, 256)
    spread = (groups.amax(2) - groups.amin(2)).square().sum(1)
    norm = g.flatten(1).square().sum(1).mean()
    wanted = 9 / 4 * (256 * spread / 256) * norm
    found = method_._codecs["0"].sensitivity
    assert found is not None
    assert ((found / wanted - 1).abs() < 0.05).all()


def test_samples_of_a_batch_share_too() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    x = rand(8, 8, 16, 16) * torch.linspace(0.1, 4, 8)[:, None, None, None]
    s = session(model, x, allocation="samples", bits=2.5)
    (codes, meta, bits), kept = actnn(s)._codecs["0"].encode(x)
    assert int(bits.sum()) == 20
    assert bits.tolist() == sorted(bits.tolist())
    assert bits[0] < bits[-1]
    assert codes.numel() == 20 * 8 * 32
    assert kept.bits is None
    back = actnn(s)._codecs["0"].decode((codes, meta, bits), kept)
    assert ((back - x).abs() <= 1.02 * (x.amax() - x.amin()) / (2.0**bits - 1)[:, None, None, None]).all()


def test_gradients_of_samples_are_remembered() -> None:
    s = session(blocks(3), use_gradient=True, num_samples=20, allocation="samples", every=2)
    index = torch.arange(8) + 5
    s.step(X, Y, index)
    codec = actnn(s)._codecs["3"]
    assert codec.remembered is not None
    first = codec.remembered.clone()
    assert first.isnan().tolist() == [not 5 <= i < 13 for i in range(20)]
    s.step(X, Y, index)
    assert (codec.remembered[5:13] > 0).all()
    assert not torch.equal(codec.remembered[5:13], first[5:13])
    state = s.state_dict()["methods"]["actnn"]
    assert torch.equal(state["layers_"]["3"]["remembered"].nan_to_num(-1), codec.remembered.nan_to_num(-1))
    with pytest.raises(UnsupportedError, match="index"):
        s.step(X, Y)


# -- refusals
@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(0.5)]
)
def test_higher_gradients_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Flatten(), nn.LazyLinear(4))
    model(X)
    session(model)
    x = X.clone().requires_grad_()
    loss = model(x).square().sum()
    with pytest.raises(CompressedActivationError, match="higher-order gradients are not supported"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_higher_gradients_of_a_convolution_are_refused_and_a_retained_graph_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(4))
    model(X)
    session(model)
    loss = model(X).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "the same codes"
    with pytest.raises(UnsupportedError, match="create_graph"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"level": "L5"}, "forked PyTorch"),
        ({"level": "L6"}, "level"),
        ({"level": "L2", "bits": 3}, "1, 2, 4 or 8"),
        ({"allocation": "fixed", "bits": 2.5}, "1, 2, 4 or 8"),
        ({"bits": 0.5}, "from 1 to 8"),
        ({"bits": 9}, "from 1 to 8"),
        ({"initial_bits": 9}, "initial_bits"),
        ({"group_size": 100}, "multiples of 32"),
        ({"group_size": 0}, "multiples of 32"),
        ({"every": 0}, "every"),
        ({"min_bytes": -1}, "min_bytes"),
        ({"allocation": "all"}, "allocation"),
        ({"rounding": "up"}, "rounding"),
        ({"use_gradient": True}, "num_samples"),
        ({"debug": 1}, "debug"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ActNN(**settings)


def test_what_cannot_run_here_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="L3"):
        session(blocks(2), level="L4")
    model = blocks(2)
    with pytest.raises(ConflictError, match="compiled graph"):
        Session(model, torch.optim.SGD(model.parameters(), lr=0.1),
                [ActNN(), method("mixed_precision", dtype="float32", compile=True)], sample=(X, Y))  # fmt: skip


def test_swapping_moves_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Level L4 needs a GPU; here the way to the host and back is a copy, which must change nothing."""
    moved: list[int] = []

    def copied(tensor: Tensor) -> Tensor:
        moved.append(tensor.numel())
        return tensor.clone()

    monkeypatch.setattr("hasten.methods.products.compressed_codec._pinned", copied)
    found = []
    for swap in (False, True):
        model = blocks(2)
        s = session(model)
        actnn(s)._run.swap = swap
        found.append(gradients(model, X))
        assert bool(moved) == swap
    assert same(*found)


# -- state and randomness
def test_the_global_generator_moves_as_without() -> None:
    def train(compressed: bool) -> Tensor:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 196, 4)
        )
        filled(model)
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        s = Session(model, optimizer, [ActNN()] if compressed else [], sample=(X, Y))
        for _ in range(3):
            s.step(X, Y)
        return torch.rand(4)

    assert torch.equal(train(True), train(False))


def test_same_seed_same_weights_and_another_seed_others() -> None:
    def train(seed: int) -> Tensor:
        model = blocks(2)
        s = Session(model, torch.optim.SGD(model.parameters(), lr=0.1), [ActNN()], sample=(X, Y), seed=seed)
        s.step(X, Y)
        return model[0].get_parameter("weight").detach().clone()

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


@pytest.mark.parametrize("settings", [{"every": 4}, {"every": 3, "allocation": "samples"}, {"level": "L2"},
                                      {"every": 3, "allocation": "samples", "use_gradient": True, "num_samples": 192}])  # fmt: skip
def test_resume_is_bit_for_bit(settings: dict[str, Any]) -> None:
    whole = start([ActNN(**settings)])
    advance(whole, 5)
    saved = through_file_format(whole.state_dict())
    advance(whole, 10)
    again = start([ActNN(**settings)])
    again.load_state_dict(saved)
    advance(again, 10)
    assert not differences(whole.state_dict(), again.state_dict())
    assert whole.witness() == again.witness()


def test_a_state_without_bits_begins_anew() -> None:
    s = start([ActNN(every=3, initial_bits=8, bits=2)])
    advance(s, 2)
    state = s.state_dict()
    state["methods"]["actnn"] = {}
    again = start([ActNN(every=3, initial_bits=8, bits=2)])
    again.load_state_dict(state)
    assert set(actnn(again).bits_by_layer().values()) == {8}
    advance(again, 4)
    assert set(actnn(again).bits_by_layer().values()) != {8}


def test_surgery_is_followed() -> None:
    s = start([ActNN(every=2), method("net2net", narrow=0.5, at=(0.25, 0.6))])
    advance(s)
    (found,) = (m for m in s.methods if isinstance(m, ActNN))
    assert found.bits_by_layer()
    for name, module in s.model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.ReLU):
            assert "forward" in module.__dict__, f"{name} keeps everything"
            assert module.__dict__["forward"].module is module


def test_export_has_no_trace() -> None:
    s = session(blocks(2))
    s.step(X, Y)
    plain = s.export()
    assert not [n for n, m in plain.named_modules() if "forward" in m.__dict__]
    with s.inference() as forward:
        assert torch.equal(forward(X), plain(X))
    assert all("forward" in m.__dict__ for m in s.model.modules() if isinstance(m, nn.ReLU))
