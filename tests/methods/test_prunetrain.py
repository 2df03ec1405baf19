"""PruneTrain: the penalty is the published one, and only what is dead on every side goes, without a trace."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.ranks import two_ranks
from tests.surgery.nets import images, net, removable
from torch import Tensor, nn
from torch.optim import SGD

from hasten import keyed, models
from hasten.checkpoint import pack, unpack
from hasten.data import load
from hasten.errors import HastenError, NoEffectError, OverPruneError, SettingsError, UnsupportedError
from hasten.loop import fit
from hasten.measure.macs import macs
from hasten.methods.loss.knowledge_distillation import KnowledgeDistillation
from hasten.methods.structure.batch_growth import grown_batch, saved_bytes
from hasten.methods.structure.lasso import GroupLasso, Groups, dead_branches, is_ordinary, strengths
from hasten.methods.structure.prunetrain import PruneTrain
from hasten.recipe import RECIPES, Recipe
from hasten.session import Session
from hasten.surgery import Channels, RemoveChannels, check_training_state, follow


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("prunetrain", seed), dtype=dtype)


def labels(x: Tensor, classes: int = 10) -> Tensor:
    return torch.arange(len(x)) % classes


def start(
    model: nn.Module,
    x: Tensor,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    total: int | None = None,
    **settings: Any,
) -> Session:
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
    method = PruneTrain(**{"round_to": 1, **settings})
    return Session(model, optimizer, [method], sample=(x, labels(x)), total_samples=total)


def only(session: Session) -> PruneTrain:
    method = session.methods[0]
    assert isinstance(method, PruneTrain)
    return method


def counts(session: Session) -> dict[str, float]:
    return session.witness()["prunetrain"]


def chain(
    widths: Sequence[int] = (8, 12), *, norm: bool = True, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Convolutions, batch norm and ReLU in a row, and a classifier for 4 classes."""
    layers: list[nn.Module] = []
    c_in = 3
    for width in widths:
        layers += [nn.Conv2d(c_in, width, 3, padding=1, bias=not norm)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.ReLU()]
        c_in = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 4)).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(
                random(*p.shape, seed=i) * (math.sqrt(2 / p[0].numel()) if p.dim() > 1 else 0.3)
                + (p.dim() < 2)
            )
    return model


def sides(model: nn.Module, channels: Channels) -> list[tuple[str, str, nn.Parameter, int]]:
    """Return (layer, role, weight, axis) of all that makes or reads channels through weights."""
    found = []
    for name, role in channels.slots:
        module = model.get_submodule(name) if role in ("out", "in") else None
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "groups", 1) == 1:
            found.append((name, role, module.weight, 0 if role == "out" else 1))
    return found


@torch.no_grad()
def kill(
    model: nn.Module, channels: Channels, classes: set[int], *, value: float = 0.0,
    where: Callable[[str, str], bool] = lambda name, role: True,
) -> None:  # fmt: skip
    """Set the weights that make or read ``classes`` to 0 (or +- ``value``) on the sides that ``where`` names."""
    for name, role, weight, axis in sides(model, channels):
        if not where(name, role):
            continue
        at = [
            i
            for i, c in enumerate(channels.classes[channels.slots[name, role].labels].tolist())
            if c in classes
        ]
        part = weight.transpose(0, axis)
        part[at] = value * torch.copysign(torch.ones_like(part[at]), part[at])


def some_classes(model: nn.Module, channels: Channels, seed: int, share: int = 4) -> set[int]:
    """Return random classes of channels, of several layers, that can be taken out; never all of a layer."""
    layers = removable(model, channels)
    order = keyed.permutation(len(layers), "classes", seed)
    chosen: set[int] = set()
    for at in order[:3]:
        made = sorted(set(channels.outputs(layers[at]).tolist()))
        picked = keyed.permutation(len(made), "channel", seed, int(at))[: max(1, len(made) // share)]
        chosen |= {made[i] for i in picked}
    return chosen


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what the model gives in eval and in training mode, leaving it as it is."""
    with torch.no_grad():
        return [copy.deepcopy(model).train(mode)(x) for mode in (False, True)]


def close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = 1e-9) -> bool:
    return all(bool((p - q).abs().max() <= tolerance * q.abs().max()) for p, q in zip(a, b, strict=True))


# -- the penalty
KINDS = {
    "filters and channels": ((6, 5, 3, 3), [(0,), (1,)]),
    "linear": ((7, 4), [(0,), (1,)]),
    "one kind": ((6, 5, 3, 3), [(1,)]),
    "columns and filters": ((6, 5, 3, 3), [(1, 2, 3), (0,)]),
    "2-D filters and the layer": ((6, 5, 3, 3), [(0, 1), ()]),
    "every weight": ((6, 5), [(0, 1)]),
    "3-D": ((4, 3, 2, 3, 2), [(0,), (1,), (2, 3, 4)]),
}


def slow(weight: Tensor, keep: tuple[int, ...], eps: float = 1e-8) -> Tensor:
    """Return the sum of group norms, group by group."""
    rows = weight.movedim(keep, tuple(range(len(keep)))).reshape(math.prod(weight.shape[d] for d in keep), -1)
    return torch.stack([((row * row).sum() + eps).sqrt() for row in rows]).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_its_gradient_is_that_of_autograd_and_the_closed_form(kind: str, layout: torch.memory_format) -> None:
    shape, keeps = KINDS[kind]
    weights = [nn.Parameter(random(*shape, seed=i)) for i in range(2)]
    if len(shape) == 4:
        weights = [nn.Parameter(w.detach().contiguous(memory_format=layout)) for w in weights]
    scales = [0.7 + i for i in range(len(keeps))]
    lasso = GroupLasso(Groups(w, keep, s) for w in weights for keep, s in zip(keeps, scales, strict=True))
    assert len(lasso) == 2 * sum(math.prod(shape[d] for d in keep) for keep in keeps)
    total = sum(s * slow(w, keep) for w in weights for keep, s in zip(keeps, scales, strict=True))
    assert lasso.penalty() == pytest.approx(total.item(), rel=1e-9)
    expected = torch.autograd.grad(total, weights)
    for w in weights:
        w.grad = random(*shape, seed=9)
    lasso.add_gradient(0.3)
    for w, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.grad, random(*shape, seed=9) + 0.3 * gradient, rtol=1e-10, atol=1e-10)
    if keeps == [(0,), (1,)]:
        w = weights[0].detach()
        n_out = ((w * w).flatten(1).sum(1) + 1e-8).sqrt()
        n_in = ((w * w).transpose(0, 1).flatten(1).sum(1) + 1e-8).sqrt()
        wide = w.flatten(2) if w.dim() > 2 else w[:, :, None]
        closed = (wide * (scales[0] / n_out[:, None, None] + scales[1] / n_in[None, :, None])).reshape(shape)
        torch.testing.assert_close(expected[0], closed, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_finite_at_zero_and_groups_without_a_scale_are_left_alone() -> None:
    weight = nn.Parameter(random(6, 5, 3, 3))
    with torch.no_grad():
        weight[2] = 0
        weight[:, 1] = 0
    weight.grad = torch.zeros_like(weight)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64).view(6, 1, 1, 1)
    lasso = GroupLasso([Groups(weight, (0,), mask)])
    assert len(lasso) == 5
    lasso.add_gradient(1.0)
    assert weight.grad.isfinite().all()
    assert not weight.grad[1].any()
    assert not weight.grad[2].any()
    assert weight.grad[0].any()
    with pytest.raises(SettingsError, match="eps"):
        GroupLasso([], eps=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_of_narrow_weights_are_float32_ones(dtype: torch.dtype) -> None:
    weight = nn.Parameter(random(64, 32, 3, 3).to(dtype))
    wide = weight.detach().double()
    lasso = GroupLasso([Groups(weight, (0,)), Groups(weight, (1,))])
    exact = (slow(wide, (0,)) + slow(wide, (1,))).item()
    assert abs(lasso.penalty() / exact - 1) < 1e-5
    weight.grad = torch.zeros_like(weight)
    lasso.add_gradient(2.0)
    assert weight.grad.dtype == dtype
    w = wide.clone().requires_grad_()
    (2 * (slow(w, (0,)) + slow(w, (1,)))).backward()
    assert w.grad is not None
    assert (weight.grad.double() - w.grad).abs().max() < (
        0.01 if dtype != torch.float32 else 1e-6
    ) * w.grad.abs().max()


def test_the_proximal_step_takes_equal_amounts_off_the_norm_down_to_exactly_zero() -> None:
    weight = nn.Parameter(random(4, 5, 3, 3))
    norm = weight.detach().flatten(1).norm(dim=1)
    lasso = GroupLasso([Groups(weight, (0,), 2.0)])
    for step in range(1, 60):
        lasso.shrink([0.1])
        torch.testing.assert_close(weight.detach().flatten(1).norm(dim=1), (norm - 0.2 * step).clamp_min(0))
    assert not weight.any()
    assert float(norm.max()) < 0.2 * 59


def test_the_proximal_step_keeps_the_type_of_narrow_weights() -> None:
    weight = nn.Parameter(random(16, 8, 3, 3).bfloat16())
    norm = weight.detach().double().flatten(1).norm(dim=1)
    GroupLasso([Groups(weight, (0,))]).shrink([2.0])
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        weight.detach().double().flatten(1).norm(dim=1), norm - 2.0, rtol=0.01, atol=0.0
    )


def penalty_of(model: nn.Module, *, inputs: bool = True) -> Tensor:
    """Return G of a network without depthwise layers, whose first layer reads the images and whose last gives logits."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return sum((slow(m.weight, (0,)) for m in layers[:-1]), torch.zeros(())) + sum(
        (slow(m.weight, (1,)) for m in layers[1:]), torch.zeros(())
    )


@pytest.mark.parametrize("name", ["flat", "resnet8"])
@pytest.mark.parametrize("r", [0.1, 0.2, 0.4, 0.9])
def test_lambda_makes_the_penalty_the_share_r_of_the_first_loss(name: str, r: float) -> None:
    model, x = net(name), images()
    loss = F.cross_entropy(copy.deepcopy(model).train()(x), labels(x)).item()
    total = penalty_of(model).item()
    session = start(model, x, r=r)
    session.step(x, labels(x))
    lam = only(session).lam_
    assert lam is not None
    assert abs(lam * total / (loss + lam * total) - r) < 1e-6
    assert counts(session)["lambda"] == lam
    session.step(x, labels(x))
    again = start(net(name), x, r=r)
    again.load_state_dict(copy.deepcopy(session.state_dict()))
    again.step(x, labels(x))
    assert only(again).lam_ == only(session).lam_ == lam


def test_the_stored_coefficients_of_the_authors_have_our_ratio() -> None:
    found = {}
    for r in (0.2, 0.4):
        session = start(chain(), random(4, 3, 8, 8), r=r)
        session.step(random(4, 3, 8, 8), labels(torch.zeros(4), 4))
        found[r] = only(session).lam_ or 0.0
    assert abs(found[0.4] / found[0.2] - 1.010e-3 / 3.787e-4) < 2e-3


def test_the_mean_of_several_batches_sets_lambda_and_there_is_no_penalty_before() -> None:
    x = random(8, 3, 8, 8)
    session, plain = start(chain(), x, calibrate=3, lr=0.0), chain()
    losses = []
    for step in range(4):
        batch = random(8, 3, 8, 8, seed=step)
        losses.append(F.cross_entropy(plain(batch), labels(x, 4)).item())
        assert (only(session).lam_ is None) == (step < 3)
        session.step(batch, labels(x, 4))
        assert counts(session)["penalty_steps"] == max(0, step - 1)
    l0, g0 = sum(losses[:3]) / 3, penalty_of(plain).item()
    assert abs((only(session).lam_ or 0.0) / (0.2 * l0 / (0.8 * g0)) - 1) < 1e-9


@pytest.mark.parametrize("every", [1, 3])
def test_the_step_minimises_the_loss_plus_the_penalty(every: int) -> None:
    x = random(6, 3, 8, 8)
    session = start(chain(), x, lam=0.02, every=every)
    for step in range(4):
        model = copy.deepcopy(session.model)
        model.zero_grad()
        session.step(x, labels(x, 4))
        strength = 0.02 * every * (step % every == 0)
        (F.cross_entropy(model(x), labels(x, 4)) + strength * penalty_of(model)).backward()
        for a, b in zip(session.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_proximal_leaves_the_gradient_alone_and_shrinks_after_the_update(momentum: float) -> None:
    x = random(6, 3, 8, 8)
    session = start(chain(), x, lam=0.2, proximal=True, momentum=momentum, lr=0.1)
    plain = chain()
    optimizer = SGD(plain.parameters(), lr=0.1, momentum=momentum)
    assert only(session).writes == {"structure"}
    F.cross_entropy(plain(x), labels(x, 4)).backward()
    optimizer.step()
    session.step(x, labels(x, 4))
    for a, b in zip(session.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    step = 0.1 * 0.2 / (1 - momentum)
    last = plain[-1].weight.detach()  # the classifier has one kind of groups
    wanted = last * (1 - step / last.norm(dim=0, keepdim=True)).clamp_min(0)
    torch.testing.assert_close(session.model[-1].weight.detach(), wanted)  # type: ignore[index, union-attr]
    for _ in range(150):
        session.step(x, labels(x, 4))
    assert (session.model[0].weight.flatten(1).norm(dim=1) == 0).any()  # type: ignore[index, union-attr]


def test_size_weighting_multiplies_each_norm_by_the_root_of_its_weights() -> None:
    x, model = random(4, 3, 8, 8), chain()
    session = start(model, x, size_weighted=True, lr=0.0)
    session.step(x, labels(x, 4))
    first, second, last = (m.weight for m in model if isinstance(m, nn.Conv2d | nn.Linear))
    expected = math.sqrt(27) * slow(first, (0,)) + math.sqrt(8 * 9) * slow(second, (0,))
    expected = expected + math.sqrt(12 * 9) * slow(second, (1,)) + math.sqrt(4) * slow(last, (1,))
    assert abs((only(session).g0_ or 0.0) / expected.item() - 1) < 1e-9


def test_without_a_penalty_it_is_plain_training_bit_for_bit_and_nothing_goes() -> None:
    x = random(8, 3, 8, 8, dtype=torch.float32)
    plain, model = chain(dtype=torch.float32), chain(dtype=torch.float32)
    for m in (plain, model):
        kill(m, follow(m, x), set(follow(m, x).outputs("0")[:3].tolist()))
    session = start(model, x, r=0.0, interval=1, total=10 * 8)
    optimizer = SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for step in range(10):
        session.start_epoch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x), labels(x, 4))
        loss.backward()
        optimizer.step()
        assert torch.equal(session.step(x, labels(x, 4)), loss.detach())
    for a, b in zip(session.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(counts(session).values())


# -- what goes and what stays
WIRED = ["resnet8", "mobilenet-v1", "densenet-bc", "googlenet", "flat", "lenet", "wrn-16-4", "mobilenet-v2"]


@pytest.mark.parametrize("name", WIRED)
def test_channels_dead_on_every_side_go_and_those_alive_on_one_stay(name: str) -> None:
    model, x = net(name), images()
    channels = follow(model, x)
    classes = some_classes(model, channels, seed=1)
    makers = {
        c: n for n, r in channels.slots if r == "out" for c in channels.outputs(n).tolist() if c in classes
    }
    kill(model, channels, classes, where=lambda n, r: r == "out")
    session = start(model, x, lam=1e-3, interval=3)
    session.start_epoch(3)
    assert counts(session)["channels_removed"] == 0
    kill(model, channels, classes)
    before, sizes = outputs(model, x), {n: len(channels.outputs(n)) for n in makers.values()}
    session.start_epoch(4)
    assert counts(session)["channels_removed"] == 0, "only every third epoch"
    session.start_epoch(6)
    assert counts(session)["channels_removed"] == len(classes)
    assert counts(session)["blocks_removed"] == 0
    now = session.surgery.channels
    for layer, size in sizes.items():
        gone = sum(c in classes for c in channels.outputs(layer).tolist())
        assert len(now.outputs(layer)) == size - gone
    assert close(outputs(model, x), before)
    check_training_state(model, session.optimizers)


@pytest.mark.parametrize("name", ["resnet8", "flat", "mobilenet-v1"])
def test_channels_whose_readers_alone_are_dead_stay(name: str) -> None:
    model, x = net(name), images()
    channels = follow(model, x)
    kill(model, channels, some_classes(model, channels, seed=2), where=lambda n, r: r == "in")
    session = start(model, x, lam=1e-3, interval=1)
    session.start_epoch(1)
    assert counts(session) == {**counts(session), "channels_removed": 0, "reconfigurations": 1}


def test_weights_are_judged_by_their_size_not_their_sign() -> None:
    model, x = chain(), random(4, 3, 8, 8)
    channels = follow(model, x)
    negative, small, large = channels.outputs("0")[:3].tolist()
    with torch.no_grad():
        for _, _, weight, axis in sides(model, channels):
            weight.transpose(0, axis)[0] = -weight.transpose(0, axis)[0].abs()
    kill(model, channels, {small}, value=0.99e-2)
    kill(model, channels, {large}, value=1.01e-2)
    session = start(model, x, lam=1e-3, interval=1, tau=1e-2)
    session.start_epoch(1)
    assert counts(session)["channels_removed"] == 1
    assert model[0].out_channels == 7
    assert negative != small


def test_what_weights_of_half_the_threshold_did_is_bounded() -> None:
    model, x, tau = chain(norm=False), random(16, 3, 8, 8), 1e-3
    channels = follow(model, x)
    gone = channels.outputs("0")[[1, 4, 6]]
    kill(model, channels, set(gone.tolist()), value=tau / 2)
    before = outputs(model, x)[0]
    with torch.no_grad():
        first = model[1](model[0](x))[:, [1, 4, 6]].abs().amax((0, 2, 3))
        # the second layer reads 9 positions of each; ReLU and the mean pass differences on at most unchanged
        bound = float(9 * tau / 2 * first.sum() * model[-1].weight.abs().sum(1).max())
    session = start(model, x, lam=1e-3, interval=1, tau=tau)
    session.start_epoch(1)
    moved = float((outputs(model, x)[0] - before).abs().max())
    assert model[0].out_channels == 5
    assert 0 < moved <= bound
    assert bound < 0.1 * float(before.abs().max())


def resnet20() -> nn.Module:
    model = models.build("resnet20", seed=0).double()
    with torch.no_grad():
        for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            m.weight.copy_(1 + 0.2 * random(m.num_features, seed=i))
            m.bias.copy_(0.3 * random(m.num_features, seed=100 + i))
    return model


def test_what_is_added_loses_only_the_channels_that_are_dead_in_all_members() -> None:
    model, x = resnet20(), images()
    channels = follow(model, x)
    stage = channels.outputs("conv1").tolist()
    dead_in = {"conv1": {2, 3}, "layer1.0.conv2": {1, 2, 3}, "layer1.1.conv2": {2, 3, 4}}
    for number in range(1, 5):
        alive = {name for name, dead in dead_in.items() if number not in dead}
        kill(
            model, channels, {stage[number]}, where=lambda n, r, alive=alive: not (r == "out" and n in alive)
        )
    before = outputs(model, x)
    session = start(model, x, lam=1e-3, interval=1)
    session.start_epoch(1)
    assert counts(session)["channels_removed"] == 2
    assert model.conv1.out_channels == 14
    assert all(block.conv2.out_channels == 14 for block in model.layer1)
    assert close(outputs(model, x), before)
    session.step(x, labels(x))


def test_gating_leaves_out_of_a_branch_what_is_dead_for_it_alone() -> None:
    model, x = resnet20(), images()
    block = model.layer1[1]
    with torch.no_grad():
        block.conv1.weight[:, [1, 2, 5]] = 1e-6
        block.conv2.weight[[4, 7]] = 1e-6
        block.bn2.bias[[4, 7]] = 0.0  # what a norm adds to a dead channel goes with it
        block.bn2.weight[[4, 7]] = 0.0
    before, dense = outputs(model, x), macs(model, x[:1]).forward
    session = start(model, x, lam=1e-3, interval=1, gating=True)
    session.start_epoch(1)
    assert counts(session)["channels_removed"] == 0
    assert counts(session)["channels_gated"] == 5
    assert (block.conv1.in_channels, block.conv2.out_channels, model.conv1.out_channels) == (13, 14, 16)
    assert close(outputs(model, x), before, 1e-4)
    assert dense - macs(model, x[:1]).forward == 5 * 16 * 9 * 32 * 32
    session.start_epoch(2)
    assert counts(session)["channels_gated"] == 5
    session.step(x, labels(x))
    exported = session.export()
    assert all(type(m).__module__.startswith(("torch.", "hasten.models.")) for m in exported.modules())
    assert close([exported(x)], [model.eval()(x)])


def test_gates_round_up_with_the_strongest_of_the_dead_and_stages_still_shrink() -> None:
    model, x = resnet20(), images()
    channels = follow(model, x)
    stage = channels.outputs("conv1").tolist()
    with torch.no_grad():
        model.layer1[1].conv1.weight[:, :9] = 1e-6
        model.layer1[1].conv1.weight[:, 3] = 1e-5
    session = start(model, x, lam=1e-3, interval=1, gating=True, round_to=8)
    session.start_epoch(1)
    assert model.layer1[1].conv1.reads.kept.tolist() == [3, *range(9, 16)]
    channels = session.surgery.channels
    stage = channels.outputs("conv1").tolist()
    kill(model, channels, {stage[i] for i in range(1, 16, 2)})
    session.start_epoch(2)
    assert model.conv1.out_channels == 8  # the gated branch does not keep a stage from rounding as one
    assert model.layer1[1].conv1.reads.width == 8


def test_a_class_is_as_strong_as_its_largest_weight_anywhere() -> None:
    model, x = net("flat"), images()
    channels = follow(model, x)
    found = strengths(channels, model)
    for at, one in enumerate(channels.outputs("conv2").tolist()):
        reads = model.fc1.weight.view(20, 10, 64)[:, at]
        assert found[one] == max(model.conv2.weight[at].abs().max().item(), reads.abs().max().item())
    assert np.isfinite(found[channels.inputs("conv1")]).all()


def test_the_number_kept_is_rounded_up_with_the_strongest_of_the_dead() -> None:
    model, x = chain((32, 24)), random(4, 3, 8, 8)
    channels = follow(model, x)
    made = channels.outputs("0").tolist()
    for at in range(13, 32):
        kill(model, channels, {made[at]}, value=1e-5 * (1 + at % 7) / 8)
    session = start(model, x, lam=1e-3, interval=1, round_to=8)
    kept = model[0].weight.detach().clone()
    session.start_epoch(1)
    assert model[0].out_channels == 16
    assert model[3].out_channels == 24
    # of the dead, numbers 13, 20 and 27 are the strongest
    assert torch.equal(model[0].weight, kept[[*range(13), 13, 20, 27]])


def test_a_layer_that_would_lose_everything_is_refused_unless_a_minimum_is_given() -> None:
    x = random(4, 3, 8, 8)
    for settings in ({"round_to": 8}, {"min_channels": 2}):
        model = chain()
        channels = follow(model, x)
        for at, one in enumerate(channels.outputs("0").tolist()):
            kill(model, channels, {one}, value=1e-6 * (1 + at * 3 % 8))
        session = start(model, x, lam=1e-3, interval=1, **settings)
        state, weight = copy.deepcopy(session.state_dict()), model[0].weight.detach().clone()
        if "min_channels" in settings:
            session.start_epoch(1)
            assert model[0].out_channels == 2
            assert torch.equal(model[0].weight, weight[[2, 5]])  # sizes 7 and 8, in their order
            continue
        with pytest.raises(
            OverPruneError, match=r"all 8 of its channels.*Lower prunetrain's r .*min_channels"
        ):
            session.start_epoch(1)
        assert torch.equal(model[0].weight, weight)
        assert session.state_dict()["structure"] == state["structure"] == []


class Unequal(nn.Module):
    """A grouped convolution, a group norm and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.mix, self.norm = nn.Conv2d(8, 12, 1), nn.GroupNorm(4, 12)
        self.depth, self.point = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.mix(F.relu(self.split(F.relu(self.stem(x)))))))
        logits: Tensor = self.fc(F.relu(self.point(self.depth(x))).mean((2, 3)))
        return logits


def test_parts_stay_equal_and_grouped_and_depthwise_layers_are_left_out_with_the_reason() -> None:
    torch.manual_seed(0)
    model, x = Unequal().double(), random(4, 3, 8, 8)
    channels = follow(model, x)
    mixed = channels.outputs("mix").tolist()
    for at, one in enumerate(mixed):
        if at not in (3, 6, 9):  # alive: none, one, one and one of the groups of three
            kill(model, channels, {one}, value=1e-6 * (1 + at))
    kill(
        model,
        channels,
        set(channels.outputs("stem")[:4].tolist()) | set(channels.outputs("split")[4:].tolist()),
    )
    model.depth.weight.data += 1  # depthwise weights are not judged
    kept = model.mix.weight.detach().clone()
    session = start(model, x, lam=1e-3, interval=1)
    effect = session.effects["prunetrain"]
    assert "groups=2" in effect.skipped["split"]
    assert "depthwise" in effect.skipped["depth"]
    assert "grouped convolution" in effect.skipped["stem"]
    assert effect.touched["mix"] == "12 output groups"
    assert effect.touched["fc"] == "16 input groups"
    assert "statistics" in effect.touched["norm"]
    session.start_epoch(1)
    assert (model.stem.out_channels, model.split.out_channels, model.mix.out_channels) == (8, 8, 4)
    assert model.depth.groups == model.norm.num_channels == 4
    assert torch.equal(model.mix.weight, kept[[2, 3, 6, 9]])
    session.step(x, labels(x, 4))


def test_frozen_layers_get_no_penalty_and_keep_what_they_need() -> None:
    model, x = chain(), random(4, 3, 8, 8)
    model[3].weight.requires_grad_(False)
    channels = follow(model, x)
    kill(model, channels, set(channels.outputs("0")[:3].tolist()), where=lambda n, r: n != "3")
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    session = Session(
        model, optimizer, [PruneTrain(lam=1e-3, interval=1, round_to=1)], sample=(x, labels(x, 4))
    )
    assert session.effects["prunetrain"].skipped["3"] == "its weight is frozen"
    session.step(x, labels(x, 4))
    session.start_epoch(1)
    assert model[0].out_channels == 8


# -- branches
def test_a_branch_with_a_dead_layer_goes_and_leaves_its_shortcut() -> None:
    model, x = resnet20(), images()
    session = start(model, x, lam=1e-4, interval=1, lr=1e-3)
    session.step(x, labels(x))
    with torch.no_grad():
        model.layer1[1].conv2.weight.zero_()
        model.layer3[0].conv1.weight.fill_(0.9e-4)
    assert sorted(dead_branches(session.surgery.channels, model, 1e-4)) == ["layer1.1", "layer3.0"]
    reference = copy.deepcopy(model)
    for block in (reference.layer1[1], reference.layer3[0]):
        shortcut = block.downsample or nn.Identity()
        block.forward = lambda t, shortcut=shortcut: F.relu(shortcut(t))
    session.start_epoch(1)
    assert counts(session)["blocks_removed"] == 2
    assert not hasattr(model.layer1[1], "conv1")
    assert close(outputs(model, x)[:1], [reference.eval()(x)])
    check_training_state(model, session.optimizers)
    assert set(session.optimizers[0].state) == set(model.parameters())
    session.step(x, labels(x))
    session.export()(x)


class Squeezed(nn.Module):
    """A residual block with a gate: the gate's own layers do not carry the branch."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.b, self.nb = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.down, self.up = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.nb(self.b(F.relu(self.na(self.a(x)))))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(out, 1)))))
        return F.relu(out * gate + x)


@pytest.mark.parametrize(("layer", "goes"), [("down", False), ("up", False), ("a", True), ("b", True)])
def test_only_a_layer_that_every_path_crosses_cuts_a_branch(layer: str, goes: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Squeezed(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 4)).double()  # fmt: skip
    with torch.no_grad():
        model.get_submodule(f"1.{layer}").weight.zero_()
    found = dead_branches(follow(model, random(2, 3, 8, 8)), model, 1e-4)
    assert found == []  # its end is a multiplication, which surgery cannot drop
    plain = nn.Sequential(model[0], Ungated(model[1]), *list(model)[2:])
    found = dead_branches(follow(plain, random(2, 3, 8, 8)), plain, 1e-4)
    assert found == (["1.inner"] if goes else [])


class Ungated(nn.Module):
    """The same with a batch norm behind the gate, so that a module ends the branch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        inner.end = nn.BatchNorm2d(8).double()

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.inner
        out = inner.nb(inner.b(F.relu(inner.na(inner.a(x)))))
        gate = torch.sigmoid(inner.up(F.relu(inner.down(F.adaptive_avg_pool2d(out, 1)))))
        return F.relu(inner.end(out * gate) + x)


# -- after it
def test_training_on_is_that_of_the_masked_network() -> None:
    model, x, y = chain((8, 12)), random(8, 3, 8, 8), labels(torch.zeros(8), 4)
    dense = copy.deepcopy(model)
    session = start(model, x, lam=0.01, interval=1, lr=0.1)
    optimizer = SGD(dense.parameters(), lr=0.1, momentum=0.9)
    channels = follow(dense, x)
    dead = set(channels.outputs("0")[[1, 5]].tolist()) | set(channels.outputs("3")[[0, 2, 7]].tolist())
    masks = {id(weight): torch.ones_like(weight) for _, _, weight, _ in sides(dense, channels)}
    for name, role, weight, axis in sides(dense, channels):
        at = [
            i for i, c in enumerate(channels.classes[channels.slots[name, role].labels].tolist()) if c in dead
        ]
        masks[id(weight)].transpose(0, axis)[at] = 0

    def dense_step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(dense(x), y)
        (loss + 0.01 * penalty_of(dense)).backward()
        if dead_now:
            for p in dense.parameters():
                if id(p) in masks and p.grad is not None:
                    p.grad.mul_(masks[id(p)])
        optimizer.step()
        return loss.item()

    dead_now = False
    for _ in range(3):
        assert abs(float(session.step(x, y)) - dense_step()) < 1e-10
    kill(model, session.surgery.channels, dead)
    with torch.no_grad():
        for p in dense.parameters():
            if id(p) in masks:
                p.mul_(masks[id(p)])
                optimizer.state[p]["momentum_buffer"].mul_(masks[id(p)])
    dead_now = True
    session.start_epoch(1)
    assert (model[0].out_channels, model[3].out_channels) == (6, 9)
    for _ in range(8):
        assert abs(float(session.step(x, y)) - dense_step()) < 1e-9
    rows = [i for i in range(12) if i not in (0, 2, 7)]
    columns = [i for i in range(8) if i not in (1, 5)]
    torch.testing.assert_close(model[3].weight, dense[3].weight[rows][:, columns], rtol=1e-9, atol=1e-9)
    ours, theirs = (o.state[w]["momentum_buffer"] for o, w in
                    ((session.optimizers[0], model[3].weight), (optimizer, dense[3].weight)))  # fmt: skip
    torch.testing.assert_close(ours, theirs[rows][:, columns], rtol=1e-9, atol=1e-9)


def test_training_macs_are_three_times_the_forward_ones_summed_over_epochs() -> None:
    model, x, y = chain((8, 12)), random(8, 3, 8, 8), labels(torch.zeros(8), 4)
    session = start(model, x, lam=1e-4, interval=2, lr=1e-6)
    forward, training, total, extra = [], [], 0, 0
    for epoch in range(6):
        if epoch in (1, 3):  # seen at the next second epoch
            channels = session.surgery.channels
            kill(model, channels, set(channels.outputs("0")[:2].tolist()))
        session.start_epoch(epoch)
        a, b = model[0].out_channels, model[3].out_channels
        assert macs(model, x).forward == 64 * 9 * (3 * a + a * b) + 4 * b
        forward.append(64 * 9 * (3 * a + a * b) + 4 * b)
        training.append(64 * 9 * (2 * 3 * a + 3 * a * b) + 3 * 4 * b)
        for _ in range(epoch + 1):
            session.step(x, y)
        total += 3 * forward[-1] * 8 * (epoch + 1)
        extra += (training[-1] - training[0]) * 8 * (epoch + 1)
    assert len(set(forward)) == 3
    assert all(later <= earlier for earlier, later in pairwise(forward))
    method = only(session)
    assert [row["forward"] for row in method.history_] == forward
    assert [row["samples"] for row in method.history_] == [8 * (e + 1) for e in range(6)]
    assert method.training_macs() == total
    assert method.dense_macs() == 3 * forward[0] * 8 * 21
    assert counts(session)["extra_macs"] == extra < 0
    assert abs(counts(session)["macs_saved"] - (1 - total / method.dense_macs())) < 1e-12


def test_it_ends_with_a_last_reconfiguration_and_without_a_penalty() -> None:
    x, y = random(8, 3, 8, 8), labels(torch.zeros(8), 4)
    for stop_at, last in ((1.0, 10), (0.6, 6)):
        model = chain((8, 12))
        session = start(model, x, lam=1e-3, interval=50, total=80, stop_at=stop_at, lr=1e-6)
        for step in range(10):
            if step == 3:
                kill(
                    model,
                    session.surgery.channels,
                    set(session.surgery.channels.outputs("0")[:2].tolist()),
                    value=1e-7,
                )
            assert model[0].out_channels == (8 if step < last else 6)
            session.step(x, y)
        assert model[0].out_channels == 6
        assert counts(session)["penalty_steps"] == last
        assert counts(session)["reconfigurations"] == 1
    with pytest.raises(UnsupportedError, match="total_samples"):
        start(chain(), x, stop_at=0.5)


def test_a_run_too_short_for_channels_to_die_is_said_in_the_effect() -> None:
    x, y = random(8, 3, 8, 8), labels(torch.zeros(8), 4)
    for interval, short in ((4, True), (3, False)):
        session = start(chain(), x, lam=1e-3, interval=interval, total=9 * 16)
        for epoch in range(2):
            session.start_epoch(epoch)
            for _ in range(2):
                session.step(x, y)
        assert ("fewer than 3 intervals" in session.effects["prunetrain"].saves) == short


# -- whole runs
def data(steps: int, batch: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Return batches of noisy images whose class shows in their pattern."""
    g = keyed.generator("prunetrain data")
    patterns = torch.randn(4, 3, 8, 8, generator=g)
    found = []
    for _ in range(steps):
        y = torch.randint(0, 4, (batch,), generator=g)
        found.append((patterns[y] + torch.randn(batch, 3, 8, 8, generator=g), y))
    return found


def run(
    session: Session, batches: Sequence[tuple[Tensor, Tensor]], stop: int, epoch_steps: int = 5
) -> list[float]:
    losses = []
    for step in range(session.counters["step"], stop):
        if step % epoch_steps == 0:
            session.start_epoch(step // epoch_steps)
        losses.append(float(session.step(*batches[step])))
    return losses


def test_channels_die_within_a_few_intervals_and_the_network_still_learns() -> None:
    batches = data(400)
    model = chain((16, 32), dtype=torch.float32)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    # with so few groups lambda is ten times the authors', and dead weights hover that much higher
    method = PruneTrain(r=0.2, interval=4, tau=0.02, round_to=4)
    session = Session(model, optimizer, [method], sample=batches[0], total_samples=400 * 32)
    losses = run(session, batches, 400, epoch_steps=20)
    found = counts(session)
    assert found["channels_removed"] + found["blocks_removed"] > 0
    forward = [row["forward"] for row in only(session).history_]
    assert macs(session.model, batches[0][0]).forward <= forward[-1] < forward[0]
    assert 0 < found["macs_saved"] < 1
    assert sum(losses[-20:]) / 20 < 0.3
    check_training_state(model, optimizer)
    for width in (m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)):
        assert width % 4 == 0


RESUMED = {"lam": 0.3, "tau": 0.15, "interval": 2, "round_to": 4, "min_channels": 4}


@pytest.mark.parametrize(
    "more",
    [{}, {"proximal": True, "every": 2, "tau": 0.03}, {"gating": True, "tau": 0.18}],
    ids=["gradient", "proximal", "gating"],
)
def test_resume_is_bit_identical_at_a_boundary_and_within_an_interval(more: dict[str, Any]) -> None:
    batches = data(30)

    def fresh() -> Session:
        model = models.build("resnet8", num_classes=4, image_size=8, seed=0)
        return Session(model, SGD(model.parameters(), lr=0.02, momentum=0.9), [PruneTrain(**{**RESUMED, **more})],
                       sample=batches[0], total_samples=30 * 32)  # fmt: skip

    whole, saved, losses = fresh(), {}, []
    for step in range(30):
        if step in (3, 9, 10, 13, 20, 29):
            tensors, skeleton = pack(whole.state_dict())
            saved[step] = unpack({k: v.clone() for k, v in tensors.items()}, skeleton)
        losses += run(whole, batches, step + 1)
    assert counts(whole)["channels_removed"] > 0
    assert 1 <= len(saved[13]["structure"]) < len(whole.state_dict()["structure"])
    expected = whole.model.state_dict()
    for step, state in saved.items():
        again = fresh()
        again.load_state_dict(state)
        assert run(again, batches, 30) == losses[step:], step
        found = again.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), step
        assert again.witness() == whole.witness()
        assert only(again).state_dict() == only(whole).state_dict()


def test_the_loop_trains_resumes_and_exports_a_smaller_network(tmp_path: Path) -> None:
    small = load("fashion-mnist-12k").stratified(200, 50)
    recipe = Recipe(epochs=3.0, batch_size=20, lr=0.02, ema=0.9, eval_every=0.0)
    method = PruneTrain(**{**RESUMED, "interval": 1})

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
    x = torch.zeros(2, 1, 28, 28)
    dense = models.build("resnet8", in_channels=1, image_size=28)
    assert macs(whole.model, x).forward < macs(dense, x).forward
    assert whole.witness == again.witness
    assert whole.accuracy == again.accuracy


RANK = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from tests.methods.test_prunetrain import RESUMED, counts, data, models, only, run, PruneTrain, SGD, Session
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
model = DistributedDataParallel(models.build("resnet8", num_classes=4, image_size=8, seed=0))
batches = data(24)[rank::2]
settings = {**RESUMED, "lam": None, "r": 0.99}
session = Session(model, SGD(model.parameters(), lr=0.02, momentum=0.9), [PruneTrain(**settings)], sample=batches[0])
run(session, batches, 12, epoch_steps=3)
torch.save({"lam": only(session).lam_, "removed": counts(session)["channels_removed"],
            "model": session.model.state_dict()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_set_one_lambda_and_stay_one_network(tmp_path: Path) -> None:
    first, second = two_ranks(RANK, tmp_path)
    assert first["lam"] == second["lam"]
    assert first["removed"] == second["removed"] > 0
    for name, value in first["model"].items():
        if "running" not in name:  # batch statistics are each rank's own
            assert torch.equal(value, second["model"][name]), name


# -- the batch that freed memory allows
def test_a_grown_batch_fits_the_memory_of_the_start() -> None:
    for seed in range(200):
        now, once = (
            int(v) for v in 10 ** (6 + 3 * torch.rand(2, generator=keyed.generator("memory", seed))).double()
        )
        batch = 8 * (1 + seed % 40)
        size = grown_batch(batch, once, now, limit=1000)
        assert batch <= size <= max(batch, min(2 * batch, 1000))
        assert size == batch or size % 8 == 0
        assert size == batch or now * size <= once * batch, "more memory than at the start"
    assert grown_batch(128, 1000, 800) == 160
    assert grown_batch(128, 1000, 100) == 256
    assert grown_batch(128, 1000, 100, limit=200) == 200
    assert grown_batch(128, 1000, 1100) == 128
    with pytest.raises(ValueError, match="positive"):
        grown_batch(128, 1000, 0)


def test_the_loop_trains_on_grown_batches_at_the_grown_rate_and_resumes(tmp_path: Path) -> None:
    small = load("fashion-mnist-12k").stratified(200, 50)
    recipe = Recipe(
        epochs=4.5, batch_size=16, lr=0.02, schedule="constant", warmup=0.0, ema=0.9, eval_every=0.0
    )
    method = PruneTrain(**{**RESUMED, "interval": 1, "grow_batch": True})

    class Stop(Exception):
        pass

    whole = fit("resnet8", small, [method], recipe=recipe, out=tmp_path / "whole", save_every=1e9)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "steps.jsonl").read_text().splitlines()]
    seen, sizes = 0, []
    for row in rows:
        sizes.append(row["samples"] - seen)
        seen = row["samples"]
        assert row["lr"] == pytest.approx(0.02 * sizes[-1] / 16, rel=1e-12)
    assert sizes[0] == 16
    assert sizes[-1] > 16
    assert all(size % 8 == 0 for size in sizes)
    assert all(b <= 2 * a for a, b in pairwise(sizes))
    at, epochs = 0, []  # an epoch is all batches that the samples fill, whatever their size
    while at < len(sizes):
        epochs.append(sizes[at : at + 200 // sizes[at]])
        at += len(epochs[-1])
    assert len(epochs) == 5
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    assert all(200 - sum(epoch) < epoch[0] for epoch in epochs[:-1])
    assert whole.witness["prunetrain"]["batch_size"] == sizes[-1]
    for step in (13, 20, len(rows) - 1):

        def stop(done: int, step: int = step) -> None:
            if done == step:
                raise Stop

        out = tmp_path / str(step)
        with pytest.raises(Stop):
            fit("resnet8", small, [method], recipe=recipe, out=out, save_every=0.0, on_step=stop)
        again = fit("resnet8", small, [method], recipe=recipe, out=out, save_every=0.0)
        assert again.witness == whole.witness
        assert again.accuracy == whole.accuracy
        assert whole.model is not None
        assert again.model is not None
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), name


def test_memory_of_a_sample_falls_with_the_channels_and_nothing_changes() -> None:
    model, x = resnet20(), images(4)
    session = start(model, x, lam=1e-3)
    state = copy.deepcopy(model.state_dict())
    dense = saved_bytes(session)
    assert dense > 32 * 32 * 16 * 8 * 7  # at least what the first stage's convolutions read, in float64
    session.surgery.apply([RemoveChannels("layer1.0.conv1", tuple(range(8)))])
    less = saved_bytes(session)
    assert dense - less == pytest.approx(3 * 8 * 32 * 32 * 8, rel=0.4)  # what two layers saved of 8 channels
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if v.shape == state[k].shape)
    assert model.training


def test_a_record_recipe_keeps_its_batch() -> None:
    small = load("fashion-mnist-12k").stratified(200, 50)
    recipe = RECIPES["record-small"].with_(epochs=1.0, batch_size=16)
    with pytest.raises(UnsupportedError, match="prunetrain changes the batch size"):
        fit("record-small", small, [PruneTrain(grow_batch=True)], recipe=recipe)


def test_lambda_is_set_from_the_loss_that_a_teacher_is_part_of() -> None:
    model, x = models.build("resnet8", seed=0), images(8).float()
    teacher = models.build("resnet8", seed=1).eval()
    pair = [PruneTrain(), KnowledgeDistillation.with_teacher(teacher)]
    session = Session(model, SGD(model.parameters(), lr=0.01), pair, sample=(x, labels(x)))
    loss = session.step(x, labels(x))
    method = next(m for m in session.methods if isinstance(m, PruneTrain))
    assert method.l0_ == pytest.approx(float(loss), rel=1e-6)
    with torch.no_grad():
        alone = F.cross_entropy(copy.deepcopy(model)(x), labels(x))
    assert abs(method.l0_ - float(alone)) > 1e-3


# -- refusals
def test_all_wrong_settings_are_named_at_once() -> None:
    wrong = {"r": 1.0, "interval": 0, "tau": -1.0, "lam": float("nan"), "l0": 0.0, "calibrate": 0, "eps": 0.0,
             "size_weighted": 1, "every": 1.5, "proximal": "no", "round_to": 0, "min_channels": True, "stop_at": 0.0, "gating": 1,
             "grow_batch": None, "max_batch": 0}  # fmt: skip
    with pytest.raises(SettingsError) as error:
        PruneTrain(**wrong)  # type: ignore[arg-type]
    for name in wrong:
        assert f"{name} is" in str(error.value)
    with pytest.raises(ValueError, match="r is 1"):
        PruneTrain(r=1.0)
    with pytest.raises(SettingsError, match="lam and l0"):
        PruneTrain(lam=1e-3, l0=2.3)


def test_a_trained_network_needs_lambda_or_its_loss() -> None:
    x, y = random(8, 3, 8, 8), labels(torch.zeros(8), 4)
    trained = chain()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        optimizer.step()
    before = copy.deepcopy(trained.state_dict())
    with pytest.raises(UnsupportedError, match=r"trained already.*lam=.*l0=1.39"):
        start(copy.deepcopy(trained), x).step(x, y)
    session = start(trained, x, l0=math.log(4), lr=0.0)
    session.step(x, y)
    for name, p in trained.named_parameters():
        assert torch.equal(p, before[name])
    total = penalty_of(trained).item()
    lam = only(session).lam_ or 0.0
    assert abs(lam * total / (math.log(4) + lam * total) - 0.2) < 1e-6
    start(copy.deepcopy(trained), x, lam=1e-3).step(x, y)


def test_a_network_without_a_channel_that_can_go_is_refused() -> None:
    x = random(4, 3, 8, 8)
    with pytest.raises(NoEffectError, match="network's output"):
        start(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double(), x)

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(self.conv(x).view(-1, 256))
            return out

    with pytest.raises(NoEffectError, match="the code fixes 256 channels"):
        start(Fixed().double(), x)

    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x.flatten(1)) if x.sum() > 0 else self.fc(-x.flatten(1))
            return out

    with pytest.raises(HastenError, match="cannot be followed"):
        start(Decides().double(), x)


def test_ordinary_layers_are_those_without_groups() -> None:
    assert is_ordinary(nn.Conv2d(4, 8, 3))
    assert is_ordinary(nn.Linear(4, 8))
    assert not is_ordinary(nn.Conv2d(4, 8, 3, groups=4))
    assert not is_ordinary(nn.BatchNorm2d(4))
