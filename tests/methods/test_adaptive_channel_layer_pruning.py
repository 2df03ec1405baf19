"""Adaptive gates: at 1 they change nothing, at 0 what they close goes without a trace, and the size comes out as asked."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.ranks import two_ranks
from tests.surgery.nets import images, net
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from hasten import keyed, models
from hasten.checkpoint import pack, unpack
from hasten.data import load
from hasten.errors import ConflictError, NoEffectError, OverPruneError, SettingsError, UnsupportedError
from hasten.exporting import load_run
from hasten.loop import fit
from hasten.measure.macs import macs
from hasten.methods.forward.mixed_precision import MixedPrecision
from hasten.methods.loss.standardization_loss import StandardizationLoss
from hasten.methods.structure.adaptive_channel_layer_pruning import AdaptiveGatePruning
from hasten.methods.structure.gate_controller import Floor, Size, adjusted, refused, wanted
from hasten.methods.structure.gates import Gates, Site, proximal_step, soft_threshold
from hasten.methods.structure.lasso import removals
from hasten.recipe import Recipe
from hasten.session import Session
from hasten.surgery import RemoveChannels, Surgeon, check_training_state
from hasten.surgery import follow as trace
from hasten.table import METHODS, Row

NAME = "adaptive_channel_layer_pruning"
LONG = 10**9
NETS = [
    "resnet8",
    "wrn-16-4",
    "mobilenet-v1",
    "lenet",
    "mobilenet-v2",
    "densenet-bc",
    "googlenet",
    "flat",
    "gated",
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("adaptive", seed), dtype=dtype)


def labels(x: Tensor, classes: int = 10) -> Tensor:
    return torch.arange(len(x)) % classes


def start(model: nn.Module, x: Tensor, *, lr: float = 0.05, classes: int = 4, total: int = LONG, optimizer: Any = None,
          loss: Any = None, **settings: Any) -> Session:  # fmt: skip
    """Return a session in which closed gates go at the next epoch, by no other rule than that one channel stays."""
    chosen = {"target": None, "patience": 0, "round_to": 1, "min_channels": 1, **settings}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(trained, lr=lr, momentum=0.9) if optimizer is None else optimizer
    return Session(model, optimizer, [AdaptiveGatePruning(**chosen)], sample=(x, labels(x, classes)), total_samples=total,
                   loss=loss)  # fmt: skip


def only(session: Session) -> AdaptiveGatePruning:
    (method,) = session.methods
    assert isinstance(method, AdaptiveGatePruning)
    return method


def gates(session: Session) -> Gates:
    found = only(session)._gates
    assert found is not None
    return found


def counts(session: Session) -> dict[str, float]:
    return session.witness()[NAME]


def put(session: Session, values: Tensor) -> None:
    """Give gates these values (n,), and the gammas that are gates."""
    found, method = gates(session), only(session)
    found.values = values.to(found.values.dtype)
    with torch.no_grad():
        for site in method._sites:
            for name, p in site.tensors().items():
                p.copy_(site.latent.get(name, p))
            site.scatter(found.values, site.weight)
            site.cover(found.values)
    method._left = None


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what the model gives in eval and in training mode, leaving it as it is."""
    with torch.no_grad():
        return [copy.deepcopy(model).train(mode)(x) for mode in (False, True)]


def close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = 1e-9) -> bool:
    return all(bool((p - q).abs().max() <= tolerance * q.abs().max()) for p, q in zip(a, b, strict=True))


def chain(
    widths: Sequence[int] = (8, 12), kernel: int = 3, classes: int = 4, norm: bool = True
) -> nn.Sequential:
    """Convolutions, batch norm and ReLU in a row, and a classifier."""
    layers: list[nn.Module] = []
    c_in = 3
    for width in widths:
        layers += [nn.Conv2d(c_in, width, kernel, padding=kernel // 2, bias=not norm)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.ReLU()]
        c_in = width
    return stirred(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes)))


def stirred(model: nn.Module) -> Any:
    """Give a float64 network random weights, and norms and statistics that are not those of initialisation."""
    model = model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            wide = random(*p.shape, seed=i) * (math.sqrt(2 / p[0].numel()) if p.dim() > 1 else 0.3)
            p.copy_(wide + (p.dim() < 2))
        for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.copy_(0.1 * random(m.num_features, seed=100 + i))
            m.running_var.copy_(0.5 + random(m.num_features, seed=200 + i).abs())
    return model


class Residual(nn.Module):
    """A block that surgery does not know by its class."""

    def __init__(self, c: int = 8, width: int = 10) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))


def residual(blocks: int = 2) -> nn.Sequential:
    """A stem, blocks of which surgery does not know the class, and a classifier."""
    return stirred(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                      *(Residual() for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    )  # fmt: skip


def gated_by_hooks(session: Session, values: Tensor) -> nn.Module:
    """Return a copy of the network without its gates, whose modules' outputs are multiplied by ``values`` instead."""
    sites = only(session)._sites
    model = copy.deepcopy(session.model)
    for site in sites:
        module = model.get_submodule(site.name)
        with torch.no_grad():
            for name, tensor in site.latent.items():
                getattr(module, name).copy_(tensor)

        def multiply(_: nn.Module, __: Any, out: Tensor, site: Site = site) -> Tensor:
            if site.channel is not None:
                each = torch.cat([values, values.new_ones(1)])[torch.from_numpy(site.channel)]
                out = out * (each.view(-1, *[1] * (out.dim() - 2)) if site.axis == 1 else each)
            return out if site.block is None else out * values[site.block]

        module.register_forward_hook(multiply)
    return model


# -- the proximal step
def by_hand(a: float, grad: float, v: float, rate: float, g: float, mu: float) -> tuple[float, float]:
    u = a - rate * grad
    z = math.copysign(max(abs(u) - rate * g, 0.0), u)
    v = z - a + mu * v
    return max(0.0, z + mu * v), v


def test_the_step_is_the_closed_form_and_no_gate_is_ever_negative() -> None:
    value, velocity = random(500).abs(), 0.3 * random(500, seed=1)
    rate, pull = random(500, seed=2).abs(), random(500, seed=3).abs()
    for step in range(20):
        grad = 3 * random(500, seed=10 + step)
        expected = [
            by_hand(*row)
            for row in zip(
                *(t.tolist() for t in (value, grad, velocity, rate, pull)), [0.8] * 500, strict=True
            )
        ]
        value, velocity = proximal_step(value, grad, velocity, rate, pull, 0.8)
        assert torch.allclose(
            value, torch.tensor([a for a, _ in expected], dtype=torch.float64), rtol=1e-12, atol=1e-15
        )
        assert torch.allclose(
            velocity, torch.tensor([v for _, v in expected], dtype=torch.float64), rtol=1e-12, atol=1e-15
        )
        assert (value >= 0).all()
    assert (value == 0).any()
    assert torch.equal(
        soft_threshold(torch.tensor([-2.0, 0.3, 1.5]), torch.tensor(0.5)), torch.tensor([-1.5, 0.0, 1.0])
    )


@pytest.mark.parametrize(("rate", "g", "mu"), [(0.1, 0.05, 0.9), (0.01, 0.2, 0.5), (0.05, 0.1, 0.0)])
def test_without_a_gradient_a_gate_closes_as_fast_as_the_momentum_gain_says(
    rate: float, g: float, mu: float
) -> None:
    one = torch.ones(1, dtype=torch.float64)
    value, velocity, steps = one, 0 * one, 0
    while float(value) > 0:
        value, velocity = proximal_step(value, 0 * one, velocity, rate * one, g * one, mu)
        steps += 1
    expected = (1 - mu) / (rate * g)
    assert expected <= steps <= expected + 1.5 / (1 - mu) + 1


def test_a_closed_gate_stays_closed_unless_the_gradient_exceeds_the_pull() -> None:
    zero, rate, pull = torch.zeros(4), torch.full((4,), 0.1), torch.full((4,), 0.5)
    grad = torch.tensor([-0.499, 0.499, -0.6, 0.6])
    value, velocity = proximal_step(zero, grad, zero, rate, pull, 0.9)
    assert (value > 0).tolist() == [False, False, True, False]
    for _ in range(20):
        value, velocity = proximal_step(value, grad, velocity, rate, pull, 0.9)
    assert (value > 0).tolist() == [False, False, True, False]


def test_a_gamma_below_zero_is_the_mirror_image_of_one_above() -> None:
    value, grad, velocity = (random(100, seed=seed) for seed in range(3))
    rate, pull = torch.full((100,), 0.2, dtype=torch.float64), torch.full((100,), 0.7, dtype=torch.float64)
    a, v = proximal_step(value, grad, velocity, rate, pull, 0.9)
    b, w = proximal_step(-value, -grad, -velocity, rate, pull, 0.9)
    assert torch.allclose(a, -b, atol=0)
    assert torch.allclose(v, -w, atol=0)
    assert (a * value >= 0).all()


# -- gates that are 1, and others
@pytest.mark.parametrize("name", NETS)
def test_gates_that_are_one_change_nothing_and_others_multiply_channels_and_branches(name: str) -> None:
    model, x = net(name), images()
    plain, names = outputs(model, x), list(model.state_dict())
    session = start(model, x, classes=10)
    assert list(model.state_dict()) == names
    assert set(gates(session).values.tolist()) == {1.0}
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), plain, strict=True))
    values = 0.2 + random(len(gates(session))).abs()
    expected = outputs(gated_by_hooks(session, values), x)
    assert not close(expected[:1], plain[:1], 1e-2)
    put(session, values)
    assert close(outputs(model, x), expected, 1e-9)
    exported = session.export()
    assert {type(m) for m in exported.modules()} == {type(m) for m in model.modules()}
    with torch.no_grad():
        assert close([exported(x)], expected[:1], 1e-9)
        assert close([exported.float()(x.float())], [expected[0].float()], 1e-4)


def test_scaling_holds_in_single_precision_for_every_kind_of_layer() -> None:
    x = random(2, 4, 6, 6, dtype=torch.float32)
    for i, (layer, given) in enumerate([
        (nn.BatchNorm2d(4), x), (nn.GroupNorm(2, 4), x), (nn.InstanceNorm2d(4, affine=True), x),
        (nn.LayerNorm(6), x), (nn.Conv2d(4, 5, 3), x), (nn.Conv2d(4, 8, 3, groups=4), x),
        (nn.ConvTranspose2d(4, 5, 3), x), (nn.Linear(6, 7, bias=False), x),
    ]):  # fmt: skip
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(random(*p.shape, seed=i, dtype=torch.float32))
        layer.eval()
        site = Site("layer", layer, "out", None)
        before = layer(given).detach()
        width = before.shape[site.axis]
        site.channel, site.block = np.arange(width), width
        site.channel[1] = -1
        site.begin()
        values = random(width + 1, seed=50, dtype=torch.float32).abs()
        site.cover(values)
        scale = values[width] * torch.where(torch.arange(width) == 1, 1.0, values[:width])
        expected = before * (scale if site.axis == -1 else scale.view(-1, 1, 1))
        assert (layer(given) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["unknown", "wrn-16-4", "lenet", "gated"])
def test_training_is_that_of_a_network_whose_maps_are_multiplied(name: str) -> None:
    """Latent weights, gates and outputs are those of explicit gates, by autograd, with decay, momentum and two rates."""
    model = residual() if name == "unknown" else net(name)
    x = random(6, 3, 8, 8) if name == "unknown" else images()
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]

    def optimizer(made: nn.Module) -> SGD:
        few = [p for m in made.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        rest = [p for p in made.parameters() if not any(p is q for q in few)]
        groups: list[dict[str, Any]] = [{"params": rest, "lr": 1e-3}]
        groups += [{"params": few, "lr": 3e-3, "weight_decay": 0.2}] if few else []
        return SGD(groups, lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True)

    session = start(model, x, optimizer=optimizer(model), g_c=0.02, g_b=0.05)
    count, weights, n = gates(session).channels, only(session)._frame().weights, len(gates(session))
    first = 0.4 + random(n, seed=7).abs()
    first[3] = 0
    values = first.clone().requires_grad_()
    explicit = gated_by_hooks(session, values)
    put(session, first)
    other, velocity = optimizer(explicit), torch.zeros(n, dtype=torch.float64)
    pull = torch.cat([0.02 * weights[:count], 0.05 * weights[count:]])
    rate = torch.full((n,), 1e-3, dtype=torch.float64)
    for site in reversed(only(session)._sites):  # the first that a gate stands behind counts
        for one in [*site.members()[1].tolist(), *([] if site.block is None else [site.block])]:
            rate[one] = 3e-3 if any(site.weight is p for p in norms) else 1e-3
    for _ in range(3):
        loss = F.cross_entropy(explicit(x), labels(x, 4))
        other.zero_grad()
        values.grad = None
        loss.backward()
        other.step()
        assert values.grad is not None
        new, velocity = proximal_step(values.detach(), values.grad, velocity, rate, pull, 0.9)
        assert session.step(x, labels(x, 4)).item() == pytest.approx(loss.item(), rel=1e-9)
        with torch.no_grad():
            values.copy_(new)
        torch.testing.assert_close(gates(session).values, new, rtol=1e-7, atol=1e-10)
        assert close(outputs(model, x), outputs(explicit, x), 1e-7)
    assert (gates(session).values != first).sum() >= n - 1
    for site in only(session)._sites:
        for key, tensor in site.latent.items():
            torch.testing.assert_close(
                tensor, getattr(explicit.get_submodule(site.name), key).detach(), rtol=1e-7, atol=1e-10
            )


def test_averages_hold_what_the_network_computed_and_what_they_put_into_it_is_learnt_from() -> None:
    model, x = chain(), random(8, 3, 8, 8)
    session = start(model, x, g_c=0.05)
    for _ in range(3):
        session.step(x, labels(x, 4))
    (site,) = [s for s in only(session)._sites if s.name == "1"]
    latent, scale = site.latent["weight"].clone(), site.scale(gates(session).values)
    assert (scale != 1).all()
    assert torch.equal(model[1].weight, latent * scale)  # what an average of the weights sees
    with torch.no_grad():  # as lookahead does
        model[1].weight.add_(0.1)
    site.expose(gates(session).values, torch.zeros_like(gates(session).values))
    assert torch.allclose(model[1].weight, latent + 0.1 / scale, atol=1e-12)


def test_what_is_added_shares_one_gate_and_inner_channels_have_their_own() -> None:
    model, x = models.build("resnet20", seed=0), images(dtype=torch.float32)
    session = start(model, x, classes=10)
    of = {site.name: site for site in only(session)._sites}
    first = of["bn1"].channel
    assert first is not None
    for block in range(3):
        assert (of[f"layer1.{block}.bn2"].channel == first).all()
    later = of["layer2.1.bn2"].channel
    assert later is not None
    assert (later[8:24] == first).all()  # zero channels are padded on both sides
    inner = of["layer1.0.bn1"].channel
    assert inner is not None
    assert not np.isin(inner, first).any()
    # 16 + 16 + 32 on the line, 3 * (16 + 32 + 64) inside; blocks that change no shape: 3 + 2 + 2
    assert gates(session).channels == 64 + 336
    assert len(gates(session)) == 64 + 336 + 7
    touched, skipped = session.effects[NAME].touched, session.effects[NAME].skipped
    assert "branch" in touched["layer1.0"]
    assert "changes the shape" in skipped["layer2.0"]
    assert "output" in skipped["fc"]


# -- what is closed goes without a trace
@pytest.mark.parametrize("name", NETS)
def test_closed_channels_go_without_a_trace_in_evaluation_and_training(name: str) -> None:
    model, x = net(name), images()
    session = start(model, x, classes=10, block_gate=False)
    n = len(gates(session))
    drawn = torch.rand(n, generator=keyed.generator("closed", name), dtype=torch.float64)
    put(session, torch.where(drawn < 0.4, 0.0, 0.5 + drawn))
    closed = int(gates(session).closed.sum())
    before, size = outputs(model, x), sum(p.numel() for p in model.parameters())
    expected = only(session)._size()
    session.start_epoch(1)
    assert counts(session)["channels_removed"] >= 0.7 * closed
    assert close(outputs(model, x), before)
    assert sum(p.numel() for p in model.parameters()) == expected < size
    check_training_state(model, session.optimizers)
    with session.inference() as forward:
        now = forward(x)
    with torch.no_grad():
        assert close([session.export()(x)], [now], 1e-12)
    session.step(x, labels(x))


@pytest.mark.parametrize("name", ["resnet8", "wrn-16-4", "unknown"])
def test_a_closed_branch_goes_without_a_trace_and_takes_its_statistics_along(name: str) -> None:
    model = residual() if name == "unknown" else net(name)
    x = random(4, 3, 8, 8) if name == "unknown" else images()
    session = start(model, x, classes=4 if name == "unknown" else 10, allow_empty_stage=True)
    found = gates(session)
    assert len(found) - found.channels == {"resnet8": 1, "wrn-16-4": 3, "unknown": 2}[name]
    values = 0.5 + random(len(found)).abs()
    values[found.channels] = 0
    put(session, values)
    before, tensors = outputs(model, x), set(model.state_dict())
    session.step(x, labels(x, 4))
    values[found.channels :] = gates(session).values[found.channels :]
    values[found.channels] = 0
    put(session, values)
    before = outputs(model, x)
    session.start_epoch(1)
    assert counts(session)["blocks_removed"] == 1
    assert counts(session)["channels_removed"] == 0
    assert close(outputs(model, x), before, 1e-12)
    lost = {key.rpartition(".")[2] for key in tensors - set(model.state_dict())}
    assert {"weight", "bias", "running_mean", "running_var"} <= lost
    check_training_state(model, session.optimizers)
    assert set(session.optimizers[0].state) == set(model.parameters())
    session.step(x, labels(x, 4))


def test_a_branch_whose_inner_layer_is_closed_whole_goes_too() -> None:
    model, x = net("wrn-16-4"), images()
    session = start(model, x, classes=10, min_channels=8)
    (inner,) = [s for s in only(session)._sites if s.name == "layer2.1.bn2"]
    assert inner.channel is not None
    values = torch.ones(len(gates(session)), dtype=torch.float64)
    values[inner.channel[1:]] = 0
    put(session, values)
    before = outputs(model, x)
    session.start_epoch(1)
    assert counts(session)["blocks_removed"] == 0
    assert model.layer2[1].conv1.out_channels == 8  # min_channels holds while the branch lives
    assert close(outputs(model, x), before)
    (inner,) = [s for s in only(session)._sites if s.name == "layer2.1.bn2"]
    values = gates(session).values.clone()
    values[inner.channel] = 0
    put(session, values)
    before = outputs(model, x)
    session.start_epoch(2)
    assert counts(session)["blocks_removed"] == 1
    assert isinstance(model.layer2[1], nn.Identity)
    assert close(outputs(model, x), before)
    check_training_state(model, session.optimizers)


def test_optimizer_state_of_what_stays_is_what_it_was() -> None:
    model, x = net("resnet8"), images()
    session = start(model, x, classes=10)
    session.step(x, labels(x))
    state = session.optimizers[0].state
    before = {name: state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    (inner,) = [s for s in only(session)._sites if s.name == "layer2.0.bn1"]
    values = gates(session).values.clone()
    assert inner.channel is not None
    closed = inner.channel[[0, 5, 31]].tolist()
    values[closed] = 0
    put(session, values)
    velocity = gates(session).velocity.clone()
    session.start_epoch(1)
    left = [i for i in range(32) if i not in (0, 5, 31)]
    for name, kept in (("layer2.0.conv1.weight", before["layer2.0.conv1.weight"][left]),
                       ("layer2.0.conv2.weight", before["layer2.0.conv2.weight"][:, left]),
                       ("layer2.0.bn1.bias", before["layer2.0.bn1.bias"][left])):  # fmt: skip
        assert torch.equal(state[model.get_parameter(name)]["momentum_buffer"], kept)
    assert len(gates(session)) == len(values) - 3
    assert gates(session).velocity.tolist() == [v for i, v in enumerate(velocity.tolist()) if i not in closed]


# -- gammas as gates
def test_with_gammas_only_channels_of_one_norm_have_gates_and_nothing_is_added_to_the_network() -> None:
    model, x = net("resnet8"), images()
    session = start(model, x, classes=10, channel_gate="bn", block_gate=False)
    # those inside, and the 32 that only the last block makes: the zeros added to them are no norm's
    assert gates(session).channels == 16 + 32 + 64 + 32
    assert torch.equal(gates(session).values[:16], model.layer1[0].bn1.weight.detach())
    assert "channel_gate='gate'" in session.effects[NAME].skipped["conv1"]


def with_constant(model: nn.Sequential, shift: float) -> Tensor:
    """Close gammas 1 and 4 of the first batch norm, whose shifts are ``shift``."""
    with torch.no_grad():
        model[1].weight[[1, 4]] = 0
        model[1].bias[[1, 4]] = shift
    return torch.tensor([1, 4])


@pytest.mark.parametrize("form", ["norm behind", "linear", "conv with bias"])
def test_the_shift_of_a_closed_gamma_is_absorbed_exactly_where_nothing_is_padded(form: str) -> None:
    x = random(4, 3, 8, 8)
    model = chain((8,) if form == "linear" else (8, 12), kernel=1)
    if form == "conv with bias":
        model = nn.Sequential(*model[:3], stirred(nn.Conv2d(8, 12, 1)), *model[5:])
    for shift in (0.7, -0.7):
        made = copy.deepcopy(model)
        which = with_constant(made, shift)
        before = outputs(made, x)
        bare = copy.deepcopy(made)
        Surgeon(bare, (), x).apply([RemoveChannels("0", (1, 4))])
        # cut without a thought it is not exact, unless the activation makes 0 of the shift
        assert close(outputs(bare, x)[:1], before[:1], 1e-9) == (shift < 0)
        session = start(made, x, channel_gate="bn")
        restarted: list[int] = []
        session.on_restart.append(lambda seen=restarted: seen.append(1))
        assert (gates(session).values[which] == 0).all()
        session.start_epoch(1)
        assert made[0].out_channels == 6
        assert close(outputs(made, x), before, 1e-9)
        assert restarted


def test_with_zero_padding_the_shift_is_absorbed_exactly_inside_and_not_at_the_border() -> None:
    model, x = chain((8, 12)), random(4, 3, 8, 8)
    with_constant(model, 0.7)
    behind = nn.Sequential(*model[:5])
    before = outputs(behind, x)[0]
    session = start(model, x, channel_gate="bn")
    session.start_epoch(1)
    error = (outputs(behind, x)[0] - before).abs()
    assert error[:, :, 1:-1, 1:-1].max() <= 1e-12 * before.abs().max()
    assert error[:, :, 0].max() > 1e-3 * before.abs().max()


def test_a_shift_that_nothing_behind_can_take_is_lost_as_if_it_were_zero() -> None:
    model = net("wrn-16-4")  # the second convolution of a block has neither bias nor norm
    x = images()
    session = start(model, x, classes=10, channel_gate="bn", block_gate=False)
    norm = model.layer1[1].bn2
    with torch.no_grad():
        norm.weight[[3, 7]] = 0
        norm.bias[[3, 7]] = 0.4
    for site in only(session)._sites:
        site.gather(site.weight.detach(), gates(session).values)
    with torch.no_grad():
        reference = copy.deepcopy(model)
        reference.layer1[1].bn2.bias[[3, 7]] = 0
    assert not close(outputs(model, x)[:1], outputs(reference, x)[:1], 1e-4)
    session.start_epoch(1)
    assert model.layer1[1].conv1.out_channels == 62
    assert close(outputs(model, x), outputs(reference, x))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_gammas_take_the_proximal_step_whatever_the_optimizer_does_to_them(kind: str) -> None:
    model, x = chain(), random(8, 3, 8, 8)
    optimizer = (
        SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if kind == "sgd"
        else AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    )
    session = start(model, x, optimizer=optimizer, channel_gate="bn", g_c=0.01)
    weights = only(session)._frame().weights
    velocity = torch.zeros(20, dtype=torch.float64)
    for _ in range(3):
        old = torch.cat([model[1].weight, model[4].weight]).detach().clone()
        session.step(x, labels(x, 4))
        assert model[1].weight.grad is not None
        assert model[4].weight.grad is not None
        grad = torch.cat([model[1].weight.grad, model[4].weight.grad])
        new, velocity = proximal_step(old, grad, velocity, torch.full_like(old, 0.1), 0.01 * weights, 0.9)
        assert torch.allclose(torch.cat([model[1].weight, model[4].weight]), new, atol=0)


# -- how gates move
def test_gates_move_by_the_rate_of_their_norms_group_whatever_the_optimizer() -> None:
    model, x = residual(), random(8, 3, 8, 8)
    own = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    others = [p for p in model.parameters() if not any(p is q for q in own)]
    optimizer = AdamW([{"params": others, "lr": 0.01}, {"params": own, "lr": 0.3, "weight_decay": 0.5}])
    session = start(model, x, optimizer=optimizer, g_c=0.02, g_b=0.05)
    n, count, weights = len(gates(session)), gates(session).channels, only(session)._frame().weights
    values = torch.ones(n, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(gated_by_hooks(session, values)(x), labels(x, 4)).backward()
    assert values.grad is not None
    one = torch.ones(n, dtype=torch.float64)
    pull = torch.cat([0.02 * weights[:count], 0.05 * weights[count:]])
    new, velocity = proximal_step(one, values.grad, 0 * one, 0.3 * one, pull, 0.9)
    session.step(x, labels(x, 4))
    assert torch.allclose(gates(session).values, new, atol=1e-12)
    assert torch.allclose(gates(session).velocity, velocity, atol=1e-12)
    assert (new != 1).all()


def nothing(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return a loss without gradients."""
    return outputs.sum() * 0


def test_of_two_structures_with_equal_gradients_the_larger_closes_first() -> None:
    model, x = residual(3), random(4, 3, 8, 8)
    session = start(model, x, g_c=1.0, g_b=1.0, lr=0.01, loss=nothing)
    cost, died = only(session)._frame().cost, np.full(len(gates(session)), 10**6)
    for step in range(200):
        session.step(x, labels(x, 4))
        closed = gates(session).closed
        died[closed & (died == 10**6)] = step
    count = gates(session).channels
    for part in (slice(0, count), slice(count, None)):
        p, when = cost[part], died[part]
        settled = when < 10**6
        for i in np.flatnonzero(settled):
            assert (when[settled & (p > p[i])] <= when[i]).all()
        if part.start == 0:
            assert len(set(p.tolist())) > 1
            assert when[p == p.max()].min() < when[p == p.min()].min()


def test_the_size_is_that_of_the_network_after_surgery_and_a_structures_share_is_what_it_takes() -> None:
    for name in ("resnet8", "mobilenet-v2", "densenet-bc", "flat", "gated", "lenet"):
        for unit in ("params", "macs"):
            model, x = net(name), images()
            channels = trace(model, x)
            size = Size.of(model, channels, x, unit)  # type: ignore[arg-type]

            def true(made: nn.Module, unit: str = unit, x: Tensor = x) -> int:
                return (
                    sum(p.numel() for p in made.parameters())
                    if unit == "params"
                    else macs(made, x[:1]).forward
                )

            assert size() == true(model)
            session = start(model, x, classes=10, block_gate=False)
            frame = only(session)._frame()
            some = torch.rand(len(gates(session)), generator=keyed.generator("size", name)).numpy() < 0.3
            gone = frame.rules.spare(frame.gone(some), np.zeros(len(channels.classes)))
            expected, each = size(gone), size.of_classes()
            for one in np.flatnonzero(gone)[:3]:
                alone = np.zeros_like(gone)
                alone[one] = True
                assert size() - size(alone) == each[one]
            session.surgery.apply(removals(session.surgery.channels, gone))
            assert true(model) == expected < size()


def test_the_size_of_a_branch_is_what_goes_with_it() -> None:
    model, x = net("wrn-16-4"), images()
    session = start(model, x, classes=10)
    frame, before = only(session)._frame(), sum(p.numel() for p in model.parameters())
    at = [branch.block if branch else "" for branch in frame.branches].index("layer3.1")
    at += gates(session).channels
    values = torch.ones(len(gates(session)), dtype=torch.float64)
    values[at] = 0
    put(session, values)
    session.start_epoch(1)
    assert before - sum(p.numel() for p in model.parameters()) == frame.cost[at] == 2 * 9 * 256**2 + 4 * 256


# -- how hard to pull
def test_the_controller_is_the_published_formula() -> None:
    assert wanted(0.0, 0.5, 0.6) == 1.0
    assert wanted(0.3, 0.5, 0.6) == pytest.approx(0.75)
    assert wanted(0.6, 0.5, 0.6) == wanted(0.9, 0.5, 0.6) == 0.5
    assert adjusted(0.01, 2.0, 0.9, 0.7) == pytest.approx(0.01 * math.exp(0.4))
    assert adjusted(0.01, 2.0, 0.6, 0.7) < 0.01


def test_pull_follows_the_controller_every_epoch_then_freezes_and_ends() -> None:
    model, x = chain((16, 16)), random(8, 3, 8, 8)
    session = start(model, x, lr=1e-9, total=80, target=0.5, k=2.0, g_c=1e-3, until=0.6, release_at=0.9)
    g, seen = 1e-3, []
    for epoch in range(10):
        session.start_epoch(epoch)
        if 0 < epoch < 6:
            g *= math.exp(2.0 * (1 - (1 - 0.5 * (epoch / 10) / 0.6)))
        assert only(session).g_c_ == pytest.approx(g)
        assert bool(only(session)._pull().any()) == (epoch < 9)
        session.step(x, labels(x, 4))
        seen.append(counts(session)["g_c"])
    assert seen[5] == seen[9] > seen[4] > 1e-3
    assert only(session).released_


def test_a_gate_must_have_been_closed_for_whole_epochs() -> None:
    for patience in (0, 1, 2):
        model, x = chain(), random(4, 3, 8, 8)
        session = start(model, x, lr=1e-12, patience=patience)
        session.start_epoch(0)
        session.step(x, labels(x, 4))
        values = torch.ones(20, dtype=torch.float64)
        values[3] = 0
        put(session, values)
        for epoch in range(1, 5):
            session.start_epoch(epoch)
            session.start_epoch(epoch)  # told twice it counts once
            assert model[0].out_channels == (7 if epoch > patience else 8)
            session.step(x, labels(x, 4))
    model = chain()
    session = start(model, x, lr=1e-12, patience=1)
    for epoch in range(1, 6):  # open for a step in every epoch
        put(session, torch.where(torch.arange(20) == 3, float(epoch % 2), 1.0).double())
        session.step(x, labels(x, 4))
        put(session, torch.where(torch.arange(20) == 3, 0.0, 1.0).double())
        if epoch % 2 == 0:
            gates(session).awake[3] = True
        session.start_epoch(epoch)
        assert model[0].out_channels == 8


def test_when_the_pull_ends_all_that_is_closed_goes_and_gates_follow_the_loss_alone() -> None:
    model, x = chain(), random(8, 3, 8, 8)
    session = start(model, x, total=80, patience=5, lr=0.01, g_c=0.5, until=0.4, release_at=0.5)
    for step in range(10):
        if step == 3:
            values = gates(session).values.clone()
            values[[1, 2, 9]] = 0
            gates(session).velocity[[1, 2, 9]] = 0
            put(session, values)
        before, velocity = gates(session).values.clone(), gates(session).velocity.clone()
        session.step(x, labels(x, 4))
        if step == 4:
            assert (model[0].out_channels, model[3].out_channels) == (6, 11)
        if step >= 5:
            after, moved = gates(session).values, gates(session).velocity
            # z - a = v' - mu v, and with no pull this is the plain gradient step: no shrinking towards 0
            assert torch.allclose(after, before + (1 + 0.9) * (moved - 0.9 * velocity) + 0.81 * velocity)
    assert counts(session)["channels_removed"] == 3
    session.start_epoch(7)
    assert counts(session)["surgeries"] == 1


def test_deaths_are_undone_where_they_would_undershoot_or_empty_a_layer() -> None:
    for seed in range(60):
        g = keyed.generator("refused", seed)
        n = 30
        old, cost = (torch.rand(n, generator=g).double().numpy() for _ in range(2))
        cost[::5] *= 8
        died = torch.rand(n, generator=g).numpy() < 0.5
        room = float(cost[died].sum() * (torch.rand((), generator=g) - 0.1))
        members = keyed.permutation(n, "members", seed)[:12]

        def excess(closed: Any, room: float = room, cost: Any = cost) -> float:
            return room - cost[closed].sum()

        back = refused(old, died, ~died, excess, [])
        assert not (back & ~died).any()
        left, first = room, True
        for one in np.flatnonzero(died)[np.argsort(old[died])]:  # the weakest first
            assert back[one] == (left <= 0 or cost[one] - left > left)
            left -= 0 if back[one] else cost[one]
            first = False
        assert first or abs(left) <= abs(room)
        back = refused(old, died, ~died, None, [Floor(members, 9)])
        gone = died & ~back
        assert gone[members].sum() == min(3, died[members].sum())
        assert gone.sum() == died.sum() - max(0, died[members].sum() - 3)
        kept = members[back[members]]
        assert all((old[kept] >= old[one]).all() for one in members[gone[members]])


def data(steps: int, batch: int = 32, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return batches of noisy images whose class shows in their pattern."""
    g = keyed.generator("adaptive data")
    patterns = torch.randn(4, 3, size, size, generator=g)
    found = []
    for _ in range(steps):
        y = torch.randint(0, 4, (batch,), generator=g)
        found.append((patterns[y] + torch.randn(batch, 3, size, size, generator=g), y))
    return found


def run(
    session: Session, batches: Sequence[tuple[Tensor, Tensor]], stop: int, epoch_steps: int = 5
) -> list[float]:
    losses = []
    for step in range(session.counters["step"], stop):
        if step % epoch_steps == 0:
            session.start_epoch(step // epoch_steps)
        losses.append(session.step(*batches[step % len(batches)]).item())
    return losses


@pytest.mark.parametrize(("channel_gate", "cost"), [("gate", "params"), ("bn", "params"), ("gate", "macs")])
def test_the_size_comes_down_to_the_target_and_stays(channel_gate: Any, cost: Any) -> None:
    batches = data(200)
    model = chain((24, 32, 32)).float()
    whole = sum(p.numel() for p in model.parameters())
    session = start(model, batches[0][0], lr=0.02, total=200 * 32, target=0.5, g_c=0.3, k=1.0, patience=1, min_channels=4,
                    channel_gate=channel_gate, cost=cost)  # fmt: skip
    first, shares = macs(model, batches[0][0][:1]).forward, []
    for stop in range(5, 205, 5):
        losses = run(session, batches, stop)
        shares.append(counts(session)["share"])
    assert min(shares) >= 0.48
    assert all(abs(share - 0.5) <= 0.02 for share in shares[-8:]), shares
    left = sum(p.numel() for p in model.parameters()) / whole
    if cost == "macs":
        left = macs(model, batches[0][0][:1]).forward / first
    assert left == pytest.approx(shares[-1])
    assert np.mean(losses) < 0.8 * math.log(4)
    assert counts(session)["channels_removed"] > 10
    assert counts(session)["extra_macs"] < 0


def test_however_hard_the_pull_the_last_channels_of_a_layer_are_held_open() -> None:
    model, x = residual(), random(8, 3, 8, 8)
    session = start(model, x, lr=0.1, g_c=30.0, g_b=0.01, min_channels=5, allow_empty_stage=True)
    for epoch in range(3):
        session.start_epoch(epoch)
        for _ in range(10):
            session.step(x, labels(x, 4))
    line = only(session)._sites[0]
    assert line.channel is not None
    assert int((~gates(session).closed)[line.channel].sum()) == 5
    assert model[0].out_channels == 5
    assert counts(session)["blocks_removed"] == 2  # inner layers have no floor, so their blocks went
    assert counts(session)["held"] > 0
    assert np.isfinite(session.step(x, labels(x, 4)).item())


def test_the_last_block_of_a_stage_is_held_open_and_does_not_go_for_being_cut() -> None:
    model, x = residual(), random(8, 3, 8, 8)
    session = start(model, x, lr=0.1, g_c=30.0, g_b=30.0, min_channels=5)
    for epoch in range(3):
        session.start_epoch(epoch)
        for _ in range(10):
            session.step(x, labels(x, 4))
    assert counts(session)["blocks_removed"] == 1
    (left,) = [block for block in model if isinstance(block, Residual) and isinstance(block.a, nn.Conv2d)]
    (inner,) = [site for site in only(session)._sites if site.module is left.na]
    assert inner.channel is not None
    assert gates(session).closed[inner.channel].all()  # else this would have cut it
    assert left.a.out_channels == 5
    assert not gates(session).closed[-1]


def test_rounding_and_equal_parts_keep_those_that_closed_last() -> None:
    model, x = chain((24, 16)), random(4, 3, 8, 8)
    session = start(model, x, round_to=8)
    values = torch.ones(40, dtype=torch.float64)
    values[3:20] = 0  # 7 of 24 stay open
    values[24 + 1] = 0  # 15 of 16
    gates(session).still[:] = 9
    gates(session).still[5] = 2
    gates(session).awake[:] = False
    put(session, values)
    kept = model[0].weight.detach().clone()
    before = outputs(model, x)
    session.start_epoch(1)
    assert model[0].out_channels == 8
    assert model[3].out_channels == 16
    assert torch.equal(model[0].weight, kept[[0, 1, 2, 5, *range(20, 24)]])
    assert close(outputs(model, x), before)

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))
            return out

    grouped = Grouped().double()
    session = start(grouped, x)
    assert "statistics" in session.effects[NAME].touched["norm"]
    put(session, torch.tensor([0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1]).double())
    session.start_epoch(1)
    assert grouped.conv.out_channels == 9
    session.step(x, labels(x, 4))


# -- plain training, resume, ranks
def test_without_pull_training_is_plain_training() -> None:
    batches, states = data(6), []
    for methods in ([], [AdaptiveGatePruning(g_c=0.0, g_b=0.0)]):
        model = models.build("resnet8", num_classes=4, image_size=8, seed=0)
        session = Session(
            model,
            SGD(model.parameters(), lr=0.05, momentum=0.9),
            methods,
            sample=batches[0],
            total_samples=LONG,
        )
        states.append((run(session, batches, 6), model.state_dict()))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(value, states[1][1][name]) for name, value in states[0][1].items())
    assert "g_c is 0" in session.effects[NAME].touched["bn1"]


RESUMED = {
    "g_c": 0.5,
    "g_b": 3.0,
    "target": 0.4,
    "k": 2.0,
    "patience": 1,
    "min_channels": 4,
    "round_to": 2,
    "until": 0.7,
}


@pytest.mark.parametrize("channel_gate", ["gate", "bn"])
def test_a_run_resumed_between_surgeries_ends_in_the_same_bits(channel_gate: Any) -> None:
    batches = data(30)

    def fresh() -> Session:
        model = models.build("wrn-16-1", num_classes=4, image_size=8, seed=0)
        return start(
            model, batches[0][0], lr=0.05, total=30 * 32, **{**RESUMED, "channel_gate": channel_gate}
        )

    whole, saved = fresh(), {}
    losses: list[float] = []
    for stop in range(1, 31):
        if stop - 1 in (0, 10, 17, 26):
            tensors, skeleton = pack(whole.state_dict())
            saved[stop - 1] = unpack({k: v.clone() for k, v in tensors.items()}, skeleton)
        losses += run(whole, batches, stop)
    assert counts(whole)["channels_removed"] > 0
    assert counts(whole)["blocks_removed"] > 0
    assert counts(whole)["surgeries"] >= 2
    expected = whole.model.state_dict()
    for step, state in saved.items():
        again = fresh()
        again.load_state_dict(state)
        assert run(again, batches, 30) == losses[step:], step
        found = again.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), step
        assert again.witness() == whole.witness()
        assert all(
            torch.equal(a, b)
            for a, b in zip(gates(again).state().values(), gates(whole).state().values(), strict=True)
        )


def test_the_loop_trains_resumes_and_exports_a_smaller_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"{AdaptiveGatePruning.__module__}:{AdaptiveGatePruning.__name__}"
    monkeypatch.setitem(METHODS, NAME, Row(where))
    small = load("fashion-mnist-12k").stratified(200, 50)
    recipe = Recipe(epochs=3.0, batch_size=20, lr=0.02, ema=0.9, eval_every=0.0)
    method = AdaptiveGatePruning(g_c=2.0, g_b=1.0, target=0.6, patience=0, round_to=4)

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 17:
            raise Stop

    whole = fit("resnet8", small, [method], recipe=recipe)
    with pytest.raises(Stop):
        fit("resnet8", small, [method], recipe=recipe, out=tmp_path / "run", save_every=0.0, on_step=stop)
    again = fit("resnet8", small, [method], recipe=recipe, out=tmp_path / "run", save_every=0.0)
    assert "continued" in " ".join(again.messages)
    assert whole.model is not None
    assert again.model is not None
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    x = torch.randn(2, 1, 28, 28, generator=keyed.generator("loop"))
    dense = models.build("resnet8", in_channels=1, image_size=28)
    assert macs(whole.model, x).forward < macs(dense, x).forward
    assert whole.witness == again.witness
    exported = load_run(tmp_path / "run").network
    with torch.no_grad():
        assert close([exported(x)], [again.model(x)], 1e-6)


RANK = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from tests.methods.test_adaptive_channel_layer_pruning import *
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
model = DistributedDataParallel(models.build("wrn-16-1", num_classes=4, image_size=8, seed=0))
batches = data(24)[rank::2]
chosen = AdaptiveGatePruning(**{**RESUMED, "patience": 0})
session = Session(model, SGD(model.parameters(), lr=0.05, momentum=0.9), [chosen], sample=batches[0], total_samples=12 * 32)
run(session, batches, 12, epoch_steps=3)
torch.save({"gates": gates(session).values, "removed": counts(session)["channels_removed"],
            "model": session.model.state_dict()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_move_their_gates_alike_and_stay_one_network(tmp_path: Path) -> None:
    first, second = two_ranks(RANK, tmp_path)
    assert torch.equal(first["gates"], second["gates"])
    assert first["removed"] == second["removed"] > 0
    for name, value in first["model"].items():
        if "running" not in name:  # batch statistics are each rank's own
            assert torch.equal(value, second["model"][name]), name


def test_under_mixed_precision_gates_stay_in_single_precision() -> None:
    batches = data(4)
    model = models.build("resnet8", num_classes=4, image_size=8, seed=0)
    methods = [
        AdaptiveGatePruning(g_c=0.1, min_channels=4, round_to=1),
        MixedPrecision(dtype="bfloat16", force=True),
    ]
    session = Session(model, SGD(model.parameters(), lr=0.05), methods, sample=batches[0], total_samples=LONG)
    seen: list[torch.dtype] = []
    model.layer1[0].conv2.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    run(session, batches, 4)
    found = next(m for m in session.methods if isinstance(m, AdaptiveGatePruning))._gates
    assert found is not None
    assert found.values.dtype == torch.float32
    assert (found.values != 1).all()
    assert set(seen) == {torch.bfloat16}


# -- refusals
def test_the_last_block_of_a_stage_stays_unless_it_may_go() -> None:
    for allowed in (False, True):
        model, x = net("resnet8"), images()
        session = start(model, x, classes=10, allow_empty_stage=allowed)
        values = torch.ones(len(gates(session)), dtype=torch.float64)
        values[-1] = 0
        put(session, values)
        before = copy.deepcopy(model.state_dict())
        if allowed:
            session.start_epoch(1)
            assert counts(session)["blocks_removed"] == 1
            continue
        with pytest.raises(
            OverPruneError, match=r"layer1\.0 would be left without a block.*g_b.*allow_empty_stage"
        ):
            session.start_epoch(1)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert session.surgery.records() == []
    model, x = net("wrn-16-4"), images()  # here another block of the stage is left
    session = start(model, x, classes=10)
    values = torch.ones(len(gates(session)), dtype=torch.float64)
    values[gates(session).channels :] = 0
    put(session, values)
    session.start_epoch(1)
    assert counts(session)["blocks_removed"] == 3


def test_a_layer_that_would_lose_everything_is_refused_unless_a_minimum_is_given() -> None:
    for least in (None, 2):
        model, x = chain(), random(4, 3, 8, 8)
        session = start(model, x, min_channels=least)
        values = torch.ones(20, dtype=torch.float64)
        values[:8] = 0
        put(session, values)
        if least is None:
            with pytest.raises(OverPruneError, match=r"would lose all its channels.*g_c.*min_channels"):
                session.start_epoch(1)
            assert model[0].out_channels == 8
        else:
            session.start_epoch(1)
            assert model[0].out_channels == 2


def test_a_target_out_of_reach_is_refused_at_once() -> None:
    model, x = chain((16, 16)), random(4, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UnsupportedError, match=r"target=0.2 is out of reach.*0\.\d+ of the params.*min_channels=12"
    ):
        start(model, x, target=0.2, min_channels=12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    start(model, x, target=0.2, min_channels=1)


def test_all_wrong_settings_are_named_at_once() -> None:
    wrong = {"g_c": -1.0, "g_b": float("nan"), "channel_gate": "gamma", "block_gate": 1, "target": 1.0, "k": -1.0,
             "cost": "time", "until": 0.95, "momentum": 1.0, "patience": -1, "min_channels": 0, "round_to": True,
             "allow_empty_stage": "no"}  # fmt: skip
    with pytest.raises(SettingsError) as error:
        AdaptiveGatePruning(**wrong)  # type: ignore[arg-type]
    for name in wrong:
        assert f"{name} is" in str(error.value)
    with pytest.raises(SettingsError, match="at least one kind"):
        AdaptiveGatePruning(channel_gate=None, block_gate=False)
    assert AdaptiveGatePruning(target=None, min_channels=None, channel_gate=None).problems() == []


def test_what_cannot_have_gates_is_left_out_with_the_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.soft, self.plain = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
            self.bare, self.norm = nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10, affine=False)
            self.cold, self.frozen = nn.Conv2d(10, 12, 1), nn.BatchNorm2d(12)
            self.last, self.fc = nn.Conv2d(12, 9, 1), nn.Linear(9, 4)
            self.frozen.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.plain(torch.sigmoid(self.soft(x)))
            x = F.relu(self.frozen(self.cold(F.relu(self.norm(self.bare(F.relu(x)))))))
            out: Tensor = self.fc(F.relu(self.last(x)).mean((2, 3)))
            return out

    model, x = Mixed().double(), random(4, 3, 8, 8)
    session = start(model, x)
    effect = session.effects[NAME]
    assert "plain still reads something else" in effect.skipped["soft"]
    assert "norm has no weight" in effect.skipped["bare"]
    assert "frozen is frozen" in effect.skipped["cold"]
    assert "output" in effect.skipped["fc"]
    assert set(effect.touched) == {"plain", "last"}
    assert gates(session).channels == 15
    with pytest.raises(NoEffectError):
        start(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double(), x)
    with pytest.raises(NoEffectError):
        start(chain(), x, channel_gate=None)


def test_methods_in_its_way_and_sessions_without_a_length_are_refused() -> None:
    model, x = chain(), random(4, 3, 8, 8)
    with pytest.raises(ConflictError, match="gates stand behind the norms"):
        Session(model, SGD(model.parameters(), lr=0.1), [AdaptiveGatePruning(), StandardizationLoss()],
                sample=(x, labels(x, 4)), total_samples=1)  # fmt: skip
    with pytest.raises(UnsupportedError, match="total_samples"):
        Session(model, SGD(model.parameters(), lr=0.1), [AdaptiveGatePruning()], sample=(x, labels(x, 4)))
