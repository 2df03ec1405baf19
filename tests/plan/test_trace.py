"""The work of a step, from shapes: it agrees with the MACs counted layer by layer, and leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten import models
from hasten.measure.macs import macs
from hasten.plan.trace import Work, trace


def flops(works: list[Work], product: str | None = None) -> float:
    return sum(w.flops for w in works if product is None or w.term.startswith(product))


@pytest.mark.parametrize("name", ["resnet8", "vgg16", "mobilenet-v1", "wrn-10-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flops_are_two_for_each_mac(name: str, dtype: torch.dtype) -> None:
    model = models.build(name, seed=0)
    count = macs(model, torch.zeros(1, 3, 32, 32))
    works = trace(model, (8, 3, 32, 32), dtype=dtype)
    assert flops(works) == 2 * 8 * count.training
    convolutions = [c for c in count.layers.values() if c.kind == "conv"]
    for product in ("grad_input", "grad_weight"):
        expected = 2 * 8 * sum(getattr(c, product) for c in convolutions)
        assert flops(works, product) == expected
    first = next(iter(count.layers.values()))
    assert first.grad_input == 0, "nothing needs the gradient of the images"


def test_bytes_of_a_convolution_and_what_is_rounded() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        nn.Conv2d(5, 7, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(63, 4),
    )
    works = {w.term: w for w in trace(model, (2, 3, 10, 10)) if "grad" in w.term}
    x, w, y = 2 * 5 * 8 * 8, 5 * 7 * 9, 2 * 7 * 3 * 3
    last = works["grad_input float32"]
    assert last.bytes == 4 * (x + w + y)
    assert last.weights == w
    assert last.converts == x
    assert last.flops == 2 * y * 5 * 9
    half = next(w for w in trace(model, (2, 3, 10, 10), dtype=torch.bfloat16) if "grad_input" in w.term)
    assert half.bytes == last.bytes / 2
    assert half.flops == last.flops


def test_passes_over_batch_norm_are_three_and_four() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    works = trace(model, (16, 3, 8, 8))
    size = 4 * 16 * 4 * 8 * 8
    assert sorted(w.bytes for w in works if w.term == "norm float32") == [3 * size, 4 * size]
    relu = {w.name: w.bytes for w in works if w.name in ("relu", "threshold_backward")}
    assert relu == {"relu": 2 * size, "threshold_backward": 3 * size}


def test_casts_appear_with_autocast_only() -> None:
    model = models.build("resnet8", seed=0)
    assert not [w for w in trace(model, (4, 3, 32, 32)) if w.term == "cast"]
    cast = [w for w in trace(model, (4, 3, 32, 32), dtype=torch.bfloat16) if w.term == "cast"]
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(6.0 * n in {w.bytes for w in cast} for n in weights), (
        "each weight is read in 4 and written in 2 bytes"
    )


def test_a_step_twice_as_large_is_twice_the_work() -> None:
    model = models.build("resnet8", seed=0)
    small, large = trace(model, (8, 3, 32, 32)), trace(model, (16, 3, 32, 32))
    assert flops(large) == 2 * flops(small)
    assert [w.term for w in small] == [w.term for w in large]
    norm = [(a.bytes, b.bytes) for a, b in zip(small, large, strict=True) if a.term.startswith("norm")]
    assert all(b == 2 * a for a, b in norm)


def test_tracing_needs_no_memory_and_changes_nothing() -> None:
    model = models.build("resnet8", seed=0).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    works = trace(model, (1_000_000, 3, 32, 32))
    assert flops(works) > 1e13
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operation_can_be_run_again(dtype: torch.dtype) -> None:
    for work in {
        w.key(): w for w in trace(models.build("resnet8", seed=0), (2, 3, 32, 32), dtype=dtype)
    }.values():
        work.replay()()


def test_large_results_are_fresh_and_those_in_place_are_not() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    works = {w.name: w for w in reversed(trace(model, (64, 3, 32, 32)))}
    assert works["convolution"].fresh == 4 * 64 * 64 * 32 * 32
    assert works["relu_"].fresh == 0
    assert works["addmm"].fresh == 0
