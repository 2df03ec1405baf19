"""SSL: penalties and phases are the published ones, and what is zero goes without a trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.surgery.nets import images, net
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from hasten import keyed, models
from hasten.checkpoint import pack, unpack
from hasten.data import load
from hasten.errors import ConflictError, NoEffectError, OverPruneError, SettingsError, UnsupportedError
from hasten.loop import fit
from hasten.measure.macs import macs
from hasten.methods.structure.column_conv import ColumnConv, pads_of
from hasten.methods.structure.dead_sides import settle
from hasten.methods.structure.depth_wise import Joint, NoShortcutError, depth_groups, silent_blocks
from hasten.methods.structure.lasso import Groups, dead_channels, removals
from hasten.methods.structure.prunetrain import PruneTrain
from hasten.methods.structure.shape_wise import FORMS, column_forms, cropped, fastest, narrow, race
from hasten.methods.structure.sparsity_groups import Penalty, layer_forms
from hasten.methods.structure.structured_sparsity_learning import StructuredSparsityLearning
from hasten.recipe import Recipe
from hasten.session import Session
from hasten.surgery import Surgeon, check_training_state, follow

NAME = "structured_sparsity_learning"
NONE: dict[str, Any] = {"filter": 0.0, "channel": 0.0}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("ssl", seed), dtype=dtype)


def some(*shape: int, share: float, seed: int = 0) -> Tensor:
    """Return True for about ``share`` of the entries."""
    return torch.rand(*shape, generator=keyed.generator("ssl some", seed)) < share


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


def conv_of(model: nn.Module, name: str) -> nn.Conv2d:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


def start(
    model: nn.Module, x: Tensor, *, total: int = 20, lr: float = 0.05, momentum: float = 0.9,
    optimizer: torch.optim.Optimizer | None = None, **settings: Any,
) -> Session:  # fmt: skip
    """Return a session for ``total`` steps of the batch x."""
    made = StructuredSparsityLearning(**{"round_to": 1, "min_channels": 1, **settings})
    optimizer = optimizer or SGD(model.parameters(), lr=lr, momentum=momentum)
    return Session(model, optimizer, [made], sample=(x, labels(x)), total_samples=total * len(x))


def labels(x: Tensor, classes: int = 4) -> Tensor:
    return torch.arange(len(x)) % classes


def only(session: Session) -> StructuredSparsityLearning:
    method = session.methods[0]
    assert isinstance(method, StructuredSparsityLearning)
    return method


def counts(session: Session) -> dict[str, float]:
    return session.witness()[NAME]


def outputs(model: nn.Module, x: Tensor, modes: Iterable[bool] = (False, True)) -> list[Tensor]:
    with torch.no_grad():
        return [copy.deepcopy(model).train(mode)(x) for mode in modes]


def close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = 1e-9) -> bool:
    return all(bool((p - q).abs().max() <= tolerance * q.abs().max()) for p, q in zip(a, b, strict=True))


# -- the groups
def pieces(weight: Tensor, kind: str, groups: int = 1, tile: tuple[int, int] = (4, 2)) -> list[Tensor]:
    """Return the entries of each group, found one by one in the matrix of filters x columns."""
    matrix = weight.reshape(len(weight), -1)
    height = len(weight) // groups
    if kind == "filter":
        return list(matrix)
    if kind == "channel":
        return [weight[:, c] for c in range(weight.shape[1])]
    if kind == "shape":
        return [
            matrix[g * height : (g + 1) * height, k] for g in range(groups) for k in range(matrix.shape[1])
        ]
    if kind == "filter_2d":
        return [weight[n, c] for n in range(len(weight)) for c in range(weight.shape[1])]
    if kind == "block":
        wide, high = tile
        return [
            matrix[g * height + y : min(g * height + y + high, (g + 1) * height), x : x + wide]
            for g in range(groups) for y in range(0, height, high) for x in range(0, matrix.shape[1], wide)
        ]  # fmt: skip
    return [weight]


def form(weight: nn.Parameter, kind: str, groups: int = 1) -> Any:
    """Return the groups of a convolution of this weight that is neither first nor last."""
    keep = {"filter": (0,), "channel": (1,), "filter_2d": (0, 1)}
    if kind in keep:
        return Groups(weight, keep[kind])
    if kind == "depth":
        return Joint("conv", (weight,))
    conv = nn.Conv2d(weight.shape[1] * groups, len(weight), 3, groups=groups)
    conv.weight = weight
    model = nn.Sequential(conv)
    channels = follow(model, torch.zeros(2, conv.in_channels, 8, 8))
    free = np.ones(len(channels.classes), dtype=bool)
    return layer_forms(channels, "0", conv, free, [kind], (4, 2))[kind]  # type: ignore[list-item, index]


CASES = [
    ("filter", 1), ("channel", 1), ("shape", 1), ("filter_2d", 1), ("block", 1), ("depth", 1), ("shape", 2),
    ("block", 2), ("shape", 3), ("filter_2d", 3),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "groups"), CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_penalty_and_gradient_are_those_of_a_slow_loop(
    kind: str, groups: int, layout: torch.memory_format
) -> None:
    weight = nn.Parameter(random(6, 5, 3, 3).contiguous(memory_format=layout))
    found = form(weight, kind, groups)
    penalty = Penalty([type(found)(**{**vars(found), "scale": 0.7})])
    slow = 0.7 * torch.stack([piece.square().sum().sqrt() for piece in pieces(weight, kind, groups)]).sum()
    assert penalty.value() == pytest.approx(slow.item(), rel=1e-12)
    assert penalty.zero_groups() == (0, len(pieces(weight, kind, groups)))
    (expected,) = torch.autograd.grad(slow, [weight])
    weight.grad = random(6, 5, 3, 3, seed=1)
    penalty.add_gradient()
    torch.testing.assert_close(weight.grad - random(6, 5, 3, 3, seed=1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_a_group_of_zeros_has_no_gradient_and_alone_is_frozen(kind: str, groups: int) -> None:
    weight = nn.Parameter(random(6, 5, 3, 3))
    wanted = torch.ones(6, 5, 3, 3, dtype=torch.bool)
    for i, piece in enumerate(pieces(torch.arange(weight.numel()).view_as(weight), kind, groups)):
        if i % 3 == 0:
            wanted.view(-1)[piece.reshape(-1)] = False
    with torch.no_grad():
        weight.mul_(wanted)
    zero = int(sum(not piece.any() for piece in pieces(weight, kind, groups)))
    assert zero > 0
    penalty = Penalty([form(weight, kind, groups)])
    weight.grad = torch.zeros_like(weight)
    penalty.add_gradient()
    assert weight.grad.isfinite().all()
    assert torch.equal(weight.grad != 0, wanted)
    assert torch.equal(penalty.free()[id(weight)], wanted)
    assert penalty.zero_groups()[0] == zero
    with torch.no_grad():  # one weight is enough for its group to live again
        weight.view(-1)[0] = 1e-30
    assert Penalty([form(weight, kind, groups)]).zero_groups()[0] == zero - 1


def test_rows_and_columns_of_the_matrix_are_filters_and_positions() -> None:
    weight = random(6, 5, 3, 2)
    matrix = weight.reshape(6, -1).clone()
    n, (c, m, k) = 4, (3, 2, 1)
    by_index, by_matrix = weight.clone(), matrix.clone()
    by_index[n], by_matrix[n] = 0, 0
    by_index[:, c, m, k], by_matrix[:, c * 6 + m * 2 + k] = 0, 0
    assert torch.equal(by_index.reshape(6, -1), by_matrix)
    dead = Penalty([Groups(nn.Parameter(by_index), (0,)), Groups(nn.Parameter(by_index), (1, 2, 3))])
    assert dead.zero_groups() == (2, 6 + 30)


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_norms_fall_by_rate_times_coefficient_to_exactly_zero(kind: str, groups: int, proximal: bool) -> None:
    weight = nn.Parameter(random(6, 5, 3, 3))
    penalty = Penalty([form(weight, kind, groups)])
    norms = torch.stack([piece.norm() for piece in pieces(weight.detach(), kind, groups)])
    steps = int(norms.max() / 0.01) + 60
    for step in range(1, steps + 1):
        if proximal:
            penalty.shrink({id(weight): 0.01})
        else:
            weight.grad = torch.zeros_like(weight)
            penalty.add_gradient()
            with torch.no_grad():
                weight.sub_(0.01 * weight.grad)
        if step == 20:
            now = torch.stack([piece.norm() for piece in pieces(weight.detach(), kind, groups)])
            far = norms > 0.25
            torch.testing.assert_close(now[far], norms[far] - 0.2, rtol=1e-6, atol=1e-6)
        penalty.cut(1e-4)
    if proximal:
        assert not weight.any()
    else:  # steps of 0.01 hop over zero: what is left is no larger than one
        left = torch.stack([piece.norm() for piece in pieces(weight.detach(), kind, groups)])
        assert float(left.max()) <= 0.01 + 1e-9


def test_with_small_steps_the_threshold_catches_every_group() -> None:
    x = random(8, 3, 6, 6)
    model = chain((6, 8))
    with torch.no_grad():
        conv_of(model, "3").weight.mul_(0.02)
    session = start(
        model,
        x,
        total=1000,
        momentum=0.0,
        lr=2e-4,
        **{**NONE, "filter": 1.0},
        multipliers={"0": {"filter": 0}},
    )
    method = only(session)
    before = conv_of(model, "3").weight.detach().flatten(1).norm(dim=1)
    for step in range(1, 300):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        method.gradients()
        session.optimizers[0].step()
        method.after_update()
        norms = conv_of(model, "3").weight.detach().flatten(1).norm(dim=1)
        far = before - step * 2e-4 > 5e-3  # the threshold takes single weights off before
        torch.testing.assert_close(norms[far], before[far] - step * 2e-4, rtol=0, atol=1e-4)
    assert not conv_of(model, "3").weight.any()
    assert conv_of(model, "0").weight.any()


def test_the_relative_threshold_zeroes_groups_far_below_the_median_of_those_that_live() -> None:
    for seed in range(20):
        weight = nn.Parameter(random(10, 6, 3, 3, seed=seed))
        with torch.no_grad():
            weight[:4] *= torch.tensor([0.0, 1e-6, 0.02, 0.3]).view(4, 1, 1, 1)
        norms = weight.detach().flatten(1).norm(dim=1)
        penalty = Penalty([Groups(weight, (0,))])
        penalty.cut_groups(0.05)
        median = norms[norms > 0].median()
        assert torch.equal(weight.detach().flatten(1).any(1), norms >= 0.05 * median)
        assert not weight[:3].any()
        assert weight[3:].flatten(1).any(1).all()


def test_root_weighting_gives_the_multipliers_of_alexnet() -> None:
    caffenet = nn.Sequential(
        nn.Conv2d(3, 96, 11, 4), nn.ReLU(), nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    x = random(2, 3, 67, 67, dtype=torch.float32)
    session = start(
        caffenet, x, **{**NONE, "shape": 1e-3}, size_weighting="sqrt", multipliers={"0": {"shape": 0.0}}
    )
    forms = only(session)._find(session)
    scales = [float(forms[name]["shape"].scale) / 1e-3 for name in ("2", "4", "6", "8")]  # type: ignore[arg-type]
    assert [round(scale, 4) for scale in scales] == [1.0, 1.7321, 1.2247, 1.0]
    assert "0" not in forms
    assert "0" in session.effects[NAME].skipped
    counts = [forms[name]["shape"].count for name in ("2", "4", "6", "8")]  # type: ignore[union-attr]
    assert counts == [96 * 25, 256 * 9, 384 * 9, 384 * 9]  # each of two groups has its own columns


# -- the step
def test_the_step_minimises_the_loss_plus_the_penalty() -> None:
    x = random(6, 3, 8, 8)
    given = {
        "filter": 0.02,
        "channel": 0.03,
        "shape": 0.01,
        "filter_2d": 0.004,
        "block": 0.007,
        "tile": (4, 2),
    }
    session = start(chain(), x, threshold=0.0, **given)
    for _ in range(3):
        model = copy.deepcopy(session.model)
        model.zero_grad()
        first, second = conv_of(model, "0").weight, conv_of(model, "3").weight
        total = F.cross_entropy(model(x), labels(x))
        for kind, weights in (("filter", (first,)), ("channel", (second,)), ("shape", (first, second)),
                              ("filter_2d", (first, second)), ("block", (first, second)), ("filter", (second,))):  # fmt: skip
            for weight in weights:
                total = total + given[kind] * sum(piece.norm() for piece in pieces(weight, kind))  # type: ignore[operator]
        total.backward()
        session.step(x, labels(x))
        for a, b in zip(session.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_small_weights_are_exactly_zero_after_every_update_and_can_come_back() -> None:
    x = random(6, 3, 8, 8)
    session = start(chain(), x, filter=1e-6, channel=0.0, threshold=0.005, lr=0.1, total=100)
    weight, was_zero, revived = conv_of(session.model, "3").weight, None, 0
    for _ in range(40):
        session.step(x, labels(x))
        assert not ((weight.abs() < 0.005) & (weight != 0)).any()
        zero = weight.detach() == 0
        revived += 0 if was_zero is None else int((was_zero & ~zero).sum())
        was_zero = zero
    assert was_zero is not None
    assert was_zero.any()
    assert revived > 0


def test_coefficients_of_zero_are_plain_training_bit_for_bit() -> None:
    x = random(8, 3, 8, 8, dtype=torch.float32)
    states = []
    for methods in ([], [StructuredSparsityLearning(**NONE)]):
        model = chain(dtype=torch.float32)
        with torch.no_grad():
            conv_of(model, "3").weight[2] = 1e-6
        session = Session(model, SGD(model.parameters(), lr=0.05, momentum=0.9), methods, sample=(x, labels(x)),
                          total_samples=80)  # fmt: skip
        losses = [float(session.step(x, labels(x))) for _ in range(10)]
        states.append((losses, session.state_dict()["model"]))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(value, states[1][1][name]) for name, value in states[0][1].items())


# -- frozen
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_frozen_groups_stay_zero_though_momentum_would_move_them(optimizer: str) -> None:
    x = random(8, 3, 8, 8)
    model = chain((8, 12))
    made: torch.optim.Optimizer
    if optimizer == "adamw":
        made = AdamW(model.parameters(), lr=0.01)
    else:
        made = SGD(
            model.parameters(), lr=0.05, momentum=0.9, nesterov=optimizer == "nesterov", weight_decay=1e-3
        )
    session = start(model, x, optimizer=made, filter=1e-3, channel=1e-3, shape=1e-3, regularise=0.5, remove="never",
                    proximal=True)  # fmt: skip
    assert only(session).writes == {"gradients"}
    second = conv_of(model, "3").weight
    for _ in range(9):
        session.step(x, labels(x))
    key = "exp_avg" if optimizer == "adamw" else "momentum_buffer"
    with torch.no_grad():
        second[3] = 0
        second[:, :, 0, :] = 0
        second[:, 5] = 0
        made.state[second][key][3] = (
            1e-6  # too little to lift them over the threshold in one step, too much to stay
        )
        made.state[second][key][:, 5] = made.state[second][key][:, :, 0] = 1e-6
        if optimizer == "adamw":
            made.state[second]["exp_avg_sq"].fill_(1.0)
    handle = second.register_hook(lambda g: g * (second != 0))
    session.step(x, labels(x))
    assert only(session).phase_ == "frozen"
    mask = only(session).masks_["3.weight"]
    assert not mask[3].any()
    assert not mask[:, :, 0].any()
    assert not mask[:, 5].any()
    assert not made.state[second][key][~mask].any()
    handle.remove()
    free = second.detach()[mask].clone()
    for _ in range(8):
        session.step(x, labels(x))
        assert not second.detach()[~mask].any()
        assert not made.state[second][key][~mask].any()
    assert not torch.equal(second.detach()[mask], free)
    assert counts(session)["frozen_steps"] == 8
    assert counts(session)["penalty_steps"] == 10
    assert counts(session)["zero_groups"] >= 1 + 1 + 3 * 8


def test_without_masks_on_momentum_the_zeros_would_move() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(2)
    optimizer.step()
    with torch.no_grad():
        weight.zero_()
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert weight.any()


# -- removal: filters and channels
def kill(
    model: nn.Module, *, filters: Mapping[str, Sequence[int]], channels: Mapping[str, Sequence[int]]
) -> None:
    with torch.no_grad():
        for name, at in filters.items():
            conv_of(model, name).weight[list(at)] = 0
        for name, at in channels.items():
            conv_of(model, name).weight[:, list(at)] = 0


def taken_out(model: nn.Module, x: Tensor, *, absorb: bool) -> Any:
    """Remove what is dead; return what was settled."""
    surgeon = Surgeon(model, (), x)
    done = settle(surgeon.channels, model, x[:2], absorb=absorb)
    gone = dead_channels(surgeon.channels, model, 0.0, round_to=1, min_channels=1, advice="")
    surgeon.apply(removals(surgeon.channels, gone))
    return done


def test_channels_that_nothing_reads_go_exactly_whatever_they_carry() -> None:
    for seed in range(10):
        model, x = chain((8, 12, 10)), random(6, 3, 8, 8, seed=seed)
        dead = [int(i) for i in keyed.permutation(8, "dead", seed)[:3]]
        kill(model, filters={}, channels={"3": dead})
        before = outputs(model, x)
        done = taken_out(model, x, absorb=False)
        assert conv_of(model, "0").out_channels == 5
        assert (done.unread, done.zero, done.absorbed) == (3, 0, 0)
        assert close(outputs(model, x), before, 1e-12)


def test_filters_of_zeros_go_exactly_where_their_channel_carries_zero() -> None:
    for seed in range(10):
        model, x = chain((8, 12, 10), norm=False), random(6, 3, 8, 8, seed=seed)
        dead = [int(i) for i in keyed.permutation(8, "dead", seed)[:4]]
        kill(model, filters={"0": dead}, channels={})
        with torch.no_grad():
            bias = conv_of(model, "0").bias
            assert bias is not None
            bias[dead[:3]] = -bias[dead[:3]].abs()  # ReLU makes 0 of it; the fourth carries its bias
            bias[dead[3]] = 0.4
        before = outputs(model, x)
        done = taken_out(model, x, absorb=False)
        assert (done.unread, done.zero, done.absorbed) == (0, 3, 0)
        assert conv_of(model, "0").out_channels == 5
        assert close(outputs(model, x), before, 1e-12)


@pytest.mark.parametrize("norm", [False, True])
def test_a_constant_channel_is_absorbed_exactly_but_at_padded_borders(norm: bool) -> None:
    inside, border = [], []
    for padding in (0, 1):
        for seed in range(6):
            model, x = chain((8, 12), norm=norm), random(6, 3, 8, 8, seed=seed)
            second = "3" if norm else "2"
            conv_of(model, second).padding = (padding, padding)
            kill(model, filters={"0": [1, 6]}, channels={})
            if not norm:
                with torch.no_grad():
                    model[0].bias[[1, 6]] = 0.7
            cut = nn.Sequential(*list(model)[: 4 if norm else 3])
            before = outputs(cut, x, (False,))[0]
            assert taken_out(model, x, absorb=True).absorbed == 2
            assert conv_of(model, "0").out_channels == 6
            cut = nn.Sequential(*list(model)[: 4 if norm else 3])
            after = outputs(cut, x, (False,))[0]
            if norm:  # the constant is now missing from the running mean
                after = after - (model[4].running_mean - chain((8, 12))[4].running_mean).view(1, -1, 1, 1)
            error = (after - before).abs().amax((0, 1))
            inside.append(float(error[1:-1, 1:-1].max()) if padding == 0 else 0.0)
            border.append((padding, float(error.max())))
    assert max(inside) < 1e-12
    assert all(error < 1e-12 for padding, error in border if padding == 0)
    assert all(error > 1e-3 for padding, error in border if padding == 1)


def test_dead_layers_pass_on_and_shared_channels_need_every_side() -> None:
    model, x = net("resnet8"), images()
    surgeon = Surgeon(model, (), x)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    stage = surgeon.channels.outputs("conv1")
    makers = [n for n in names if set(surgeon.channels.outputs(n).tolist()) == set(stage.tolist())]
    assert len(makers) > 1
    kill(model, filters={makers[0]: [2, 3]}, channels={})
    before = outputs(model, x)
    done = settle(surgeon.channels, model, x, absorb=True)
    assert (done.unread, done.zero, done.absorbed) == (0, 0, 0)
    assert close(outputs(model, x), before, 1e-12)
    # nothing reads conv2's inputs: conv1 of the block dies as a whole, but for the channels that must stay
    with torch.no_grad():
        conv_of(model, "layer1.0.conv2").weight.zero_()
    before = outputs(model, x)
    settle(surgeon.channels, model, x, absorb=False)
    assert not conv_of(model, "layer1.0.conv1").weight.any()
    assert close(outputs(model, x), before, 1e-12)


def test_a_group_norm_and_a_fixed_layer_keep_their_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(),
                          nn.Linear(4 * 16, 4)).double()  # fmt: skip
    x = random(4, 3, 6, 6)
    kill(model, filters={}, channels={"3": [0, 5]})
    before = outputs(model, x)
    assert taken_out(model, x, absorb=True).unread == 0
    assert conv_of(model, "0").out_channels == 8
    assert close(outputs(model, x), before, 1e-12)


def test_a_flattened_channel_is_absorbed_by_a_linear_layer_exactly() -> None:
    for seed in range(5):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 16, 4)).double()
        x = random(6, 3, 6, 6, seed=seed)
        kill(model, filters={"0": [0, 5, 6]}, channels={})
        before = outputs(model, x)
        assert taken_out(model, x, absorb=True).absorbed == 3
        assert conv_of(model, "0").out_channels == 5
        assert close(outputs(model, x), before, 1e-12)


# -- removal: layers
def test_a_zero_convolution_is_not_a_zero_branch_where_a_bias_follows() -> None:
    model, x = net("resnet8"), images()
    channels = follow(model, x)
    block = "layer1.0"
    branch = model.get_submodule(block)
    with torch.no_grad():
        branch.conv2.weight.zero_()
    alive = outputs(model, x)
    assert silent_blocks(channels, model) == []
    with torch.no_grad():
        branch.bn2.weight.zero_()
        still = outputs(model, x)
        assert silent_blocks(channels, model) == []
        branch.bn2.bias.zero_()
    silent = outputs(model, x)
    assert not close(silent, alive, 1e-3)
    assert not close(silent, still, 1e-3)
    assert silent_blocks(channels, model) == [block]
    session = start(model, x, total=1, depth=1e-3, **NONE, lr=0.0, regularise=1.0, threshold=0.0)
    session.counters["streamed"] = len(x)
    only(session).after_update()
    assert counts(session)["blocks_removed"] == 1
    assert "conv2" not in dict(model.get_submodule(block).named_children())
    assert close(outputs(model, x), silent, 1e-12)


@pytest.mark.parametrize("per", ["conv", "branch"])
@pytest.mark.parametrize("name", ["resnet8", "wrn-16-4", "resnet18"])
def test_depth_groups_hold_what_makes_the_branch_zero(name: str, per: Any) -> None:
    model, x = net(name), images()
    channels = follow(model, x)
    groups = depth_groups(channels, model, per)
    blocks = [n for n in groups] if per == "branch" else sorted({n.rpartition(".")[0] for n in groups})
    assert blocks
    for group, joint in groups.items():
        hit = copy.deepcopy(model)
        named = {id(p): n for n, p in model.named_parameters()}
        with torch.no_grad():
            for tensor in joint.tensors:
                hit.get_parameter(named[id(tensor)]).zero_()
        block = group if per == "branch" else group.rpartition(".")[0]
        assert silent_blocks(channels, hit) == [block]
        convs = [n for n in named.values() if n.startswith(f"{block}.conv") and n.endswith("weight")]
        inside = [named[id(t)] for t in joint.tensors]
        assert set(convs) <= set(inside) if per == "branch" else f"{group}.weight" in inside
        assert joint.size == sum(t.numel() for t in joint.tensors)
    if per == "conv" and name == "resnet8":
        assert len(groups) == 6


def test_depth_drives_branches_out_of_a_network_in_training() -> None:
    batches = data(60)
    model = models.build("resnet8", num_classes=4, image_size=8, seed=0)
    made = StructuredSparsityLearning(**NONE, depth=1.5, proximal=True, regularise=0.5)
    session = Session(model, SGD(model.parameters(), lr=0.05, momentum=0.9), [made], sample=batches[0],
                      total_samples=60 * 32)  # fmt: skip
    run(session, batches, 60)
    assert counts(session)["blocks_removed"] >= 1
    check_training_state(session.model, session.optimizers)
    assert counts(session)["macs_removed"] > 0.1


# -- removal: columns
def frames() -> Iterable[tuple[nn.Conv2d, Tensor, str]]:
    """Yield convolutions of many geometries with inputs."""
    number = 0
    for kernel in ((3, 3), (5, 5), (1, 3), (5, 2), (7, 7)):
        for stride in (1, 2, (2, 3)):
            for dilation in (1, 2):
                for padding in (0, 1, (2, 1), "same", "valid"):
                    number += 1
                    if padding == "same" and (stride != 1 or kernel[1] % 2 == 0):
                        continue
                    conv = nn.Conv2d(5, 6, kernel, stride, padding, dilation, bias=number % 2 == 0).double()
                    with torch.no_grad():
                        conv.weight.copy_(random(*conv.weight.shape, seed=number))
                    yield conv, random(2, 5, 15, 14, seed=number), f"{kernel} {stride} {dilation} {padding}"


def kill_positions(conv: nn.Conv2d, seed: int) -> None:
    """Leave a random rectangle of the kernel."""
    draw = keyed.generator("rectangle", seed)
    with torch.no_grad():
        for axis, size in enumerate(conv.kernel_size):
            low, high = sorted(torch.randint(0, size + 1, (2,), generator=draw).tolist())
            low, high = (low, high) if low < high else (min(low, size - 1), min(low, size - 1) + 1)
            dead = torch.ones(size, dtype=torch.bool)
            dead[low:high] = False
            conv.weight.index_fill_(2 + axis, dead.nonzero().flatten(), 0.0)


def test_a_cropped_kernel_computes_the_same_with_any_stride_padding_and_dilation() -> None:
    smaller = 0
    for number, (conv, x, what) in enumerate(frames()):
        kill_positions(conv, number)
        form = cropped(conv)
        if form is None:
            continue
        smaller += 1
        made = form.built(conv)
        kernels = [m.kernel_size for m in made.modules() if isinstance(m, nn.Conv2d)]
        assert len(kernels) == 1
        assert math.prod(kernels[0]) < math.prod(conv.kernel_size)
        assert all(type(m).__module__.startswith("torch.") for m in made.modules())
        torch.testing.assert_close(made(x), conv(x), rtol=1e-11, atol=1e-11, msg=what)
    assert smaller > 60


def test_a_cropped_convolution_in_groups_computes_the_same() -> None:
    conv = nn.Conv2d(6, 8, 5, padding=2, groups=2).double()
    with torch.no_grad():
        conv.weight[:, :, 0] = 0
        conv.weight[:, :, :, 3:] = 0
    form, x = cropped(conv), random(2, 6, 9, 9)
    assert form is not None
    torch.testing.assert_close(form.built(conv)(x), conv(x), rtol=1e-11, atol=1e-11)
    assert column_forms(conv) == {}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_form_computes_the_same_from_the_surviving_columns(layout: torch.memory_format) -> None:
    seen = set()
    for number, (conv, x, what) in enumerate(frames()):
        conv, x = conv.to(memory_format=layout), x.contiguous(memory_format=layout)  # noqa: PLW2901
        with torch.no_grad():
            conv.weight.mul_(some(1, *conv.weight.shape[1:], share=0.3, seed=number))
            conv.weight[:, number % 5] = 0
            if number % 3 == 0:
                conv.weight[:, [1, 3], 1:] = 0
        live = int((conv.weight != 0).any(0).sum())
        for name, form in column_forms(conv).items():
            made = form.built(conv)
            seen.add(name)
            torch.testing.assert_close(made(x), conv(x), rtol=1e-11, atol=1e-11, msg=f"{name} {what}")
            with torch.no_grad():
                torch.testing.assert_close(made(x), conv(x), rtol=1e-11, atol=1e-11, msg=f"{name} {what}")
            held = sum(p.numel() for n, p in made.named_parameters() if n.endswith("weight"))
            assert held == live * 6 if name in ("taps", "unfold") else live * 6 <= held < conv.weight.numel()
            assert isinstance(made, ColumnConv)
            plain = made.dense()
            torch.testing.assert_close(plain(x), conv(x), rtol=1e-11, atol=1e-11, msg=f"{name} {what}")
            work = macs(made, x).forward
            assert work == held * math.prod(conv(x).shape[2:])
    assert seen == set(FORMS)


def test_gradients_through_the_forms_are_those_of_the_surviving_columns() -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1, stride=2).double()
    with torch.no_grad():
        conv.weight.mul_(some(1, 6, 3, 3, share=0.4))
    x = random(3, 6, 9, 9).requires_grad_()
    target = random(3, 8, 5, 5, seed=1)
    (conv(x) * target).sum().backward()
    assert conv.weight.grad is not None
    for name, form in column_forms(conv).items():
        made, given = form.built(conv), x.detach().clone().requires_grad_()
        (made(given) * target).sum().backward()
        torch.testing.assert_close(given.grad, x.grad, msg=name)
        own = dict(made.named_parameters())
        for key, expected in form.take(conv.weight.grad).items():
            torch.testing.assert_close(own[key].grad, expected, msg=name)


def test_narrowing_carries_weights_and_momentum_and_the_next_steps_are_those_of_the_masked_network() -> None:
    x, y = random(8, 3, 10, 10), labels(random(8))
    masks = {"0": some(1, 3, 3, 3, share=0.5, seed=3), "3": some(1, 8, 3, 3, share=0.4, seed=4)}
    masks["0"][:, :, 0] = False
    masks["3"][:, :, :, 2] = False
    for forms in ({"0": "crop", "3": "crop"}, {"0": "crop", "3": "unfold"}, {"0": "taps", "3": "split"},
                  {"0": "dense", "3": "select"}):  # fmt: skip
        nets = [chain(), chain()]
        optimizers = [SGD(n.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3) for n in nets]

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if at > 2 and model is nets[0]:  # noqa: B023
                for name, mask in masks.items():
                    conv_of(model, name).weight.grad.mul_(mask)  # type: ignore[union-attr]
            optimizer.step()

        for at in range(3):
            for model, optimizer in zip(nets, optimizers, strict=True):
                step(model, optimizer, at)
        with torch.no_grad():
            for model, optimizer in zip(nets, optimizers, strict=True):
                for name, mask in masks.items():
                    weight = conv_of(model, name).weight
                    weight.mul_(mask)
                    optimizer.state[weight]["momentum_buffer"].mul_(mask)
        before = outputs(nets[1], x)
        done = narrow(Surgeon(nets[1], (optimizers[1],), x), list(forms), lambda name, _: forms[name])  # noqa: B023
        assert {name: d.form for name, d in done.items()} == {n: f for n, f in forms.items() if f != "dense"}
        check_training_state(nets[1], optimizers[1])
        assert close(outputs(nets[1], x), before, 1e-11)
        exact = set(forms.values()) <= {"taps", "unfold"}
        for at in range(3, 8):
            step(nets[0], optimizers[0], at)
            step(nets[1], optimizers[1], at)
            if not exact:  # zeros within a rectangle are held there by the method's masks, not by the form
                break
        if exact:
            assert close(outputs(nets[1], x), outputs(nets[0], x), 1e-9)


def test_the_timing_gate_takes_a_form_only_where_it_is_faster() -> None:
    conv, x = nn.Conv2d(8, 8, 3, padding=1).double(), random(2, 8, 9, 9)
    with torch.no_grad():
        conv.weight.mul_(some(1, 8, 3, 3, share=0.3))

    def timer(best: str, share: float) -> Any:
        return lambda runs: {name: share if name == best else 1.0 for name in runs}

    for name in ("taps", "unfold"):
        assert fastest(conv, x, timer=timer(name, 0.5))[0] == name
        assert fastest(conv, x, timer=timer(name, 0.97))[0] == "dense"
    assert fastest(conv, x, timer=timer("dense", 0.5))[0] == "dense"
    with torch.no_grad():
        conv.weight[:, :, :, 2] = 0
    assert fastest(conv, x, timer=timer("crop", 0.5))[0] == "crop"
    found = race({"one": lambda: None, "two": lambda: sum(range(20000))}, rounds=3)
    assert 0 <= found["one"] < found["two"]


def test_gathered_columns_train_export_plain_and_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def second(conv: nn.Conv2d, x: Tensor, *, timer: Any) -> tuple[str, dict[str, float]]:
        return ("unfold" if x.shape[1] == 8 else "dense"), {}

    monkeypatch.setattr("hasten.methods.structure.shape_wise.fastest", second)
    x = random(8, 3, 8, 8)
    model = chain()
    with torch.no_grad():
        conv_of(model, "3").weight.mul_(some(1, 8, 3, 3, share=0.4))
    settings = {
        **NONE,
        "shape": 1e-3,
        "threshold": 1e-3,
        "regularise": 0.5,
        "columns": "gather",
        "total": 6,
        "lr": 1e-4,
    }
    session = start(model, x, **settings)
    for _ in range(6):
        session.step(x, labels(x))
    assert isinstance(session.model.get_submodule("3"), ColumnConv)
    assert counts(session)["layers_narrowed"] == 1
    plain = session.export()
    assert all(type(m).__module__.startswith("torch.") for m in plain.modules())
    with session.inference() as forward, torch.no_grad():
        torch.testing.assert_close(plain(x), forward(x), rtol=1e-10, atol=1e-10)
    again = start(chain(), x, **settings)
    again.load_state_dict(copy.deepcopy(session.state_dict()))
    session.step(x, labels(x))
    again.step(x, labels(x))
    for name, value in session.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


# -- whole runs
def data(steps: int, batch: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Return batches of noisy images whose class shows in their pattern."""
    g = keyed.generator("ssl data")
    patterns = torch.randn(4, 3, 8, 8, generator=g)
    found = []
    for _ in range(steps):
        y = torch.randint(0, 4, (batch,), generator=g)
        found.append((patterns[y] + torch.randn(batch, 3, 8, 8, generator=g), y))
    return found


def run(session: Session, batches: Sequence[tuple[Tensor, Tensor]], stop: int) -> list[float]:
    losses = []
    for step in range(session.counters["step"], stop):
        if step % 5 == 0:
            session.start_epoch(step // 5)
        losses.append(float(session.step(*batches[step])))
    return losses


EVERY: dict[str, Any] = {
    "filter": 0.3, "channel": 0.3, "shape": 0.05, "depth": 0.2, "filter_2d": 0.01, "block": 0.01, "proximal": True,
    "regularise": 0.6, "round_to": 4, "min_channels": 4, "threshold": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("remove", ["early", "end"])
def test_resume_is_bit_identical_from_any_phase(remove: str) -> None:
    batches = data(20)

    def fresh() -> Session:
        model = models.build("resnet8", num_classes=4, image_size=8, seed=0)
        made = StructuredSparsityLearning(**{**EVERY, "remove": remove})
        return Session(model, SGD(model.parameters(), lr=0.05, momentum=0.9), [made], sample=batches[0],
                       total_samples=20 * 32)  # fmt: skip

    whole, saved, losses = fresh(), {}, []
    for step in range(20):
        if step in (1, 11, 12, 13, 19):
            tensors, skeleton = pack(whole.state_dict())
            saved[step] = unpack({k: v.clone() for k, v in tensors.items()}, skeleton)
        losses += run(whole, batches, step + 1)
    found = counts(whole)
    assert found["channels_removed"] > 0
    assert found["zero_groups"] > 0
    assert 0 < found["macs_removed"] < 1
    assert found["frozen_steps"] == 8
    expected = whole.model.state_dict()
    for step, state in saved.items():
        again = fresh()
        again.load_state_dict(state)
        assert run(again, batches, 20) == losses[step:], step
        assert again.model.state_dict().keys() == expected.keys()
        assert all(torch.equal(again.model.state_dict()[n], v) for n, v in expected.items()), step
        assert again.witness() == whole.witness()


def test_early_removal_changes_nothing_but_the_cost_and_masks_follow() -> None:
    batches = data(12)
    sessions = {}
    for remove in ("early", "never"):
        model = chain((16, 24), dtype=torch.float32)
        made = StructuredSparsityLearning(filter=0.0, channel=0.2, shape=0.05, regularise=0.5, remove=remove, round_to=4,
                                          min_channels=4, proximal=True)  # type: ignore[arg-type]  # fmt: skip
        session = Session(model, SGD(model.parameters(), lr=0.05, momentum=0.9), [made], sample=batches[0],
                          total_samples=12 * 32)  # fmt: skip
        run(session, batches, 5)
        kill(model, filters={}, channels={"3": [1, 4, 5, 9, 10]})
        session.optimizers[0].state[conv_of(model, "3").weight]["momentum_buffer"][:, [1, 4, 5, 9, 10]] = 0
        run(session, batches, 6)
        sessions[remove] = session
    early, never = sessions["early"], sessions["never"]
    assert counts(early)["channels_removed"] > 0
    assert counts(never)["channels_removed"] == 0
    x = batches[0][0]
    assert close(outputs(early.model, x), outputs(never.model, x), 1e-4)
    masks, weights = only(early).masks_, dict(early.model.named_parameters())
    assert masks
    assert all(mask.shape == weights[name].shape for name, mask in masks.items())
    assert all(not weights[name].detach()[~mask].any() for name, mask in masks.items())
    for a, b in zip(run(early, batches, 12), run(never, batches, 12), strict=True):
        assert abs(a - b) < 1e-3
    assert all(
        not dict(early.model.named_parameters())[n].detach()[~m].any() for n, m in only(early).masks_.items()
    )


def test_macs_are_those_of_the_logs_and_fall_as_widths_do() -> None:
    x = torch.zeros(1, 3, 32, 32)
    assert macs(models.build("resnet20-proj"), x).forward == 40_813_184
    assert macs(models.build("resnet20"), x).forward == 40_551_040
    model = models.build("resnet20-proj", seed=0)
    whole = macs(model, x).forward
    with torch.no_grad():
        conv_of(model, "layer1.0.conv2").weight[:, :8] = 0
    taken_out(model, torch.zeros(2, 3, 32, 32), absorb=False)
    assert whole - macs(model, x).forward == 2 * 8 * 16 * 9 * 32 * 32


def test_columns_of_a_small_network_mostly_die_at_little_loss() -> None:
    small = load("fashion-mnist-12k").stratified(2000, 1000)
    recipe = Recipe(epochs=6.0, batch_size=50, lr=0.02, eval_every=0.0, augment=(), weight_decay=1e-4)
    base = fit("lenet", small, [], recipe=recipe)
    assert base.model is not None
    method = StructuredSparsityLearning(**NONE, shape=0.035, proximal=True, regularise=0.6)
    steady = recipe.with_(epochs=5.0, schedule="constant", warmup=0.0)
    sparse = fit(base.model, small, [method], recipe=steady)
    assert sparse.model is not None
    found = sparse.witness[NAME]
    assert found["zero_groups"] / found["groups"] > 0.5
    convs = [m for m in sparse.model.modules() if isinstance(m, nn.Conv2d)]
    live = sum(int((m.weight != 0).any(0).sum()) for m in convs)
    assert live < 0.5 * found["groups"]
    assert sparse.accuracy > base.accuracy - 0.01
    print(f"{base.accuracy} {sparse.accuracy} {found}")


def test_the_loop_trains_resumes_and_exports_a_smaller_network(tmp_path: Path) -> None:
    small = load("fashion-mnist-12k").stratified(200, 50)
    recipe = Recipe(epochs=3.0, batch_size=20, lr=0.05, ema=0.9, eval_every=0.0)
    method = StructuredSparsityLearning(**EVERY)

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 22:
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
    assert whole.witness == again.witness
    x = torch.zeros(2, 1, 28, 28)
    assert (
        macs(whole.model, x).forward < macs(models.build("resnet8", in_channels=1, image_size=28), x).forward
    )


# -- refusals
def test_all_wrong_settings_are_named_at_once() -> None:
    wrong = {"filter": -1.0, "channel": float("nan"), "shape": math.inf, "depth": -1e-9, "threshold": -1.0,
             "regularise": 0.0, "depth_groups": "net", "size_weighting": "log", "remove": "now", "columns": "few",
             "relative": 1, "proximal": "no", "absorb": None, "round_to": 0, "min_channels": True, "tile": (0, 4),
             "multipliers": {"conv1": {"rows": 1.0}}}  # fmt: skip
    with pytest.raises(SettingsError) as error:
        StructuredSparsityLearning(**wrong)  # type: ignore[arg-type]
    for name in wrong:
        assert name in str(error.value)
    with pytest.raises(SettingsError, match="relative"):
        StructuredSparsityLearning(relative=True, threshold=1.0)


def test_whole_layers_without_a_shortcut_are_refused() -> None:
    x = random(4, 3, 8, 8)
    with pytest.raises(NoShortcutError, match="no convolution of this network"):
        start(chain(), x, depth=1e-3)
    x = images()
    with pytest.raises(NoShortcutError, match="conv1"):
        start(net("resnet8"), x, depth=1e-3, multipliers={"conv1": {"depth": 1.0}})


def test_optimizers_that_rescale_gradients_need_the_proximal_form() -> None:
    x = random(4, 3, 8, 8)
    for kind in (torch.optim.Adam, AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        model = chain()
        with pytest.raises(UnsupportedError, match=f"{kind.__name__}.*proximal=True"):
            start(model, x, optimizer=kind(model.parameters(), lr=1e-3))
        start(model, x, optimizer=kind(model.parameters(), lr=1e-3), proximal=True).step(x, labels(x))
        start(model, x, optimizer=kind(model.parameters(), lr=1e-3), **NONE).step(x, labels(x))


def test_what_has_no_groups_is_said_and_layers_by_name_are_checked() -> None:
    x = images(2)
    session = start(net("mobilenet-v1"), x)
    effect = session.effects[NAME]
    assert any("depthwise" in reason for reason in effect.skipped.values())
    first = next(n for n, m in session.model.named_modules() if isinstance(m, nn.Conv2d))
    assert "channels" not in effect.touched[first]
    x = random(4, 3, 8, 8)
    with pytest.raises(SettingsError, match="Did you mean"):
        start(net("resnet8"), images(), multipliers={"layer1.0.conv3": {"filter": 2.0}})
    with pytest.raises(NoEffectError):
        start(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double(), x)


def test_a_layer_that_would_lose_everything_is_refused_or_kept() -> None:
    x = random(4, 3, 8, 8)
    for least in (None, 2):
        model = chain()
        with torch.no_grad():
            conv_of(model, "3").weight.zero_()
        session = start(model, x, total=1, filter=1e-6, lr=0.0, regularise=1.0, min_channels=least)
        if least is None:
            with pytest.raises(OverPruneError, match="Lower structured_sparsity_learning"):
                session.step(x, labels(x))
        else:
            session.step(x, labels(x))
            assert conv_of(model, "0").out_channels == 2


def test_pads_of_every_form_are_those_that_pytorch_uses() -> None:
    for conv, x, what in frames():
        left, right, top, bottom = pads_of(conv)
        padded = F.pad(x, (left, right, top, bottom))
        expected = F.conv2d(padded, conv.weight, conv.bias, conv.stride, 0, conv.dilation)
        torch.testing.assert_close(conv(x), expected, msg=what)


def test_no_other_method_may_change_the_structure_beside_it() -> None:
    x = random(4, 3, 8, 8)
    for remove in ("early", "never"):
        model = chain()
        methods = [StructuredSparsityLearning(remove=remove), PruneTrain()]  # type: ignore[arg-type]
        with pytest.raises(ConflictError, match=f"{NAME}.*prunetrain|prunetrain.*{NAME}"):
            Session(model, SGD(model.parameters(), lr=0.1), methods, sample=(x, labels(x)), total_samples=8)
