"""A session without methods is PyTorch, bit for bit; with wrong input it says so before anything changes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import hasten
from hasten import keyed, models
from hasten.contract import Effect, Method, MethodSpec
from hasten.errors import (
    CheckpointError,
    ConflictError,
    HastenError,
    NoEffectError,
    NonFiniteError,
    SettingsError,
    UnknownName,
    UnsupportedError,
)
from hasten.session import Session


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 5))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(8 * 16, 5))  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (mlp, 8),
    "cnn": (cnn, 8),
    "resnet8": (lambda: models.build("resnet8", num_classes=5, in_channels=3, image_size=16, seed=0), 16),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.05),
    "momentum": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda m: Adam(m.parameters(), lr=1e-3),
}


def make(net: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return NETS[net][0]()


def stream(net: str, steps: int, batch: int = 12) -> list[tuple[Tensor, Tensor]]:
    size, g = NETS[net][1], keyed.generator("stream", net)
    return [(torch.randn(batch, 3, size, size, generator=g), torch.randint(5, (batch,), generator=g))
            for _ in range(steps)]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return bool(a == b)


def bare(
    net: str, optimizer: str, loss: Callable[..., Tensor], steps: int = 10
) -> tuple[list[float], Any, Any]:
    """Train as every PyTorch tutorial does."""
    torch.manual_seed(7)
    model = make(net).train()
    opt, losses = OPTIMIZERS[optimizer](model), []
    for x, y in stream(net, steps):
        opt.zero_grad()
        value = loss(model(x), y)
        value.backward()
        opt.step()
        losses.append(value.item())
    return losses, model.state_dict(), opt.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_without_methods_losses_weights_and_optimizer_are_those_of_a_bare_loop(
    net: str, optimizer: str
) -> None:
    def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=0.1)

    expected, weights, slots = bare(net, optimizer, smoothed)
    torch.manual_seed(7)
    model = make(net)
    opt = OPTIMIZERS[optimizer](model)
    session = Session(model, opt, sample=stream(net, 1)[0], loss=smoothed, check_gradients=True)
    losses = [session.step(x, y).item() for x, y in stream(net, 10)]
    assert losses == expected
    assert len(set(losses)) == 10
    assert same(session.model.state_dict(), weights)
    assert same(opt.state_dict(), slots)
    assert session.counters == {"step": 10, "epoch": 0, "streamed": 120, "forward": 120, "backward": 120, "updates": 10}  # fmt: skip


def test_several_optimizers_step_together() -> None:
    model, twin = make("cnn"), make("cnn")
    conv, rest = [*model[:2].parameters()], [*model[2:].parameters()]  # type: ignore[index]
    session = Session(model, [SGD(conv, lr=0.1), Adam(rest, lr=1e-2)], sample=stream("cnn", 1)[0])
    pair = SGD(twin[:2].parameters(), lr=0.1), Adam(twin[2:].parameters(), lr=1e-2)  # type: ignore[index]
    for x, y in stream("cnn", 5):
        session.step(x, y)
        for o in pair:
            o.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for o in pair:
            o.step()
    assert same(model.state_dict(), twin.state_dict())
    again = make("cnn")
    other = Session(again, [SGD(again[:2].parameters(), lr=1.0), Adam(again[2:].parameters())],  # type: ignore[index]
                    sample=stream("cnn", 1)[0])  # fmt: skip
    other.load_state_dict(copy.deepcopy(session.state_dict()))
    x, y = stream("cnn", 6)[5]
    assert other.step(x, y).item() == session.step(x, y).item()
    assert same(again.state_dict(), model.state_dict())
    one = make("cnn")
    single = Session(one, SGD(one.parameters(), lr=0.1), sample=stream("cnn", 1)[0])
    with pytest.raises(HastenError, match="holds 2 optimizers, this session has 1"):
        single.load_state_dict(session.state_dict())


# -- what is not finite


class Poison(nn.Module):
    """Gives NaN (or a NaN gradient) from a chosen call in training on."""

    def __init__(self, at: int, gradient: bool) -> None:
        super().__init__()
        self.at, self.gradient, self.calls = at, gradient, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls <= self.at:
            return x
        if not self.gradient:
            return x * float("nan")
        # sqrt has an infinite slope at 0, and 0 * inf is NaN; the value itself is 0
        return x + torch.sqrt(x * 0) * 0


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("at", [0, 3])
def test_what_is_not_finite_stops_before_weights_and_optimizer_change(at: int, gradient: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), Poison(at, gradient), nn.Linear(16, 5))
    opt = SGD(model.parameters(), lr=0.05, momentum=0.9)
    x0, y0 = stream("mlp", 1)[0]
    session = Session(model, opt, sample=(x0, y0), check_gradients=True)
    model[3].calls = 0
    batches = stream("mlp", at + 1)
    for x, y in batches[:at]:
        session.step(x, y)
    weights, slots = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        session.step(*batches[at])
    assert same(model.state_dict(), weights)
    assert same(opt.state_dict(), slots)
    text = str(caught.value)
    assert f"step {at} " in text
    assert ("gradient of 1.weight" if gradient else "layer 3 (Poison)") in text
    assert ("the gradient became" if gradient else "the loss became") in text
    assert "Lower the learning rate" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_image_or_weight_is_named(value: float) -> None:
    model = make("cnn")
    session = Session(model, SGD(model.parameters(), lr=0.1), sample=stream("cnn", 1)[0])
    x, y = stream("cnn", 1)[0]
    x[3, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match="first seen in the input images"):
        session.step(x, y)

    model = make("cnn")
    session = Session(model, SGD(model.parameters(), lr=0.1), sample=stream("cnn", 1)[0])
    with torch.no_grad():
        model[5].weight[0, 0] = value  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=r"first seen in layer 5 \(Linear\)"):
        session.step(*stream("cnn", 1)[0])


def test_finite_gradients_whose_norm_overflows_are_not_called_infinite() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    opt = SGD(model.parameters(), lr=1e-30)
    session = Session(model, opt, sample=stream("mlp", 1)[0], check_gradients=True,
                      loss=lambda o, t: F.cross_entropy(o, t) * 1e25)  # fmt: skip
    session.step(*stream("mlp", 1)[0])
    assert session.counters["updates"] == 1


# -- what is refused


def unreduced(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("name", ["selective_backprop", "importance_sampling", "early_instance_filtering"])
def test_a_loss_without_reduction_is_refused_where_samples_are_weighed(name: str) -> None:
    model = make("cnn")
    with pytest.raises(UnsupportedError, match=rf'{name} needs the loss of each sample.*reduction="none"'):
        Session(model, SGD(model.parameters(), lr=0.1), [hasten.method(name)], sample=stream("cnn", 1)[0],
                loss=unreduced)  # fmt: skip


def test_an_optimizer_with_missing_foreign_or_repeated_parameters_is_refused() -> None:
    model, sample = make("cnn"), stream("cnn", 1)[0]
    parameters = [*model.parameters()]
    with pytest.raises(HastenError, match=r"does not hold 0\.weight, 0\.bias"):
        Session(model, SGD(parameters[2:], lr=0.1), sample=sample)
    with pytest.raises(HastenError, match="holds 1 tensors that are not trainable parameters"):
        Session(model, SGD([*parameters, nn.Parameter(torch.zeros(3))], lr=0.1), sample=sample)
    with pytest.raises(HastenError, match=r"holds 0\.weight more than once"):
        Session(model, [SGD(parameters, lr=0.1), SGD(parameters[:1], lr=0.1)], sample=sample)
    parameters[0].requires_grad_(False)
    Session(model, SGD(parameters[1:], lr=0.1), sample=sample)  # a frozen one need not be held


@dataclass(kw_only=True, eq=False)
class PerSample(Method):
    """Keeps something for each sample."""

    spec: ClassVar[MethodSpec] = MethodSpec(name="per_sample", title="", paper="", saves="samples", acts="",
                                            writes=frozenset({"losses"}), requires=frozenset({"index", "progress"}))  # fmt: skip

    def attach(self, session: Session) -> Effect:
        return Effect({"batch": "all"})


@dataclass(kw_only=True, eq=False)
class Nothing(Method):
    """Finds nothing to act on."""

    spec: ClassVar[MethodSpec] = MethodSpec(name="nothing", title="", paper="", saves="memory", acts="",
                                            writes=frozenset({"pooling"}))  # fmt: skip

    def attach(self, session: Session) -> Effect:
        return Effect(
            skipped={name: "it has no use here" for name, _ in session.layers(nn.Conv2d, nn.Linear)}
        )


def test_what_a_method_requires_is_asked_for_before_training() -> None:
    model, (x, y) = make("cnn"), stream("cnn", 1)[0]
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=r"per_sample follows a schedule.*total_samples"):
        Session(model, opt, [PerSample()], sample=(x, y))
    session = Session(model, opt, [PerSample()], sample=(x, y), total_samples=48)
    with pytest.raises(UnsupportedError, match=r"per_sample keeps something for each sample: give step"):
        session.step(x, y)
    assert session.counters["streamed"] == 0
    session.step(x, y, torch.arange(12))
    assert session.progress == 0.25


def test_a_method_without_effect_is_refused_layer_by_layer_unless_allowed() -> None:
    model, sample = make("cnn"), stream("cnn", 1)[0]
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(NoEffectError) as caught:
        Session(model, opt, [Nothing()], sample=sample)
    for line in ("  0: skipped, it has no use here", "  5: skipped, it has no use here"):
        assert line in str(caught.value).splitlines()
    assert (
        Session(model, opt, [Nothing()], sample=sample, allow_no_effect=True).effects["nothing"].touched == {}
    )


def test_conflicting_methods_are_refused_with_both_names_and_change_nothing() -> None:
    model, sample = make("cnn"), stream("cnn", 1)[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConflictError) as caught:
        Session(model, SGD(model.parameters(), lr=0.1),
                [hasten.method("selective_backprop"), hasten.method("importance_sampling"), hasten.method("s3pool")],
                sample=sample)  # fmt: skip
    for part in ("selective_backprop", "importance_sampling", "'samples'", "keep one of the two"):
        assert part in str(caught.value)
    assert same(before, model.state_dict())
    assert type(model[3]) is nn.MaxPool2d  # type: ignore[index]


def test_unknown_methods_and_settings_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown method 's3pol'\. Did you mean 's3pool'"):
        hasten.method("s3pol")
    with pytest.raises(
        SettingsError, match=r"unknown setting of selective_backprop 'betta'\. Did you mean 'beta'"
    ):
        hasten.method("selective_backprop", betta=1.0)
    with pytest.raises(SettingsError, match="beta"):
        hasten.method("selective_backprop", beta=-1.0)
    with pytest.raises(SettingsError, match="selective_backprop"):
        hasten.method("selective_backprop", beta="high")


# -- state and export


def test_a_state_of_another_network_or_method_is_refused_before_anything_changes() -> None:
    net, other = make("cnn"), make("mlp")
    session = Session(net, SGD(net.parameters(), lr=0.1), sample=stream("cnn", 1)[0])
    foreign = Session(other, SGD(other.parameters(), lr=0.1), sample=stream("mlp", 1)[0]).state_dict()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"another network: only saved \['4\.bias', '4\.weight'\].*only here \['0\.bias'",
    ):
        session.load_state_dict(foreign)
    wider = copy.deepcopy(session.state_dict())
    wider["model"]["5.weight"] = torch.zeros(6, 128)
    wider["model"]["0.bias"] += 1
    with pytest.raises(CheckpointError, match=r"5\.weight \(6x128 saved, 5x128 here\)"):
        session.load_state_dict(wider)
    assert same(before, net.state_dict())
    with pytest.raises(HastenError, match="saved with methods"):
        session.load_state_dict({**session.state_dict(), "methods": {"s3pool": {}}})


def test_export_is_a_plain_copy_in_eval_mode() -> None:
    model = make("cnn")
    method = hasten.method("selective_backprop", prime_epochs=0, beta=1.0)
    session = Session(model, SGD(model.parameters(), lr=0.1), [method], sample=stream("cnn", 1)[0])
    for x, y in stream("cnn", 3):
        session.step(x, y, torch.arange(12))
    plain = session.export()
    assert {type(m).__module__.split(".")[0] for m in plain.modules()} == {"torch"}
    assert not plain.training
    assert session.model.training
    assert plain.state_dict().keys() == make("cnn").state_dict().keys()
    fresh = make("cnn").eval()
    fresh.load_state_dict(plain.state_dict())
    x = stream("cnn", 1)[0][0]
    with torch.no_grad():
        assert torch.equal(plain(x), fresh(x))
        before = plain(x)
    for x_, y in stream("cnn", 3):
        session.step(x_, y, torch.arange(12))
    assert not same(session.model.state_dict(), plain.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(x), before)


def test_one_rank_of_ddp_trains_as_the_bare_model(tmp_path: Path) -> None:
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    expected, weights, _ = bare("cnn", "momentum", F.cross_entropy, 6)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = make("cnn")
        wrapped = nn.parallel.DistributedDataParallel(model)
        session = Session(wrapped, OPTIMIZERS["momentum"](wrapped), sample=stream("cnn", 1)[0])
        assert session.model is model
        assert [session.step(x, y).item() for x, y in stream("cnn", 6)] == expected
        assert same(session.state_dict()["model"], weights)
        assert type(session.export()) is nn.Sequential
    finally:
        dist.destroy_process_group()


def test_the_callers_method_object_is_not_shared() -> None:
    method = hasten.method("selective_backprop", prime_epochs=0, beta=1.0)
    runs = []
    for _ in range(2):
        model = make("cnn")
        session = Session(model, SGD(model.parameters(), lr=0.1), [method], sample=stream("cnn", 1)[0])
        runs.append([session.step(x, y, torch.arange(12)).item() for x, y in stream("cnn", 6)])
    assert runs[0] == runs[1]
    assert vars(method) == method.settings()
