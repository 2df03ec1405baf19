"""ResRep: compactors change nothing, shrink as computed, are chosen as by brute force, and merge without loss."""

from __future__ import annotations

import copy
import math
import re
from itertools import product
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

from hasten import PLAIN, fit, keyed, models
from hasten.conformance import differences, through_file_format
from hasten.data import load
from hasten.errors import NoEffectError, SettingsError, UnsupportedError
from hasten.exporting import load_run
from hasten.measure.macs import macs
from hasten.methods.forward.mixed_precision import MixedPrecision
from hasten.methods.structure.compactor import Compactor, Target, find_targets, merged
from hasten.methods.structure.compactor_choice import Work, choose, fewest_rows
from hasten.methods.structure.resrep import ResRep, penalise, row_norms
from hasten.session import Session
from hasten.surgery import RemoveChannels, Surgeon
from hasten.table import METHODS, Row

NETS = ["resnet8", "wrn-16-4", "mobilenet-v1", "lenet", "googlenet", "flat"]
LONG = 10**9


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("resrep", seed), dtype=dtype)


def toy(widths: tuple[int, ...] = (8, 12, 16), act: nn.Module | None = None) -> nn.Sequential:
    """Return a chain of 3x3 convolutions with batch norm; all but the first can be pruned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for c_in, c_out in zip((3, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                act or nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def start(model: nn.Module, x: Tensor, total: int = LONG, lr: float = 0.01, **settings: Any) -> Session:
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-3)
    chosen = {"num_at_least": 1, "round_to": 1, "target": 0.9, **settings}
    return Session(
        model, optimizer, [ResRep(**chosen)], sample=(x, torch.arange(len(x)) % 4), total_samples=total
    )


def small_images(n: int = 6, seed: int = 5) -> Tensor:
    return random(n, 3, 8, 8, seed=seed)


def method(session: Session) -> ResRep:
    (found,) = session.methods
    assert isinstance(found, ResRep)
    return found


def compactors(model: nn.Module) -> dict[str, Compactor]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Compactor)}


def stir(session: Session, share: float = 0.4) -> dict[str, list[int]]:
    """Make compactors random, with some rows of zeros; return those rows."""
    zeros = {}
    for i, (name, compactor) in enumerate(compactors(session.model).items()):
        width = compactor.out_channels
        rows = [r for r in range(width - 1) if keyed.uniform(np.array([r]), 1, "stir", i)[0, 0] < share] or [
            0
        ]
        with torch.no_grad():
            compactor.weight.add_(
                0.2 / math.sqrt(width) * random(width, width, 1, 1, seed=i, dtype=compactor.weight.dtype)
            )
            compactor.weight[rows] = 0
        zeros[name] = rows
    return zeros


def finish(session: Session) -> None:
    """Let the method act as after the last step of the run."""
    assert session.total_samples is not None
    session.counters["streamed"] = session.total_samples
    method(session).after_update()


def outputs(session: Session, x: Tensor) -> Tensor:
    with session.inference() as forward:
        return forward(x)


# -- in and out
@pytest.mark.parametrize("name", NETS)
def test_compactors_that_come_in_change_nothing(name: str) -> None:
    model, x = net(name), images()
    before = {mode: copy.deepcopy(model).train(mode)(x) for mode in (False, True)}
    names = dict(model.named_parameters())
    session = start(model, x)
    assert compactors(model)
    for mode in (False, True):
        got = copy.deepcopy(model).train(mode)(x)
        assert (got - before[mode]).abs().max() <= 1e-12 * before[mode].abs().max()
    old = [p for p in model.parameters() if any(p is q for q in names.values())]
    assert len(old) == len(names)
    assert len(session.effects["resrep"].touched) == len(compactors(model))


@pytest.mark.parametrize("name", NETS)
def test_zero_rows_go_and_the_rest_merges_without_a_trace(name: str) -> None:
    model, x = net(name), images()
    session = start(model, x)
    zeros = stir(session)
    for compactor, rows in zeros.items():
        shown: list[Tensor] = []
        hook = model.get_submodule(compactor).register_forward_hook(lambda _, __, out, s=shown: s.append(out))
        outputs(session, x)
        hook.remove()
        assert not shown[0][:, rows].any()
    expected = outputs(session, x)
    finish(session)
    for compactor, rows in zeros.items():
        made = model.get_submodule(compactor)
        assert made.out_channels == made.in_channels - len(rows)
    scale = expected.abs().max()
    assert (outputs(session, x) - expected).abs().max() <= 1e-9 * scale
    plain = session.export()
    with torch.no_grad():
        assert (plain(x) - expected).abs().max() <= 1e-9 * scale
    assert not compactors(plain)
    assert macs(plain, x[:1]).forward == method(session)._work(method(session)._lost())
    for target in method(session)._targets:
        conv = plain.get_submodule(target.conv)
        assert type(conv) is nn.Conv2d
        assert conv.bias is not None
        if target.norm is not None:
            assert type(plain.get_submodule(target.norm)) is nn.Identity


def test_merging_holds_in_float32_and_float64() -> None:
    for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        for conv in (
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.Conv2d(3, 6, 5, dilation=2, padding_mode="reflect", padding=3, bias=False),
        ):
            for norm in (None, nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)):
                conv.to(dtype)
                bn = None if norm is None else norm.to(dtype).eval()
                for seed, t in enumerate(() if bn is None else (*bn.parameters(), bn.running_mean)):
                    t.data.copy_(random(6, seed=seed))  # type: ignore[union-attr]
                rows, x = random(4, 6, 1, 1, seed=9, dtype=dtype), random(2, 3, 12, 12, dtype=dtype)
                y = conv(x) if bn is None else bn(conv(x))
                got = merged(conv, bn, rows)(x)
                expected = F.conv2d(y, rows)
                assert got.dtype == dtype
                assert (got - expected).abs().max() <= error * expected.abs().max()


def test_a_constant_behind_a_depthwise_convolution_is_not_lost() -> None:
    """The batch norm between has shifts of both signs: what goes on is relu(shift), and not its absolute value."""
    model, x = net("mobilenet-v1"), images()
    session = start(model, x)
    means = {n: b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")}
    restarted: list[int] = []
    session.on_restart.append(lambda: restarted.append(1))
    stir(session)
    expected = outputs(session, x)
    finish(session)
    moved = [
        n
        for n, b in model.named_buffers()
        if n in means and b.shape == means[n].shape and not torch.equal(b, means[n])
    ]
    assert len(moved) > 5
    assert restarted
    undone = copy.deepcopy(model)
    for name, buffer in undone.named_buffers():
        if name in moved:
            buffer.copy_(means[name])
    assert (outputs(session, x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    with torch.no_grad():
        assert (undone.eval()(x) - expected).abs().max() > 1e-4 * expected.abs().max()


# -- the penalty
def test_the_gradient_of_a_row_is_the_penalty_and_the_losss_unless_it_is_masked() -> None:
    weight = nn.Parameter(random(6, 6, 1, 1))
    with torch.no_grad():
        weight[2] = 0
    task = random(6, 6, 1, 1, seed=1)
    weight.grad = task.clone()
    kept = torch.tensor([True, False, False, True, True, True])
    penalise(weight, kept, 0.03)
    rows = weight.detach().flatten(1)
    pull = 0.03 * rows / rows.norm(dim=1, keepdim=True)
    grad = weight.grad.flatten(1)
    assert torch.equal(grad[1], pull[1])
    assert not grad[2].any()
    for row in (0, 3, 4, 5):
        assert torch.allclose(grad[row], task.flatten(1)[row] + pull[row], rtol=1e-6, atol=0)
    with torch.no_grad():
        weight[0] = 0
    weight.grad = task.clone()
    penalise(weight, kept, 0.03)
    assert torch.equal(weight.grad[0], task[0])
    weight.grad = None
    penalise(weight, kept, 0.03)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_a_masked_row_shrinks_by_lr_lambda_over_1_minus_momentum() -> None:
    lr, lam, momentum = 0.01, 1e-4, 0.99
    weight = nn.Parameter(torch.eye(4).view(4, 4, 1, 1).clone())
    optimizer = SGD([weight], lr=lr, momentum=momentum)
    norms = []
    for step in range(600):
        weight.grad = 0.1 * random(4, 4, 1, 1, seed=step)
        penalise(weight, torch.zeros(4, dtype=torch.bool), lam)
        optimizer.step()
        norms.append(row_norms(weight))
    slope = (norms[499] - norms[599]) / 100
    assert (slope / (lr * lam / (1 - momentum)) - 1).abs().max() < 0.05


def test_compactors_have_a_group_of_their_own_that_follows_the_learning_rate() -> None:
    model, x = toy(), small_images()
    session = start(model, x)
    (optimizer,) = session.optimizers
    assert len(optimizer.param_groups) == 2
    group = optimizer.param_groups[1]
    assert {id(p) for p in group["params"]} == {id(c.weight) for c in compactors(model).values()}
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.99, 0.0, False)
    optimizer.param_groups[0]["lr"] = 0.0021
    session.step(x, torch.arange(6) % 4)
    assert group["lr"] == 0.0021


def test_an_optimizer_with_named_parameters_takes_compactors_with_their_names() -> None:
    model, x = toy(), small_images()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    Session(model, optimizer, [ResRep(num_at_least=1)], sample=(x, torch.arange(6) % 4), total_samples=LONG)
    assert optimizer.param_groups[1]["param_names"] == ["4.1.weight", "7.1.weight"]


def test_without_penalty_it_is_plain_training_of_the_network_with_compactors() -> None:
    model, x, y = toy(), small_images(), torch.arange(6) % 4
    session = start(model, x, lam=0.0, every=1, warmup=0.0)
    plain = copy.deepcopy(model)
    own = [c.weight for c in compactors(plain).values()]
    rest = [p for p in plain.parameters() if all(p is not q for q in own)]
    optimizer = SGD([{"params": rest, "weight_decay": 1e-3, "momentum": 0.9, "nesterov": True},
                     {"params": own, "momentum": 0.99}], lr=0.01)  # fmt: skip
    for step in range(5):
        x = small_images(seed=step)
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        optimizer.step()
        assert torch.equal(session.step(x, y), loss.detach())
    assert not differences(dict(plain.state_dict()), dict(model.state_dict()))
    assert not any(session.witness()["resrep"].values())


def test_the_penalty_is_not_scaled_with_a_float16_loss() -> None:
    model, x = toy(), small_images()
    optimizer = SGD(model.parameters(), lr=0.01)
    methods = [
        ResRep(lam=0.05, num_at_least=1),
        MixedPrecision(dtype="float16", force=True, channels_last=False),
    ]
    session = Session(model, optimizer, methods, sample=(x, torch.arange(6) % 4), total_samples=LONG)
    resrep = next(m for m in session.methods if isinstance(m, ResRep))
    for name in resrep.masks_:
        resrep.masks_[name][:] = False
    session.step(x, torch.arange(6) % 4)
    for compactor in compactors(model).values():
        assert compactor.weight.grad is not None
        assert (compactor.weight.grad.flatten(1).norm(dim=1) - 0.05).abs().max() < 1e-6


# -- which rows
def work_of(model: nn.Module, x: Tensor) -> tuple[Work, list[Target], Surgeon]:
    hand = Surgeon(model, (), x)
    targets, _ = find_targets(hand, x[:1], 1)
    return Work.of(model, hand.channels, targets, x[:1]), targets, hand


def test_macs_of_the_papers_network_and_of_the_widths_in_the_authors_log() -> None:
    model = models.build("resnet50", num_classes=1000, image_size=224, seed=0)
    work, targets, _ = work_of(model, torch.zeros(1, 3, 224, 224))
    assert len(targets) == 32
    assert work.whole == work(np.zeros(32, np.int64)) == 4_089_184_256
    left = [22, 22, 23, 36, 1, 1, 62, 97, 16, 49, 38, 68, 41, 92, 189, 204, 69, 145, 65, 139, 64, 94, 67, 89, 86, 95,
            473, 488, 171, 281, 511, 512]  # fmt: skip
    assert work(np.array([t.width for t in targets]) - left) == 1_858_866_887


def test_the_layers_pruned_are_those_of_the_paper() -> None:
    work, targets, _ = work_of(models.build("resnet56", seed=0), torch.zeros(1, 3, 32, 32))
    assert [t.conv.rpartition(".")[2] for t in targets] == ["conv1"] * 27
    assert work.whole == 125_485_696
    _, targets, _ = work_of(models.build("mobilenet-v1", seed=0), torch.zeros(1, 3, 32, 32))
    assert [t.conv.rpartition(".")[2] for t in targets] == ["conv_pw"] * 13


@pytest.mark.parametrize("name", ["resnet8", "mobilenet-v1", "googlenet", "flat", "lenet"])
def test_macs_of_narrowed_widths_are_those_of_the_narrowed_network(name: str) -> None:
    model, x = net(name), images(1)
    work, targets, hand = work_of(model, x)
    for seed in range(2):
        gone = [int(u * (len(hand.channels.outputs(t.conv)) - 1)) for t, u in
                zip(targets, keyed.uniform(np.arange(len(targets)), 1, "gone", seed)[:, 0], strict=True)]  # fmt: skip
        small = copy.deepcopy(model)
        Surgeon(small, (), x).apply(
            [RemoveChannels(t.conv, tuple(range(g))) for t, g in zip(targets, gone, strict=True)]
        )
        assert work(np.array(gone)) == macs(small, x).forward


def brute_choice(
    norms: Any, masked: Any, lost: Any, work: Work, limit: float, granularity: int, floor: int
) -> list[set[int]]:
    now = [int(a) + int(m.sum()) for a, m in zip(lost, masked, strict=True)]
    most = sum(now) + granularity if work(np.array(now)) > limit else 10**9
    found: list[set[int]] = [set() for _ in norms]
    rows = sorted(((float(n), t, r) for t, row in enumerate(norms) for r, n in enumerate(row)))
    for _, t, r in rows:
        gone = [int(a) + len(f) for a, f in zip(lost, found, strict=True)]
        if work(np.array(gone)) <= limit or sum(gone) >= most:
            break
        if len(norms[t]) - len(found[t]) > floor:
            found[t].add(r)
    return found


def test_the_choice_is_that_of_brute_force_and_keeps_its_bounds() -> None:
    work, targets, _ = work_of(toy((8, 12, 16, 10)), small_images())
    widths = [t.width for t in targets]
    unmasked = 0
    for seed in range(60):
        u = keyed.uniform(np.arange(100), 4, "choice", seed)
        lost = np.array([int(u[t, 3] * w / 3) for t, w in enumerate(widths)])
        norms = [u[10 * t : 10 * t + w - int(lost[t]), 0] + u[t : t + 1, 1] for t, w in enumerate(widths)]
        norms = [np.resize(n, w - int(lost[t])) for t, (n, w) in enumerate(zip(norms, widths, strict=True))]
        masked = [np.resize(u[10 * t :, 2], len(n)) < 0.2 * (seed % 3) for t, n in enumerate(norms)]
        limit, granularity, floor = work.whole * (0.2 + 0.7 * u[50, 0]), 1 + seed % 5, 1 + seed % 3
        got = choose(norms, masked, lost, work, limit, granularity, floor)
        expected = brute_choice(norms, masked, lost, work, limit, granularity, floor)
        assert [set(np.flatnonzero(g).tolist()) for g in got] == expected
        gone = lost + [g.sum() for g in got]
        assert all(len(n) - g.sum() >= min(floor, len(n)) for n, g in zip(norms, got, strict=True))
        now = lost + [m.sum() for m in masked]
        if work(now) > limit:
            assert gone.sum() <= now.sum() + granularity
        if work(gone) <= limit and gone.sum() > lost.sum():  # not a row too many
            assert any(work(gone - one) > limit for one in np.eye(len(widths), dtype=np.int64))
        unmasked += sum(int((m & ~g).sum()) for m, g in zip(masked, got, strict=True))
    assert unmasked > 20


def test_ties_are_taken_in_the_order_of_layers_and_rows() -> None:
    work, targets, _ = work_of(toy(), small_images())
    ones = [np.ones(t.width) for t in targets]
    none = [np.zeros(t.width, bool) for t in targets]
    got = choose(ones, none, np.zeros(len(targets), np.int64), work, 0.1 * work.whole, 4, 1)
    assert np.flatnonzero(got[0]).tolist() == [0, 1, 2, 3]


def test_no_choice_needs_fewer_rows_than_the_bound() -> None:
    work, targets, _ = work_of(toy((3, 4, 3)), small_images())
    widths = np.array([t.width for t in targets])
    for share in (0.5, 0.7, 0.9):
        bound = fewest_rows(work, widths, share * work.whole, 1)
        ways = [np.array(g) for g in product(*(range(w) for w in widths))]
        enough = [int(g.sum()) for g in ways if work(g) <= share * work.whole]
        assert bound is not None
        assert bound <= min(enough)
    assert fewest_rows(work, widths, 0.05 * work.whole, 1) is None


def test_masks_follow_the_interval_and_the_warmup() -> None:
    model, x, y = toy(), small_images(), torch.arange(6) % 4
    session = start(
        model, x, total=6 * 40, lr=0.1, lam=1.0, every=4, granularity=3, warmup=0.25, target=0.5, momentum=0.0
    )
    for step in range(1, 25):
        session.step(x, y)
        masked = session.witness()["resrep"]["rows_masked"]
        # the first step at or after a quarter of 40 that is a multiple of 4
        assert session.witness()["resrep"]["mask_updates"] == max(0, (step - 8) // 4)
        assert masked <= 3 * max(0, (step - 8) // 4)
    log = method(session).log_
    assert [row[0] for row in log] == [12, 16, 20, 24][: len(log)]
    assert len(log[0]) == 3
    assert sum(log[0][1:]) == 12 + 16 - 3


# -- a run
def patterns(n: int, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Return noisy images whose class shows in their pattern."""
    base = random(classes, 3, 8, 8, seed=77)
    y = torch.arange(n) % classes
    return base[y] + 0.7 * random(n, 3, 8, 8, seed=1000 + seed), y


def accuracy(forward: Any, n: int = 1000) -> float:
    x, y = patterns(n, seed=-1)
    with torch.no_grad():
        return float((forward(x).argmax(1) == y).double().mean())


def trained(steps: int = 60) -> nn.Sequential:
    model = toy((8, 16, 16))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        x, y = patterns(32, step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def run(session: Session, steps: int, total: int, lr: float = 0.05) -> None:
    for step in range(session.counters["step"], steps):
        for optimizer in session.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / total))
        session.step(*patterns(32, step))


TOY_RUN: dict[str, Any] = {"target": 0.4, "lam": 0.02, "momentum": 0.9, "every": 5, "granularity": 4, "warmup": 0.05,
                           "num_at_least": 2, "threshold": 1e-3}  # fmt: skip


@pytest.mark.parametrize("early", [False, True])
def test_a_trained_network_is_pruned_without_loss(early: bool) -> None:
    model, steps = trained(), 300
    base = accuracy(copy.deepcopy(model).eval())
    whole = macs(model, small_images(1)).forward
    session = start(model, small_images(32), total=32 * steps, lr=0.05, early_shrink=early, **TOY_RUN)
    run(session, steps - 1, steps)
    before = session.witness()["resrep"]
    assert (before["rows_removed"] > 0) == early
    x, _ = patterns(200, 9)
    merged_before = session.export()
    session_before = accuracy(lambda x: outputs(session, x))
    run(session, steps, steps)
    witness = session.witness()["resrep"]
    assert witness["rows_masked"] == 0
    # with early surgery a row that the penalty alone is about to take counts as meant to stay
    assert witness["gap"] > (1 if early else 10)
    plain = session.export()
    now = macs(plain, small_images(1)).forward
    work, widths = method(session)._work, np.array([16, 16])
    chosen = widths - method(session).log_[-1][1:]
    # the last choice stops at the first row with which the target is met; rows that died unasked go as well
    assert any(work(chosen - one) > 0.4 * whole for one in np.eye(2, dtype=np.int64))
    assert now <= work(chosen) <= 0.4 * whole
    assert now > 0.3 * whole
    assert abs(witness["macs_removed"] - (1 - now / whole)) < 1e-12
    assert abs(accuracy(plain) - session_before) < 1e-3
    assert abs(accuracy(plain) - base) < 1e-3
    with torch.no_grad():
        difference = (plain(x) - merged_before(x)).abs().max() / plain(x).abs().max()
    assert difference < 1e-2
    note = session.effects["resrep"].touched["3"]
    assert note.startswith(f"{plain.get_submodule('3').out_channels} of 16")


@pytest.mark.parametrize("early", [False, True])
def test_a_resumed_run_ends_in_the_same_bits(early: bool) -> None:
    """Saved at a choice, right after it, between two, and after rows went."""
    steps, settings = 40, {**TOY_RUN, "threshold": 0.995, "warmup": 0.0, "granularity": 100, "early_shrink": early,
                           "every": 5, "target": 0.6}  # fmt: skip
    x = small_images(32)

    def fresh() -> Session:
        return start(trained(3), x, total=32 * steps, lr=0.05, **settings)

    session, saved = fresh(), {}
    for step in range(steps):
        if step in (4, 5, 6, 10, 11, 13, 20, 31, 39):
            saved[step] = through_file_format(session.state_dict())
        run(session, step + 1, steps)
    assert session.witness()["resrep"]["surgeries"] >= 1
    if early:
        assert saved[39]["structure"]
    final = session.state_dict()
    for step, state in saved.items():
        again = fresh()
        again.load_state_dict(state)
        run(again, steps, steps)
        assert not differences(final, again.state_dict()), f"resumed at {step}"
        assert again.witness() == session.witness()


def test_rounding_keeps_the_largest_of_the_dead() -> None:
    session = start(net("resnet8", torch.float32), images(2, torch.float32), round_to=8, num_at_least=8)
    for compactor in compactors(session.model).values():
        with torch.no_grad():
            compactor.weight[:-3] *= torch.linspace(1e-9, 1e-6, compactor.out_channels - 3).view(-1, 1, 1, 1)
    kept = {name: list(range(c.out_channels))[-8:] for name, c in compactors(session.model).items()}
    finish(session)
    state = method(session).kept_
    assert {name: rows.tolist() for name, rows in state.items()} == kept
    assert {c.out_channels for c in compactors(session.model).values()} == {8}


def test_a_relative_threshold_takes_masked_rows_only() -> None:
    session = start(toy(), small_images(), threshold=0.01, relative=True, lam=0.1)
    ours, weights = method(session), compactors(session.model)
    for name, compactor in weights.items():
        with torch.no_grad():
            compactor.weight[:4] *= 0.005
        ours.masks_[name][:2] = False
    ours._shrink()
    assert [rows.tolist()[:2] for rows in ours.kept_.values()] == [[2, 3]] * len(weights)
    assert ours.gap_ == pytest.approx(1.0)  # rows of the same size stayed, which a user must see


def test_a_session_that_does_not_train_takes_no_offence_at_its_length() -> None:
    """As the export of a finished run builds it: learning rate 0, one sample."""
    session = start(toy(), small_images(), total=1, lr=0.0)
    assert compactors(session.model)


# -- refusals
def test_runs_too_short_are_refused_with_the_number_of_steps() -> None:
    x = small_images(32)
    with pytest.raises(UnsupportedError, match=r"has 299 steps .* needs at least 10000: 10000 for a row"):
        start(toy(), x, total=32 * 300, warmup=0.003, granularity=100)
    with pytest.raises(
        UnsupportedError, match=r"20 for a row to shrink .* after 300 until the last of 7 or more"
    ):
        start(
            toy(),
            x,
            total=32 * 200,
            lr=0.05,
            lam=0.1,
            momentum=0.9,
            granularity=1,
            every=50,
            warmup=0.0,
            target=0.5,
        )
    start(toy(), x, total=32 * 30, lr=0.05, lam=0.1, momentum=0.9, granularity=100, warmup=0.0, target=0.8)


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"target=0.2 is out of reach: with num_at_least=8"):
        start(toy(), small_images(), target=0.2, num_at_least=8)
    with pytest.raises(NoEffectError, match="target=1 keeps every channel"):
        start(toy(), small_images(), target=1.0)


def test_optimizers_that_rescale_gradients_are_refused() -> None:
    model = toy()
    with pytest.raises(UnsupportedError, match=r"torch.optim.SGD.*given: AdamW"):
        Session(
            model,
            AdamW(model.parameters()),
            [ResRep()],
            sample=(small_images(), torch.arange(6)),
            total_samples=LONG,
        )


def test_a_network_with_compactors_is_refused() -> None:
    session = start(toy(), small_images())
    with pytest.raises(UnsupportedError, match=r"compactors already \(4.1"):
        start(session.model, small_images())
    start(session.export().train(), small_images())


RANK = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from tests.methods.test_resrep import TWO, SGD, ResRep, Session, models
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
model = DistributedDataParallel(models.build("resnet8", num_classes=4, image_size=8, seed=0))
g = torch.Generator().manual_seed(rank)
x, y = torch.randn(8, 3, 8, 8, generator=g), torch.arange(8) % 4
session = Session(model, SGD(model.parameters(), lr=0.02, momentum=0.9), [ResRep(**TWO)], sample=(x, y),
                  total_samples=8 * 16)
for step in range(16):
    session.step(x, y)
torch.save({"witness": session.witness()["resrep"], "model": session.model.state_dict(),
            "grads": {n: p.grad for n, p in session.model.named_parameters()}}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""
TWO = {"target": 0.6, "lam": 0.1, "momentum": 0.9, "every": 4, "granularity": 1000, "warmup": 0.0,
       "threshold": 0.9999, "relative": True}  # fmt: skip


def test_two_ranks_prune_one_network(tmp_path: Path) -> None:
    first, second = two_ranks(RANK, tmp_path)
    assert first["witness"] == second["witness"]
    assert first["witness"]["rows_removed"] > 0
    assert set(first["grads"]) == set(second["grads"])
    for name, grad in first["grads"].items():
        assert torch.equal(grad, second["grads"][name]), (
            name
        )  # compactors, which came in later, are averaged too
    for name, value in first["model"].items():
        if "running" not in name:  # batch statistics are each rank's own
            assert torch.equal(value, second["model"][name]), name


class Odd(nn.Module):
    """Layers that must not be pruned, each for its own reason, and one that can be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shifted, self.bent, self.early = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.added, self.twice = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.groups, self.plain, self.narrow = (
            nn.Conv2d(8, 8, 1, groups=2),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 2, 1),
        )
        self.unused, self.scaled = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.stateless, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.mix = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(8))
        self.last, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.mix[0](F.relu(self.shifted(x)) + 1.0) + x
        x = self.mix[1](torch.sigmoid(self.bent(x))) + x
        x = self.mix[2](self.norm(F.relu(self.early(x)))) + x
        x = F.relu(self.added(x)) + x
        x = self.mix[3](self.twice(self.twice(x))) + x
        x = self.mix[4](F.relu(self.groups(self.mix[5](x)))) + x
        x = self.mix[6](F.relu(self.plain(x))) + x
        x = self.mix[7](F.relu(self.scaled(x)) * self.gain) + x
        x = self.last(F.relu(self.bn(self.stateless(x)))) + x
        return self.fc(F.relu(self.narrow(x)).mean((2, 3)))


def test_layers_that_cannot_be_pruned_are_named_with_the_reason() -> None:
    session = start(Odd(), small_images(), num_at_least=2, target=0.99)
    effect = session.effects["resrep"]
    assert list(effect.touched) == ["plain"]
    reasons = {
        "stem": "first layer", "shifted": r"reads 1: an activation between them has f\(0\) != 0",
        "bent": r"reads 0.5: an activation", "early": "norm makes a constant", "added": "also those of",
        "twice": "more than once", "groups": "groups=2", "narrow": "num_at_least=2", "unused": "no channels",
        "scaled": "also those of gain", "stateless": "no running statistics", "mix.5": "in 2 parts", "mix.0": "also those of",
    }  # fmt: skip
    for name, reason in reasons.items():
        assert re.search(reason, effect.skipped[name]), (name, effect.skipped[name])


@pytest.mark.parametrize(("act", "fits"), [
    (nn.ReLU, True), (nn.GELU, True), (nn.SiLU, True), (nn.Hardswish, True), (nn.Tanh, True), (nn.PReLU, True),
    (nn.LeakyReLU, True), (nn.Sigmoid, False), (nn.Softplus, False), (nn.Hardsigmoid, False),
])  # fmt: skip
def test_only_activations_that_map_0_to_0_are_allowed(act: type[nn.Module], fits: bool) -> None:
    model = toy(act=act())
    if fits:
        assert start(model, small_images()).effects["resrep"].touched
    else:
        with pytest.raises(NoEffectError, match=r"f\(0\) != 0"):
            start(model, small_images())


def test_a_depthwise_convolution_whose_constant_has_nowhere_to_go_is_left_whole() -> None:
    def chain(kernel: int, bias: bool, norm: bool) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 5, kernel, padding=kernel // 2, bias=bias), nn.BatchNorm2d(5) if norm else nn.Identity(), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
        )  # fmt: skip

    x = small_images()
    assert "borders" in start(chain(3, False, True), x).effects["resrep"].skipped["2"]
    assert "nowhere to go" in start(chain(1, False, False), x).effects["resrep"].skipped["2"]
    for bias, norm in ((True, False), (False, True), (True, True)):
        model = chain(1, bias, norm)
        with torch.no_grad():
            model[6].bias.copy_(random(6))
        session = start(model, x)
        assert "2" in session.effects["resrep"].touched
        stir(session)
        expected = outputs(session, x)
        finish(session)
        assert session.witness()["resrep"]["rows_removed"] > 0
        torch.testing.assert_close(outputs(session, x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(session.export()(x), expected, rtol=1e-4, atol=1e-5)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        ResRep(target=0, lam=-1, momentum=1, every=0, granularity=1.5, warmup=-0.1, num_at_least=0, threshold=2.0,
               relative=True, round_to=0, early_shrink=1)  # type: ignore[arg-type] # fmt: skip
    for name in (
        "target",
        "lam",
        "momentum",
        "every",
        "granularity",
        "warmup",
        "num_at_least",
        "threshold",
        "round_to",
        "early_shrink",
    ):
        assert name in str(error.value)


def test_a_run_with_averaged_weights_is_pruned_saved_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "resrep", Row("hasten.methods.structure.resrep:ResRep"))
    data = load("fashion-mnist-12k").stratified(256, 100)
    recipe = PLAIN.with_(epochs=2.0, batch_size=32, ema=0.9, augment=())
    ours = ResRep(
        target=0.5,
        lam=0.05,
        momentum=0.5,
        every=3,
        granularity=1000,
        warmup=0.0,
        threshold=0.999,
        relative=True,
    )
    result = fit("resnet8", data, [ours], recipe=recipe, out=tmp_path / "run")
    assert result.witness["resrep"]["rows_removed"] >= 24
    assert result.model is not None
    run = load_run(tmp_path / "run")
    again, x = run.network, random(4, *run.shape)
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    assert {type(m).__module__.split(".")[0] for m in again.modules() if not list(m.children())} == {
        "torch",
        "hasten",
    }
    assert not compactors(again)
