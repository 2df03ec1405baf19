"""Net2Net keeps the function when it grows, lets copies part by noise, and resumes bit for bit around every growth."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.nets import images, net
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from hasten import conformance, keyed, models
from hasten.errors import (
    NoEffectError,
    SettingsError,
    UnknownName,
    UnsupportedError,
    UnsupportedSurgeryError,
)
from hasten.measure.macs import macs
from hasten.methods.structure.deepening import NonIdempotentActivationError, deepen, insertions, moments
from hasten.methods.structure.growing import (
    copies,
    lower_rates,
    narrow,
    perturb,
    rates_at_most,
    rounded,
    stages,
    target_widths,
    widen,
    width_groups,
)
from hasten.methods.structure.net2net import Net2Net
from hasten.optim.average import float_tensors
from hasten.optim.ema import EMA
from hasten.session import Session
from hasten.surgery import Insert, Surgeon, Widen, check_training_state


def surgeon(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...] = ()) -> Surgeon:
    return Surgeon(model, optimizers, images(2, next(model.parameters()).dtype))


def outputs(model: nn.Module, x: Tensor) -> dict[bool, Tensor]:
    """Return what the model gives in eval and in train mode, without changing it."""
    return {mode: copy.deepcopy(model).train(mode)(x).detach() for mode in (False, True)}


def difference(a: dict[bool, Tensor], b: dict[bool, Tensor], mode: bool = False) -> float:
    return float((a[mode] - b[mode]).abs().max() / a[mode].abs().max())


def chain(activation: type[nn.Module] = nn.ReLU, norm: bool = True) -> nn.Sequential:
    """Return a chain of double precision with batch norm whose statistics are not those of initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, 8), (8, 12), (12, 8)):
            layers.append(nn.Conv2d(c_in, c_out, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(c_out)] if norm else []
            layers += [activation(), nn.MaxPool2d(2)]
        model = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(128, 20), activation(), nn.Linear(20, 10)
        ).double()
        norms = [part for part in model if isinstance(part, nn.BatchNorm2d)]
        for part in norms:
            part.momentum = None  # the plain average of what follows
        for _ in range(8):
            model.train()(torch.randn(64, 3, 32, 32, dtype=torch.float64))
        for part in norms:
            part.momentum = 0.1
    return model


def labels(n: int = 4) -> Tensor:
    return torch.arange(n) % 10


# -- wider: the function
@pytest.mark.parametrize("name", ["flat", "wrn-16-4", "mobilenet-v2", "densenet-bc", "googlenet"])
def test_a_wider_network_gives_the_same_outputs_in_both_modes(name: str) -> None:
    model, x = net(name), images()
    before, size = outputs(model, x), sum(p.numel() for p in model.parameters())
    hand = surgeon(model)
    widths = target_widths(hand, 1.5, round_to=1)
    assert widths
    widen(hand, widths, noise=0.0, seed=5)
    assert sum(p.numel() for p in model.parameters()) > 1.5 * size
    for mode in (False, True):
        assert difference(before, outputs(model, x), mode) < 1e-10


def test_a_widened_map_that_is_flattened_keeps_its_order() -> None:
    model, x = net("flat"), images()
    before = outputs(model, x)
    widen(surgeon(model), {"conv2": 23}, noise=0.0, seed=1)
    assert model.fc1.in_features == 23 * 64
    assert difference(before, outputs(model, x)) < 1e-12
    # each channel's block is a divided copy, and not some other arrangement of the same numbers
    g = surgeon(net("flat"))
    change = widen(g, {"conv2": 23}, noise=0.0, seed=1)
    assert change is not None
    mapping = change.edits[0].mapping
    counts = Counter(mapping)
    old = net("flat").fc1.weight.view(20, 10, 64)
    for j, source in enumerate(mapping):
        assert torch.equal(model.fc1.weight.view(20, 23, 64)[:, j], old[:, source] / counts[source])


@pytest.mark.parametrize("where", ["outgoing", "incoming"])
def test_noise_changes_the_outputs_in_proportion(where: Any) -> None:
    changes = {}
    for noise in (1e-6, 1e-5):
        model, x = net("flat"), images()
        before = outputs(model, x)
        hand = surgeon(model)
        widen(hand, {"conv1": 20, "conv2": 16, "fc1": 30}, noise=noise, noise_on=where, seed=2)
        changes[noise] = difference(before, outputs(model, x))
    assert changes[1e-6] > 1e-9
    assert 9.5 < changes[1e-5] / changes[1e-6] < 10.5


@pytest.mark.parametrize("where", ["outgoing", "incoming"])
def test_noise_falls_on_copies_alone_with_its_share_of_their_spread(where: Any) -> None:
    quiet, loud = net("flat"), net("flat")
    for model, noise in ((quiet, 0.0), (loud, 0.05)):
        widen(surgeon(model), {"conv1": 24, "fc1": 60}, noise=noise, noise_on=where, mapping="balanced")
    for name, old, axis in (("conv2", 12, 1), ("fc2", 20, 1), ("conv1", 12, 0), ("fc1", 20, 0)):
        before, after = quiet.get_submodule(name).weight, loud.get_submodule(name).weight
        noise = (after - before).detach().movedim(axis, 0)
        if (axis == 1) != (where == "outgoing"):
            assert not noise.any(), name
            continue
        assert not noise[:old].any()
        spread = noise[old:].std() / before.detach().movedim(axis, 0)[old:].std()
        assert 0.04 < spread < 0.06
        assert (noise[old:] != 0).all()


def test_noise_is_drawn_even_where_the_weights_that_read_are_zero() -> None:
    model = net("flat")
    with torch.no_grad():
        model.fc2.weight.zero_()
    hand = surgeon(model)
    change = widen(hand, {"fc1": 30}, noise=0.0)
    assert change is not None
    assert perturb(model, change, 0.05, "outgoing", 0) == 10 * 10
    assert (model.fc2.weight[:, 20:] != 0).all()
    assert not model.fc2.weight[:, :20].any()


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_copies_part_by_noise_and_only_by_noise(noise: float) -> None:
    model, x, y = net("flat"), images(), labels()
    change = widen(surgeon(model), {"conv1": 20, "fc1": 30}, noise=noise, seed=4)
    assert change is not None
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    for edit in change.edits:
        weight = model.get_submodule(edit.layer).weight.detach()
        apart = max(float((weight[j] - weight[g]).abs().max()) for j, g in enumerate(edit.mapping))
        assert (apart < 1e-12) if noise == 0 else (apart > 1e-4)


def test_gradients_of_copies_follow_the_chain_rule() -> None:
    model, wide, x, y = net("flat"), net("flat"), images(), labels()
    change = widen(surgeon(wide), {"conv1": 31}, noise=0.0, seed=6)
    assert change is not None
    g = torch.tensor(change.edits[0].mapping)
    c = torch.bincount(g)[g].double()
    for each in (model, wide):
        F.cross_entropy(each.train()(x), y).backward()
    makers = [(m.conv1.weight.grad, m.bn1.weight.grad, m.bn1.bias.grad) for m in (model, wide)]
    for small, large in zip(*makers, strict=True):
        shape = (-1, *[1] * (small.dim() - 1))
        torch.testing.assert_close(large, small[g] / c.view(shape), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(wide.conv2.weight.grad, model.conv2.weight.grad[:, g], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_optimizer_state_is_that_of_copies(kind: type[torch.optim.Optimizer]) -> None:
    model, x, y = net("flat"), images(), labels()
    more = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **more)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    old = {
        name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()
    }
    change = widen(surgeon(model, (optimizer,)), {"conv1": 31}, noise=0.05, seed=6)
    assert change is not None
    check_training_state(model, optimizer)
    g = torch.tensor(change.edits[0].mapping)
    c = torch.bincount(g)[g].double()
    powers = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            was = old[name][key]
            if name in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias") and key in powers:
                was = was[g] / c.view(-1, *[1] * (was.dim() - 1)) ** powers[key]
            elif name == "conv2.weight" and key in powers:
                was = was[:, g]
            assert torch.equal(value, was), (name, key)


def test_macs_follow_the_widths() -> None:
    model = net("flat")
    before = {name: layer.output for name, layer in macs(model, images(1)).layers.items()}
    widen(surgeon(model), {"conv1": 24, "conv2": 15})
    after = {name: layer.output for name, layer in macs(model, images(1)).layers.items()}
    factors = {"conv1": 2.0, "conv2": 2.0 * 1.5, "fc1": 1.5, "fc2": 1.0}
    assert {name: after[name] / before[name] for name in before} == factors


# -- the mapping
def test_mappings_are_keyed_and_spread_as_they_say() -> None:
    assert copies(5, 9, "random", 1) == copies(5, 9, "random", 1)
    assert copies(50, 90, "random", 1) != copies(50, 90, "random", 2)
    for n, width in ((5, 6), (5, 10), (7, 30), (8, 12), (1, 4)):
        for how in ("random", "balanced"):
            g = copies(n, width, how, "k")
            assert g[:n] == tuple(range(n))
            assert len(g) == width
            assert set(g) == set(range(n))
        counts = Counter(copies(n, width, "balanced"))
        assert max(counts.values()) - min(counts.values()) == (width % n > 0)
    drawn = Counter(copies(4, 4 + 4000, "random", "uniform")[4:])
    assert all(abs(count - 1000) < 5 * 27.4 for count in drawn.values())  # five standard deviations
    with pytest.raises(ValueError, match="more than the 8"):
        copies(8, 8, "random")


def test_the_log_holds_the_mapping_and_rebuilds_the_network() -> None:
    model = net("wrn-16-4")
    hand = surgeon(model)
    widen(hand, target_widths(hand, {"layer1.*": 1.5}), seed=9)
    deepen(hand, ["layer2.1"], seed=9)
    records = hand.records()
    assert [r["edit"] for r in records[0]] == ["widen"] * len(records[0])
    assert all(max(r["mapping"][64:]) < 64 and len(r["mapping"]) == 96 for r in records[0])
    again = surgeon(net("wrn-16-4"))
    again.replay(records)
    again.model.load_state_dict(model.state_dict())
    x = images()
    assert torch.equal(again.model.eval()(x), model.eval()(x))


# -- which layers, how wide
def test_layers_that_are_added_share_one_width() -> None:
    hand = surgeon(net("wrn-16-4"))
    groups, left_out = width_groups(hand)
    of = {name: group for group in groups for name in group.layers}
    assert of["layer1.0.conv2"] is of["layer1.1.conv2"] is of["layer1.0.downsample"]
    assert of["layer1.0.conv1"] is not of["layer1.1.conv1"]
    assert left_out == {"fc": "it is the network's output"}
    with pytest.raises(UnsupportedSurgeryError, match="one width"):
        target_widths(hand, {"layer1.0.conv2": 80, "layer1.1.conv2": 96})
    with pytest.raises(UnsupportedSurgeryError, match="cannot have"):
        widen(hand, {"layer1.0.conv2": 80, "layer1.1.conv2": 96})
    different = [Widen("layer1.0.conv2", (*range(64), 0)), Widen("layer1.1.conv2", (*range(64), 1))]
    with pytest.raises(ValueError, match="more than that"):
        hand.apply(different)
    assert hand.log == []
    widen(hand, {"layer1.0.conv2": 80, "layer1.1.conv2": 80})
    assert hand.model.layer1[1].conv2.out_channels == 80


def test_depthwise_layers_follow_the_one_before_them() -> None:
    groups, _ = width_groups(surgeon(net("mobilenet-v1", torch.float32)))
    of = {name: group for group in groups for name in group.layers}
    assert of["blocks.0.0.conv_dw"] is of["conv_stem"]
    assert of["conv_stem"].layer == "conv_stem"


def test_patterns_factors_and_widths() -> None:
    hand = surgeon(net("flat"))
    assert target_widths(hand, 2.0) == {"conv1": 24, "conv2": 24, "fc1": 40}
    assert target_widths(hand, 2.0, round_to=1) == {"conv1": 24, "conv2": 20, "fc1": 40}
    assert target_widths(hand, {"conv*": 1.1, "conv2": 13}) == {"conv1": 16, "conv2": 13}
    assert target_widths(hand, 1.0) == {"conv1": 12, "conv2": 10, "fc1": 20}
    with pytest.raises(SettingsError, match="conv1"):
        target_widths(hand, {"conv11": 2.0})
    with pytest.raises(SettingsError, match="decimal point"):
        target_widths(hand, {"conv1": 2})
    with pytest.raises(UnsupportedSurgeryError, match="output"):
        target_widths(hand, {"fc2": 2.0})
    assert rounded(9, 8) == 16
    assert rounded(16.0, 8) == 16
    assert stages(16, 64, 2, 8) == [16, 32, 64]
    assert stages(24, 64, 3, 8) == [24, 40, 48, 64]
    assert stages(64, 64, 2, 8) == [64, 64, 64]


def test_what_cannot_widen_says_why() -> None:
    class Normed(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(12, 8), norm, nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.norm(self.a(x))))

    x = torch.randn(2, 12, dtype=torch.float64)
    model = Normed(nn.LayerNorm(8)).double()
    hand = Surgeon(model, (), x)
    assert width_groups(hand)[0][0].even
    with pytest.raises(UnsupportedSurgeryError, match="equal numbers"):
        widen(hand, {"a": 12}, mapping="balanced")
    before = outputs(model, x)
    widen(hand, {"a": 16}, mapping="balanced", noise=0.0)
    assert difference(before, outputs(model, x)) < 1e-6  # eps weighs the same, as the variance is the same

    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    groups, left_out = width_groups(Surgeon(grouped, (), images(2)))
    assert groups == []
    assert "parts" in left_out["0"]

    frozen = net("flat")
    frozen.conv1.weight.requires_grad_(False)
    assert width_groups(surgeon(frozen))[1]["conv1"] == "the weights of conv1 are frozen"
    assert "zeros" in width_groups(surgeon(net("resnet8")))[1]["conv1"]
    with pytest.raises(ValueError, match="more than the 12"):
        widen(surgeon(net("flat")), {"conv1": 12})


def test_narrowing_keeps_the_size_of_outputs() -> None:
    """A fresh network cut to a quarter of its channels gives outputs as large as one drawn at that width."""
    model = nn.Sequential(
        nn.Conv2d(3, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 64, 3, padding=1), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in")
                nn.init.zeros_(module.bias)
    x = images(4, torch.float32)
    before = model[:5](x).detach().std()
    narrow(surgeon(model), {"0": 64, "2": 64})
    assert model[2].weight.shape[:2] == (64, 64)
    assert 0.8 < model[:5](x).detach().std() / before < 1.25


# -- deeper
@pytest.mark.parametrize("place", ["2", "3", "14"])
def test_an_inserted_layer_keeps_eval_outputs_if_calibrated(place: str) -> None:
    model, x = chain(), images(64)
    before = outputs(model, x)
    deepen(surgeon(model), [place], images(64, seed=1))
    assert difference(before, outputs(model, x)) < 1e-6
    made = model.get_submodule(f"{place}_1")
    if place == "14":  # features get no batch norm, so nothing needs statistics
        assert [type(part) for part in made] == [nn.Linear, nn.ReLU]
        return
    with torch.no_grad():
        made.bn.weight.fill_(1)
        made.bn.bias.zero_()
    assert difference(before, outputs(model, x)) > 1e-3, "a batch norm that is not calibrated is not seen"


def test_in_training_a_calibrated_layer_changes_little_and_a_fresh_batch_norm_much() -> None:
    model, x = chain(), images(256)
    before = outputs(model, x)
    hand = surgeon(model)
    deepen(hand, ["2"], x)
    calibrated = difference(before, outputs(model, x), True)
    fresh = surgeon(chain())
    fresh.apply([Insert("2", "identity_conv", {"channels": 8})])
    assert calibrated < 0.1 * difference(before, outputs(fresh.model, x), True)


def test_statistics_are_those_of_all_images_however_they_are_cut() -> None:
    model, x = chain(), images(40)
    kept = copy.deepcopy(model.train().state_dict())
    whole = model[:3].eval()(x)
    model.train()
    found = moments(model, {"2"}, x, chunk=7)["2"]
    torch.testing.assert_close(torch.tensor(found[0]).double(), whole.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
    wanted = whole.var((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(found[1]).double(), wanted, rtol=1e-6, atol=1e-8)
    assert model.training
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
    with pytest.raises(UnsupportedSurgeryError, match="1 images"):
        moments(model, {"2"}, x[:1])


@pytest.mark.parametrize(
    ("name", "place", "last"),
    [("resnet18", "layer1.1", "bn2"), ("resnet8", "layer2.0", "bn2"), ("resnet50", "layer3.1", "bn3"),
     ("wrn-16-4", "layer2.1", "conv2")],
)  # fmt: skip
def test_an_inserted_block_is_exact_in_both_modes_and_learns(name: str, place: str, last: str) -> None:
    model = models.build(name, seed=0).double() if name == "resnet50" else net(name)
    x = images(2)
    before = outputs(model, x)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    hand = surgeon(model, (optimizer,))
    state = torch.get_rng_state()
    deepen(hand, [place], seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    check_training_state(model, optimizer)
    for mode in (False, True):
        assert difference(before, outputs(model, x), mode) < 1e-12
    made = model.get_submodule(f"{place}_1")
    assert type(made) is type(model.get_submodule(place))
    F.cross_entropy(model.train()(x), labels(2)).backward()
    end = made.get_submodule(last)
    assert end.weight.grad.abs().max() > 0
    assert all(p not in optimizer.state for p in made.parameters())
    optimizer.step()
    assert end.weight.abs().max() > 0


@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.ELU, nn.PReLU])
def test_activations_that_change_what_they_gave_are_refused_unless_left_out(
    activation: type[nn.Module],
) -> None:
    model, x = chain(activation), images(16)
    before, hand = outputs(model, x), surgeon(model)
    with pytest.raises(NonIdempotentActivationError, match=f"{activation.__name__} at '2'.*form='linear'"):
        deepen(hand, ["2"], x)
    assert hand.log == []
    deepen(hand, ["2", "11"], x, form="linear")
    assert difference(before, outputs(model, x)) < 1e-6


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardtanh])
@pytest.mark.parametrize("norm", [True, False])
def test_activations_that_keep_what_they_gave_are_repeated(activation: type[nn.Module], norm: bool) -> None:
    model, x = chain(activation, norm), images(16)
    before = outputs(model, x)
    place = "2" if norm else "1"
    deepen(surgeon(model), [place], x if norm else None, kernel=5)
    made = model.get_submodule(f"{place}_1")
    assert isinstance(made[-1], nn.ReLU if activation is nn.ReLU else nn.Hardtanh)
    assert made[0].kernel_size == (5, 5)
    assert difference(before, outputs(model, x)) < 1e-6


def test_wider_and_then_deeper_keeps_the_function() -> None:
    model, x = chain(), images(64)
    before = outputs(model, x)
    hand = surgeon(model)
    widen(hand, target_widths(hand, 1.5, round_to=1), noise=0.0)
    deepen(hand, ["2", "6", "11"], x)
    widen(hand, target_widths(hand, 2.0, round_to=1), noise=0.0, seed=1)
    assert difference(before, outputs(model, x)) < 1e-6


def test_places_and_forms_that_cannot_be_are_refused_before_anything_changes() -> None:
    hand = surgeon(chain())
    with pytest.raises(UnsupportedSurgeryError, match="Did you mean '11'"):
        deepen(hand, ["111"])
    with pytest.raises(UnsupportedSurgeryError, match="give images"):
        deepen(hand, ["2"])
    with pytest.raises(SettingsError, match="odd"):
        deepen(hand, ["2"], images(8), kernel=4)
    with pytest.raises(SettingsError, match="stride"):
        hand.apply([Insert("2", "identity_layer", {"channels": 8, "stride": 2})])
    with pytest.raises(SettingsError, match="odd"):
        hand.apply([Insert("2", "identity_layer", {"channels": 8, "kernel": 2})])
    with pytest.raises(UnsupportedSurgeryError, match="form='linear'"):
        deepen(hand, ["1"], images(8))  # behind the batch norm, before its ReLU
    with pytest.raises(UnsupportedSurgeryError, match="residual block"):
        deepen(hand, ["2"], form="block")
    with pytest.raises(SettingsError, match="form"):
        insertions(hand, ["2"], form="deep")  # type: ignore[arg-type]
    assert hand.log == []
    with pytest.raises(UnsupportedSurgeryError, match="not an element"):
        deepen(surgeon(net("resnet18")), ["layer1.0.conv1"])
    with pytest.raises(UnsupportedSurgeryError, match="form='linear'"):
        deepen(surgeon(net("wrn-16-4")), ["layer1.0"], images(8), form="layer")


# -- in a run
def pictures(n: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, 16, 16) whose class of 4 shows in a pattern under noise."""
    patterns = torch.randn(4, 3, 16, 16, generator=keyed.generator("patterns"))
    targets = torch.arange(n) % 4
    return patterns[targets] + noise * torch.randn(
        n, 3, 16, 16, generator=keyed.generator("noise", seed)
    ), targets


def run(method: Net2Net, model: nn.Module | None = None, **more: Any) -> Session:
    return conformance.start([method], model, **more)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_a_run_begins_narrow_and_ends_with_the_network_it_was_given() -> None:
    session = run(Net2Net(narrow=0.5, at=(0.25, 0.6)))
    given = shapes(session.model)
    effect = session.effects["net2net"]
    assert effect.touched["4"] == "32 channels, 48 from 25% of the run, 64 from 60% of the run"
    assert effect.skipped == {"13": "it is the network's output"}
    widths = []
    for step in range(12):
        conformance.advance(session, step + 1)
        widths.append(session.model[4].out_channels)
    assert widths == [32, 32, 48, 48, 48, 48, 48, 64, 64, 64, 64, 64]
    assert shapes(session.model) == given
    assert session.witness()["net2net"] == {
        "channels_left_out": 16 + 32 + 32, "growths": 2, "channels_added": 80, "layers_inserted": 0, "slowed_updates": 9,
    }  # fmt: skip
    with torch.no_grad():
        conformance.network()(torch.zeros(1, 3, 16, 16))
    plain = conformance.network()
    plain.load_state_dict(session.export().state_dict())  # an outsider's network takes the weights


def test_the_expected_work_is_that_of_the_widths() -> None:
    session = run(Net2Net(narrow=0.5, at=(0.25,)))
    given = macs(session.model, torch.zeros(1, 3, 16, 16)).training
    session.start_epoch(0)
    small = macs(session.model, torch.zeros(1, 3, 16, 16)).training
    assert session.effects["net2net"].work == pytest.approx(0.25 * small / given + 0.75, rel=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_growth_in_a_run_keeps_the_function_up_to_the_noise(noise: float) -> None:
    session = run(Net2Net(narrow=0.5, at=(0.5,), noise=noise))
    conformance.advance(session, 5)
    before = {}
    widened = session.surgery.apply

    def seen(edits: Any, **more: Any) -> Any:
        before.update(outputs(session.model, x))
        return widened(edits, **more)

    x, _ = pictures(16, 5)
    session.surgery.apply = seen  # type: ignore[method-assign]
    conformance.advance(session, 6)
    after = outputs(session.model, x)
    assert session.model[4].out_channels == 64
    for mode in (False, True):
        change = difference(before, after, mode)
        assert change < 1e-4 if noise == 0 else 1e-3 < change < 0.3


def test_the_same_seed_grows_alike_and_another_does_not() -> None:
    logs = []
    for seed in (1, 1, 2):
        session = run(Net2Net(narrow=0.5, at=(0.1,)), seed=seed)
        conformance.advance(session, 2)
        logs.append(session.surgery.records()[1:])
    assert logs[0] == logs[1] != logs[2]


def test_a_loop_that_starts_no_epochs_begins_narrow_all_the_same() -> None:
    session = run(Net2Net(narrow=0.5))
    x, y, index, _ = conformance.batches(1)[0]
    session.step(x, y, index)
    assert session.model[0].out_channels == 16


def test_no_growth_comes_when_no_step_would_follow() -> None:
    session = run(Net2Net(narrow=0.5, at=(1.0,)))
    conformance.advance(session)
    assert session.progress == 1.0
    assert session.model[0].out_channels == 16


DEEP = Net2Net(narrow=0.5, at=(0.2, 0.45), deepen=("6", "2"), calibration=80, noise=0.05)


def test_inserted_layers_wait_for_their_images_and_are_calibrated() -> None:
    session = run(DEEP)
    conformance.advance(session, 7)  # 5.4 steps are 45%; 80 images are 3 batches, the 6th to the 8th
    method = session.methods[0]
    assert method.grown_ == 1
    assert len(method.images_) == 64
    conformance.advance(session, 8)
    assert method.grown_ == 2
    assert method.images_ is None
    norm = session.model.get_submodule("6_1.bn")
    assert norm.running_var.min() > 0
    assert not torch.equal(norm.running_mean, torch.zeros(64))
    assert session.witness()["net2net"]["layers_inserted"] == 2
    check_training_state(session.model, session.optimizers)
    before = {name: p.clone() for name, p in session.model.named_parameters()}
    conformance.advance(session, 12)
    still = [n for n, p in session.model.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    kinds = {type(module).__module__.split(".")[0] for module in session.export().modules()}
    assert kinds == {"torch"}


def test_a_run_resumes_bit_for_bit_from_every_step() -> None:
    """Around two growths, while images are kept for statistics, with momentum, noise and held rates."""
    whole, saved = run(DEEP), []
    for step in range(12):
        saved.append(conformance.through_file_format(whole.state_dict()))
        conformance.advance(whole, step + 1)
    final = whole.state_dict()
    assert any(state["methods"]["net2net"]["images_"] is not None for state in saved)
    for step, state in enumerate(saved):
        again = run(DEEP)
        again.load_state_dict(state)
        conformance.advance(again)
        assert conformance.differences(final, again.state_dict()) == [], step
        assert again.witness() == whole.witness()


def test_limit_settings_are_plain_training() -> None:
    limit = Net2Net(narrow=1.0, widen=2.0, at=(1.0,))
    plain, limited = conformance.start([]), run(limit)
    assert conformance.advance(plain) == conformance.advance(limited)
    assert conformance.differences(plain.model.state_dict(), limited.model.state_dict()) == []


def test_averages_of_the_weights_give_the_same_before_and_after_a_growth() -> None:
    """The average is widened by g without the noise, and an inserted layer enters it calibrated."""
    session = run(DEEP)
    ema = EMA(session.model, 0.9)

    def follow(change: Any) -> None:
        ema.average = change.follow(ema.average, float_tensors(session.model))

    session.surgery.followers.append(follow)
    session.on_restart.append(lambda: ema.restart(session.model))
    x, _ = pictures(16, 3)
    given = []
    for step in range(9):
        conformance.advance(session, step + 1)
        if step < 7:
            ema.update(session.model)
        with ema.applied(session.model):
            given.append(outputs(session.model, x)[False])
    # the last growth is after step 8, and the average took nothing in since step 7
    assert session.methods[0].grown_ == 2
    torch.testing.assert_close(given[7], given[6], rtol=1e-4, atol=1e-5)


def test_a_student_keeps_the_teachers_accuracy() -> None:
    test_x, test_y = pictures(1000, 99, 2.0)
    train_x, train_y = pictures(512, 7, 2.0)
    model = conformance.network()
    session = Session(model, SGD(model.parameters(), lr=0.05, momentum=0.9), [Net2Net(narrow=0.5, at=(0.81,))],
                      sample=(train_x[:4], train_y[:4]), total_samples=5 * 512)  # fmt: skip

    def accuracy() -> float:
        with session.inference() as forward:
            return 100 * float((forward(test_x).argmax(1) == test_y).float().mean())

    reached = []
    for epoch in range(5):
        session.start_epoch(epoch)
        for rows in torch.from_numpy(keyed.permutation(512, "epoch", epoch)).split(64):
            session.step(train_x[rows], train_y[rows])
        session.end_epoch()
        reached.append((session.model[4].out_channels, accuracy()))
    (before, teacher), (after, student) = reached[-2:]
    assert (before, after) == (32, 64)
    assert 50 < teacher < 99.5, "the task must leave room to lose"
    assert student >= teacher - 1


# -- learning rates
class Told(SGD):
    """Notes the rate of every step."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.seen: list[list[float]] = []

    def step(self, closure: Any = None) -> Any:
        self.seen.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def test_after_a_growth_rates_stay_below_a_share_of_the_largest_one() -> None:
    model = conformance.network()
    heavy = [p for p in model.parameters() if p.dim() > 1]
    light = [p for p in model.parameters() if p.dim() == 1]
    optimizer = Told([{"params": heavy}, {"params": light, "lr": 0.002}], lr=0.02, momentum=0.9)
    x, y, _, _ = conformance.batches(1)[0]
    session = Session(model, optimizer, [Net2Net(narrow=0.5, at=(0.5,), lr_scale=0.1)], sample=(x, y),
                      total_samples=12 * 32)  # fmt: skip
    schedule = [0.01, 0.02, 0.04, 0.04, 0.03, 0.02, 0.02, 0.01, 0.005, 0.003, 0.002, 0.001]
    for x, y, index, _ in conformance.batches():
        now = schedule[session.counters["step"]]
        for group, rate in zip(optimizer.param_groups, (now, now / 10), strict=True):
            group["lr"] = rate
        session.step(x, y, index)
        assert [group["lr"] for group in optimizer.param_groups] == [now, now / 10], (
            "the rates were not given back"
        )
    limits = [float("inf")] * 6 + [0.1 * 0.04] * 6
    wanted = [min(now, limit) for now, limit in zip(schedule, limits, strict=True)]
    assert [row[0] for row in optimizer.seen] == pytest.approx(wanted)
    assert [row[1] for row in optimizer.seen] == pytest.approx([w / 10 for w in wanted])
    assert session.witness()["net2net"]["slowed_updates"] == 3


def test_rates_are_given_back_when_a_step_fails_and_lowered_for_good_between_runs() -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.5)

    def fails() -> None:
        with rates_at_most((optimizer,), [[0.1]]) as held:
            assert held == 1
            assert optimizer.param_groups[0]["lr"] == 0.1
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert optimizer.param_groups[0]["lr"] == 0.5
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    lower_rates((optimizer,), 0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.05)
    del scheduler


def test_only_held_rates_claim_the_place_of_the_update() -> None:
    assert Net2Net().writes == {"structure", "update"}
    assert Net2Net(lr_scale=1.0).writes == {"structure"}


# -- refusals of the method
def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        Net2Net(at=(0.5, 0.4), narrow=0.0, widen=0.5, deepen="2", form="x", kernel=4, mapping="y", noise=-1.0,
                noise_on="z", lr_scale=2.0, calibration=1, round_to=0)  # type: ignore[arg-type]  # fmt: skip
    for name in Net2Net().settings():
        assert f"{name} must" in str(error.value), name
    for wrong in ((), (1.5,), (-0.1,), (0.5, 0.5), 0.5, (float("nan"),), (True,)):
        with pytest.raises(SettingsError, match="at must"):
            Net2Net(at=wrong)  # type: ignore[arg-type]
    for wrong in ({}, {"a": 0.5}, {"a": True}, "a", float("inf")):
        with pytest.raises(SettingsError, match="widen must"):
            Net2Net(widen=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"widen": {"7": 1.5}}, SettingsError, "layer to widen"),
        ({"widen": {"13": 2.0}}, UnsupportedSurgeryError, "output"),
        ({"widen": {"4": 40}}, SettingsError, "64 channels"),
        ({"deepen": ("fc",)}, UnsupportedSurgeryError, "fc"),
        ({"deepen": ("0",)}, UnsupportedSurgeryError, "form='linear'"),
        ({"deepen": ("2",), "form": "block"}, UnsupportedSurgeryError, "residual block"),
        ({"narrow": 1.0}, NoEffectError, "stay"),
    ],
)
def test_what_cannot_grow_is_refused_before_anything_changes(settings: Any, kind: Any, text: str) -> None:
    model = conformance.network()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    with pytest.raises(kind, match=text):
        run(Net2Net(**settings), model)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_run_of_unknown_length_is_refused() -> None:
    model = conformance.network()
    x, y, _, _ = conformance.batches(1)[0]
    with pytest.raises(UnsupportedError, match="total_samples"):
        Session(model, SGD(model.parameters(), lr=0.1), [Net2Net()], sample=(x, y))


def test_a_network_that_cannot_run_at_its_last_width_is_found_when_attaching() -> None:
    class Only(nn.Module):
        passes_channels = True

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 16:
                raise ValueError("only 16 channels are foreseen")
            return x

    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), Only(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    run(Net2Net(narrow=0.5), copy.deepcopy(model))
    with pytest.raises(UnsupportedSurgeryError, match="only 16 channels"):
        run(Net2Net(narrow=0.5, widen=2.0), model)


def test_a_residual_network_in_two_stages_of_a_fit_with_averaged_weights() -> None:
    """The ready loop: ends with the given network, deeper by a block, with its average in step."""
    from hasten.data import load
    from hasten.loop import fit
    from hasten.recipe import STRONG

    data = load("fashion-mnist-12k").stratified(320, 100)
    method = Net2Net(narrow=0.5, widen={"layer*.conv1": 1.0}, at=(0.3, 0.6), deepen=("layer1.0",))
    result = fit("resnet8", data, [method], recipe=STRONG.with_(epochs=2.0, batch_size=32, eval_every=0.5))
    assert result.witness["net2net"]["growths"] == 2
    assert result.witness["net2net"]["layers_inserted"] == 1
    assert result.model is not None
    grown, given = shapes(result.model), shapes(models.build("resnet8", in_channels=1, image_size=28))
    assert {name: shape for name, shape in grown.items() if "0_1" not in name} == given
    assert any("layer1.0_1" in name for name in grown)
    assert "zeros" in result.effects["net2net"].skipped["layer1.0.conv2"]


# -- two ranks
WORKER = """
import json, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from hasten import conformance
from hasten.methods.structure.net2net import Net2Net
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
method = Net2Net(narrow=0.5, at=(0.25,), deepen=("2",), calibration=16)
session = conformance.start([method], DistributedDataParallel(conformance.network()))
session.total_samples //= 2
for x, y, index, epoch in conformance.batches(8):
    if session.counters["step"] % 6 == 0:
        session.start_epoch(epoch)
    half = slice(16 * rank, 16 * rank + 16)
    session.step(x[half], y[half], index[half])
torch.save({n: p.detach() for n, p in session.model.named_parameters()}, f"{folder}/{rank}.pt")
json.dump([session.surgery.records(), session.witness()], open(f"{folder}/{rank}.json", "w"))
dist.destroy_process_group()
"""


def test_two_ranks_grow_alike_from_different_images(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=environment,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    complaints = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], complaints
    texts = [(tmp_path / f"{rank}.json").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert '"layers_inserted": 1.0' in texts[0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert "2_1.conv.weight" in first
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_the_names_of_kinds_are_checked() -> None:
    with pytest.raises(SettingsError, match="hardtanh"):
        surgeon(chain()).apply([Insert("2", "identity_layer", {"channels": 8, "activation": "hardtan"})])
    with pytest.raises(SettingsError, match="basic"):
        surgeon(net("resnet18")).apply(
            [Insert("layer1.1", "residual_block", {"kind": "basics", "channels": 64, "seed": 0})]
        )
    with pytest.raises(UnknownName):
        surgeon(chain()).apply([Insert("2", "identity_layers", {"channels": 8})])
