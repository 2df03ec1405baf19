"""Removing channels: exact for silent ones, for every kind of wiring, with optimizer state and nothing left behind."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.nets import NETS, images, masked_steps_of, net, removable, silence
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, RMSprop

from hasten.errors import OverPruneError, UnsupportedSurgeryError
from hasten.measure.macs import macs
from hasten.surgery import RemoveChannels, Surgeon, check_training_state, follow


def surgeon(model: nn.Module, optimizers: tuple[Optimizer, ...] = ()) -> Surgeon:
    return Surgeon(model, optimizers, images(2, next(model.parameters()).dtype))


def some(model: nn.Module, how_many: int = 4, seed: int = 0) -> list[tuple[str, list[int]]]:
    """Return random removals, one in each of several groups."""
    channels = follow(model, images(2))
    chosen, seen, pick = [], set(), random.Random(seed)
    layers = removable(model, channels)
    pick.shuffle(layers)
    for layer in layers:
        classes = channels.outputs(layer).tolist()
        if seen & set(classes):
            continue
        seen |= set(classes)
        chosen.append((layer, sorted(pick.sample(range(len(classes)), max(1, len(classes) // 3)))))
        if len(chosen) == how_many:
            break
    return chosen


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_removing_silent_channels_changes_nothing(name: str, seed: int) -> None:
    model, x = net(name), images()
    cuts = some(model, seed=seed)
    assert cuts
    channels = follow(model, x)
    for layer, which in cuts:
        silence(model, channels, layer, which)
    before = {}
    for training in (False, True):
        twin = copy.deepcopy(model).train(training)
        before[training] = twin(x)
    sizes = {layer: len(channels.outputs(layer)) for layer, _ in cuts}
    surgeon(model).apply([RemoveChannels(layer, tuple(which)) for layer, which in cuts])
    after = follow(model, x)
    for layer, which in cuts:
        assert len(after.outputs(layer)) == sizes[layer] - len(which)
    for training in (False, True):
        got = copy.deepcopy(model).train(training)(x)
        scale = before[training].abs().max()
        assert (got - before[training]).abs().max() <= 1e-11 * scale


@pytest.mark.parametrize("name", NETS)
def test_a_new_trace_finds_what_the_old_one_was_cut_to(name: str) -> None:
    model = net(name)
    hand = surgeon(model)
    hand.apply([RemoveChannels(layer, tuple(which)) for layer, which in some(model)])
    kept, anew = hand.channels, follow(model, images(2))
    assert kept.slots.keys() == anew.slots.keys()
    for key in kept.slots:
        a, b = kept.classes[kept.slots[key].labels], anew.classes[anew.slots[key].labels]
        # the same channels hang together, whatever they are called
        assert (
            len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))
        )


@pytest.mark.parametrize("make", [
    lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    lambda p: AdamW(p, lr=0.01), lambda p: Adam(p, lr=0.01, amsgrad=True), lambda p: RMSprop(p, lr=0.01, momentum=0.5),
], ids=["sgd", "adamw", "amsgrad", "rmsprop"])  # fmt: skip
@pytest.mark.parametrize("name", ["resnet8", "densenet-bc", "mobilenet-v2", "flat"])
def test_training_goes_on_as_that_of_the_masked_network(name: str, make: Any) -> None:
    model = net(name).train()
    cuts = some(model, 2)
    masks: dict[str, Tensor] = {}
    channels = follow(model, images(2))
    for layer, which in cuts:
        masks |= silence(model, channels, layer, which)
    optimizer = make(model.parameters())
    masked_steps_of(model, optimizer, masks, 2)
    full, full_optimizer = copy.deepcopy((model, optimizer))
    change = surgeon(model, (optimizer,)).apply([RemoveChannels(layer, tuple(w)) for layer, w in cuts])
    assert change is not None
    check_training_state(model, optimizer)
    masked_steps_of(full, full_optimizer, masks, 3)
    masked_steps_of(model, optimizer, {}, 3)
    expected = change.follow(dict(full.state_dict()), dict(model.state_dict()))
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, expected[key], rtol=1e-7, atol=1e-9), key


@pytest.mark.parametrize("seed", range(3))
def test_optimizer_state_keeps_its_numbers(seed: int) -> None:
    model = net("resnet8").train()
    optimizer = AdamW(model.parameters(), lr=0.01)
    masked_steps_of(model, optimizer, {}, 3)
    before = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    change = surgeon(model, (optimizer,)).apply(
        [RemoveChannels(a, tuple(w)) for a, w in some(model, seed=seed)]
    )
    assert change is not None
    assert objects == {n: id(p) for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert torch.equal(state["step"], before[name]["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            now = change.follow({name: before[name][key]}, {name: p})[name]
            assert state[key].shape == p.shape
            assert torch.equal(state[key], now)


def test_factored_state_follows_along_its_own_axes() -> None:
    model = net("flat", torch.float32).train()
    optimizer = Adafactor(model.parameters(), lr=0.01)
    for seed in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images(4, torch.float32, seed)), torch.arange(4)).backward()
        optimizer.step()
    rows = optimizer.state[model.fc1.weight]["row_var"].clone()
    surgeon(model, (optimizer,)).apply([RemoveChannels("fc1", (0, 5)), RemoveChannels("conv2", (1,))])
    kept = [i for i in range(20) if i not in (0, 5)]
    assert torch.equal(optimizer.state[model.fc1.weight]["row_var"], rows[kept])
    optimizer.zero_grad()
    F.cross_entropy(model(images(4, torch.float32)), torch.arange(4)).backward()
    optimizer.step()


def test_state_of_an_unknown_shape_is_refused_and_nothing_changes() -> None:
    model = net("flat").train()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    masked_steps_of(model, optimizer, {}, 1)
    optimizer.state[model.conv1.weight]["blocks"] = torch.zeros(7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedSurgeryError, match="'blocks' of shape"):
        surgeon(model, (optimizer,)).apply([RemoveChannels("conv1", (0,))])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.conv1.out_channels == 12


def test_macs_fall_as_widths_do() -> None:
    model = net("resnet18")
    full = macs(model, images(1))
    surgeon(model).apply([RemoveChannels("layer1.0.conv1", tuple(range(16)))])
    cut = macs(model, images(1))
    for name in ("layer1.0.conv1", "layer1.0.conv2"):
        assert cut.layers[name].output * 64 == full.layers[name].output * 48
    assert cut.layers["layer1.1.conv1"] == full.layers["layer1.1.conv1"]


def test_a_channel_without_gain_but_with_bias_is_not_silent() -> None:
    model, x = net("resnet8").eval(), images()
    block = model.layer1[0]
    with torch.no_grad():
        block.bn1.weight[3], block.bn1.bias[3] = 0.0, 0.7
    before = model(x)
    surgeon(model).apply([RemoveChannels("layer1.0.conv1", (3,))])
    assert (model(x) - before).abs().max() > 1e-3


# -- refusals, each with the network as it was


class Fixed(nn.Module):
    """A forward that fixes a size after the trace can see it only as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)).reshape(-1, 8))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        if x.sum() > 0:
            x = x * 2
        return self.fc(x)


def refused(
    model: nn.Module,
    edits: list[RemoveChannels],
    match: str,
    error: type[Exception] = UnsupportedSurgeryError,
) -> None:
    before, kinds = copy.deepcopy(model.state_dict()), {n: dict(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(error, match=match):
        surgeon(model).apply(edits)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    for name, module in model.named_modules():
        same = {k: v for k, v in kinds[name].items() if isinstance(v, int | tuple)}
        assert all(getattr(module, k) == v for k, v in same.items())


def test_refusals_say_why_and_change_nothing() -> None:
    refused(net("resnet8"), [RemoveChannels("fc", (0,))], "network's output")
    refused(net("resnet8"), [RemoveChannels("conv1", tuple(range(16)))], "without", OverPruneError)
    refused(net("resnet8"), [RemoveChannels("conv1", (99,))], "0 to 15")
    refused(net("resnet8"), [RemoveChannels("nowhere", (0,))], "makes no channels")
    both = [RemoveChannels("layer1.0.conv2", (1,)), RemoveChannels("conv1", (2,))]
    refused(net("resnet8"), both, "added to each other")
    refused(Fixed().double(), [RemoveChannels("conv", (0,))], "fixes 8 channels")
    refused(Branching().double(), [RemoveChannels("conv", (0,))], "cannot be followed.*test_remove.py")


def test_shared_weights_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).double()  # fmt: skip
    model[2].weight = model[1].weight
    refused(model, [RemoveChannels("1", (0,))], "shared by 1 and 2")


@pytest.mark.parametrize(("which", "allowed"), [((0, 1), False), ((0, 4), True), ((0, 1, 4, 5), True)])
def test_grouped_layers_must_lose_the_same_in_each_part(which: tuple[int, ...], allowed: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
                          nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(12, 10)).double()  # fmt: skip
    if not allowed:
        refused(model, [RemoveChannels("0", which)], "parts that must stay equal")
        return
    x = images()
    with torch.no_grad():  # the grouped convolution reads nothing from them
        for c in which:
            model[3].weight[(c // 4) * 6 : (c // 4) * 6 + 6, c % 4] = 0
    mid = model[3](model[2](model[0](x)))
    surgeon(model).apply([RemoveChannels("0", which)])
    assert model[3].weight.shape == (12, 4 - len(which) // 2, 3, 3)
    assert torch.allclose(model[3](model[2](model[0](x))), mid, atol=1e-12)


def test_a_grouped_convolution_loses_groups_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 6, 3, padding=1, groups=3), nn.ReLU(),
                          nn.Conv2d(6, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).double()  # fmt: skip
    refused(model, [RemoveChannels("0", (4, 5, 6, 7))], "but not both")
    refused(model, [RemoveChannels("2", (2, 3))], "but not both")
    refused(model, [RemoveChannels("0", (4, 5, 6, 7, 8))], "or a group with all it reads and makes")
    with torch.no_grad():
        model[4].weight[:, 2:4] = 0  # nobody reads what the second group makes
    x = images()
    expected = model(x)
    optimizer = SGD(model.parameters(), lr=0.0, momentum=0.9)
    F.cross_entropy(expected, torch.arange(4)).backward()
    optimizer.step()
    kept = surgeon(model, (optimizer,))
    kept.apply([RemoveChannels("0", (4, 5, 6, 7)), RemoveChannels("2", (2, 3))])
    assert (model[2].groups, model[2].weight.shape) == (2, (4, 4, 3, 3))
    assert optimizer.state[model[2].weight]["momentum_buffer"].shape == (4, 4, 3, 3)
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)
    kept.apply(
        [RemoveChannels("0", (0, 5)), RemoveChannels("2", (1, 2))]
    )  # then the same number in each that is left
    assert (model[2].groups, model[2].weight.shape) == (2, (2, 3, 3, 3))
    assert {key: slot.labels.size for key, slot in kept.channels.slots.items()} == {
        key: slot.labels.size for key, slot in follow(model, x).slots.items()
    }


def test_nothing_to_remove_is_no_change() -> None:
    hand = surgeon(net("resnet8"))
    assert hand.apply([RemoveChannels("conv1", ())]) is None
    assert hand.log == []


def test_plan_says_what_would_happen_and_does_nothing() -> None:
    model = net("resnet8")
    before = copy.deepcopy(model.state_dict())
    hand = surgeon(model)
    text = "\n".join(hand.plan([RemoveChannels("layer1.0.conv1", (0, 1))]))
    assert "remove 2 channels of layer1.0.conv1" in text
    assert "layer1.0.conv2.in: now 14 positions" in text
    assert hand.log == []
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_memory_format_grad_and_frozen_parameters_stay_as_they_were() -> None:
    model = net("resnet8", torch.float32).to(memory_format=torch.channels_last)
    model.layer1[0].conv1.weight.requires_grad_(False)
    F.cross_entropy(model(images(4, torch.float32)), torch.arange(4)).backward()
    surgeon(model).apply([RemoveChannels("layer1.0.conv1", (0, 1)), RemoveChannels("layer2.0.conv1", (3,))])
    assert not model.layer1[0].conv1.weight.requires_grad
    for name, p in model.named_parameters():
        assert p.dim() != 4 or p.is_contiguous(memory_format=torch.channels_last), name
        assert p.grad is None or p.grad.shape == p.shape, name


class Excited(nn.Module):
    """Squeeze-and-excite by linear layers; its scale gets its axes by indexing with None."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        scale = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.out((x * scale[:, :, None, None]).mean((2, 3)))


def test_axes_added_by_an_index_are_followed() -> None:
    model, x = Excited().double(), images()
    channels = follow(model, x)
    masks = silence(model, channels, "conv", [0, 3])
    assert masks.keys() == {"down.weight", "out.weight"}
    before = model(x)
    surgeon(model).apply([RemoveChannels("conv", (0, 3))])
    assert (model.conv.out_channels, model.up.out_features, model.down.in_features) == (6, 6, 6)
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-12)
