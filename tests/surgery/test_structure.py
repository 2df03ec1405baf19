"""Dropping blocks, widening, inserting, replaying: function kept, state followed, whole or not at all."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.nets import images, net, removable
from tests.surgery.test_remove import some, surgeon
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from hasten import models
from hasten.errors import HastenError, SettingsError, UnknownName, UnsupportedSurgeryError
from hasten.surgery import (
    DropBlock,
    Insert,
    RemoveChannels,
    Replace,
    Surgeon,
    Widen,
    apply,
    check_training_state,
    follow,
)
from hasten.surgery.edits import from_json, to_json


class OwnBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.b, self.nb = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        out = self.nb(self.b(F.relu(self.na(self.a(x)))))
        out += x
        return F.relu(out)


def own_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), OwnBlock(8), OwnBlock(8), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, 10))  # fmt: skip


BLOCKS = {
    "resnet8": ("layer2.0", "bn2"), "resnet18": ("layer2.1", "bn2"), "resnet50": ("layer3.0", "bn3"),
    "wrn-16-4": ("layer2.1", "conv2"), "own": ("1", "nb"),
}  # fmt: skip


def a_net(name: str) -> nn.Module:
    if name == "own":
        torch.manual_seed(0)
        return own_net().double()
    if name == "resnet50":
        return models.build("resnet50", seed=0).double()
    return net(name)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_whose_branch_gives_zero_goes_without_a_trace(name: str) -> None:
    model, x = a_net(name), images()
    block, last = BLOCKS[name]
    with torch.no_grad():
        end = model.get_submodule(f"{block}.{last}")
        end.weight.zero_()
        if getattr(end, "bias", None) is not None:
            end.bias.zero_()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    with torch.no_grad():
        end.weight.zero_()
        if getattr(end, "bias", None) is not None:
            end.bias.zero_()
    before = {mode: copy.deepcopy(model).train(mode)(x) for mode in (False, True)}
    gone = [weakref.ref(m) for m in model.get_submodule(block).modules() if isinstance(m, nn.Conv2d)][:1]
    hand = surgeon(model, (optimizer,))
    assert block in hand.blocks()
    hand.apply([DropBlock(block)])
    for mode in (False, True):
        assert torch.allclose(copy.deepcopy(model).train(mode)(x), before[mode], rtol=1e-12, atol=1e-12)
    check_training_state(model, optimizer)
    assert set(optimizer.state) <= set(model.parameters())
    del end
    gc.collect()
    assert all(ref() is None for ref in gone), "the dropped layers are still held"
    assert block not in hand.blocks()


def test_an_unknown_block_is_named_with_those_there_are() -> None:
    with pytest.raises(UnsupportedSurgeryError, match=r"layer1\.0"):
        surgeon(net("resnet8")).apply([DropBlock("layer1.7")])


# -- widening


WIDENABLE = ["resnet18", "wrn-16-4", "densenet40", "mobilenet-v1", "lenet", "alexnet", "mobilenet-v2", "densenet-bc",
             "googlenet", "flat"]  # fmt: skip


def widenings(model: nn.Module, seed: int) -> list[Widen]:
    channels = follow(model, images(2))
    g = torch.Generator().manual_seed(seed)
    found = []
    for layer, _ in some(model, 3, seed):
        n = len(channels.outputs(layer))
        more = torch.randint(0, n, (max(1, n // 2),), generator=g).tolist()
        found.append(Widen(layer, (*range(n), *more)))
    return found


@pytest.mark.parametrize("name", WIDENABLE)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_widened_network_computes_the_same(name: str, seed: int) -> None:
    model, x = net(name), images()
    before = {mode: copy.deepcopy(model).train(mode)(x) for mode in (False, True)}
    size = sum(p.numel() for p in model.parameters())
    edits = widenings(model, seed)
    surgeon(model).apply(edits)
    assert sum(p.numel() for p in model.parameters()) > size
    for mode in (False, True):
        got = copy.deepcopy(model).train(mode)(x)
        assert (got - before[mode]).abs().max() <= 1e-10 * before[mode].abs().max()


@pytest.mark.parametrize("name", ["resnet18", "densenet-bc", "mobilenet-v2", "flat"])
def test_gradients_and_state_of_copies_follow_the_chain_rule(name: str) -> None:
    """The gradient of a copied maker is divided by the copies, that of a reader is repeated; so is the state."""
    model, x, y = net(name).train(), images(), torch.arange(4)
    optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    wide = copy.deepcopy(model)
    wide_optimizer = AdamW(wide.parameters(), lr=0.0, weight_decay=0.0)
    edit = widenings(model, 0)[:1]
    surgeon(wide).apply(edit)
    for net_, opt in ((model, optimizer), (wide, wide_optimizer)):
        F.cross_entropy(net_(x), y).backward()
        opt.step()
    surgeon(model, (optimizer,)).apply(edit)
    of = dict(wide.named_parameters())
    for name_, p in model.named_parameters():
        expected = wide_optimizer.state[of[name_]]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(optimizer.state[p][key], expected[key], rtol=1e-6, atol=1e-12), (name_, key)


def test_widening_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="more than that"):
        surgeon(net("flat")).apply([Widen("conv1", tuple(range(12)))])
    with pytest.raises(ValueError, match="mapping"):
        surgeon(net("flat")).apply([Widen("conv1", (*range(1, 13), 0))])
    with pytest.raises(UnsupportedSurgeryError, match="network's output"):
        surgeon(net("flat")).apply([Widen("fc2", (*range(10), 0))])
    with pytest.raises(UnsupportedSurgeryError, match="shortcuts"):
        surgeon(net("resnet8")).apply([Widen("conv1", (*range(16), 0))])


# -- inserting and replacing


def test_an_inserted_identity_changes_nothing_and_joins_the_right_groups() -> None:
    model, x = net("alexnet").eval(), images()
    heavy = [p for p in model.parameters() if p.dim() > 1]
    light = [p for p in model.parameters() if p.dim() == 1]
    optimizer = SGD([{"params": heavy, "weight_decay": 0.1}, {"params": light, "weight_decay": 0.0}], lr=0.1)
    before = model(x)
    after = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU))
    width = model.features[0].out_channels
    surgeon(model, (optimizer,)).apply([Insert(after, "identity_conv", {"channels": width, "norm": False})])
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)
    check_training_state(model, optimizer)
    for group in optimizer.param_groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_a_new_first_layer_joins_the_groups_of_its_kinds() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4096, 2)
    )
    heavy = [p for p in model.parameters() if p.dim() > 1]
    light = [p for p in model.parameters() if p.dim() == 1]
    optimizer = SGD([{"params": heavy, "weight_decay": 0.1}, {"params": light, "weight_decay": 0.0}], lr=0.1)
    Surgeon(model, (optimizer,), images(2, torch.float32)).apply(
        [Replace("0", "identity_conv", {"channels": 3})]
    )
    check_training_state(model, optimizer)
    for group in optimizer.param_groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_an_inserted_residual_block_gives_zero_and_learns() -> None:
    model, x = net("resnet18").eval(), images()
    before = model(x)
    optimizer = SGD(model.parameters(), lr=0.1)
    surgeon(model, (optimizer,)).apply([Insert("layer1.1", "basic_block", {"channels": 64})])
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)
    assert list(model.layer1._modules) == ["0", "1", "1_1"]
    F.cross_entropy(model.train()(x), torch.arange(4)).backward()
    assert model.layer1.get_submodule("1_1").bn2.weight.grad.abs().max() > 0


def test_unknown_kinds_and_places_are_named() -> None:
    with pytest.raises(UnknownName, match="identity_conv"):
        surgeon(net("alexnet")).apply([Insert("features.1", "identity_con", {})])
    with pytest.raises(SettingsError, match="identity_conv"):
        surgeon(net("alexnet")).apply([Insert("features.1", "identity_conv", {"width": 3})])
    with pytest.raises(UnsupportedSurgeryError, match="not an element"):
        surgeon(net("resnet8")).apply([Insert("conv1", "identity_conv", {"channels": 16})])
    with pytest.raises(UnsupportedSurgeryError, match=r"features\.1"):
        surgeon(net("alexnet")).apply([Replace("features.1x", "identity_conv", {"channels": 64})])


# -- whole or not at all


def test_a_failure_in_the_middle_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("resnet8").train()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    optimizer.step()
    hand = surgeon(model, (optimizer,))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    modules, objects = dict(model.named_modules()), list(model.parameters())

    def fails(*_: object) -> None:
        if fails.armed:
            raise RuntimeError("on purpose")
        settled(*_)

    settled, fails.armed = apply.settle, False
    monkeypatch.setattr(apply, "settle", fails)
    real = hand._rehearse

    def rehearsed(*args: object, **kwargs: object) -> object:
        done = real(*args, **kwargs)
        fails.armed = True
        return done

    monkeypatch.setattr(hand, "_rehearse", rehearsed)
    with pytest.raises(RuntimeError, match="on purpose"):
        hand.apply([RemoveChannels("layer1.0.conv1", (0, 1)), DropBlock("layer2.0")])
    assert dict(model.named_modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    for number, slots in before[1]["state"].items():
        assert torch.equal(slots["momentum_buffer"], after[1]["state"][number]["momentum_buffer"])
    assert model.layer1[0].conv1.out_channels == 16
    assert hand.log == []


def test_a_log_rebuilds_the_structure_from_plain_values() -> None:
    model = net("resnet18")
    hand = surgeon(model)
    hand.apply([RemoveChannels(layer, tuple(which)) for layer, which in some(model)])
    hand.apply(
        [
            DropBlock("layer2.1"),
            Insert("layer1.1", "basic_block", {"channels": model.layer1[1].conv2.out_channels}),
        ]
    )
    hand.apply(widenings(model, 3)[:1])
    again = surgeon(net("resnet18"))
    again.replay(hand.records())
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in again.model.state_dict().items()} == shapes
    again.model.load_state_dict(model.state_dict())
    x = images()
    assert torch.equal(again.model.eval()(x), model.eval()(x))
    for edits in hand.log:
        for edit in edits:
            assert from_json(to_json(edit)) == edit
    with pytest.raises(HastenError, match="not those"):
        hand.replay([[to_json(DropBlock("layer3.1"))]])


def test_a_record_that_names_code_is_refused() -> None:
    hand = surgeon(net("alexnet"))
    with pytest.raises(UnknownName):
        hand.replay([[{"edit": "replace", "name": "features.1", "kind": "os:system", "settings": {}}]])
    with pytest.raises(SettingsError):
        hand.replay([[{"edit": "run", "command": "x"}]])
    with pytest.raises(SettingsError):
        hand.replay([[{"edit": "drop_block", "block": "x", "more": 1}]])


def test_a_hundred_surgeries_leave_nothing_behind() -> None:
    model = models.build("resnet18", seed=0)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    hand = Surgeon(model, (optimizer,), images(2, torch.float32))
    channels = hand.channels
    layers = [n for n in removable(model, channels) if n.endswith("conv1") and n != "conv1"]

    def living() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    hand.apply([RemoveChannels(layers[0], (0,))])
    before = living()
    for i in range(100):
        hand.apply([RemoveChannels(layers[i % len(layers)], (i % 7,))], dry_run=i % 10 == 0)
    assert living() <= before + 5


class SharesItsActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn(self.conv(x))))) + x)


def test_a_module_that_is_used_outside_the_branch_too_stays() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), SharesItsActivation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    x = images(4, torch.float32)
    stem = model.eval()[0](x)
    with torch.no_grad():
        Surgeon(model, (), x).apply([DropBlock("1")])
    assert torch.equal(model[1](stem), stem.relu())


def test_building_leaves_the_global_generator_alone_and_follows_the_layout() -> None:
    model = net("resnet18", torch.float32).to(memory_format=torch.channels_last)
    before = torch.get_rng_state()
    Surgeon(model, (), images(2, torch.float32)).apply([Insert("layer1.1", "basic_block", {"channels": 64})])
    assert torch.equal(before, torch.get_rng_state())
    assert model.layer1.get_submodule("1_1").conv1.weight.is_contiguous(memory_format=torch.channels_last)
