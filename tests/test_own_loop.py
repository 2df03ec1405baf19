"""A session in a loop of the user's own: its parts, batches in parts, clipping, frozen layers, and losses of all kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

import hasten
from hasten import keyed
from hasten.errors import HastenError, NonFiniteError, SettingsError, UnsupportedError
from hasten.loss import divisor, understood
from hasten.session import Session

CLASSES = 10


def net(norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(32, CLASSES),
        )  # fmt: skip


def batch(count: int = 32, key: int = 0) -> tuple[Tensor, Tensor]:
    g = keyed.generator("own loop", key)
    return torch.randn(count, 3, 8, 8, generator=g), torch.randint(CLASSES - 1, (count,), generator=g)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference of two states."""
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def session(model: nn.Module, *methods: Any, optimizer: Optimizer | None = None, **more: Any) -> Session:
    made = optimizer or SGD(model.parameters(), lr=0.5, momentum=0.9)
    return Session(model, made, methods, sample=batch(), total_samples=3200, **more)


# -- the parts of a step


@pytest.mark.parametrize("methods", [(), ("mixed_precision",), ("activation_gradient_pruning",)])
def test_the_parts_of_a_step_are_the_step(methods: tuple[str, ...]) -> None:
    whole, parts = net(), net()
    first, second = (
        session(whole, *methods, check_gradients=True),
        session(parts, *methods, check_gradients=True),
    )
    for s in (first, second):
        s.start_epoch(0)
    for key in range(4):
        x, y = batch(key=key)
        first.step(x, y)
        second.backward(F.cross_entropy(second.forward(x), y))
        second.update()
    assert apart(state(whole), state(parts)) == 0
    assert first.counters == second.counters
    assert first.witness() == second.witness()


def test_an_own_loop_accumulates_and_clips_as_a_bare_one() -> None:
    ours, bare = net(), net()
    s, optimizer = session(ours), SGD(bare.parameters(), lr=0.5, momentum=0.9)
    for step in range(3):
        for key in range(4):
            x, y = batch(8, 10 * step + key)
            s.backward(F.cross_entropy(s.forward(x), y) / 4)
            (F.cross_entropy(bare(x), y) / 4).backward()
        for model in (ours, bare):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        s.update()
        optimizer.step()
        optimizer.zero_grad()
    assert apart(state(ours), state(bare)) == 0
    assert s.counters == {"step": 3, "epoch": 0, "streamed": 96, "forward": 96, "backward": 96, "updates": 3}


def test_terms_of_a_loss_come_once_an_update() -> None:
    from hasten.conformance import subject

    x, y = batch()
    losses = []
    for parts in (1, 2):
        model = net(norm=True)
        s = session(model, subject("standardization_loss").make(), allow_no_effect=True)
        s.start_epoch(0)
        for _ in range(parts):
            s.backward(F.cross_entropy(s.forward(x), y) / parts)
        s.update()
        losses.append(state(model))
    assert apart(*losses) < 1e-5


def test_methods_that_act_on_batches_ask_for_step() -> None:
    s = session(net(), "selective_backprop")
    with pytest.raises(UnsupportedError, match=r"selective_backprop acts on a batch.*session\.step"):
        s.backward(s.forward(batch()[0]).sum())
    with pytest.raises(HastenError, match=r"call session\.backward\(loss\) first"):
        session(net()).update()


def test_what_is_not_finite_stops_an_own_loop_too() -> None:
    model = net()
    s, before = session(model, check_gradients=True), state(model)
    x, y = batch()
    with pytest.raises(NonFiniteError, match="at step 0"):
        s.backward(F.cross_entropy(s.forward(x * float("nan")), y))
    s.backward(F.cross_entropy(s.forward(x), y))
    model[0].weight.grad[0] = float("inf")  # type: ignore[index, union-attr]
    with pytest.raises(NonFiniteError, match=r"gradient of 0\.weight"):
        s.update()
    assert apart(before, state(model)) == 0


# -- batches in parts, clipping


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean that cannot be asked for each sample's loss."""
    return F.cross_entropy(outputs, targets)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mean": F.cross_entropy,
    "smoothing": partial(F.cross_entropy, label_smoothing=0.1),
    "class weights": nn.CrossEntropyLoss(weight=torch.linspace(0.05, 2, CLASSES)),
    "ignored": partial(F.cross_entropy, ignore_index=2),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "own": own_loss,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_the_gradient_in_parts_is_that_of_the_whole_batch(loss: str, accumulate: int) -> None:
    results = []
    for parts in (1, accumulate):
        model = net()
        s = session(model, loss=LOSSES[loss], accumulate=parts, optimizer=SGD(model.parameters(), lr=0.01))
        values = [float(s.step(*batch(key=key))) for key in range(3)]
        results.append((state(model), values))
    (whole, first), (cut, second) = results
    assert first == pytest.approx(second, rel=1e-5)
    assert apart(whole, cut) < 1e-6
    assert apart(whole, state(net())) > 1e-4


def test_parts_in_which_no_sample_counts_do_no_harm() -> None:
    x, y = batch(8)
    y[:4] = 7
    results = []
    for parts in (1, 2):
        model = net()
        session(model, loss=partial(F.cross_entropy, ignore_index=7), accumulate=parts).step(x, y)
        results.append(state(model))
    assert apart(*results) < 1e-6


def test_methods_observe_the_whole_batch() -> None:
    seen: dict[int, list[Any]] = {1: [], 3: []}
    for parts, rows in seen.items():
        s = session(net(), hasten.method("selective_backprop", prime_epochs=0, beta=0.5), accumulate=parts)
        s.start_epoch(0)
        for key in range(3):
            s.step(*batch(key=key))
        rows += [dict(s.counters), s.witness()]
    assert seen[1] == seen[3]


def test_gradients_are_clipped_to_the_norm_given() -> None:
    ours, bare = net(), net()
    s, optimizer = session(ours, clip_norm=0.05), SGD(bare.parameters(), lr=0.5, momentum=0.9)
    for key in range(3):
        x, y = batch(key=key)
        s.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(bare(x), y).backward()
        assert nn.utils.clip_grad_norm_(bare.parameters(), 0.05) > 0.05
        optimizer.step()
    assert apart(state(ours), state(bare)) == 0
    with pytest.raises(UnsupportedError, match="clip_norm"):
        session(net(), hasten.method("mixed_precision", dtype="float16", force=True), clip_norm=1.0)
    with pytest.raises(SettingsError, match="accumulate"):
        session(net(), accumulate=0)


# -- the late check, as on an accelerator


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "fused adamw": lambda p: AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_late_check_lets_no_weight_take_what_is_not_finite(optimizer: str, where: str) -> None:
    model = net()
    s = session(
        model, optimizer=OPTIMIZERS[optimizer](model.parameters()), check_gradients=True, late_check=True
    )
    for key in range(3):
        s.step(*batch(key=key))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = batch(key=3)
    if where == "gradient":
        handle = model[0].weight.register_hook(lambda g: g * float("nan"))  # type: ignore[union-attr]
    s.step(x * float("nan") if where == "loss" else x, y)  # told only by the next
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    if where == "gradient":
        handle.remove()
    with pytest.raises(NonFiniteError) as caught:
        s.step(*batch(key=4))
    assert "at step 3 (0-based)" in str(caught.value)
    assert f"the {where} became" in str(caught.value)
    if where == "loss":
        assert "first seen in the input images" in str(caught.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_late_check_is_settled_before_anything_is_kept() -> None:
    for ask in (Session.state_dict, Session.export, Session.settle):
        s = session(net(), late_check=True)
        x, y = batch()
        s.step(x * float("inf"), y)
        with pytest.raises(NonFiniteError, match="at step 0"):
            ask(s)
        s.settle()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_where_all_is_finite_a_late_check_changes_no_bit(optimizer: str) -> None:
    results = []
    for late in (False, True):
        model = net(norm=True)
        s = session(
            model, optimizer=OPTIMIZERS[optimizer](model.parameters()), check_gradients=True, late_check=late
        )
        losses = [float(s.step(*batch(key=key))) for key in range(5)]
        results.append((state(model), losses, copy.deepcopy(s.optimizers[0].state_dict()["state"])))
    assert apart(results[0][0], results[1][0]) == 0
    assert results[0][1] == results[1][1]
    for slot, value in results[0][2][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(results[1][2][0][slot]))


def test_a_late_check_reads_nothing_back_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session(net(), late_check=True, check_gradients=True)
    s.step(*batch())
    read: list[str] = []
    for name in ("item", "__bool__", "__float__", "tolist"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *a, _n=name, _p=plain: (read.append(_n), _p(self, *a))[1]
        )
    s.step(*batch(key=1))
    monkeypatch.undo()
    assert read == ["__bool__"]  # the verdict on the step before


# -- frozen layers, optimizers


def test_layers_frozen_in_eval_mode_stay_so() -> None:
    model = net(norm=True)
    model[1].eval().requires_grad_(False)
    before = state(model)
    s = Session(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), sample=batch())
    with s.inference() as forward:
        forward(batch()[0])
    s.step(*batch())
    after = state(model)
    assert not model[1].training
    assert model[0].training
    for name in ("1.running_mean", "1.running_var", "1.weight"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["0.weight"], after["0.weight"])


def test_a_model_wholly_in_eval_mode_trains() -> None:
    model = net(norm=True).eval()
    session(model).step(*batch())
    assert all(m.training for m in model.modules())
    assert model[1].num_batches_tracked == 1


def test_closure_optimizers_are_refused_at_construction() -> None:
    model = net()
    with pytest.raises(UnsupportedError, match="LBFGS runs the model itself, by a closure"):
        session(model, optimizer=torch.optim.LBFGS(model.parameters()))


# -- losses


def step_length(methods: list[Any], loss: Callable[..., Tensor], targets: Tensor) -> tuple[float, float]:
    model = net()
    s = Session(model, SGD(model.parameters(), lr=1.0), methods, sample=(batch()[0], targets), loss=loss)
    before = state(model)
    s.start_epoch(0)
    value = s.step(batch()[0], targets)
    after = state(model)
    return float(value), sum(float((before[k] - after[k]).norm() ** 2) for k in before) ** 0.5


TARGETS = torch.arange(32) % 9
WEIGHED: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "plain": (F.cross_entropy, TARGETS),
    "class weights 0.05": (partial(F.cross_entropy, weight=torch.full((10,), 0.05)), TARGETS),
    "uneven class weights": (nn.CrossEntropyLoss(weight=torch.linspace(0.1, 3, 10)), TARGETS),
    "ignore_index": (
        partial(F.cross_entropy, ignore_index=9),
        torch.where(torch.arange(32) < 24, 9, TARGETS),
    ),
    "ignore_index in a module": (
        nn.CrossEntropyLoss(ignore_index=9),
        torch.where(torch.arange(32) < 24, 9, TARGETS),
    ),
    "ignored by default": (F.cross_entropy, torch.where(torch.arange(32) < 24, -100, TARGETS)),
    "smoothing and weights": (
        nn.CrossEntropyLoss(weight=torch.linspace(0.1, 3, 10), label_smoothing=0.2),
        TARGETS,
    ),
    "soft labels": (F.cross_entropy, F.one_hot(TARGETS, 10).float() * 0.7 + 0.03),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), TARGETS),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_a_method_that_selects_all_with_equal_weights_is_plain_training(name: str) -> None:
    loss, targets = WEIGHED[name]
    all_of_them = hasten.method(
        "selective_backprop", beta=0.0, reweight=True, sampling_min=1.0, prime_epochs=0
    )
    plain, selected = step_length([], loss, targets), step_length([all_of_them], loss, targets)
    assert selected == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("name", ["class weights 0.05", "ignore_index"])
def test_importance_sampling_has_the_gradient_of_plain_training_in_the_mean(name: str) -> None:
    loss, targets = WEIGHED[name]

    def gradient(*methods: Any) -> Tensor:
        model, total, draws = net(), torch.zeros(()), 60 if methods else 1
        s = Session(model, SGD(model.parameters(), lr=0.0), methods, sample=(batch()[0], targets), loss=loss)
        for _ in range(draws):
            s.start_epoch(0)
            s.step(batch()[0], targets)
            total = total + torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        return total / draws

    drawn = gradient(hasten.method("importance_sampling", presample=2.0, tau_th=1.0))
    plain = gradient()
    assert float(drawn @ plain / (plain @ plain)) == pytest.approx(1, abs=0.25)


def test_what_a_mean_divides_by() -> None:
    outputs = torch.zeros(32, 10)
    weights = torch.linspace(0.1, 3, 10)
    assert divisor(F.cross_entropy, outputs, TARGETS) == 32
    assert (
        divisor(nn.NLLLoss(weight=weights), outputs, TARGETS) == 32
    )  # not understood: no reduction= to ask by
    assert divisor(understood(nn.NLLLoss(weight=weights)), outputs, TARGETS) == pytest.approx(
        float(weights[TARGETS].sum())
    )
    assert divisor(understood(nn.CrossEntropyLoss(reduction="sum")), outputs, TARGETS) == pytest.approx(1)
    assert divisor(partial(F.cross_entropy, ignore_index=0), outputs, TARGETS) == int((TARGETS != 0).sum())
    assert divisor(partial(F.cross_entropy, ignore_index=0), outputs, TARGETS * 0) == 0.0


def test_loss_modules_are_understood_and_left_as_they_are() -> None:
    given = nn.CrossEntropyLoss(weight=torch.linspace(0.1, 3, 10), label_smoothing=0.1)
    loss = understood(given)
    outputs = torch.randn(32, 10, generator=keyed.generator("x"))
    each = loss(outputs, TARGETS, reduction="none")
    assert each.shape == (32,)
    assert given.reduction == "mean"
    assert torch.equal(loss(outputs, TARGETS), given(outputs, TARGETS))


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"is a class, give an object: CrossEntropyLoss\(\)"):
        session(net(), loss=nn.CrossEntropyLoss)
    with pytest.raises(UnsupportedError, match="is no function"):
        session(net(), loss="cross_entropy")
