"""Gates: a branch that leaves channels out computes what the whole one does with zeros in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.surgery.nets import images, masked_steps_of, net
from torch import Tensor, nn
from torch.optim import SGD

from hasten import models
from hasten.errors import UnsupportedSurgeryError
from hasten.measure.macs import macs
from hasten.surgery import DropBlock, Gate, RemoveChannels, Surgeon, Widen, check_training_state
from hasten.surgery.gates import GatedBatchNorm2d, GatedConv2d, dissolve

# (network, first and last convolution of a branch, the batch norm at its end if one is)
BRANCHES = [
    ("resnet8", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.bn2"),
    ("resnet18", "layer1.1.conv1", "layer1.1.conv2", "layer1.1.bn2"),
    ("wrn-16-4", "layer1.1.conv1", "layer1.1.conv2", None),
]
IDS = [row[0] for row in BRANCHES]


def some(count: int, of: int, seed: int) -> tuple[int, ...]:
    order = torch.randperm(of, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:count].tolist()))


def gates(model: nn.Module, first: str, last: str, seed: int = 0) -> list[Gate]:
    reads, makes = model.get_submodule(first).in_channels, model.get_submodule(last).out_channels
    return [
        Gate(first, "in", some(reads // 2, reads, seed)), Gate(last, "out", some(makes // 2, makes, seed + 1)),
    ]  # fmt: skip


def silence(model: nn.Module, edits: list[Gate], end: str | None) -> dict[str, Tensor]:
    """Zero what the gates leave out, and return the masks that keep it so."""
    masks: dict[str, Tensor] = {}
    for edit in edits:
        conv = model.get_submodule(edit.layer)
        mask = torch.zeros_like(conv.weight)
        if edit.role == "in":
            mask[:, list(edit.channels)] = 1
        else:
            mask[list(edit.channels)] = 1
        masks[f"{edit.layer}.weight"] = mask
        with torch.no_grad():
            conv.weight.mul_(mask)
            if edit.role == "out" and end is not None:
                norm = model.get_submodule(end)
                stays = torch.zeros_like(norm.weight)
                stays[list(edit.channels)] = 1
                norm.weight.mul_(stays)
                norm.bias.mul_(stays)
                masks |= {f"{end}.weight": stays, f"{end}.bias": stays}
    return masks


@pytest.mark.parametrize("row", BRANCHES, ids=IDS)
@pytest.mark.parametrize("seed", range(2))
def test_a_gated_branch_computes_what_the_silent_one_does(row: tuple[str, ...], seed: int) -> None:
    name, first, last, end = row
    model, x = net(name), images()
    edits = gates(model, first, last, seed)
    silence(model, edits, end)
    full = copy.deepcopy(model)
    work = macs(model, x[:1])
    change = Surgeon(model, (), x).apply(edits)
    assert change is not None
    for mode in (True, False):
        a, b = full.train(mode)(x), model.train(mode)(x)
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
        (a.square().sum().backward(), b.square().sum().backward())
    moved = change.follow({n: p.grad for n, p in full.named_parameters()}, dict(model.named_parameters()))
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, moved[key], rtol=1e-7, atol=1e-9), key
    less = macs(model, x[:1])
    assert less.layers[first].output * 2 == work.layers[first].output
    assert less.layers[last].output * 2 == work.layers[last].output
    assert less.forward < work.forward


@pytest.mark.parametrize("row", BRANCHES, ids=IDS)
def test_training_goes_on_as_that_of_the_masked_network(row: tuple[str, ...]) -> None:
    name, first, last, end = row
    model = net(name).train()
    edits = gates(model, first, last)
    masks = silence(model, edits, end)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    masked_steps_of(model, optimizer, masks, 2)
    full, full_optimizer = copy.deepcopy((model, optimizer))
    change = Surgeon(model, (optimizer,), images()).apply(edits)
    assert change is not None
    check_training_state(model, optimizer)
    masked_steps_of(full, full_optimizer, masks, 3)
    masked_steps_of(model, optimizer, {}, 3)
    expected = change.follow(dict(full.state_dict()), dict(model.state_dict()))
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, expected[key], rtol=1e-7, atol=1e-9), key


@pytest.mark.parametrize("row", BRANCHES, ids=IDS)
def test_a_dissolved_gate_leaves_pytorch_modules_that_compute_the_same(row: tuple[str, ...]) -> None:
    name, first, last, _ = row
    model, x = net(name), images()
    before = {k: v.shape for k, v in model.state_dict().items()}
    surgeon = Surgeon(model, (), x)
    surgeon.apply(gates(model, first, last))
    gated = [m for m in model.modules() if isinstance(m, GatedConv2d | GatedBatchNorm2d)]
    assert len(gated) == 2
    expected = model.eval()(x)
    plain = copy.deepcopy(model)
    dissolve(plain)
    assert not [m for m in plain.modules() if isinstance(m, GatedConv2d | GatedBatchNorm2d)]
    assert {k: v.shape for k, v in plain.state_dict().items()} == before
    assert torch.allclose(plain(x), expected, rtol=1e-9, atol=1e-11)


def test_gates_narrow_further_and_follow_what_goes_around_them() -> None:
    model, x = net("resnet18"), images()
    surgeon = Surgeon(model, (), x)
    surgeon.apply(
        [
            Gate("layer1.1.conv1", "in", tuple(range(0, 64, 2))),
            Gate("layer1.1.conv2", "out", tuple(range(20, 40))),
        ]
    )
    surgeon.apply(
        [
            Gate("layer1.1.conv1", "in", tuple(range(8, 32))),
            Gate("layer1.1.conv2", "out", tuple(range(0, 20, 2))),
        ]
    )
    conv1, bn2 = model.layer1[1].conv1, model.layer1[1].bn2
    assert conv1.reads.kept.tolist() == list(range(16, 64, 2))
    assert bn2.makes.kept.tolist() == list(range(20, 40, 2))
    with torch.no_grad():  # channels 18 to 29 of the stage become silent, and go
        for name, p in model.named_parameters():
            if name in ("layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight",
                        "layer2.0.downsample.0.weight"):  # fmt: skip
                at = range(18, 30) if name != "layer1.1.conv1.weight" else range(1, 7)
                p[:, list(at)] = 0
    expected = model.eval()(x)
    surgeon.apply([RemoveChannels("conv1", tuple(range(18, 30)))])
    assert torch.allclose(model(x), expected, rtol=1e-9, atol=1e-11)
    assert conv1.reads.kept.tolist() == [16, *range(18, 52, 2)]
    assert bn2.makes.kept.tolist() == [18, 20, 22, 24, 26]
    assert (conv1.in_channels, bn2.num_features, model.layer1[1].conv2.out_channels) == (18, 5, 5)
    again = net("resnet18")
    replayed = Surgeon(again, (), x)
    replayed.replay(surgeon.records())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))
    surgeon.apply([DropBlock("layer1.1")])
    model.train()(x).sum().backward()


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (Gate("layer1.0.conv1", "norm", (0,)), "role 'norm'"),
        (Gate("layer1.0.conv1", "in", ()), "at least one"),
        (Gate("layer1.0.conv1", "in", (3, 2)), "ascending numbers from 0 to 15"),
        (Gate("layer1.0.conv1", "in", (16,)), "ascending numbers from 0 to 15"),
        (Gate("fc", "in", (0,)), "a Linear cannot be gated"),
        (Gate("nowhere", "in", (0,)), "no channels of the role"),
    ],
)
def test_refusals_change_nothing(edit: Gate, match: str) -> None:
    model = models.build("resnet8", seed=0)
    with pytest.raises(UnsupportedSurgeryError, match=match):
        Surgeon(model, (), images(2, torch.float32)).apply([Gate("layer1.0.conv2", "out", (0, 1)), edit])
    assert type(model.layer1[0].bn2) is nn.BatchNorm2d
    assert model.layer1[0].conv2.out_channels == 16


def test_a_failure_after_a_gate_takes_it_back() -> None:
    model, x = net("resnet8"), images()
    expected = model.eval()(x)
    surgeon = Surgeon(model, (), x)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # does not hold the model: found after the change
    surgeon.optimizers = (optimizer,)
    with pytest.raises(Exception, match="optimizer"):
        surgeon.apply([Gate("layer1.0.conv1", "in", (0, 1)), Gate("layer1.0.conv2", "out", (0, 1))])
    assert not [m for m in model.modules() if isinstance(m, GatedConv2d | GatedBatchNorm2d)]
    assert torch.equal(model(x), expected)


def test_what_a_gate_reads_cannot_be_widened() -> None:
    model, x = net("wrn-16-4"), images()
    surgeon = Surgeon(model, (), x)
    surgeon.apply([Gate("layer1.1.conv1", "in", tuple(range(32)))])
    with pytest.raises(UnsupportedSurgeryError, match="no gates"):
        surgeon.apply([Widen("layer1.0.conv2", (*range(64), 0))])
