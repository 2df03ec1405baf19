"""Claims, conflicts, kernels and codecs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten import errors
from hasten.products import Geometry, Plan, Saved, arithmetic, install

from .support import Fixed, Identity, run


class OutputTwice:
    """An output kernel that hands its backward kernel a tensor."""

    name = "twice"
    selectable = True

    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return 2 * arithmetic.output(x, w, bias, geometry), (x.mean(), w.mean())


class InputFromExtras:
    name = "input from extras"
    selectable = False

    def __call__(self, grad_output: Tensor, w: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        mean, _ = saved.extras
        return arithmetic.grad_input(grad_output, w, geometry, saved) * mean


class ZeroWeight:
    name = "zero"
    selectable = True
    needs_x = False

    def __call__(self, grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        return torch.zeros_like(saved.w_like)


class Half:
    """A codec that keeps x in bfloat16."""

    name = "bf16"

    def __init__(self) -> None:
        self.observed: list[torch.Size] = []

    def encode(self, x: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        return (x.to(torch.bfloat16), x.new_ones(1)), x.dtype

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        return tensors[0].to(meta) * tensors[1]

    def observe(self, grad_output: Tensor) -> None:
        self.observed.append(grad_output.shape)


def test_one_owner_a_place() -> None:
    plan = Plan("conv1")
    plan.select("in_channels", Fixed([0]), "approximate_tensor_ops")
    plan.select("out_channels", Fixed([0]), "error_map_pruning")
    plan.codec(Half(), "actnn")
    plan.kernel("grad_weight", ZeroWeight(), "gradient_approximation")
    plan.transform("x", Identity(), "limited_precision")
    plan.transform("x", Identity(), "another")
    assert plan.owners == (
        "approximate_tensor_ops",
        "error_map_pruning",
        "actnn",
        "gradient_approximation",
        "limited_precision",
        "another",
    )
    claims = len(plan.claims)
    attempts = [
        (lambda: plan.select("in_channels", Fixed([1]), "new"), "approximate_tensor_ops", "in_channels"),
        (
            lambda: plan.select("out_channels", Fixed([1]), "new", ["grad_input"]),
            "error_map_pruning",
            "out_channels",
        ),
        (lambda: plan.codec(Half(), "new"), "actnn", "codec"),
        (lambda: plan.kernel("grad_weight", ZeroWeight(), "new"), "gradient_approximation", "grad_weight"),
        (lambda: plan.kernel("grad_input", InputFromExtras(), "new"), "approximate_tensor_ops", "grad_input"),
    ]
    for attempt, owner, place in attempts:
        with pytest.raises(
            errors.ConflictError, match=f"'conv1'.*'new'.*{place}.*'{owner}'.*Use one of the two"
        ):
            attempt()
    assert len(plan.claims) == claims


def test_a_kernel_that_cannot_be_shrunk_refuses_a_selection_in_either_order() -> None:
    plan = Plan()
    plan.kernel("grad_input", InputFromExtras(), "a")
    plan.select("out_channels", Fixed([0]), "b", ["grad_weight"])
    with pytest.raises(errors.ConflictError, match=r"'c'.*grad_input.*'a'"):
        plan.select("in_channels", Fixed([0]), "c")


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda plan: plan.transform("grad_ouput", Identity(), "a"), "grad_output"),
        (lambda plan: plan.select("inchannels", Fixed([0]), "a"), "in_channels"),
        (lambda plan: plan.kernel("outputs", OutputTwice(), "a"), "output"),
        (lambda plan: plan.select("batch", Fixed([0]), "a", ["grad_input"]), "grad_weight"),
        (lambda plan: plan.select("in_channels", Fixed([0]), "a", ["output"]), "Leave out"),
        (lambda plan: plan.transform("grad_output", Identity(), "a", []), "no product"),
    ],
)
def test_unknown_places_name_the_known_ones(call: Any, hint: str) -> None:
    with pytest.raises(errors.SettingsError, match=hint):
        call(Plan())


def test_release_and_activate_are_by_owner() -> None:
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(2, 4, 6, 6)
    plain = run(layer, x)
    plan = install(layer)
    plan.select("in_channels", Fixed([0]), "a")
    plan.select("out_channels", Fixed([0, 1]), "b")
    both = run(layer, x)
    plan.activate("a", False)
    assert torch.equal(run(layer, x)["y"], plain["y"])
    assert run(layer, x)["weight"][2:].abs().max() == 0
    with pytest.raises(errors.ConflictError):
        plan.select("in_channels", Fixed([1]), "c")
    plan.activate("a")
    assert torch.equal(run(layer, x)["x"], both["x"])
    plan.release("b")
    plan.release("a")
    assert plan.exact
    assert all(torch.equal(tensor, plain[name]) for name, tensor in run(layer, x).items())
    with pytest.raises(errors.UnknownName, match="'a'"):
        plan.activate("a")


def test_kernels_take_their_products_and_share_what_the_output_kernel_kept() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, stride=2), torch.randn(2, 4, 7, 7)
    plain = run(layer, x)
    plan = install(layer)
    plan.kernel("output", OutputTwice(), "a")
    plan.kernel("grad_input", InputFromExtras(), "a")
    found = run(layer, x)
    torch.testing.assert_close(found["y"], 2 * plain["y"])
    torch.testing.assert_close(found["x"], plain["x"] * x.mean())
    assert torch.equal(found["weight"], plain["weight"])
    assert torch.equal(found["bias"], plain["bias"])


def test_a_weight_kernel_without_need_of_x_frees_it_and_leaves_the_rest_exact() -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 7)
    plain = run(layer, x)
    install(layer).kernel("grad_weight", ZeroWeight(), "a")
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x)
    assert kept == [layer.weight.shape]
    found = run(layer, x)
    assert found["weight"].abs().max() == 0
    for name in ("y", "x"):
        assert torch.equal(found[name], plain[name])
    torch.testing.assert_close(found["bias"], plain["bias"])


@pytest.mark.parametrize("chosen", [None, [0, 3]])
def test_codec_stores_what_it_encodes(chosen: list[int] | None) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 7)
    plan = install(layer)
    if chosen:
        plan.select("in_channels", Fixed(chosen), "s")
    plain = run(layer, x)
    codec = Half()
    plan.codec(codec, "a")
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        layer(x)
    assert torch.bfloat16 in kept
    found = run(layer, x)
    assert codec.observed == [found["y"].shape]
    assert torch.equal(found["y"], plain["y"])
    assert torch.equal(found["x"], plain["x"])
    install(layer).release("a")
    rounded = run(layer, x.to(torch.bfloat16).float())
    torch.testing.assert_close(found["weight"], rounded["weight"])
    assert not torch.equal(found["weight"], plain["weight"])
