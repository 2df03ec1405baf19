"""Selections compute what a reference that zeroes the unselected slices computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten import errors
from hasten.products import install

from .support import CHANNELS_LAST, Fixed, Identity, Times, TopK, run

LAYOUTS = [torch.contiguous_format, CHANNELS_LAST]


def conv(layout: torch.memory_format, seed: int = 0) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(seed)
    layer = nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2, dtype=torch.float64).to(memory_format=layout)
    return layer, torch.randn(4, 8, 9, 10, dtype=torch.float64).contiguous(memory_format=layout)


def linear(_: torch.memory_format, seed: int = 0) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(8, 12, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)


def keep(tensor: Tensor, dim: int, index: list[int], scale: list[float] | None = None) -> Tensor:
    """Zero every slice of ``tensor`` that is not selected; add up the scales of the ones that are."""
    factor = torch.zeros(tensor.shape[dim], dtype=tensor.dtype)
    factor.index_add_(0, torch.tensor(index), torch.tensor(scale or [1.0] * len(index), dtype=tensor.dtype))
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return tensor * factor.view(shape)


def product(layer: nn.Module, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(x, w, b, layer.stride, layer.padding, layer.dilation)
    return functional.linear(x, w, b)


def grads(layer: nn.Module, x: Tensor, w: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Return exact (grad_input, grad_weight) for the given operands."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    gi, gw = torch.autograd.grad(product(layer, x, w), (x, w), grad_output)
    return gi, gw


def noise(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(y.numel())).to(y)


def close(found: dict[str, Tensor], **wanted: Tensor) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [None, [0.5, 2.0, 3.0, 0.1]])
@pytest.mark.parametrize(
    "chosen",
    [([0, 3, 4, 7], 1, False), ([2, 3, 6, 7], 2, False), ([1, 4, 4, 6], 1, True)],
)
def test_in_channels(make, layout, scale, chosen) -> None:  # type: ignore[no-untyped-def]
    index, block, repeats = chosen
    layer, x = make(layout)
    dim = 1 if make is conv else -1
    w, b = layer.weight.detach(), layer.bias.detach()
    install(layer).select("in_channels", Fixed(index, scale, block, repeats), "a")
    found = run(layer, x)
    y = product(layer, keep(x, dim, index, scale), w, b)
    gi, gw = grads(layer, x, w, noise(y))
    close(found, y=y, x=keep(gi, dim, index, scale), weight=keep(gw, 1, index, scale))
    outside = [c for c in range(8) if c not in index]
    assert found["x"].transpose(0, dim)[outside].abs().max() == 0
    assert found["weight"][:, outside].abs().max() == 0
    if make is conv:
        assert found["y"].is_contiguous(memory_format=layout)
        assert found["x"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [None, [0.5, 2.0, 3.0, 0.1]])
@pytest.mark.parametrize("products", [["grad_input", "grad_weight"], ["grad_input"], ["grad_weight"]])
def test_out_channels(make, layout, scale, products) -> None:  # type: ignore[no-untyped-def]
    index = [1, 2, 7, 11]
    layer, x = make(layout)
    dim = 1 if make is conv else -1
    plain = run(layer, x)
    selector = Fixed(index, scale)
    install(layer).select("out_channels", selector, "a", products)
    found = run(layer, x)
    assert torch.equal(found["y"], plain["y"])
    assert len(selector.seen) == 1
    go = noise(found["y"])
    kept = keep(go, dim, index, scale)
    gi, gw = grads(layer, x, layer.weight, kept)
    rest = tuple(d for d in range(go.dim()) if d != dim % go.dim())
    if "grad_weight" in products:
        close(found, weight=gw, bias=kept.sum(rest))
        assert found["weight"][[0, 3, 4, 5, 6, 8, 9, 10]].abs().max() == 0
        assert found["bias"][[0, 3, 4, 5, 6, 8, 9, 10]].abs().max() == 0
    else:
        close(found, weight=plain["weight"], bias=plain["bias"])
    close(found, x=gi if "grad_input" in products else plain["x"])


@pytest.mark.parametrize("groups", [1, 2])
def test_batch(groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, groups=groups, dtype=torch.float64)
    x = torch.randn(6, 8, 7, 7, dtype=torch.float64)
    plain = run(layer, x)
    install(layer).select("batch", Fixed([0, 2, 5], [2.0, 1.5, 4.0]), "a")
    found = run(layer, x)
    close(found, y=plain["y"], x=plain["x"], bias=plain["bias"])
    w = layer.weight.detach().requires_grad_()
    y = functional.conv2d(x, w, groups=groups)
    (gw,) = torch.autograd.grad(y, w, keep(noise(y), 0, [0, 2, 5], [2.0, 1.5, 4.0]))
    close(found, weight=gw)


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_and_out_channels_and_batch_compose(make, layout) -> None:  # type: ignore[no-untyped-def]
    layer, x = make(layout)
    dim = 1 if make is conv else -1
    w, b = layer.weight.detach(), layer.bias.detach()
    plan = install(layer)
    plan.select("in_channels", Fixed([0, 3, 4]), "forward")
    plan.select("out_channels", Fixed([1, 2, 7]), "backward")
    found = run(layer, x)
    y = product(layer, keep(x, dim, [0, 3, 4]), w, b)
    kept = keep(noise(y), dim, [1, 2, 7])
    gi, gw = grads(layer, x, w, kept)
    rest = tuple(d for d in range(y.dim()) if d != dim % y.dim())
    close(found, y=y, x=keep(gi, dim, [0, 3, 4]), weight=keep(gw, 1, [0, 3, 4]), bias=kept.sum(rest))

    plan.select("batch", Fixed([0, 3]), "examples")
    found = run(layer, x)
    _, gw = grads(layer, x, w, keep(kept, 0, [0, 3]))
    close(found, y=y, x=keep(gi, dim, [0, 3, 4]), weight=keep(gw, 1, [0, 3, 4]), bias=kept.sum(rest))


def test_different_rows_for_each_gradient() -> None:
    layer, x = conv(CHANNELS_LAST)
    plan = install(layer)
    plan.select("out_channels", Fixed([0, 1]), "a", ["grad_input"])
    plan.select("out_channels", Fixed([5]), "b", ["grad_weight"])
    found = run(layer, x)
    go = noise(found["y"])
    close(found, x=grads(layer, x, layer.weight, keep(go, 1, [0, 1]))[0])
    close(
        found, weight=grads(layer, x, layer.weight, keep(go, 1, [5]))[1], bias=keep(go, 1, [5]).sum((0, 2, 3))
    )


def test_only_the_selected_part_of_x_is_kept() -> None:
    layer = nn.Conv2d(8, 12, 3, bias=False)
    install(layer).select("in_channels", Fixed([1, 5]), "a")
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(3, 8, 6, 6))
    assert sorted(kept) == sorted([(12, 2, 3, 3), (3, 2, 6, 6), (2,)])


def test_a_selector_that_returns_none_means_exact() -> None:
    class Never(Fixed):
        def __call__(self, first: Tensor, second: Tensor) -> None:  # type: ignore[override]
            self.seen.append((first.shape, second.shape))

    layer, x = conv(CHANNELS_LAST)
    plain = run(layer, x)
    selectors = {dimension: Never([]) for dimension in ("in_channels", "out_channels", "batch")}
    for dimension, selector in selectors.items():
        install(layer).select(dimension, selector, dimension)
    found = run(layer, x)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    shapes = {dimension: selector.seen for dimension, selector in selectors.items()}
    assert shapes["in_channels"] == [(x.shape, layer.weight.shape)]
    assert shapes["out_channels"] == [(found["y"].shape, layer.weight.shape)]
    assert shapes["batch"] == [(x.shape, found["y"].shape)]


def test_transforms_stack_in_order_and_pass_gradients_through() -> None:
    layer, x = conv(CHANNELS_LAST)
    w = layer.weight.detach()

    class Plus(Times):
        def __call__(self, tensor: Tensor) -> Tensor:
            return tensor + self.factor

    plan = install(layer)
    plan.transform("x", Times(2.0), "a")
    plan.transform("x", Plus(1.0), "b")
    plan.transform("w", Times(3.0), "a")
    plan.transform("grad_output", Times(5.0), "a")
    plan.transform("grad_output", Times(7.0), "b", ["grad_weight"])
    plan.transform("grad_input", Times(11.0), "a")
    plan.transform("grad_weight", Times(13.0), "a")
    found = run(layer, x)
    y = product(layer, 2 * x + 1, 3 * w, layer.bias.detach())
    gi, gw = grads(layer, 2 * x + 1, 3 * w, noise(y))
    close(found, y=y, x=5 * 11 * gi, weight=5 * 7 * 13 * gw, bias=35 * noise(y).sum((0, 2, 3)))


def test_a_differentiable_transform_has_its_own_gradient() -> None:
    class Clamp(Identity):
        differentiable = True

        def __call__(self, tensor: Tensor) -> Tensor:
            return tensor.clamp(-0.5, 0.5)

    layer, x = conv(CHANNELS_LAST)
    install(layer).transform("x", Clamp(), "a")
    found = run(layer, x)
    gi, gw = grads(layer, x.clamp(-0.5, 0.5), layer.weight, noise(found["y"]))
    close(found, x=gi * (x.abs() <= 0.5), weight=gw)


def test_autocast_shows_the_plan_bfloat16_once() -> None:
    seen: list[torch.dtype] = []

    class See(TopK):
        def __call__(self, first: Tensor, second: Tensor):  # type: ignore[no-untyped-def]
            seen.extend((first.dtype, second.dtype))
            assert not torch.is_autocast_enabled("cpu")
            return super().__call__(first, second)

    layer, x = nn.Conv2d(8, 8, 3).to(memory_format=CHANNELS_LAST), torch.randn(2, 8, 6, 6)
    plan = install(layer)
    plan.select("in_channels", See(4), "a")
    plan.select("out_channels", See(4), "b")
    found = run(layer, x.contiguous(memory_format=CHANNELS_LAST), autocast=True)
    assert seen == [torch.bfloat16] * 4
    assert found["y"].dtype == torch.bfloat16
    assert found["x"].dtype == found["weight"].dtype == found["bias"].dtype == torch.float32
    double = nn.Linear(8, 8, dtype=torch.float64)
    install(double).transform("x", Identity(), "a")
    assert run(double, torch.randn(2, 8, dtype=torch.float64), autocast=True)["y"].dtype == torch.float64


def test_groups_tie_channels() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    plan = install(layer, "blocks.1.conv")
    for dimension in ("in_channels", "out_channels"):
        with pytest.raises(errors.UnsupportedError, match=r"blocks\.1\.conv.*groups=2"):
            plan.select(dimension, Fixed([0]), "a")
