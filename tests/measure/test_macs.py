"""MAC counter: the anchors of model_surgery.md 3.6, published counts, closed forms, side effects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hasten import models
from hasten.errors import UnsupportedError
from hasten.measure.macs import MacCount, macs


def count(name: str, size: int = 32, classes: int = 10, channels: int = 3) -> MacCount:
    with torch.device("meta"):
        model = models.build(name, image_size=size, num_classes=classes, in_channels=channels)
        return macs(model, torch.zeros(2, channels, size, size))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", 40_551_040),
        ("resnet20-proj", 40_813_184),
        ("resnet32", 68_862_592),
        ("resnet32-proj", 69_124_736),
        ("resnet56", 125_485_696),
        ("resnet56-proj", 125_747_840),
        ("resnet110", 252_887_680),
    ],
)
def test_cifar_anchors(name: str, expected: int) -> None:
    assert count(name).forward == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", 4_089_184_256),
        ("vgg16", 15_346_630_656 + 123_633_664),
        # Published elsewhere: torchvision's tables, the MobileNet paper's 569 million.
        ("resnet18", 1_814_073_344),
        ("resnet34", 3_663_761_408),
        ("vgg19", 19_632_062_464),
        ("alexnet", 714_188_480),
        ("mobilenet-v1", 568_740_352),
    ],
)
def test_imagenet_anchors(name: str, expected: int) -> None:
    assert count(name, 224, 1000).forward == expected


def test_vgg16_splits_into_conv_and_linear() -> None:
    vgg = count("vgg16", 224, 1000)
    assert (vgg.conv, vgg.linear) == (15_346_630_656, 123_633_664)


def test_lenet_by_hand() -> None:
    layers = count("lenet", 28, 10, 1).layers
    by_hand = {
        "conv1": 20 * 25 * 24 * 24,
        "conv2": 20 * 50 * 25 * 8 * 8,
        "fc1": 800 * 500,
        "fc2": 500 * 10,
    }
    assert {name: layer.output for name, layer in layers.items()} == by_hand


def test_training_is_three_forwards_less_the_first_grad_input() -> None:
    net = count("resnet20")
    assert net.training == 3 * net.forward - 3 * 16 * 9 * 32 * 32


def test_frozen_layers_need_no_grad_weight() -> None:
    """The record net's whitening weights are frozen, its bias trains: no dW there, dX from then on."""
    net = count("record94")
    whiten = net.layers["whiten"]
    assert whiten.output == 12 * 24 * 31 * 31
    assert (whiten.grad_input, whiten.grad_weight) == (0, 0)
    assert all(x.grad_input == x.grad_weight == x.output for n, x in net.layers.items() if n != "whiten")


@pytest.mark.parametrize("seed", range(8))
def test_random_layers_match_the_closed_form(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    groups, kernel, stride, side, batch = pick(1, 4), pick(1, 4), pick(1, 3), pick(6, 12), pick(1, 4)
    c_in, c_out = groups * pick(1, 4), groups * pick(1, 4)
    conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, groups=groups)
    out = (side - kernel) // stride + 1
    fc = nn.Linear(c_out * out * out, 5)
    found = macs(nn.Sequential(conv, nn.Flatten(), fc), torch.zeros(batch, c_in, side, side))
    assert found.conv == c_in * c_out * kernel * kernel * out * out // groups
    assert found.linear == c_out * out * out * 5


def test_transposed_conv_costs_what_its_mirror_costs() -> None:
    up = macs(nn.ConvTranspose2d(6, 4, 3, stride=2), torch.zeros(1, 6, 5, 5))
    down = macs(nn.Conv2d(4, 6, 3, stride=2), torch.zeros(1, 4, 11, 11))
    assert up.forward == down.forward == 6 * 4 * 9 * 25


def test_a_shared_layer_counts_each_call() -> None:
    conv = nn.Conv2d(3, 3, 1)
    assert macs(nn.Sequential(conv, conv), torch.zeros(1, 3, 4, 4)).forward == 2 * 9 * 16


def test_inputs_given_by_name_are_counted() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    assert macs(Named(), torch.zeros(2, 3, 8, 8)).forward == 3 * 4 * 9 * 6 * 6


def test_nothing_changes_in_the_model() -> None:
    model = models.build("resnet8", seed=1)
    model.layer1[0].bn1.eval()  # a mixed mode must come back as it was
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    macs(model, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_and_modes_are_restored_when_forward_fails() -> None:
    model = models.build("resnet8", seed=1)
    with pytest.raises(RuntimeError):
        macs(model, torch.randn(2, 4, 32, 32))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_do_not_run_are_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(x)
            return result

    assert macs(Half(), torch.zeros(1, 4)).not_run == ("spare",)
    with pytest.raises(UnsupportedError, match="no conv or linear"):
        macs(nn.ReLU(), torch.zeros(1, 4))
