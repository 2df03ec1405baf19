"""Bit masks: ReLU and its gradient as PyTorch computes them, from one bit for each element, in every form."""

from __future__ import annotations

import math

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.bit_mask import bit_mask, masked, relu_mask, relu_mask_
from hasten.kernels.native import dense, flat
from hasten.kernels.reference import bit_mask as reference

ODD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan, -math.nan]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def numbers(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed + n))
    x[: len(ODD)] = torch.tensor(ODD)[:n]
    return x.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 31, 33, 64, 1000, 70001])
def test_every_form_is_pytorchs_relu(isa: str, dtype: torch.dtype, n: int) -> None:
    x, g = numbers(n, dtype), numbers(n, dtype, 5)
    with instruction_set(isa), poisoned_memory():
        y, mask = relu_mask(x)
        alone, inplace = bit_mask(x), x.clone()
        third = relu_mask_(inplace)
        back, scaled = masked(mask, g), masked(mask, g, 1.7)
    wanted = reference.bit_mask(x)
    assert mask.numel() == (n + 7) // 8
    for made in (mask, alone, third):
        assert torch.equal(made, wanted)
    assert same(y, x.relu())
    assert same(inplace, y)
    assert same(back, torch.ops.aten.threshold_backward(g, x.relu(), 0))
    assert same(scaled, torch.where(~(x <= 0), g * 1.7, 0))


@each_isa
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, layout: str) -> None:
    x = layouts(torch.randn(3, 5, 7, 9, generator=torch.Generator().manual_seed(1)))[layout]
    with instruction_set(isa), poisoned_memory():
        y, mask = relu_mask(x)
        copy = x.detach()
        mask_again = relu_mask_(copy)
        back = masked(mask, dense(x))
    assert y.stride() == dense(x).stride()
    assert torch.equal(mask, reference.bit_mask(flat(dense(x))))
    assert torch.equal(mask, mask_again)
    assert (x >= 0).all(), "in place means in place, whatever the layout"
    assert torch.equal(y, x)
    assert torch.equal(back, y)


def test_the_operators_are_well_formed() -> None:
    x = torch.randn(4, 6)
    for op in (bit_mask, relu_mask, relu_mask_):
        torch.library.opcheck(op, (x.clone(),))
    torch.library.opcheck(masked, (bit_mask(x), x, 2.0))


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="floating point"):
        bit_mask(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(UnsupportedError, match="mask"):
        masked(torch.zeros(2, dtype=torch.uint8), torch.zeros(17))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_the_reference(triton_interpreter: None, dtype: torch.dtype) -> None:
    from hasten.kernels.gpu.bit_mask import bit_mask as make
    from hasten.kernels.gpu.bit_mask import masked as apply

    x, g = numbers(3001, dtype), torch.randn(3001, generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = reference.bit_mask(x)
    mask, y = torch.full_like(wanted, 99), torch.full_like(x, 9.0)
    make(x, y, mask)
    assert torch.equal(mask, wanted)
    assert same(y, x.relu())
    mask.fill_(99)
    make(x, None, mask)
    assert torch.equal(mask, wanted)
    for scale in (1.0, 1.7):
        back = torch.full_like(x, 9.0)
        apply(mask, g, back, scale)
        assert same(back, reference.masked(mask, g, scale))
