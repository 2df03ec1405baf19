"""AOFP: scoring leaves training alone, t is its definition, the search is the paper's, and removing changes nothing."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.ranks import two_ranks
from tests.surgery.nets import images, net
from torch import Tensor, nn
from torch.optim import SGD

import hasten
from hasten import PLAIN, conformance, fit, keyed, models
from hasten.conformance import differences, through_file_format
from hasten.data import load
from hasten.errors import NoEffectError, SettingsError, UnsupportedError
from hasten.exporting import load_run
from hasten.measure.macs import macs
from hasten.methods.forward.mixed_precision import MixedPrecision
from hasten.methods.structure.aofp import AOFP, TRIED
from hasten.methods.structure.aofp_scoring import (
    Affine,
    Reader,
    Switch,
    contribution,
    find_pairs,
    relative_change,
)
from hasten.methods.structure.aofp_search import Search
from hasten.session import Session
from hasten.surgery import Surgeon
from hasten.surgery.labels import Array
from hasten.table import METHODS, Row

LONG = 10**9


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("aofp test", seed), dtype=dtype)


def toy(widths: tuple[int, ...] = (8, 12, 16), norm: bool = True) -> nn.Sequential:
    """Return a chain of 3x3 convolutions with activations in place, a pool and a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for c_in, c_out in zip((3, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(c_in, c_out, 3, padding=1, bias=not norm),
                nn.BatchNorm2d(c_out) if norm else nn.Identity(),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def small_images(n: int = 6, seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(n, 3, 8, 8, seed=seed, dtype=dtype)


def start(model: nn.Module, x: Tensor, total: int = LONG, lr: float = 0.01, **settings: Any) -> Session:
    chosen = {"h": 4, "warmup": 0, "round_to": 1, "target": 0.2, "surgery_every": 1.0, **settings}
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    sample = (x, torch.arange(len(x)) % 4)
    session = Session(model, optimizer, [AOFP(**chosen)], sample=sample, total_samples=total, seed=7)
    method(session).trial_ = [TRIED, TRIED]  # as after a trained network's first images
    return session


def method(session: Session) -> AOFP:
    found = next(m for m in session.methods if isinstance(m, AOFP))
    return found


def run(session: Session, steps: int, make: Callable[..., Tensor] = small_images) -> list[Tensor]:
    """Bring ``session`` to step ``steps`` and return the losses."""
    losses = []
    for step in range(session.counters["step"], steps):
        x = make(seed=step)
        losses.append(session.step(x, torch.arange(len(x)) % 4))
    return losses


def mask(session: Session, gone: dict[str, list[int]], damage: dict[str, list[float]] | None = None) -> None:
    """Mask filters as a move does."""
    for name, rows in gone.items():
        search = method(session).searches_[name]
        search.alive[rows] = False
        search.damage[rows] = damage[name] if damage else 0.001
    method(session)._mask()


def some(session: Session, seed: int = 0) -> dict[str, list[int]]:
    """Return about 0.4 of the filters of each layer, at least one of each and not all."""
    found = {}
    for i, (name, search) in enumerate(method(session).searches_.items()):
        u = keyed.uniform(np.arange(len(search.alive) - 1), 1, "some", seed, i)[:, 0]
        found[name] = np.flatnonzero(u < 0.4).tolist() or [0]
    return found


# -- training is what it is without
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "batch norm": (toy, small_images),
    "no norm, in place": (lambda: toy(norm=False), small_images),
    "resnet8": (lambda: models.build("resnet8", seed=0), lambda seed=0: images(4, torch.float32, seed)),
    "flattened": (lambda: net("flat", torch.float32), lambda seed=0: images(4, torch.float32, seed)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", [{}, {"bn_mode": "own", "share": 0.5}], ids=["base", "own"])
def test_scoring_leaves_losses_weights_and_running_statistics_as_they_are(case: str, settings: Any) -> None:
    build, make = CASES[case]
    scored, plain = build(), build()
    session = start(scored, make(), theta=0.0, h=2, **settings)
    optimizer = SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    bare = Session(plain, optimizer, [], sample=(make(), torch.arange(len(make())) % 4), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(run(session, 6, make), run(bare, 6, make), strict=True))
    assert session.witness()["aofp"]["scores"] >= 5 * len(method(session).searches_)
    assert not differences(session.state_dict()["model"], bare.state_dict()["model"])
    assert not differences(session.state_dict()["optimizers"], bare.state_dict()["optimizers"])


# -- t
def reader(model: nn.Module, name: str, x: Tensor, share: float = 1.0) -> Reader:
    """Return the reader ``name`` after one training pass on ``x``."""
    switch = Switch(True, share)
    made = Reader(model, Surgeon(model, (), x).channels.graph, name, switch)
    made.set_mask(np.ones(made.module.weight.shape[1], np.bool_))
    model.train()(x)
    switch.on = False
    return made


def t_of(made: Reader, at: list[int], mode: Any = "base", alive: Array | None = None) -> float:
    (t,) = made.scores([np.array(at)], mode, alive)
    return float(t)


class Chain(nn.Module):
    """conv, batch norm or none, activation, and a reader with what stands behind it."""

    def __init__(self, reads: nn.Module, *behind: nn.Module) -> None:
        super().__init__()
        self.conv, self.reads, self.behind = nn.Conv2d(3, 8, 3, padding=1), reads, nn.Sequential(*behind)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.behind(self.reads(x.flatten(1) if isinstance(self.reads, nn.Linear) else x))


READERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[nn.Module]]]] = {
    "conv, norm, relu": (lambda: nn.Conv2d(8, 6, 3), lambda: [nn.BatchNorm2d(6), nn.ReLU(inplace=True)]),
    "conv, norm": (
        lambda: nn.Conv2d(8, 6, 3, stride=2, bias=False),
        lambda: [nn.BatchNorm2d(6, affine=False)],
    ),
    "conv, relu": (lambda: nn.Conv2d(8, 6, 3), lambda: [nn.ReLU(inplace=True)]),
    "reflected": (
        lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
        lambda: [nn.BatchNorm2d(6), nn.LeakyReLU(0.2)],
    ),
    "frozen norm": (lambda: nn.Conv2d(8, 6, 1), lambda: [nn.BatchNorm2d(6).eval(), nn.GELU()]),
    "linear": (lambda: nn.Linear(8 * 64, 6), lambda: [nn.BatchNorm1d(6), nn.Tanh()]),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("mode", ["base", "own"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_t_is_what_running_the_reader_again_gives(name: str, mode: str, share: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        reads, behind = READERS[name]
        model = Chain(reads(), *behind()).double()
        for parameter in model.behind.parameters():
            nn.init.normal_(parameter)
    x, frozen = random(6, 3, 8, 8, dtype=torch.float64), name == "frozen norm"
    if frozen:
        model.train()
        model.behind[0].running_mean.uniform_(-0.5, 0.5, generator=keyed.generator("frozen"))
        made = Reader(model, Surgeon(model, (), x).channels.graph, "reads", Switch(True, share))
        made.set_mask(np.ones(8, np.bool_))
        model.behind[0].eval()
        model(x)
    else:
        made = reader(model, "reads", x, share)
    read = F.relu(model.conv(x)).detach()
    n, filters = int(6 * share), [1, 2, 5, 7]
    cut = read.clone()
    cut[:, filters] = 0
    flat = isinstance(model.reads, nn.Linear)
    whole, less = (copy.deepcopy(model.reads)(r.flatten(1) if flat else r).detach() for r in (read, cut))
    norm = next((m for m in model.behind if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)), None)
    rest = [m for m in model.behind if m is not norm]

    def after(y: Tensor, statistics: Tensor) -> Tensor:
        if norm is not None:
            dims = [d for d in range(y.dim()) if d != 1]
            mean, var = (norm.running_mean, norm.running_var) if frozen else (
                statistics.mean(dims), statistics.var(dims, correction=0))  # fmt: skip
            y = F.batch_norm(y, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return nn.Sequential(*rest)(y.clone())

    with torch.no_grad():
        expected_base = after(whole[:n], whole)
        expected = after(less[:n], whole if mode == "base" else less[:n])
    wanted = float((expected_base - expected).square().sum() / expected_base.square().sum())
    at = [f * 64 + p for f in filters for p in range(64)] if flat else filters
    assert abs(t_of(made, at, mode) / wanted - 1) < 1e-9


def test_ablating_what_is_zero_does_no_damage_and_ablating_all_is_one() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False), nn.Flatten(), nn.LazyLinear(2)
    )
    x = small_images()
    model(x)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = 0
        model[2].weight[:, 6] = 0
    made = reader(model, "2", x)
    assert t_of(made, [1, 4, 6]) == 0
    assert t_of(made, list(range(8))) == pytest.approx(1, abs=1e-6)
    assert 1e-4 < t_of(made, [0, 2]) < 1
    assert float(relative_change(torch.zeros(3), torch.zeros(3))) == 0


def test_the_readers_own_mask_lies_on_both_outputs() -> None:
    made = reader(toy().double(), "3", small_images(dtype=torch.float64))
    alive = np.ones(12, np.bool_)
    alive[[0, 3, 4]] = False
    whole = t_of(made, [0, 1])
    masked = t_of(made, [0, 1], alive=alive)
    assert made.seen is not None
    read, y = made.seen
    affine = Affine.of(made.norm, y)
    base = affine(y)[:, alive].relu()
    lost = contribution(made.module, read, torch.tensor([0, 1]), y.dtype)
    less = affine(y - lost)[:, alive].relu()
    assert masked == pytest.approx(float((base - less).square().sum() / base.square().sum()), rel=1e-9)
    assert abs(whole - masked) > 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_scores_are_those_of_float64(layout: torch.memory_format) -> None:
    x = small_images(16)
    exact = reader(toy().double(), "3", x.double())
    model = toy().to(memory_format=layout)
    switch = Switch(True, 1.0)
    rough = Reader(model, Surgeon(model, (), x).channels.graph, "3", switch)
    rough.set_mask(np.ones(8, np.bool_))
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x.contiguous(memory_format=layout))
    for at in ([0], [1, 5], [0, 2, 3, 7]):
        (t,) = rough.scores([np.array(at)], "base", None)
        assert t.dtype == torch.float32
        assert abs(float(t) / t_of(exact, at) - 1) < 0.05


# -- the search
def test_draws_are_half_of_the_search_space_and_never_masked() -> None:
    search = Search(13)
    search.start()
    seen = set()
    for step in range(60):
        drawn = search.draw("seed", step)
        assert len(set(drawn.tolist())) == int(search.space.sum()) // 2
        assert search.space[drawn].all()
        assert search.alive[drawn].all()
        assert (search.draw("seed", step) == drawn).all()
        search.add(drawn, float(drawn.sum()))
        search.step(10, 20.0)
        seen.add(tuple(drawn.tolist()))
    assert not search.alive.all()
    assert len(seen) > 30


def scripted(search: Search, values: Array, theta: float) -> str:
    """Run one half in which ablating filter f alone gives ``values[f]``."""
    for f in np.flatnonzero(search.space):
        search.add(np.array([f]), float(values[f]))
    return search.step(1, theta)


def test_granularity_goes_8_4_2_1_and_begins_again() -> None:
    search, values = Search(16), np.arange(16)[::-1] + 1.0
    search.start()
    trace = []
    for _ in range(4):
        trace.append((search.granularity, scripted(search, values, 0.5)))
    assert trace == [(8, "halve"), (4, "halve"), (2, "halve"), (1, "restart")]
    assert search.space.all()
    assert search.restarts == 1
    assert (search.steps, search.count.sum()) == (0, 0)
    assert scripted(search, values, 8.5) == "move"  # the 8th smallest is 8
    assert search.alive.tolist() == [True] * 8 + [False] * 8
    assert search.damage[8:].tolist() == values[8:].tolist()
    assert (search.space == search.alive).all()
    assert search.restarts == 0


def test_the_search_space_becomes_the_filters_of_least_damage() -> None:
    for seed in range(20):
        n = 5 + seed
        values = keyed.uniform(np.arange(n), 1, "least", seed)[:, 0]
        search = Search(n)
        search.start()
        g = search.granularity
        assert scripted(search, values, 0.0) == "halve"
        assert set(np.flatnonzero(search.space).tolist()) == set(np.argsort(values)[:g].tolist())


def test_a_filter_that_was_never_ablated_is_never_chosen() -> None:
    for seed in range(30):
        search = Search(10)
        search.start()
        drawn = [search.draw(seed, i) for i in range(1 + seed % 3)]
        for at in drawn:
            search.add(at, 0.001)
        outcome = search.step(1, 0.01 if seed % 2 else 0.0)
        chosen = np.flatnonzero(~search.alive if outcome == "move" else search.space)
        assert outcome == ("move" if seed % 2 else "halve")
        assert len(chosen) == 5
        assert set(chosen.tolist()) <= set(np.concatenate(drawn).tolist())
    search = Search(10)
    search.start()
    assert search.step(1, 1.0) == "void"
    assert search.alive.all()


@pytest.mark.parametrize("n", [16, 32])
@pytest.mark.parametrize("planted", [1, 4, 8, 12])
def test_planted_filters_are_found_within_log2_n_halves_and_no_others(n: int, planted: int) -> None:
    harmless = set(keyed.permutation(n, "planted", n, planted)[:planted].tolist())
    damage = 0.5 + keyed.uniform(np.arange(n), 1, "damage")[:, 0]
    damage[list(harmless)] = 0
    search, h = Search(n), 2000
    search.start()
    halves = first = 0
    while not search.restarts:
        halves += 1
        for i in range(h):
            drawn = search.draw(n, planted, halves, i)
            search.add(drawn, float(damage[drawn].sum()))
        for _ in range(h):
            outcome = search.step(h, 1e-6)
        if outcome == "move":
            first = first or halves
        assert set(np.flatnonzero(~search.alive).tolist()) <= harmless
    assert 1 <= first <= np.log2(n)
    assert set(np.flatnonzero(~search.alive).tolist()) == harmless


def test_planted_filters_are_found_in_a_network() -> None:
    model, harmless = toy((8, 16, 8)), [0, 2, 3, 7, 9, 10, 12, 15]
    with torch.no_grad():
        model[6].weight[:, harmless] = 0
    session = start(model, small_images(), lr=0.0, h=100, theta=1e-9, patience=1)
    with pytest.warns(UserWarning, match="found nothing to mask"):
        run(session, 3000)
    masked = method(session).log_[-1]
    assert masked[1:] == [8, 8, 8]
    assert session.model[3].out_channels == 8
    assert method(session).kept_["3"].tolist() == [i for i in range(16) if i not in harmless]


def test_layers_start_one_after_the_other() -> None:
    session = start(toy(), small_images(), warmup=3, h=10, theta=0.0)
    starts: dict[str, int] = {}
    for step in range(16):
        for name, search in method(session).searches_.items():
            if search.started:
                starts.setdefault(name, step)
        before = {name: int(s.count.sum()) for name, s in method(session).searches_.items()}
        run(session, step + 1)
        for name, search in method(session).searches_.items():
            moved = int(search.count.sum()) != before[name]
            assert moved == (name in starts)
    assert starts == {"0": 3, "3": 6, "6": 9}


def test_a_step_in_every_n_is_scored_and_a_half_is_as_long_as_before() -> None:
    session = start(toy(), small_images(), every=4, h=8, theta=0.0)
    run(session, 1)
    assert session.witness()["aofp"]["scores"] == 1  # the others have not started
    scores = []
    for step in range(1, 25):
        run(session, step + 1)
        scores.append(session.witness()["aofp"]["scores"])
    assert [s for s, (a, b) in enumerate(itertools.pairwise(scores), 2) if a != b] == [4, 8, 12, 16, 20, 24]
    assert session.witness()["aofp"]["halvings"] + session.witness()["aofp"]["restarts"] == 7


# -- masks and surgery
def look(session: Session, x: Tensor) -> Tensor:
    with session.inference() as forward:
        return forward(x)


@pytest.mark.parametrize("name", ["toy", "resnet8", "wrn-16-4", "flat", "lenet", "alexnet", "googlenet"])
def test_masked_is_pruned_in_outputs_gradients_and_macs(name: str) -> None:
    x = images() if name != "toy" else small_images(dtype=torch.float64)
    model = (toy().double() if name == "toy" else net(name)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    session = start(model, x, target=0.5, h=1000)
    gone = some(session)
    before = model.train()(x)
    mask(session, gone)
    masked = {"train": model.train()(x), "eval": look(session, x)}
    assert (masked["train"] - before).abs().max() > 1e-6
    masked["train"].square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    expected_macs = method(session)._share_left(
        np.array([s.kept for s in method(session).searches_.values()])
    )
    whole = macs(model, x[:1]).forward
    for parameter in model.parameters():
        parameter.grad = None
    kept = dict(grads)
    session.surgery.followers.insert(0, lambda change: kept.update(change.follow(
        {n: g for n, g in grads.items() if g is not None}, dict(model.named_parameters()))))  # fmt: skip
    method(session)._cut()
    assert session.witness()["aofp"]["filters_masked"] == 0
    assert session.witness()["aofp"]["filters_removed"] == sum(map(len, gone.values()))
    pruned = {"eval": look(session, x), "train": model.train()(x)}
    pruned["train"].square().sum().backward()
    for mode in ("eval", "train"):
        assert (pruned[mode] - masked[mode]).abs().max() <= 1e-9 * masked[mode].abs().max(), mode
    for n, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(
                parameter.grad, kept[n], rtol=1e-7, atol=1e-9 * float(kept[n].abs().max() + 1)
            ), n
    assert macs(model, x[:1]).forward == round(expected_macs * whole)


def test_a_masked_filter_gets_no_gradient_and_its_reader_sees_zeros() -> None:
    session = start(toy(), small_images(), h=1000)
    mask(session, {"3": [2, 5]})
    seen: list[Tensor] = []
    session.model[6].register_forward_hook(lambda m, given, out: seen.append(given[0]))
    session.model(small_images()).square().sum().backward()
    assert not seen[0][:, [2, 5]].any()
    assert seen[0][:, [0, 1, 3]].any()
    weight = session.model[3].weight
    assert weight.grad is not None
    assert not weight.grad[[2, 5]].any()
    assert weight.grad[[0, 1]].any()
    assert session.model[6].weight.grad is not None
    assert not session.model[6].weight.grad[:, [2, 5]].any()


def test_export_with_masks_is_plain_and_the_same_function() -> None:
    session = start(toy(), small_images(), h=1000)
    mask(session, some(session))
    x = small_images(seed=9)
    plain = session.export()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert all(m._forward_hooks and m._forward_pre_hooks for m in (session.model[3], session.model[6]))
    with torch.no_grad():
        assert (plain(x) - look(session, x)).abs().max() < 1e-6
        assert session.model[3].weight.ne(0).all()


def test_a_copy_of_the_network_stays_masked_as_it_was() -> None:
    session, x = start(toy(), small_images(), h=1000), small_images(seed=9)
    mask(session, {"3": [2, 5]})
    copied, masked = copy.deepcopy(session.model).eval(), look(session, x)
    mask(session, {"3": [7]})
    method(session)._cut()
    method(session)._switch.on = True
    with torch.no_grad():
        assert torch.equal(copied(x), masked)
    copied(x).sum().backward()
    assert all(reader.seen is None for reader in method(session)._readers.values())


def test_rounding_keeps_the_filters_of_least_damage_and_moves_them_back_at_the_end() -> None:
    session = start(toy((16, 24, 16)), small_images(), h=1000, round_to=8, target=0.6)
    order = np.argsort(keyed.uniform(np.arange(24), 1, "order")[:, 0])
    gone = order[:13].tolist()  # 11 alive, 16 stay
    mask(session, {"3": gone}, {"3": [0.001 * (i + 1) for i in range(13)]})
    method(session)._cut()
    ours = method(session)
    assert ours.kept_["3"].tolist() == sorted({*order[13:].tolist(), *gone[:5]})
    assert session.witness()["aofp"]["filters_masked"] == 5
    x, masked = small_images(seed=9), look(session, small_images(seed=9))
    ours._finish("reached")
    assert session.witness()["aofp"]["filters_masked"] == 0
    assert session.witness()["aofp"]["filters_moved_back"] == 5
    assert session.model[3].out_channels == 16
    assert (look(session, x) - masked).abs().max() > 1e-6
    assert ours.searches_["3"].alive.all()
    run(session, 3)
    assert not ours._switch.on


def test_a_layer_that_rounding_keeps_whole_is_not_searched() -> None:
    effect = start(toy((8, 16, 24)), small_images(), round_to=8, target=0.6).effects["aofp"]
    assert "8 filters, of which round_to=8 keeps all" in effect.skipped["0"]
    assert list(effect.touched) == ["3", "6"]
    search = Search(24, 8)
    search.start()
    for _ in range(10):
        scripted(search, np.zeros(24), 1.0)
    assert search.over
    assert search.kept == 8


def test_the_macs_of_rounded_widths_are_what_counts() -> None:
    session = start(toy((16, 16, 16)), small_images(), h=2, theta=100.0, round_to=8, target=0.45)
    run(session, 6)
    ours = method(session)
    assert ours.finished_ == "reached"
    assert {m.out_channels for m in session.model if isinstance(m, nn.Conv2d)} <= {8, 16}
    share = macs(session.model, small_images(1)).forward / macs(toy((16, 16, 16)), small_images(1)).forward
    assert share < 0.45
    assert session.witness()["aofp"]["macs_removed"] == pytest.approx(1 - share, abs=1e-12)


def test_intermediate_surgery_leaves_sums_and_function_as_they_are() -> None:
    def twin_run(every: float) -> Session:
        session = start(toy((8, 12, 16)).double(), small_images(dtype=torch.float64), h=4, theta=0.3, target=0.1,
                        surgery_every=every, patience=50)  # fmt: skip
        run(session, 30, lambda seed: small_images(seed=seed, dtype=torch.float64))
        return session

    often, never = twin_run(0.01), twin_run(1.0)
    assert often.witness()["aofp"]["surgeries"] >= 2
    assert never.witness()["aofp"]["surgeries"] == 0
    assert method(often).log_ == method(never).log_
    for name, search in method(often).searches_.items():
        other = method(never).searches_[name]
        at = method(often).kept_[name].numpy()
        assert (search.alive == other.alive[at]).all()
        assert not other.alive[np.setdiff1d(np.arange(len(other.alive)), at)].any()
        assert (search.space == other.space[at]).all()
        assert np.allclose(search.total, other.total[at], rtol=1e-7, atol=0)
        assert (search.count == other.count[at]).all()
    x = small_images(seed=99, dtype=torch.float64)
    assert (look(often, x) - look(never, x)).abs().max() < 1e-9


# -- a run
def test_the_target_ends_the_search_at_once() -> None:
    session = start(toy((16, 16, 16)), small_images(), h=3, theta=100.0, target=0.5)
    shares = []
    for step in range(12):
        run(session, step + 1)
        shares.append(1 - session.witness()["aofp"]["macs_removed"])
    ours = method(session)
    at = ours.log_[-1][0]
    assert ours.finished_ == "reached"
    assert shares[at - 1] < 0.5  # after the step of the last move
    assert all(s == shares[at - 1] for s in shares[at - 1 :])
    assert shares[at - 2] == 1.0
    assert "reached" in session.effects["aofp"].saves
    assert "of 16 filters left" in session.effects["aofp"].touched["0"]
    x, plain = small_images(seed=50), session.export()
    with torch.no_grad():
        assert torch.equal(plain(x), look(session, x))


def test_a_target_that_theta_does_not_allow_is_given_up_and_said_so() -> None:
    session = start(toy((4, 4, 4)), small_images(), h=2, theta=0.0, target=0.3, patience=2)
    with pytest.warns(
        UserWarning, match=r"2 searches in a row.*1.000 of the MACs remain where target=0.3.*Raise theta"
    ):
        run(session, 20)
    assert method(session).finished_ == "given up"
    assert min(s.restarts for s in method(session).searches_.values()) >= 2
    assert "given up" in session.effects["aofp"].saves
    scores = session.witness()["aofp"]["scores"]
    run(session, 25)
    assert session.witness()["aofp"]["scores"] == scores


def test_what_is_masked_at_the_end_of_the_run_goes() -> None:
    session = start(toy((16, 16, 16)), small_images(), total=6 * 9, h=4, theta=0.5, target=0.01, round_to=1)
    run(session, 9)
    witness = session.witness()["aofp"]
    assert method(session).finished_ == "the run ended first"
    assert witness["filters_removed"] > 0
    assert witness["filters_masked"] == 0
    assert witness["surgeries"] == 1


@pytest.mark.parametrize("bn_mode", ["base", "own"])
def test_a_resumed_run_ends_in_the_same_bits(bn_mode: str) -> None:
    def fresh() -> Session:
        return start(toy((8, 12, 16)), small_images(), total=6 * 26, h=5, theta=0.25, target=0.05, surgery_every=0.05,
                     every=2, bn_mode=bn_mode, round_to=2)  # fmt: skip

    session, saved = fresh(), {}
    for step in range(26):
        saved[step] = through_file_format(session.state_dict())
        run(session, step + 1)
    final = session.state_dict()
    assert session.witness()["aofp"]["surgeries"] >= 2
    assert any(state["structure"] for state in saved.values())
    for step in (1, 3, 4, 6, 7, 9, 11, 12, 13, 17, 18, 22, 25):
        again = fresh()
        again.load_state_dict(saved[step])
        run(again, 26)
        assert not differences(final, again.state_dict()), f"resumed at {step}"
        assert again.witness() == session.witness()


def patterns(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy images whose class shows in their pattern."""
    base, y = random(4, 3, 8, 8, seed=77), torch.arange(n) % 4
    return base[y] + 1.2 * random(n, 3, 8, 8, seed=1000 + seed), y


def accuracy(forward: Any) -> float:
    x, y = patterns(1000, -1)
    with torch.no_grad():
        return float((forward(x).argmax(1) == y).double().mean())


def test_a_trained_network_loses_little_where_random_masks_lose_much() -> None:
    model = toy((16, 24, 24))
    plain = Session(model, SGD(model.parameters(), lr=0.05, momentum=0.9), [], sample=patterns(32, 0))
    for step in range(80):
        plain.step(*patterns(32, step))
    with plain.inference() as forward:
        base = accuracy(forward)
    by_chance = start(copy.deepcopy(model), patterns(32, 0)[0], h=1000)
    session = start(model, patterns(32, 0)[0], h=20, theta=0.05, target=0.6, lr=0.01)
    for step in range(400):
        session.step(*patterns(32, 200 + step))
        if method(session).finished_:
            break
    assert method(session).finished_ == "reached"
    widths = method(session).log_[-1][1:]
    mask(by_chance, {name: list(range(len(s.alive) - w)) for (name, s), w in
                     zip(method(by_chance).searches_.items(), widths, strict=True)})  # fmt: skip
    with session.inference() as forward, by_chance.inference() as other:
        assert accuracy(forward) > base - 0.03
        assert accuracy(other) < accuracy(forward) - 0.02


def test_an_untrained_network_is_warned_of_and_a_trained_one_is_not() -> None:
    x, y = small_images(64), torch.arange(64) % 4

    def trial(right: float) -> None:
        session = start(toy(), x, h=1000)
        outputs = F.one_hot((y + (torch.arange(64) >= right * 64)) % 4, 4).float()
        method(session).trial_ = [0, 0]
        for _ in range(8):
            method(session)._try(outputs, y)

    with pytest.warns(UserWarning, match="128 of the first 512 images .* which is chance"):
        trial(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial(0.5)


def test_work_counts_what_scoring_costs_and_surgery_saves() -> None:
    session = start(toy((16, 16, 16)), small_images(), h=3, theta=100.0, target=0.5, share=0.5)
    run(session, 1)
    (reads,) = [macs(session.model, small_images(1)).layers["3"].output]
    assert (
        session.witness()["aofp"]["extra_macs"] == 3 * reads // 2
    )  # half of six images, half of the filters
    run(session, 6)
    before = session.witness()["aofp"]["extra_macs"]
    run(session, 7)
    saved = macs(toy((16, 16, 16)), small_images(1)).training - macs(session.model, small_images(1)).training
    assert session.witness()["aofp"]["extra_macs"] - before == -6 * saved


# -- beside others
def test_compiled_steps_are_those_of_the_plain_loop_and_masks_do_not_recompile() -> None:
    def made() -> Session:
        return start(toy((8, 12, 16)), small_images(), h=3, theta=0.3, target=0.05, patience=50)

    plain, compiled = made(), made()
    torch._dynamo.reset()
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    compiled.wrap(lambda forward: torch.compile(forward, backend=backend, fullgraph=True, dynamic=False))
    assert all(torch.equal(a, b) for a, b in zip(run(plain, 16), run(compiled, 16), strict=True))
    assert method(plain).log_ == method(compiled).log_
    assert len(method(plain).log_) >= 4
    assert len(calls) <= 2
    torch._dynamo.reset()


def test_it_runs_under_mixed_precision_with_averaged_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "aofp", Row("hasten.methods.structure.aofp:AOFP"))
    data = load("fashion-mnist-12k").stratified(256, 100)
    recipe = PLAIN.with_(epochs=3.0, batch_size=32, ema=0.9, augment=())
    ours = [
        AOFP(h=3, warmup=2, theta=0.5, target=0.75, surgery_every=0.05),
        MixedPrecision(dtype="bfloat16", force=True),
    ]
    result = fit("resnet8", data, ours, recipe=recipe, out=tmp_path / "run")
    assert result.witness["aofp"]["filters_removed"] >= 8
    assert result.model is not None
    run = load_run(tmp_path / "run")
    again, x = run.network, random(4, *run.shape)
    with torch.no_grad():
        assert torch.allclose(again(x), result.model(x), atol=1e-6)


@pytest.mark.parametrize("other", ["error_map_pruning", "approximate_tensor_ops", "s3pool"])
def test_other_methods_follow_its_surgery(other: str) -> None:
    """Some run the network while they are told of it."""
    ours = AOFP(theta=0.5, h=2, warmup=0, target=0.3, surgery_every=0.05)
    session = conformance.start([ours, hasten.method(other, **METHODS[other].settings)])
    conformance.advance(session)
    assert session.witness()["aofp"]["surgeries"] >= 2
    assert any(session.witness()[other].values())


RANK = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from tests.methods.test_aofp import AOFP, SGD, Session, method, run, small_images, toy
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
model = DistributedDataParallel(toy((8, 12, 16)))
sample = (small_images(), torch.arange(6) % 4)
session = Session(model, SGD(model.parameters(), lr=0.01), [AOFP(h=4, warmup=0, theta=0.3, target=0.3, round_to=1)],
                  sample=sample, seed=7)
mine = lambda seed: small_images(seed=2 * seed + rank)
run(session, 2, mine)
first = {n: torch.from_numpy(s.total.copy()) for n, s in method(session).searches_.items()}
run(session, 24, mine)
torch.save({"first": first, "log": method(session).log_, "model": session.model.state_dict()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_average_their_scores_and_stay_one_network(tmp_path: Path) -> None:
    one, two = two_ranks(RANK, tmp_path)
    assert len(one["log"]) >= 2
    assert one["log"] == two["log"]
    parameters = {n for n, _ in toy().named_parameters()}
    for name, value in one["model"].items():
        if name in parameters:
            assert torch.equal(value, two["model"][name]), name
    alone = [start(toy((8, 12, 16)), small_images(), lr=0.01, theta=0.3, target=0.3) for _ in range(2)]
    for rank, session in enumerate(alone):  # the first step is from the same weights
        run(session, 1, lambda seed, rank=rank: small_images(seed=2 * seed + rank))
    singles = [method(session).searches_["0"].total for session in alone]
    # the second step's scores come on top
    drawn = np.flatnonzero(singles[0])
    assert set(drawn.tolist()) <= set(np.flatnonzero(one["first"]["0"].numpy()).tolist())
    assert torch.equal(one["first"]["0"], two["first"]["0"])
    only_first = [f for f in drawn if f not in second_draw()]
    expected = (singles[0] + singles[1])[only_first] / 2
    assert only_first
    assert np.allclose(one["first"]["0"].numpy()[only_first], expected, rtol=1e-5)


def second_draw() -> list[int]:
    search = Search(8)
    search.start()
    return search.draw(7, "aofp", "0", 1).tolist()


# -- where it applies
class Odd(nn.Module):
    """Layers that cannot be searched, each for its own reason, and two that can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.added, self.twice = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1),
        )
        self.groups, self.deep, self.depthwise = (
            nn.Conv2d(8, 8, 1, groups=2),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
        )
        self.both, self.shared, self.before = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.parts, self.group_norm, self.unused = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.layered, self.layer_norm = nn.Conv2d(8, 8, 1), nn.LayerNorm(8)
        self.mix = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(8))
        self.single, self.scaled, self.last = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)
        self.gain, self.fc = nn.Parameter(torch.rand(8, 1, 1)), nn.Linear(6, 4)
        self.after = nn.Conv2d(1, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.added(x)) + x
        x = self.mix[0](self.twice(self.twice(x)))
        x = self.mix[1](F.relu(self.groups(x))) + x
        x = self.mix[2](self.depthwise(F.relu(self.deep(x)))) + x
        both = F.relu(self.both(x))
        x = self.mix[3](both) + self.mix[4](both) + x
        x = self.mix[7](F.relu(self.shared(F.relu(self.shared(F.relu(self.before(x))))))) + x
        x = self.mix[5](self.group_norm(self.parts(x))) + x
        x = self.mix[6](self.layer_norm(self.layered(x).movedim(1, -1)).movedim(-1, 1)) + x
        x = self.after(F.relu(self.single(x))) + x
        x = self.last(F.relu(self.scaled(x)) * self.gain)
        return self.fc(F.relu(x).mean((2, 3)))


def test_layers_that_cannot_be_searched_are_named_with_the_reason() -> None:
    session = start(Odd(), small_images(), target=0.99)
    effect = session.effects["aofp"]
    reasons = {
        "stem": "added to what", "added": "added to what", "twice": "runs more than once", "groups": "groups=2",
        "deep": "in groups=8", "both": r"2 layers read it \(mix.3, mix.4\); several='sum'", "unused": "no channels",
        "before": "shared reads it and runs more than once", "parts": "in 2 parts",
        "single": "1 filters",
    }  # fmt: skip
    for name, reason in reasons.items():
        assert re.search(reason, effect.skipped[name]), (name, effect.skipped[name])
    assert {"scaled", "last"} <= set(effect.touched)
    assert "layered" in effect.skipped


def test_the_layers_searched_are_those_of_the_paper() -> None:
    vgg, _ = find_pairs(Surgeon(models.build("vgg16", seed=0), (), torch.zeros(2, 3, 32, 32)), "skip", 8)
    assert len(vgg) == 13
    assert vgg[-1].readers == ("classifier.0",)
    resnet, skipped = find_pairs(
        Surgeon(models.build("resnet56", seed=0), (), torch.zeros(2, 3, 32, 32)), "skip", 8
    )
    assert [pair.producer.rpartition(".")[2] for pair in resnet] == ["conv1"] * 27
    assert [pair.readers[0].rpartition(".")[2] for pair in resnet] == ["conv2"] * 27
    assert all("added" in reason for reason in skipped.values())
    deep, _ = find_pairs(Surgeon(models.build("resnet50", seed=0), (), torch.zeros(2, 3, 32, 32)), "skip", 8)
    assert [pair.producer.rpartition(".")[2] for pair in deep] == ["conv1", "conv2"] * 16


def test_damages_of_several_readers_are_added_up() -> None:
    model, x = net("googlenet"), images(4)
    skipped = start(copy.deepcopy(model), x, target=0.9)
    assert "layers read it" in skipped.effects["aofp"].skipped["stem.0"]
    session = start(model, x, target=0.9, several="sum", h=1000, lr=0.0)
    ours = method(session)
    pair = next(p for p in ours._pairs if p.producer == "stem.0")
    assert len(pair.readers) == 4
    ours.searches_["stem.0"].start()
    for name in list(ours.searches_)[1:]:
        ours.searches_[name].started = False
    session.model.train()(x)
    drawn = ours.searches_["stem.0"].draw(0)
    singles = []
    for name in pair.readers:
        (t,) = ours._readers[name].scores(
            [drawn], "base", ours.searches_[name].alive if name in ours.searches_ else None
        )
        singles.append(float(t))
    found = ours._scores({"stem.0": drawn}, 4)
    assert float(found["stem.0"]) == pytest.approx(sum(singles), rel=1e-12)
    assert min(singles) > 0


# -- refusals
def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"target=0.2 is out of reach: with 8 of the filters left in each of 2 layers"
    ):
        start(toy((8, 16, 16)), small_images(), target=0.2, round_to=8)
    work = start(toy(), small_images())
    least = method(work)._share_left(np.ones(3, np.int64))
    with pytest.raises(SettingsError, match="out of reach"):
        start(toy(), small_images(), target=least)
    start(toy(), small_images(), target=least * 1.01)


def test_a_run_that_ends_before_the_first_half_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="the run has 10 steps, and the first half ends after 12"):
        start(toy(), small_images(), total=60, warmup=4, h=8)
    start(toy(), small_images(), total=60, warmup=2, h=8)
    start(toy(), small_images(), total=1, lr=0.0)


def test_a_network_without_a_pair_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    with pytest.raises(NoEffectError):
        start(model, small_images())
    session = Session(model, SGD(model.parameters(), lr=0.1), [AOFP()], sample=(small_images(), torch.arange(6) % 4),
                      allow_no_effect=True)  # fmt: skip
    run(session, 2)
    again = session.state_dict()
    session.load_state_dict(again)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        AOFP(target=1.0, theta=-1, h=0, warmup=-1, every=0, share=0.0, bn_mode="none", several="all", surgery_every=0,
             round_to=0, patience=1.5)  # type: ignore[arg-type] # fmt: skip
    for name in AOFP().settings():
        assert re.search(rf"\b{name} is", str(error.value)), name
    with pytest.raises(SettingsError, match="every is 9, so that a half of h=8"):
        AOFP(h=8, every=9)
