"""Every named network: trains, accepts its smallest image, keeps its names, and is a function of its seed."""

from __future__ import annotations

import copy
import hashlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from hasten import models
from hasten.errors import SettingsError, UnknownName, UnsupportedError
from hasten.models.geometry import Geometry
from hasten.models.registry import lookup

NAMES = [*models.available(), "resnet20-proj", "record-small-muon", "wrn-10-2"]
BIG = {"wrn-28-10", "resnet110", "vgg19", "record96", "resnet50", "resnet34"}
SMALL = [name for name in NAMES if name not in BIG]


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_on_the_smallest_image(name: str) -> None:
    size = max(lookup(name)[0].smallest, 4)
    model = models.build(name, num_classes=7, in_channels=2, image_size=size, seed=3)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(4, 2, size, size, generator=draw)
    logits = model(images)
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, key
            assert bool(torch.isfinite(p.grad).all()), key


@pytest.mark.parametrize("name", [name for name in NAMES if lookup(name)[0].smallest > 1])
def test_the_smallest_image_is_true_and_one_pixel_less_is_refused(name: str) -> None:
    entry, options = lookup(name)
    size = entry.smallest - 1
    with pytest.raises(UnsupportedError, match=f"{entry.smallest}x{entry.smallest}"):
        models.build(name, image_size=size)
    # The refusal is not over-cautious: without it the network cannot be built or run.
    with (
        warnings.catch_warnings(action="ignore"),  # layers without elements
        pytest.raises((RuntimeError, ValueError)),
        torch.device("meta"),
    ):
        entry.factory(g=Geometry(10, 3, size), **options)(torch.zeros(2, 3, size, size))


@pytest.mark.parametrize("name", NAMES)
def test_mnist_size_works_or_is_refused_with_the_smallest_size(name: str) -> None:
    with torch.device("meta"):
        if lookup(name)[0].smallest > 28:
            assert name in {"alexnet", "vgg16", "vgg19"}
            with pytest.raises(UnsupportedError, match="at least"):
                models.build(name, in_channels=1, image_size=28)
        else:
            model = models.build(name, in_channels=1, image_size=28)
            assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", [n for n in models.available() if not n.startswith(("lenet", "cifarnet"))])
def test_other_image_sizes_run_through_the_same_network(name: str) -> None:
    """Progressive resizing needs forwards without fixed sizes."""
    with torch.device("meta"):
        model = models.build(name, image_size=32)
        assert model(torch.zeros(2, 3, 48, 48)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "size", "classes", "expected"),
    [
        ("resnet20", 32, 10, 269_722),
        ("resnet32", 32, 10, 464_154),
        ("resnet56", 32, 10, 853_018),
        ("resnet110", 32, 10, 1_727_962),
        ("resnet18", 32, 10, 11_173_962),
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet34", 224, 1000, 21_797_672),
        ("resnet50", 224, 1000, 25_557_032),
        ("vgg16", 224, 1000, 138_365_992),
        ("vgg19", 224, 1000, 143_678_248),
        ("alexnet", 224, 1000, 61_100_840),
        ("mobilenet-v1", 224, 1000, 4_231_976),
        ("wrn-28-10", 32, 10, 36_479_194),
        ("wrn-28-10", 32, 100, 36_536_884),
        ("wrn-16-4", 32, 10, 2_748_890),
        ("densenet40", 32, 10, 1_019_722),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, size: int, classes: int, expected: int) -> None:
    with torch.device("meta"):
        model = models.build(name, image_size=size, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == expected


def torchvision_resnet18_names() -> list[str]:
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{key}" for key in norm)]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            for i in (1, 2):
                names += [f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{key}" for key in norm)]
            if stage > 1 and block == 0:
                names += [f"{at}.downsample.0.weight", *(f"{at}.downsample.1.{key}" for key in norm)]
    return [*names, "fc.weight", "fc.bias"]


def test_names_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        resnet = models.build("resnet18", image_size=224, num_classes=1000).state_dict()
        vgg = models.build("vgg16", image_size=224, num_classes=1000).state_dict()
        alexnet = models.build("alexnet", image_size=224, num_classes=1000).state_dict()
    assert list(resnet) == torchvision_resnet18_names()
    assert tuple(resnet["conv1.weight"].shape) == (64, 3, 7, 7)
    convs = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    assert [k for k, v in vgg.items() if v.ndim == 4] == [f"features.{i}.weight" for i in convs]
    assert [k for k, v in vgg.items() if v.ndim == 2] == [f"classifier.{i}.weight" for i in (0, 3, 6)]
    assert [k for k, v in alexnet.items() if v.ndim == 4] == [
        f"features.{i}.weight" for i in (0, 3, 6, 8, 10)
    ]
    assert [k for k, v in alexnet.items() if v.ndim == 2] == [f"classifier.{i}.weight" for i in (1, 4, 6)]


NAME_DIGESTS = {
    "lenet": "9e76d6ed2ed37add",
    "cifarnet": "61572117229f7ab1",
    "alexnet": "79b755fd1a2fab27",
    "vgg16": "2bad9db3a22ee352",
    "vgg19": "905a91e9dfab912b",
    "resnet8": "397fd53cb2104769",
    "resnet20": "28a0d5e26aad4d86",
    "resnet32": "ddc0be0bb73a15cd",
    "resnet56": "58531dd8472cd8f1",
    "resnet110": "d12c35714c8d1fac",
    "resnet18": "dd4dcc22c0f77399",
    "resnet34": "bd0ad046a8cb88a9",
    "resnet50": "db29beb85d0d8c04",
    "wrn-28-10": "768d83e9b2bdbb44",
    "wrn-16-4": "5cd970428d5aa989",
    "mobilenet-v1": "84a13d2296395aae",
    "densenet40": "f1df233b5a90118c",
    "record94": "3e96319d3e667bb4",
    "record95": "470fb4e8146a78fd",
    "record96": "a3e164fa68395e13",
    "record-small": "018e683a10ca12cd",
}


@pytest.mark.parametrize("name", list(models.available()))
def test_state_dict_names_and_shapes_stay(name: str) -> None:
    """A lock: checkpoints written today must load into tomorrow's networks."""
    with torch.device("meta"):
        state = models.build(name).state_dict()
    text = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == NAME_DIGESTS[name]


@pytest.mark.parametrize("name", ["lenet", "resnet8", "densenet40", "record-small", "record-small-muon"])
def test_weights_are_a_function_of_the_seed_alone(name: str) -> None:
    state = torch.get_rng_state()
    first = models.build(name, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(13)
    again = models.build(name, seed=5).state_dict()
    other = models.build(name, seed=6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_without_a_seed_the_global_stream_decides() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first = models.build("lenet").fc1.weight
        torch.default_generator.manual_seed(0)
        assert torch.equal(models.build("lenet").fc1.weight, first)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_deepcopy_and_trace_compute_the_same(name: str) -> None:
    model = models.build(name, seed=1).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(images)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(images), expected)
        assert torch.equal(fx.symbolic_trace(model)(images), expected)
        last = copied.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    scale = expected.abs().max()
    assert float((last - expected).abs().max()) <= 1e-4 * float(scale)
    assert list(copied.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", ["cifarnet", "resnet8", "densenet40", "record-small"])
def test_compile_captures_the_whole_forward(name: str) -> None:
    model = models.build(name, seed=1).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        captured = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(captured(images), model(images))


def test_he_initialisation_keeps_the_signal() -> None:
    """Without batch norm, He's variance is what keeps activations of one size through the layers."""
    draw = torch.Generator().manual_seed(0)
    model = models.build("alexnet", image_size=64, seed=0).eval()
    x = torch.randn(8, 3, 64, 64, generator=draw)
    with torch.no_grad():
        features = model.features[:10](x)
    assert 0.2 < float(features.square().mean()) < 5
    weight = models.build("resnet20", seed=0).layer3[1].conv1.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_option_a_shortcut_is_subsampling_and_zero_channels() -> None:
    model = models.build("resnet8", seed=0)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    y = model.layer2[0].downsample(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_wrong_names_options_and_numbers_are_refused() -> None:
    with pytest.raises(UnknownName, match="resnet20"):
        models.build("resnet21")
    for name in ("resnet18-proj", "lenet-muon", "wrn-28", "wrn-28-10-proj"):
        with pytest.raises(UnknownName):
            models.build(name)
    for name in ("wrn-27-10", "wrn-28-0", "wrn-4-1", "wrn-1006-1"):
        with pytest.raises(SettingsError, match="6n"):
            models.build(name)
    with pytest.raises(SettingsError, match="shortcut is 'C'"):
        models.build("resnet20", shortcut="C")
    with pytest.raises(SettingsError, match="already fixed"):
        models.build("resnet20-proj", shortcut="A")
    with pytest.raises(SettingsError, match="unknown option 'depth'"):
        models.build("resnet20", depth=3)
    with pytest.raises(SettingsError) as problem:
        models.build("resnet20", num_classes=0, in_channels=-1, image_size=10**9)
    assert all(key in str(problem.value) for key in ("num_classes", "in_channels", "image_size"))
