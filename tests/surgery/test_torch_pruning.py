"""What hangs together in six standard networks, held against Torch-Pruning, which finds it in another way.

Torch-Pruning walks autograd's graph of a real forward, hasten a torch.fx trace of a copy without data. It is an optional
extra: these tests are skipped without it.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tests.surgery.nets import NETS, Gated, net, removable
from tests.surgery.zoo import ZOO, zoo
from torch import Tensor, nn

from hasten.errors import OverPruneError, UnsupportedSurgeryError
from hasten.surgery import Channels, RemoveChannels, Surgeon, follow
from hasten.surgery.reshape import removal

tp = pytest.importorskip("torch_pruning")

Group = dict[tuple[str, str], list[int]]

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vgg16-bn": 138_365_992,
    "mobilenet-v2": 3_504_872,
    "densenet121": 7_978_856,
    "googlenet": 6_624_904,
}
"""As torchvision publishes them."""

SETS = {
    "resnet18": 4 * 3,
    "resnet50": 1 + (1 + 2 * 3) + (1 + 2 * 4) + (1 + 2 * 6) + (1 + 2 * 3),
    "vgg16-bn": 13 + 2,
    "mobilenet-v2": 1 + 7 + 16 + 1,
    "densenet121": 1 + 2 * (6 + 12 + 24 + 16) + 3,
    "googlenet": 3 + 9 * 6,
}
"""Sets of layers that must lose the same channels, counted by hand from the papers' tables, without the logits.

ResNets: the stem where it is not part of the first stage's sum, a sum for each stage, and each block's inner layers;
MobileNetV2: the stem, seven stages' sums, sixteen expansions and the last layer; the others tie no two layers.
"""


def images(n: int = 1, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def oracle(model: nn.Module, x: Tensor | None = None, **settings: Any) -> Any:
    """Return Torch-Pruning's graph of ``model``. What it does not know it warns of, which fails a test."""
    return tp.DependencyGraph().build_dependency(model, (images() if x is None else x,), **settings)


def group(graph: Any, model: nn.Module, layer: str, which: list[int]) -> Any:
    """Return what Torch-Pruning would cut along with these output channels of ``layer``."""
    module = model.get_submodule(layer)
    linear = isinstance(module, nn.Linear)
    return graph.get_pruning_group(
        module, tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels, which
    )


def theirs(graph: Any, model: nn.Module, layer: str, which: list[int]) -> Group:
    """Return the positions that Torch-Pruning would cut, by module and side as hasten calls it."""
    names = {id(owned): name for name, owned in (*model.named_modules(), *model.named_parameters())}
    found: dict[tuple[str, str], set[int]] = {}
    for dep, positions in group(graph, model, layer, which):
        module = dep.target.module
        if id(module) not in names:  # an operation between modules
            continue
        if isinstance(module, nn.Parameter):
            sides = [f"axis{dep.target.pruning_dim}"]
        elif isinstance(module, nn.BatchNorm2d | nn.PReLU):
            sides = ["norm"]
        elif isinstance(module, nn.Conv2d) and module.groups > 1:  # depthwise: one event for both sides
            sides = ["in", "out"]
        else:
            sides = ["out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"]
        for side in sides:
            found.setdefault((names[id(module)], side), set()).update(positions)
    return {key: sorted(positions) for key, positions in found.items()}


def ours(channels: Channels, model: nn.Module, layer: str, which: list[int]) -> Group:
    """Return the positions that hasten would cut, by module and side."""
    change = removal(channels, model, [RemoveChannels(layer, tuple(which))])
    return {
        key: np.setdiff1d(np.arange(len(channels.slots[key].labels)), kept).tolist()
        for key, kept in change.slots.items()
    }


def same(mine: Group, other: Group, layer: str) -> None:
    """Assert that two groups are equal; say where they are not."""
    assert mine.keys() == other.keys(), f"{layer}: {sorted(mine.keys() ^ other.keys())}"
    differ = [key for key in mine if mine[key] != other[key]]
    assert not differ, f"{layer}: {differ}"


@dataclass(eq=False)
class Case:
    """One network, traced by both."""

    name: str
    model: nn.Module
    channels: Channels
    graph: Any

    def inner(self) -> list[str]:
        """Return the layers but the last, which makes the logits."""
        return layers(self.model)[:-1]

    def width(self, layer: str) -> int:
        return len(self.model.get_submodule(layer).weight)


@pytest.fixture(scope="module", params=ZOO)
def case(request: pytest.FixtureRequest) -> Case:
    model = zoo(request.param)
    return Case(request.param, model, follow(model, images()), oracle(model))


def some(width: int, pick: random.Random, most: float = 1.0) -> list[int]:
    """Return random channels of a layer, from one to a part ``most`` of them, in random order; one stays at least."""
    return pick.sample(range(width), pick.randint(1, max(1, min(width - 1, int(width * most)))))


def test_the_networks_have_the_published_numbers_of_parameters(case: Case) -> None:
    assert sum(p.numel() for p in case.model.parameters()) == PARAMETERS[case.name]


def test_every_layer_takes_the_same_channels_along(case: Case) -> None:
    pick = random.Random(case.name)
    for layer in case.inner() * 3:
        which = some(case.width(layer), pick)
        mine = ours(case.channels, case.model, layer, which)
        assert mine[layer, "out"] == sorted(which)
        assert any(side == "in" and name != layer for name, side in mine), f"nobody reads {layer}"
        same(mine, theirs(case.graph, case.model, layer, which), layer)


def test_the_same_layers_form_sets(case: Case) -> None:
    made = {layer: set(case.channels.outputs(layer).tolist()) for layer in layers(case.model)}
    mine = {frozenset(b for b in made if made[a] & made[b]) for a in made}
    names = {module: name for name, module in case.model.named_modules()}
    found = {
        frozenset(
            names[dep.target.module]
            for dep, _ in whole
            if isinstance(dep.target.module, nn.Conv2d | nn.Linear)
            and case.graph.is_out_channel_pruning_fn(dep.handler)
        )
        for whole in case.graph.get_all_groups()
    }
    assert mine == found
    assert len(mine) == SETS[case.name] + 1


def test_the_logits_stay_and_nothing_else_does(case: Case) -> None:
    last = layers(case.model)[-1]
    why = {layer: case.channels.why_not(layer) for layer in layers(case.model)}
    assert {layer: reason for layer, reason in why.items() if reason} == {last: "it is the network's output"}
    with pytest.raises(UnsupportedSurgeryError, match=f"{last}.* cannot go: it is the network's output"):
        ours(case.channels, case.model, last, [3, 1])
    # Torch-Pruning leaves it to the caller to keep the logits, so there is no group to compare with
    assert theirs(case.graph, case.model, last, [3, 1]) == {(last, "out"): [1, 3]}


def test_both_say_when_a_layer_would_be_left_empty(case: Case) -> None:
    pick = random.Random(case.name)
    for layer in pick.sample(case.inner(), 6):
        everything = list(range(case.width(layer)))
        with pytest.raises(OverPruneError, match="would be left without"):
            ours(case.channels, case.model, layer, everything)
        assert not case.graph.check_pruning_group(group(case.graph, case.model, layer, everything))
        everything.remove(pick.choice(everything))
        assert len(ours(case.channels, case.model, layer, everything)[layer, "out"]) == len(everything)
        assert case.graph.check_pruning_group(group(case.graph, case.model, layer, everything))


def plan(case: Case, pick: random.Random) -> list[tuple[str, list[int]]]:
    """Return a random removal in every set of layers, asked of a random one of them."""
    order, seen = case.inner(), set[int]()
    pick.shuffle(order)
    chosen = []
    for layer in order:
        mine = set(case.channels.outputs(layer).tolist())
        if not mine & seen:
            seen |= mine
            chosen.append((layer, some(len(mine), pick, 0.5)))
    assert len(chosen) == SETS[case.name]
    return chosen


def sizes(module: nn.Module) -> dict[str, int]:
    """Return the numbers of channels that a module says it has."""
    names = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def test_both_leave_the_same_network(case: Case) -> None:
    pick = random.Random(case.name)
    cuts = plan(case, pick)
    other = copy.deepcopy(case.model)
    graph = oracle(other)
    for layer, which in cuts:
        group(graph, other, layer, which).prune()
    model = copy.deepcopy(case.model)
    surgeon = Surgeon(model, (), images())
    surgeon.apply([RemoveChannels(layer, tuple(which)) for layer, which in cuts])
    mine, found = model.state_dict(), other.state_dict()
    assert {key: value.shape for key, value in mine.items()} == {k: v.shape for k, v in found.items()}
    assert all(torch.equal(value, found[key]) for key, value in mine.items())
    assert all(sizes(model.get_submodule(n)) == sizes(m) for n, m in other.named_modules())
    assert sum(p.numel() for p in model.parameters()) < 0.8 * PARAMETERS[case.name]
    with torch.no_grad():
        x = images(2)
        full, got, expected = case.model(x), model(x), other(x)
    assert got.shape == (2, 1000)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-6 * scale
    assert (got - full).abs().max() > 1e-3 * scale
    # and what is left hangs together alike, in the trace that the surgeon kept
    graph = oracle(other)
    for layer in pick.sample(case.inner(), 8):
        which = some(len(model.get_submodule(layer).weight), pick)
        same(ours(surgeon.channels, model, layer, which), theirs(graph, other, layer, which), layer)


@pytest.mark.parametrize(
    "name", [n for n in NETS if n != "resnet8"]
)  # it takes zero-padded channels for added ones
def test_the_small_networks_hang_together_alike(name: str) -> None:
    model, x, pick = net(name).eval(), images(size=32).double(), random.Random(name)
    loose = [(model.scale, 1)] if isinstance(model, Gated) else []
    channels, graph = follow(model, x), oracle(model, x, unwrapped_parameters=loose)
    assert removable(model, channels) == [layer for layer, role in channels.slots if role == "out"][:-1]
    for layer in removable(model, channels) * 2:
        which = some(len(model.get_submodule(layer).weight), pick)
        same(ours(channels, model, layer, which), theirs(graph, model, layer, which), layer)
