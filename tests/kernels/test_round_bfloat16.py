"""Stochastic rounding to bfloat16: unbiased, to a neighbour, and every form equal to the reference bit for bit."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import dense
from hasten.kernels.reference import round_bfloat16 as reference
from hasten.kernels.round_bfloat16 import round_bfloat16

ODD = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-40,
    -1e-45,
    3.4e38,
    -3.4028235e38,
    float("inf"),
    float("-inf"),
    float("nan"),
]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def expected(x: Tensor, key: int) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    y.as_strided((y.numel(),), (1,)).copy_(
        reference.round_bfloat16(x.as_strided((x.numel(),), (1,), x.storage_offset()), key)
    )
    return y


@each_isa
@pytest.mark.parametrize("n", [0, 1, 15, 16, 31, 32, 33, 1000, 70001])
def test_every_form_equals_the_reference(isa: str, n: int) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g) * torch.exp(4 * torch.randn(n, generator=g))
    x[: len(ODD)] = torch.tensor(ODD)[:n]
    with instruction_set(isa), poisoned_memory():
        assert same_bits(round_bfloat16(x, 2**61 + n), expected(x, 2**61 + n))


@each_isa
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, layout: str) -> None:
    x = layouts(torch.randn(3, 5, 7, 9, generator=torch.Generator().manual_seed(1)))[layout]
    with instruction_set(isa), poisoned_memory():
        y = round_bfloat16(x, 5)
    assert y.shape == x.shape
    assert y.stride() == dense(x).stride()
    assert same_bits(y, expected(x, 5))
    assert ((y.float() - x).abs() <= x.abs() * 2**-7).all()


def test_unbiased() -> None:
    x = torch.tensor([1.001, -1.001, 3e-5, -7.7e8, 1e-30])
    draws = 100_000
    y = round_bfloat16(x.repeat(draws), 42).double().view(draws, -1)
    error = (y.mean(0) - x.double()).abs()
    assert (error <= 5 * y.std(0) / draws**0.5).all()
    nearest = x.bfloat16().double()
    assert (
        (nearest - x.double()).abs() > 20 * y.std(0) / draws**0.5
    ).any()  # rounding to nearest must not pass


def test_probability_is_the_distance() -> None:
    lower = torch.tensor([1.0, -2.0, 0.5])
    upper = lower * (1 + 2**-7)
    for share in (0.0, 0.1, 0.5, 0.9):
        x = lower + share * (upper - lower)
        y = round_bfloat16(x.repeat(40_000), 7).double().view(-1, 3)
        assert ((y == lower) | (y == upper)).all()
        up = (y == upper).double().mean(0)
        assert ((up - share).abs() <= 5 * (share * (1 - share) / 40_000) ** 0.5 + 1e-4).all()


def test_odd_values() -> None:
    y = round_bfloat16(torch.tensor(ODD).repeat(100), 3).view(100, -1).float()
    assert (y[:, 0] == 0).all()
    assert (y[:, [2, 3]] == torch.tensor([1.0, -1.0])).all()
    assert torch.isfinite(y[:, 6:8]).all()
    assert (y[:, 8] == torch.inf).all()
    assert (y[:, 9] == -torch.inf).all()
    assert y[:, 10].isnan().all()


def test_the_operator_is_well_formed() -> None:
    torch.library.opcheck(round_bfloat16, (torch.randn(4, 6), 9))


def test_other_dtypes_are_refused() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        with pytest.raises(UnsupportedError, match=r"allowed: torch\.float32"):
            round_bfloat16(torch.zeros(4, dtype=dtype), 1)


def test_triton_equals_the_reference(triton_interpreter: None) -> None:
    from hasten.kernels.gpu.round_bfloat16 import round_bfloat16 as triton

    x = torch.cat([torch.tensor(ODD), torch.randn(3000, generator=torch.Generator().manual_seed(2))])
    y = torch.empty_like(x, dtype=torch.bfloat16)
    triton(x, y, 2**62 + 99)
    assert same_bits(y, expected(x, 2**62 + 99))
