"""Limited precision: rounding at every place, updates that are not lost, switches without loss, exact resume."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten import keyed
from hasten.errors import ConflictError, SettingsError, UnsupportedError
from hasten.kernels.round_bfloat16 import round_bfloat16
from hasten.methods.forward import precision_bfloat16
from hasten.methods.forward.fixed_format import Format, StraightThrough, convert
from hasten.methods.forward.limited_precision import LimitedPrecision
from hasten.methods.forward.mixed_precision import MixedPrecision
from hasten.methods.forward.precision_bfloat16 import EmulatedWarning
from hasten.session import Session

NAME = "limited_precision"


@pytest.fixture(autouse=True)
def with_bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no warning depend on the machine."""
    monkeypatch.setattr(precision_bfloat16, "hardware_bfloat16", lambda device: True)


def rand(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("limited", key))


def network(norm: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    layers += [nn.BatchNorm2d(16)] if norm else []
    layers += [
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    for i, p in enumerate(model.parameters()):
        p.data = (
            rand(*p.shape, key=i) * (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1 * rand(*p.shape, key=i)
        )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data += 1
    return model


def batch(key: int = 0, n: int = 16) -> tuple[Tensor, Tensor]:
    return rand(n, 3, 10, 10, key=100 + key), torch.arange(n) % 4


def session(model: nn.Module | None = None, *methods: Any, total: int | None = 320, lr: float = 0.05, optimizer: Any = None,
            **settings: Any) -> Session:  # fmt: skip
    model = network() if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Session(model, optimizer, [*methods, LimitedPrecision(**settings)], sample=batch(), seed=5, total_samples=total)  # fmt: skip


def on_grid(x: Tensor, form: Format) -> bool:
    steps = x * 2.0**form.fl
    low, high = form.ends
    return bool(torch.equal(steps, steps.round()) and (x >= low).all() and (x <= high).all())


def products(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


# -- the format
def test_ends_step_and_words() -> None:
    form = Format(2, 14)
    assert (form.wl, form.eps, form.ends) == (16, 2**-14, (-2.0, 2 - 2**-14))
    y, saturated, _ = convert(torch.tensor([5.0, -5.0, torch.inf, -torch.inf]), form, 1)
    assert y.tolist() == [2 - 2**-14, -2.0, 2 - 2**-14, -2.0]
    assert saturated == 4


def test_an_update_smaller_than_half_a_step_is_lost_by_nearest_and_kept_in_the_mean_by_stochastic() -> None:
    """w = 1 and 1000 updates of eps / 10: nearest stays at 1, stochastic ends near 1 + 100 eps, over 400 weights."""
    form, n = Format(2, 10), 400
    ends = {}
    for rounding in ("nearest", "stochastic"):
        w = torch.ones(n)
        for step in range(1000):
            w = convert(w + form.eps / 10, form, keyed.key64("starve", step), rounding)[0]
        ends[rounding] = (w - 1) / form.eps
    assert (ends["nearest"] == 0).all()
    deviation = (1000 * 0.1 * 0.9) ** 0.5
    assert abs(ends["stochastic"].mean().item() - 100) < 5 * deviation / n**0.5
    assert ((ends["stochastic"] - 100).abs() < 6 * deviation).all()


def test_gradient_passes_inside_the_range_and_stops_where_it_saturated() -> None:
    x = (3 * rand(1000)).requires_grad_()
    met: list[Any] = []
    form = Format(2, 6)
    y = StraightThrough.apply(x, form, 3, "nearest", lambda *seen: met.append(seen))  # type: ignore[no-untyped-call]
    g = rand(1000, key=1)
    y.backward(g)
    low, high = form.ends
    inside = (x >= low) & (x <= high)
    assert x.grad is not None
    assert torch.equal(x.grad, g * inside)
    assert 0 < int((~inside).sum()) == met[0][1]


# -- the places
def test_every_tensor_of_a_layer_is_on_its_grid() -> None:
    s = session(until=1.0)
    layer = s.model[3]  # type: ignore[index]
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, given, out: seen.update(output=out))
    layer.register_full_backward_hook(lambda _, gi, go: seen.update(grad_input=gi[0]))
    s.step(*batch())
    f_err = Format(6, 10).moved(4)  # a batch of 16
    assert on_grid(seen["output"], Format(6, 10))
    assert on_grid(seen["grad_input"], f_err)
    assert on_grid(layer.weight.grad, Format(2, 14))
    for module in products(s.model).values():
        assert all(on_grid(p, Format(2, 14)) for p in module.parameters())
    norm = s.model[1]  # type: ignore[index]
    assert not on_grid(norm.weight, Format(2, 14))
    counts = s.witness()[NAME]
    assert counts["updates"] == 1
    assert counts["converted"] > 10_000


def test_numbers_on_the_grid_give_the_result_of_float32_exactly() -> None:
    """FL large: Convert changes nothing, so output and gradients are those of the plain layer, bit for bit."""
    plain, model = network(norm=False), network(norm=False)
    for m in (plain, model):
        for p in m.parameters():
            p.data = (p.data * 64).round() / 64
    wide = (8, 16)
    s = session(model, until=1.0, f_w=wide, f_act=wide, f_err=(8, 12), f_grad=wide, rounding="nearest")
    x = (rand(16, 16, 10, 10) * 8).round() / 8
    g = (rand(16, 24, 5, 5, key=2) * 8).round() / 8
    results = []
    for net in (plain, s.model):
        given = x.clone().requires_grad_()
        y = net[2](given)  # type: ignore[index]
        y.backward(g)
        results.append([y, given.grad, net[2].weight.grad])  # type: ignore[index]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_float32_from_the_start_is_plain_training() -> None:
    losses = []
    for settings in ({"until": 0.0}, {"schedule": ((0, "float32"),)}):
        s, plain = session(**settings), network()
        bare = Session(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), sample=batch())
        losses.append([[run.step(*batch(i)).item() for i in range(4)] for run in (s, bare)])
    assert all(ours == theirs for ours, theirs in losses)


def test_first_and_last_layer_stay_in_float32_at_eight_bits() -> None:
    small = {"f_w": (1, 7), "f_act": (4, 4), "f_err": (4, 4), "f_grad": (2, 6)}
    s = session(until=1.0, **small)
    s.step(*batch())
    names = list(products(s.model))
    for name, module in products(s.model).items():
        assert on_grid(module.weight, Format(1, 7)) == (name not in (names[0], names[-1]))  # type: ignore[arg-type]
    assert "float32" in s.effects[NAME].touched[names[0]]


def test_errors_count_as_those_of_the_summed_loss() -> None:
    """Halving the loss's scale by doubling the batch leaves the format's share of a sample the same."""
    s = session(until=1.0)
    layer = s.methods[0]._layers["3"]  # type: ignore[attr-defined]
    assert layer.form("grad_output", torch.zeros(16, 24, 5, 5)) == Format(2, 14)
    assert layer.form("grad_output", torch.zeros(64, 24, 5, 5)) == Format(0, 16)
    assert layer.form("grad_weight", torch.zeros(24, 16, 3, 3)) == Format(2, 14)


def test_running_scale_saves_errors_that_a_fixed_format_loses() -> None:
    kept = {}
    for scale in ("fixed", "running"):
        s = session(until=1.0, scale=scale, rounding="nearest", f_err=(6, 10), f_grad=(6, 10), lr=0.0)
        s.loss = lambda outputs, targets: 1e-5 * F.cross_entropy(outputs, targets)  # type: ignore[assignment]
        for i in range(3):
            s.step(*batch(i))
        gradient = s.model[3].weight.grad  # type: ignore[index]
        kept[scale] = (gradient != 0).double().mean()
        reference = network()
        (1e-5 * F.cross_entropy(reference(batch(2)[0]), batch(2)[1])).backward()  # type: ignore[no-untyped-call]
        if scale == "running":
            cosine = F.cosine_similarity(gradient.flatten(), reference[3].weight.grad.flatten(), dim=0)
            assert cosine > 0.99
    assert kept["fixed"] == 0
    assert kept["running"] > 0.9


def test_master_keeps_float32_weights_and_rounds_them_for_the_products() -> None:
    s = session(until=1.0, master=True, f_w=(2, 6))
    layer = s.model[3]  # type: ignore[index]
    before = layer.weight.detach().clone()
    out: list[Tensor] = []
    layer.register_forward_hook(lambda _, given, y: out.append(y.detach()))
    layer.register_forward_pre_hook(lambda _, given: out.append(given[0].detach()))
    s.step(*batch())
    x = convert(out[0], Format(6, 10), 0, "nearest")[0]
    rounded = convert(before, Format(2, 6), 1)[0]
    assert not on_grid(layer.weight, Format(2, 6))
    near = F.conv2d(x, rounded, layer.bias, 2, 1)
    assert 0 < (out[1] - near).abs().max() < 0.5, "its own draw of the noise"


# -- schedules
def test_switch_up_changes_no_bit_and_switch_down_less_than_a_step() -> None:
    schedule = ((0, {"f_w": (2, 8)}), (1, {"f_w": (2, 16)}), (2, "float32"), (3, {"f_w": (2, 9)}), (4, "bfloat16"), (5, "float32"))  # fmt: skip
    s = session(schedule=schedule)
    s.start_epoch(0)
    s.step(*batch())
    for epoch in (1, 2, 5):
        if epoch == 5:
            s.start_epoch(4)
            s.step(*batch())
        before = copy.deepcopy(s.model.state_dict())
        s.start_epoch(epoch)
        for name, value in s.model.state_dict().items():
            assert torch.equal(value.float(), before[name].float()), (epoch, name)
            assert value.dtype != torch.bfloat16
        s.step(*batch())
    s = session(schedule=((0, "float32"), (1, {"f_w": (2, 9)}), (2, "bfloat16")))
    s.step(*batch())
    before = copy.deepcopy(s.model.state_dict())
    s.start_epoch(1)
    moved = [(m.weight - before[f"{n}.weight"]).abs().max() for n, m in products(s.model).items()]  # type: ignore[operator]
    assert all(0 < step < 2**-9 for step in moved)
    before = copy.deepcopy(s.model.state_dict())
    s.start_epoch(2)
    for name, module in products(s.model).items():
        assert module.weight.dtype == torch.bfloat16
        old = before[f"{name}.weight"]
        assert ((module.weight.float() - old).abs() <= old.abs() * 2**-7).all()  # type: ignore[operator]
    assert s.witness()[NAME]["switches"] == 2


def test_until_follows_the_run() -> None:
    s = session(until=0.5, total=64)
    phases = []
    for i in range(4):
        s.step(*batch(i))
        phases.append(s.methods[0].phase_)  # type: ignore[attr-defined]
    assert phases == [0, 1, 1, 1]
    weight = s.model[3].weight  # type: ignore[index]
    assert not on_grid(weight, Format(2, 14))


@pytest.mark.parametrize("told", [True, False])
def test_patience_switches_once_the_loss_has_not_improved(told: bool) -> None:
    s = session(patience=2, total=None, lr=0.0)
    method = s.methods[0]
    assert isinstance(method, LimitedPrecision)
    phases = []
    for epoch, loss in enumerate([1.0, 0.8, 0.9, 0.85, 0.7]):
        s.start_epoch(epoch)
        phases.append(method.phase_)
        # what training says: the same numbers, or ones that fall all the time and are overruled by those told
        seen = 1.0 / (1 + epoch) if told else loss
        s.loss = lambda outputs, targets, seen=seen: 0 * F.cross_entropy(outputs, targets) + seen  # type: ignore[assignment, misc]
        s.step(*batch())
        if told:
            method.validated(loss)
    assert phases == [0, 0, 0, 0, 1], "best in epoch 1, none better in 2 and 3"


# -- bfloat16 weights
def test_bfloat16_weights_have_no_copy_and_the_optimizer_stays_in_float32() -> None:
    s = session(policy="bfloat16", until=1.0)
    for i in range(3):
        s.step(*batch(i))
    for module in products(s.model).values():
        assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    assert s.model[1].weight.dtype == torch.float32  # type: ignore[index]
    held = list(s.optimizers[0].state.items())
    parameters = {id(p) for p in s.model.parameters()}
    assert {id(p) for p, _ in held} == parameters
    assert all(slots["momentum_buffer"].dtype == torch.float32 for _, slots in held)
    assert [id(p) for g in s.optimizers[0].param_groups for p in g["params"]] == [
        id(p) for p in s.model.parameters()
    ]
    assert s.witness()[NAME]["forward_bfloat16"] == 3


def test_bfloat16_update_equals_its_definition_and_loses_nothing_in_the_mean() -> None:
    n = 20_000
    model = nn.Sequential(nn.Linear(n, 1, bias=False))
    model[0].weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x, y = torch.ones(2, n), torch.zeros(2)
    s = Session(model, optimizer, [LimitedPrecision(policy="bfloat16", until=1.0)], sample=(x, y), seed=1,
                loss=lambda outputs, targets: -(outputs.mean() * 2**-11))  # fmt: skip
    method = s.methods[0]
    assert isinstance(method, LimitedPrecision)
    for _ in range(16):
        old = model[0].weight.detach().float()
        key = method._key("0.weight", "weight", 0)
        s.step(x, y)
        gradient = model[0].weight.grad
        assert gradient is not None
        assert torch.equal(model[0].weight.detach(), round_bfloat16(old - gradient.float(), key))
    # a step is 2**-7 above 1; each update is 2**-11, an eighth of what nearest would need to move at all
    p, steps = 2**-4, 16
    mean = (model[0].weight.float().mean() - 1).item()
    assert abs(mean - steps * 2**-11) < 5 * 2**-7 * (steps * p * (1 - p) / n) ** 0.5
    assert (torch.ones(1) + 2**-11).bfloat16() == 1


def test_other_optimizers_step_on_float32_too() -> None:
    model = network()
    s = session(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        policy="bfloat16",
        until=1.0,
    )
    losses = [s.step(*batch()).item() for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]
    slots = s.optimizers[0].state[model[3].weight]
    assert slots["exp_avg"].dtype == slots["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize(
    "kind", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW, torch.optim.RMSprop]
)
def test_updating_part_by_part_changes_no_bit(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Float32 copies of a few parameters at a time, or of all at once, with parameters in groups of their own."""
    ends = []
    for part in (1, 1 << 30):
        monkeypatch.setattr(precision_bfloat16, "PART", part)
        model = network()
        norm = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        groups = [
            {"params": [p for p in model.parameters() if (id(p) in norm) == which]} for which in (True, False)
        ]
        s = session(model, optimizer=kind(groups, lr=1e-2), policy="bfloat16", until=1.0)
        for i in range(4):
            s.step(*batch(i))
        assert [len(g["params"]) for g in s.optimizers[0].param_groups] == [2, 8]
        assert set(s.optimizers[0].state) == set(model.parameters())
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_export_is_plain_and_in_float32() -> None:
    for policy in ("fixed", "bfloat16"):
        s = session(policy=policy, until=1.0)
        s.step(*batch())
        plain = s.export()
        assert {p.dtype for p in plain.parameters()} == {torch.float32}
        assert all(type(m).__module__.startswith("torch") for m in plain.modules())
        assert not any(m._forward_pre_hooks or m._load_state_dict_pre_hooks for m in plain.modules())
        for ours, theirs in zip(s.model.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(ours.float(), theirs.float())
        fresh = network()
        fresh.load_state_dict(plain.state_dict())
        assert torch.equal(fresh.eval()(batch()[0]), plain(batch()[0]))


@pytest.mark.parametrize(
    "settings",
    [
        {"until": 0.5},
        {"scale": "running", "until": 1.0},
        {"policy": "bfloat16", "until": 0.6},
        {"schedule": ((0, "bfloat16"), (1, {"f_w": (2, 9)}), (2, "float32"))},
        {"patience": 1},
        {"kernel": "native", "until": 1.0},
    ],
    ids=str,
)
def test_resume_is_bit_identical(settings: dict[str, Any]) -> None:
    def train(s: Session, first: int, last: int) -> None:
        for i in range(first, last):
            if i % 2 == 0:
                s.start_epoch(i // 2)
            s.step(*batch(i))

    whole = session(total=96, **settings)
    states = []
    for i in range(6):
        states.append(copy.deepcopy(whole.state_dict()))
        train(whole, i, i + 1)
    for i, state in enumerate(states):
        again = session(total=96, **settings)
        again.load_state_dict(state)
        for name, value in again.model.state_dict().items():
            assert value.dtype == state["model"][name].dtype
        train(again, i, 6)
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), (i, name)
        ours, theirs = whole.optimizers[0].state, again.optimizers[0].state
        for a, b in zip(ours.values(), theirs.values(), strict=True):
            assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
        assert whole.witness() == again.witness()


# -- narrow products
def test_sixteen_bit_products_train_like_those_on_float32() -> None:
    """Nearest rounding, so that no noise differs: float32 sums in 24 bits, which moves few numbers by a step of the grid."""
    dense, native = (session(until=1.0, rounding="nearest", kernel=kernel) for kernel in ("dense", "native"))
    a, b = dense.step(*batch()), native.step(*batch())
    assert abs(a - b) < 1e-4
    for name, module in products(dense.model).items():
        twin = products(native.model)[name]
        p, q = module.weight.grad, twin.weight.grad
        assert isinstance(p, Tensor)
        assert isinstance(q, Tensor)
        assert F.cosine_similarity(p.flatten(), q.flatten(), dim=0) > 0.9999
        assert on_grid(twin.weight, Format(2, 14))  # type: ignore[arg-type]
    touched = native.effects[NAME].touched
    assert "16-bit products" in touched["3"]
    assert "products in float32" in touched["9"]


def test_the_choice_of_products_is_part_of_the_state() -> None:
    s = session(until=1.0, kernel="native")
    state = copy.deepcopy(s.state_dict())
    assert set(state["methods"][NAME]["kernels_"].values()) == {"native", "dense"}
    other = session(until=1.0, kernel="auto")
    other.load_state_dict(state)
    assert other.state_dict()["methods"][NAME]["kernels_"] == state["methods"][NAME]["kernels_"]
    assert torch.equal(s.step(*batch()), other.step(*batch()))


# -- what it says, and what it refuses
def test_emulation_is_said_and_no_gain_may_be_reported() -> None:
    fixed, low = session(until=1.0).effects[NAME], session(policy="bfloat16", until=1.0).effects[NAME]
    assert fixed.emulated is True
    assert "emulated" in fixed.lines()[0]
    assert fixed.saves == ""
    assert low.emulated is False


def test_a_machine_without_bfloat16_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_bfloat16, "hardware_bfloat16", lambda device: False)
    with pytest.warns(EmulatedWarning, match="bfloat16 will be emulated and slower"):
        s = session(policy="bfloat16", until=1.0)
    s.step(*batch())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"f_w": (0, 16)}, "IL=0; allowed: from 1"),
        ({"f_act": (4, -1)}, "FL=-1; allowed: from 0"),
        ({"f_err": (10, 15)}, "25 bits; allowed: up to 24, because fixed point is emulated"),
        ({"f_grad": (2.0, 14)}, "two whole numbers"),
        ({"f_w": 16}, "two whole numbers"),
        ({"policy": "float8"}, "allowed: 'fixed', 'bfloat16', 'float32'"),
        ({"rounding": "up"}, "allowed: 'stochastic', 'nearest'"),
        ({"until": 1.5}, "a share of the run"),
        ({"patience": 0}, "whole numbers from 1"),
        ({"kernel": "fast"}, "allowed: 'dense', 'native', 'auto'"),
        ({"kernel": "native", "f_act": (8, 12)}, "up to 16 bits; f_act"),
        ({"schedule": ()}, "allowed: ((0, policy)"),
        ({"schedule": ((1, "fixed"),)}, "begins with epoch 1"),
        ({"schedule": ((0, "fixed"), (5, "float32"), (5, "fixed"))}, "strictly increasing"),
        ({"schedule": ((0, "fixed"), (2.5, "float32"))}, "whole epochs"),
        ({"schedule": ((0, {"f_w": (0, 3)}),)}, "IL=0"),
        ({"schedule": ((0, {"bits": 8}),)}, "'bits'; allowed: f_w"),
        ({"schedule": ((0, "fixed"),), "patience": 3}, "both say when"),
        ({"scale": 3}, "allowed: 'fixed', 'running'"),
        ({"decay": 1.0}, "between 0 and 1"),
        ({"master": 1}, "True or False"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as told:
        LimitedPrecision(**settings)
    assert message in str(told.value)
    with pytest.raises(ValueError, match=NAME):
        LimitedPrecision(**settings)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as told:
        LimitedPrecision(f_w=(0, 30), until=2.0, rounding="up")
    assert all(word in str(told.value) for word in ("IL=0", "30 bits", "until", "rounding"))


def test_what_it_cannot_work_with_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="total_samples"):
        session(total=None)
    with pytest.raises(ConflictError, match="number format"):
        session(None, MixedPrecision(dtype="bfloat16", force=True))
    s = session(until=1.0)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedError, match="Turn autocast off"):
        s.step(*batch())


def test_layers_of_another_dtype_are_left_out_with_the_reason() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = network(), nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x).double())
            return y.float()

    effect = session(Casting(), until=1.0).effects[NAME]
    assert "float64" in effect.skipped["last"]
    assert len(effect.touched) == 4
