"""Gradient approximation: what is replaced and what stays exact, the schedule, the scales, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hasten import keyed
from hasten.errors import ConflictError, NoEffectError, SettingsError, UnsupportedError
from hasten.kernels.reference.one_patch import one_patch as reference
from hasten.methods.products import gradient_approximation as module
from hasten.methods.products.gradient_approximation import GradientApproximation
from hasten.products import arithmetic
from hasten.session import Session
from hasten.surgery import RemoveChannels

NAME = "gradient_approximation"
ALWAYS = {"period": 1, "exact_epochs": 0, "stop_fraction": 1.0, "measure_every": 0, "kernel": "native"}


@pytest.fixture(autouse=True)
def no_probe_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_PROBES", "off")


def rand(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("test", key))


def network(bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=bias), nn.Tanh(),
        nn.Conv2d(12, 10, 3, padding=1), nn.Tanh(), nn.Conv2d(10, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    for i, p in enumerate(model.parameters()):
        p.data = rand(*p.shape, key=i) / math.sqrt(max(1, p[0].numel()))
    return model


def data(n: int = 8, key: int = 50) -> tuple[Tensor, Tensor]:
    return rand(n, 3, 12, 12, key=key), torch.arange(n) % 4


def session(model: nn.Module, *, total: int | None = None, sgd: dict[str, Any] | None = None, seed: int = 0, **settings: Any) -> Session:  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), **(sgd or {"lr": 0.1}))
    method = GradientApproximation(**{**ALWAYS, **settings})
    return Session(model, optimizer, [method], sample=data(), total_samples=total, seed=seed)


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    layer.zero_grad()
    y.backward(g)
    found = {"output": y.detach(), "grad_input": x.grad, "weight": layer.weight.grad}
    if layer.bias is not None:
        found["bias"] = layer.bias.grad
    return {name: t.clone() for name, t in found.items() if isinstance(t, Tensor)}


def approximates(s: Session) -> bool:
    return s.witness()[NAME]["steps"] > 0


# -- what is computed
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("position", ["argmax_abs", "argmax", "fixed"])
@pytest.mark.parametrize("weight", ["sum", "max_value"])
def test_the_patch_gradient_is_the_formula(weight: str, position: str, layout: torch.memory_format) -> None:
    model = network().to(memory_format=layout)  # type: ignore[call-overload]
    session(model, position=position, weight=weight)
    x, g = rand(8, 8, 12, 12), rand(8, 12, 6, 6, key=1)
    got = gradients(model[2], x.contiguous(memory_format=layout), g.contiguous(memory_format=layout))
    expected = reference(g, x, [3, 3], [2, 2], [1, 1], position, weight)
    assert (got["weight"] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("padding", [0, 1])
def test_exact_where_each_map_has_one_value(padding: int) -> None:
    plain, model = nn.Conv2d(5, 6, 3, padding=padding), nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=padding), nn.Flatten(), nn.LazyLinear(4)
    )  # fmt: skip
    model(data()[0])
    plain.load_state_dict(model[1].state_dict())
    session(model)
    x = rand(8, 5, 12, 12)
    g = torch.zeros(8, 6, 10 + 2 * padding, 10 + 2 * padding)
    at = torch.randint(0, g[0, 0].numel(), (8, 6, 1), generator=keyed.generator("at"))
    g.flatten(2).scatter_(2, at, rand(8, 6, 1, key=2))
    a, b = gradients(model[1], x, g)["weight"], gradients(plain, x, g)["weight"]
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_exact_where_x_is_constant() -> None:
    x, g = torch.full((4, 5, 9, 9), 1.7) * torch.arange(1, 6)[:, None, None], rand(4, 6, 7, 7)
    exact = arithmetic.gradients(g, x, torch.zeros(6, 5, 3, 3), arithmetic.Geometry(True), (False, True, False))[1]  # fmt: skip
    got = reference(g, x, [3, 3], [1, 1], [0, 0])
    assert exact is not None
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_exact_where_the_map_is_one_place() -> None:
    x, g = rand(4, 5, 3, 3), rand(4, 6, 1, 1, key=1)
    exact = arithmetic.gradients(g, x, torch.zeros(6, 5, 3, 3), arithmetic.Geometry(True), (False, True, False))[1]  # fmt: skip
    assert exact is not None
    assert (reference(g, x, [3, 3], [1, 1], [0, 0]) - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_linear_in_x_and_homogeneous_in_the_gradient() -> None:
    model = network()
    session(model)
    x, z, g = rand(8, 8, 12, 12), rand(8, 8, 12, 12, key=1), rand(8, 12, 6, 6, key=2)

    def f(x: Tensor, g: Tensor) -> Tensor:
        return gradients(model[2], x, g)["weight"]

    largest = f(x, g).abs().max()
    assert (f(2 * x - 3 * z, g) - (2 * f(x, g) - 3 * f(z, g))).abs().max() <= 1e-4 * largest
    assert torch.equal(f(x, 4 * g), 4 * f(x, g))
    assert torch.equal(f(x, -g), -f(x, g))


def test_it_is_biased() -> None:
    """Guards against a claim of unbiasedness: a map whose strongest place is not its typical one."""
    x = torch.zeros(1, 1, 4, 4)
    x[..., 0, 0] = 1.0
    exact, patch = torch.zeros(()), torch.zeros(())
    draws = 400
    for key in range(draws):
        g = torch.full((1, 1, 4, 4), 1.0) + 0.1 * rand(1, 1, 4, 4, key=key)
        g[..., 0, 0] += 1.0
        patch += reference(g, x, [1, 1], [1, 1], [0, 0]).sum() / draws
        exact += (g * x).sum() / draws
    assert abs(exact - 2.0) < 0.05
    assert abs(patch - 17.0) < 0.2, "the whole sum falls on the strongest place"


@pytest.mark.parametrize("settings", [{"method": "zero"}, {"method": "random"}, {}, {"rescale": True}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_grad_input_stay_bit_for_bit(
    settings: dict[str, Any], layout: torch.memory_format
) -> None:
    plain = network().to(memory_format=layout)  # type: ignore[call-overload]
    model = network().to(memory_format=layout)  # type: ignore[call-overload]
    s = session(model, **{**settings, "measure_every": 3})
    for _ in range(2):
        s.step(*data())
    assert approximates(s)
    for layer in (2, 6):
        plain[layer].load_state_dict(model[layer].state_dict())
    for layer, c, o, size, out in ((2, 8, 12, 12, 6), (6, 10, 6, 6, 6)):
        x = rand(8, c, size, size).contiguous(memory_format=layout)
        g = rand(8, o, out, out, key=3).contiguous(memory_format=layout)
        a, b = gradients(model[layer], x, g), gradients(plain[layer], x, g)
        assert torch.equal(a["output"], b["output"])
        assert torch.equal(a["grad_input"], b["grad_input"])
        assert (a["bias"] - b["bias"]).abs().max() <= 1e-5 * b["bias"].abs().max()
        assert not torch.equal(a["weight"], b["weight"])


def test_zero_keeps_no_input_and_computes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(bias=False)
    s = session(model, method="zero")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        x = rand(8, 8, 12, 12).requires_grad_()
        y = model[2](x)
    assert x.data_ptr() not in kept
    monkeypatch.setattr(arithmetic, "gradients", counting(arithmetic.gradients, masks := []))
    y.sum().backward()
    assert masks == [(True, False, False)]
    assert not model[2].weight.grad.any()
    assert s.effects[NAME].touched["2"]


def counting(f: Any, masks: list[Any]) -> Any:
    def wrapped(g: Tensor, x: Tensor, w: Tensor, geometry: Any, wanted: tuple[bool, bool, bool]) -> Any:
        masks.append(wanted)
        return f(g, x, w, geometry, wanted)

    return wrapped


@pytest.mark.parametrize("freeze", [False, True])
def test_zero_leaves_weights_constant_without_momentum_and_decay(freeze: bool) -> None:
    model = network()
    before = {i: model[i].weight.detach().clone() for i in (2, 4, 6)}
    s = session(model, method="zero", freeze_on_zero=freeze)
    for _ in range(3):
        s.step(*data())
    assert all(torch.equal(model[i].weight, before[i]) for i in (2, 6))
    assert not torch.equal(model[4].weight, before[4])


def test_weight_decay_still_acts_unless_frozen() -> None:
    for freeze in (False, True):
        model = network()
        before = model[2].weight.detach().clone()
        s = session(model, method="zero", freeze_on_zero=freeze, sgd={"lr": 0.1, "weight_decay": 0.5})
        s.step(*data())
        expected = before if freeze else before * 0.95
        assert (model[2].weight - expected).abs().max() <= 1e-6
        assert (model[2].weight.grad is None) == freeze


def test_noise_is_as_large_as_the_last_exact_gradients_and_independent() -> None:
    model = network()
    s = session(model, method="random", measure_every=1000, decay=0.0)
    s.step(*data())
    exact = model[2].weight.grad.square().mean().sqrt().item()
    draws = []
    for _ in range(40):
        s.step(*data())
        draws.append(model[2].weight.grad.flatten().clone())
    noise = torch.stack(draws)
    count = noise.numel()
    assert count > 30_000
    assert abs(noise.square().mean().sqrt().item() / exact - 1) < 0.05
    assert abs(noise.mean().item()) < 5 * exact / math.sqrt(count)
    lag = (noise[1:] * noise[:-1]).mean().item()
    assert abs(lag) < 5 * exact**2 / math.sqrt(count)
    assert not torch.equal(model[6].weight.grad.flatten()[:100], noise[-1][:100])
    assert s.witness()[NAME] == {"steps": 40, "products_approximated": 80, "measured": 1}


def test_rescaling_gives_the_patch_gradient_the_exact_norm() -> None:
    model, bare = network(), network()
    s = session(model, rescale=True, measure_every=1000, sgd={"lr": 1e-9})
    other = session(bare, sgd={"lr": 1e-9})
    s.step(*data())
    exact = model[2].weight.grad.norm()
    s.step(*data())
    other.step(*data())
    assert abs(model[2].weight.grad.norm() / exact - 1) < 1e-4, "at the same weights both norms are equal"
    ratio = exact / bare[2].weight.grad.norm()
    assert abs(ratio - 1) > 0.05
    assert (model[2].weight.grad - ratio * bare[2].weight.grad).abs().max() < 1e-4 * exact


def test_the_measured_cosine_is_that_of_both_gradients() -> None:
    model, plain, bare = network(), network(), network()
    s = session(model, measure_every=1000)
    s.step(*data())
    other = session(bare)
    other.step(*data())
    loss = nn.functional.cross_entropy(plain(data()[0]), data()[1])
    loss.backward()
    expected = []
    for i in (2, 6):
        exact, patch = plain[i].weight.grad, bare[i].weight.grad
        assert (model[i].weight.grad - exact).abs().max() <= 1e-6, "a measured step is exact"
        expected.append(float((exact * patch).sum() / exact.norm() / patch.norm()))
    assert abs(s.witness()[NAME]["cosine"] - sum(expected) / 2) < 1e-4


def test_gradients_that_do_not_point_down_raise_the_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALARM", 2.0)  # no cosine reaches it
    monkeypatch.setattr(module, "ALARM_AFTER", 3)
    s = session(network(), measure_every=1, period=2)
    s.step(*data())
    s.step(*data())
    s.step(*data())
    s.step(*data())
    with pytest.warns(UserWarning, match="3 measured steps"):
        s.step(*data())


def test_on_a_trained_net_the_cosine_is_clearly_positive() -> None:
    model = network()
    s = session(model, period=2, measure_every=2, sgd={"lr": 0.05, "momentum": 0.9})
    for step in range(40):
        s.step(*data(16, key=step % 5))
    method = s.methods[0]
    assert isinstance(method, GradientApproximation)
    assert sum(method.cosines_) / len(method.cosines_) > 0.2


# -- the schedule
def acting(s: Session, steps: int, per_epoch: int = 1000) -> list[bool]:
    found = []
    for step in range(steps):
        if step % per_epoch == 0:
            s.start_epoch(step // per_epoch)
        before = s.witness()[NAME]["steps"]
        s.step(*data())
        found.append(s.witness()[NAME]["steps"] > before)
    return found


def test_period_two_calls_the_exact_kernel_in_half_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session(network(), period=2, method="patch")
    kernel, calls = torch.nn.Conv2d.forward, {"exact": 0}

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        calls["exact"] += self is s.model[2]  # type: ignore[index]
        return kernel(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    assert acting(s, 20) == [False, True] * 10
    assert calls["exact"] == 10, "PyTorch's own layer runs in half of the steps"
    assert s.witness()[NAME]["products_approximated"] == 20


def test_period_one_and_three_and_measured_steps() -> None:
    assert acting(session(network()), 5) == [True] * 5
    assert acting(session(network(), period=3), 7) == [False, False, True] * 2 + [False]
    s = session(network(), measure_every=4)
    assert acting(s, 9) == [False, True, True, True] * 2 + [False]
    assert s.witness()[NAME]["measured"] == 3


def test_exact_in_the_first_epoch_and_at_the_end() -> None:
    s = session(network(), total=20 * 8, exact_epochs=1, stop_fraction=0.8)
    assert acting(s, 20, per_epoch=5) == [False] * 5 + [True] * 11 + [False] * 4


def test_a_step_whose_batch_is_left_out_does_not_change_the_turn() -> None:
    s = session(network(), period=2)
    x, y = data()
    for step in range(8):
        s.step(x, y) if step % 2 else s.step(x[:0], y[:0])
    assert s.witness()[NAME]["steps"] == 2


@pytest.mark.parametrize("settings", [{"rescale": True}, {"method": "random"}, {"method": "zero"}])
def test_resume_is_bit_for_bit(settings: dict[str, Any]) -> None:
    def make() -> Session:
        sgd = {"lr": 0.1, "momentum": 0.9}
        return session(network(), period=2, measure_every=3, total=80, stop_fraction=0.9, sgd=sgd, **settings)

    whole = make()
    for step in range(10):
        if step == 5:
            state = {k: v for k, v in torch_copy(whole.state_dict()).items()}
        whole.step(*data(key=step))
    again = make()
    again.load_state_dict(state)
    for step in range(5, 10):
        again.step(*data(key=step))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True)
    )
    assert whole.witness() == again.witness()


def torch_copy(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: torch_copy(v) for k, v in state.items()}
    return [torch_copy(v) for v in state] if isinstance(state, list) else state


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch._dynamo does
def test_compiled_steps_equal_eager_ones_and_compile_a_graph_for_each_phase() -> None:
    torch._dynamo.reset()
    eager, compiled = (session(network(), period=2, rescale=True, measure_every=4) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled.forward = torch.compile(compiled.model, backend=counter, fullgraph=True)
    for step in range(12):
        a, b = eager.step(*data(key=step)), compiled.step(*data(key=step))
        assert abs(a - b) < 1e-4
    one, two = eager.witness()[NAME], compiled.witness()[NAME]
    assert two["steps"] == 6
    assert two["measured"] == one["measured"] == 3
    assert abs(one["cosine"] - two["cosine"]) < 1e-3
    assert counter.frame_count <= 3, "exact, approximate, measure"


# -- which layers
def test_alternate_takes_odd_layers_and_names_why_not() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 2),
        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.Conv2d(8, 8, 3, dilation=2, padding=2),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    x, y = rand(4, 3, 18, 18), torch.arange(4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    effect = Session(model, sgd, [GradientApproximation(**ALWAYS)], sample=(x, y)).effects[NAME]
    assert set(effect.touched) == {"2", "4"}
    reasons = {"0": "first", "1": "1x1", "3": "number 2", "5": "number 4", "6": "across groups", "7": "dilation", "9": "places",
               "11": "Linear"}  # fmt: skip
    assert set(reasons) == set(effect.skipped)
    for name, reason in reasons.items():
        assert reason in effect.skipped[name]
    assert effect.work is not None
    assert 0.5 < effect.work < 1.0


def test_lists_of_layers() -> None:
    assert set(session(network(), layers=("[46]",)).effects[NAME].touched) == {"4", "6"}
    with pytest.raises(SettingsError, match="match no Conv2d"):
        session(network(), layers=("nothing.*",))
    with pytest.raises(SettingsError, match="Linear, whose x has no patches"):
        session(network(), layers=("2", "9"))
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.LazyLinear(4))
    grouped(data()[0])
    with pytest.raises(SettingsError, match="undefined across groups in this release"):
        session(grouped, layers=("1",))
    with pytest.raises(NoEffectError, match="first convolution"):
        session(network(), layers=("0",))


def test_frozen_weights_and_single_places_are_left_alone() -> None:
    model = network()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    s = Session(model, optimizer, [GradientApproximation(**ALWAYS)], sample=data())
    assert s.effects[NAME].skipped["2"] == "its weight is frozen"
    small = nn.Sequential(nn.Conv2d(3, 4, 12), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(NoEffectError, match="one patch is exact already"):
        session(small)


def test_two_replacements_of_one_gradient_are_refused() -> None:
    model = network()
    s = session(model)
    with pytest.raises(ConflictError, match="grad_weight"):
        s.plan("2").kernel("grad_weight", module.NoWeightGradient(), "another")


def test_adaptive_optimizers_are_warned_of() -> None:
    model = network()
    with pytest.warns(UserWarning, match="use SGD"):
        Session(
            model, torch.optim.AdamW(model.parameters()), [GradientApproximation(**ALWAYS)], sample=data()
        )


def test_the_schedule_needs_the_length_of_the_run() -> None:
    with pytest.raises(UnsupportedError, match="total_samples"):
        session(network(), stop_fraction=0.8)


def test_layers_that_lose_channels_are_claimed_anew() -> None:
    model = network()
    s = session(model, rescale=True, period=2, measure_every=2)
    for _ in range(2):
        s.step(*data())
    before = s.witness()[NAME]
    method = s.methods[0]
    assert isinstance(method, GradientApproximation)
    ratios = dict(method.ratio_)
    s.surgery.apply([RemoveChannels("2", (0, 5))])
    assert method.ratio_ == ratios, "what was measured stays, by name"
    assert s.witness()[NAME] == before
    for step in range(2):
        s.step(*data(key=step))
    assert model[2].weight.grad.shape == (10, 8, 3, 3)
    assert s.witness()[NAME]["products_approximated"] == before["products_approximated"] + 2


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Answer probes with "patch", or with what the test puts in for a part of the key."""
    answers: dict[str, str] = {}

    def choose(key: str, candidates: dict[str, Any], *, rounds: int) -> str:
        for call in candidates.values():
            call()  # both ways must run
        return next((answer for part, answer in answers.items() if part in key), "patch")

    monkeypatch.setattr("hasten.methods.products.approximated_layers.choose", choose)
    return answers


def test_a_layer_whose_exact_gradient_is_faster_stays_exact_also_after_resume(probe: dict[str, str]) -> None:
    probe["w(12, 8, 3, 3)"] = "exact"
    s = session(network(), kernel="auto")
    assert set(s.effects[NAME].touched) == {"6"}
    assert "timed probe" in s.effects[NAME].skipped["2"]
    s.step(*data())
    probe.clear()
    again = session(network(), kernel="auto")
    assert set(again.effects[NAME].touched) == {"2", "6"}
    again.load_state_dict(torch_copy(s.state_dict()))
    assert set(again.effects[NAME].touched) == {"6"}
    s.step(*data())
    again.step(*data())
    assert torch.equal(s.model[2].weight, again.model[2].weight)  # type: ignore[index]
    probe["one_patch"] = "exact"
    with pytest.raises(NoEffectError, match="timed probe"):
        session(network(), kernel="auto")


@pytest.mark.parametrize(
    "settings",
    [{"method": "none"}, {"layers": []}, {"layers": ()}, {"layers": "all"}, {"period": 0}, {"period": True},
     {"exact_epochs": -1}, {"stop_fraction": 0.0}, {"stop_fraction": 1.5}, {"position": "corner"}, {"weight": "mean"},
     {"rescale": True, "method": "zero"}, {"decay": 1.0}, {"measure_every": -1}, {"freeze_on_zero": True},
     {"measure_every": 0, "method": "random"}, {"measure_every": 0, "rescale": True}, {"kernel": "dense"}],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        GradientApproximation(**settings)
