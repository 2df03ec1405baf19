"""A plan that changes nothing computes what PyTorch computes, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hasten import errors
from hasten.products import PlannedConv2d, PlannedLinear, install, supported, uninstall

from .support import Fixed, Identity, Times, layers, run, strides


def force(layer: nn.Module) -> None:
    """Make the layer run its three products by a plan that changes nothing."""
    plan = install(layer)
    for tensor in ("x", "w", "output", "grad_output", "grad_input", "grad_weight"):
        plan.transform(tensor, Identity(), "identity")
    assert not plan.exact


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert strides(found) == strides(wanted)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_forced_products_equal_autograd_bit_for_bit(autocast: bool, channels_last: bool) -> None:
    for layer, x in layers(40, 2 * autocast + channels_last, channels_last):
        wanted = run(layer, x, autocast)
        plan = install(layer)
        plan.transform("grad_weight", Identity(), "identity")
        same(run(layer, x, autocast), wanted)
        plan.transform("x", Identity(), "identity")
        same(run(layer, x, autocast), wanted)


@pytest.mark.parametrize("channels_last", [False, True])
def test_separate_products_equal_autograd_bit_for_bit(channels_last: bool) -> None:
    """Splitting the backward pass into one call a product, as kernels and narrowed transforms need."""
    for layer, x in layers(40, 9, channels_last):
        wanted = run(layer, x)
        install(layer).transform("grad_output", Identity(), "identity", ["grad_weight"])
        assert not install(layer).recipe.joint
        same(run(layer, x), wanted)


def test_an_empty_or_inactive_plan_and_eval_run_pytorchs_own_op() -> None:
    for layer, x in layers(8, 3):
        plain = layer(x).grad_fn
        plan = install(layer)
        assert plan.exact
        assert type(layer(x).grad_fn) is type(plain)
        plan.transform("x", Identity(), "a")
        assert (
            "ThreeProducts"
            in type(layer(x).grad_fn.next_functions[0][0] if x.dim() == 1 else layer(x).grad_fn).__name__
        )
        plan.activate("a", False)
        assert type(layer(x).grad_fn) is type(plain)
        plan.activate("a", True)
        plan.active = False
        assert type(layer(x).grad_fn) is type(plain)
        plan.active = True
        assert type(layer.eval()(x).grad_fn) is type(plain)


def test_without_gradients_a_plan_of_the_backward_pass_calls_nothing() -> None:
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 5, 5)
    wanted = layer(x)
    seen = Fixed([0, 1])
    install(layer).select("in_channels", seen, "a")
    with torch.no_grad():
        assert not torch.equal(layer(x), wanted)
        layer.plan.release("a")
        layer.plan.transform("grad_output", Times(2.0), "b")
        assert layer.plan.recipe.plain_output
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_named_padding(padding: str, kernel: int | tuple[int, int]) -> None:
    layer = nn.Conv2d(3, 5, kernel, padding=padding, dilation=2)
    x = torch.randn(2, 3, 11, 12)
    wanted = run(layer, x)
    force(layer)
    for name, tensor in run(layer, x).items():
        torch.testing.assert_close(tensor, wanted[name])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    layer = nn.Conv2d(3, 5, 3, padding=2, padding_mode=mode)
    x = torch.randn(2, 3, 7, 8)
    wanted = run(layer, x)
    force(layer)
    same(run(layer, x), wanted)


def test_unbatched_images() -> None:
    layer, x = nn.Conv2d(3, 5, 3), torch.randn(3, 8, 8)
    wanted = run(layer, x)
    force(layer)
    for name, tensor in run(layer, x).items():
        torch.testing.assert_close(tensor, wanted[name])


def test_only_needed_gradients_are_computed_and_kept() -> None:
    layer = nn.Conv2d(4, 6, 3)
    force(layer)
    x = torch.randn(2, 4, 8, 8)
    y = layer(x)
    y.sum().backward()
    assert x.grad is None
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x.requires_grad_()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    assert kept == [layer.weight.shape]
    layer.zero_grad()
    y.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_gradcheck_in_float64(kind: str) -> None:
    layer: nn.Module
    if kind == "conv":
        layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, dtype=torch.float64)
        x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    else:
        layer = nn.Linear(4, 3, dtype=torch.float64)
        x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    force(layer)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_double_use_of_one_module_adds_its_gradients() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    wanted = run(model, x)
    force(layer)
    same(run(model, x), wanted)


def test_second_gradients_are_refused() -> None:
    layer = nn.Linear(3, 3)
    force(layer)
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(errors.UnsupportedError, match="create_graph"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_installing_keeps_the_module_and_uninstalling_restores_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    names, first = list(model.state_dict()), model[0].weight
    for layer in (model[0], model[2]):
        force(layer)
        assert install(layer) is layer.plan
    assert type(model[0]) is PlannedConv2d
    assert isinstance(model[2], nn.Linear)
    assert list(model.state_dict()) == names
    assert model[0].weight is first
    assert [n for n, _ in model.named_modules()] == ["", "0", "1", "2"]
    twin = copy.deepcopy(model)
    assert type(twin[2]) is PlannedLinear
    assert twin[0].plan is not model[0].plan
    assert twin[0].plan.claims == model[0].plan.claims
    twin[0].plan.release("identity")
    assert twin[0].plan.exact
    assert not model[0].plan.exact
    for layer in (model[0], model[2]):
        uninstall(layer)
        uninstall(layer)
    assert type(model[0]) is nn.Conv2d
    assert type(model[2]) is nn.Linear
    assert "plan" not in model[0].__dict__
    twin.load_state_dict(model.state_dict())


def test_layers_that_cannot_carry_a_plan_say_why() -> None:
    class Mine(nn.Conv2d):
        pass

    quantized = nn.Linear(2, 2)
    quantized.forward = lambda x: x  # type: ignore[method-assign]
    complex_layer = nn.Linear(2, 2, dtype=torch.complex64)
    cases = [
        (Mine(2, 2, 1), "class Mine"),
        (nn.ConvTranspose2d(2, 2, 1), "neither"),
        (nn.BatchNorm2d(2), "neither"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "ParametrizedLinear"),
        (quantized, "replaced"),
        (complex_layer, "complex64"),
    ]
    for module, reason in cases:
        assert reason in (supported(module) or "")
        with pytest.raises(errors.UnsupportedError, match=reason):
            install(module, "stem")
    assert supported(nn.Conv2d(2, 2, 1)) is None
