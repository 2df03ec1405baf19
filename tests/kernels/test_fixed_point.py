"""Rounding to fixed point: on the grid, unbiased where it must be, and every form equal to the reference."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor

from hasten import keyed
from hasten.errors import SettingsError, UnsupportedError
from hasten.kernels.fixed_point import fixed_point
from hasten.kernels.native import dense
from hasten.kernels.reference import fixed_point as reference

ODD = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, -2.5, 1e-40, -1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan"),
       8388607.5, -8388607.5, 0.49999997, -0.49999997, 1 - 2**-24]  # fmt: skip
MODES = pytest.mark.parametrize("stochastic", [False, True])


def rand(n: int, key: int = 0) -> Tensor:
    return torch.randn(n, generator=keyed.generator("fixed_point", key))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def expected(
    x: Tensor, word: int, fraction: int, key: int, stochastic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    y = torch.empty_like(x)
    line = x.as_strided((x.numel(),), (1,), x.storage_offset())
    rounded, saturated, largest = reference.fixed_point(line, word, fraction, key, stochastic)
    y.as_strided((y.numel(),), (1,)).copy_(rounded)
    return y, saturated, largest


@each_isa
@MODES
@pytest.mark.parametrize("n", [0, 1, 15, 31, 32, 33, 1000, 16385, 70001])
@pytest.mark.parametrize("form", [(16, 14), (8, 0), (24, 10), (4, -3), (1, 2)])
def test_every_form_equals_the_reference(isa: str, stochastic: bool, n: int, form: tuple[int, int]) -> None:
    x = rand(n, n) * torch.exp(3 * rand(n, n + 1))
    x[: len(ODD)] = torch.tensor(ODD)[:n]
    with instruction_set(isa), poisoned_memory():
        found = fixed_point(x, *form, 2**61 + n, stochastic)
    for got, wanted in zip(found, expected(x, *form, 2**61 + n, stochastic), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@each_isa
def test_the_bits_after_the_first_sixteen_decide_where_those_do_not(isa: str) -> None:
    """A share below 2**-16 of a step is met about 2000 times less often than the first bits could tell apart."""
    n = 1 << 22
    x = torch.full((n,), 2.0**-19)
    with instruction_set(isa):
        y, _, _ = fixed_point(x, 16, 0, 11, True)
    assert torch.equal(y, expected(x, 16, 0, 11, True)[0])
    up = int((y == 1).sum())
    assert abs(up - n * 2.0**-19) <= 5 * (n * 2.0**-19) ** 0.5
    assert up > 0


@each_isa
@MODES
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, stochastic: bool, layout: str) -> None:
    x = layouts(rand(3 * 5 * 7 * 9).view(3, 5, 7, 9))[layout]
    with instruction_set(isa), poisoned_memory():
        y, saturated, largest = fixed_point(x, 12, 10, 5, stochastic)
    wanted = expected(x, 12, 10, 5, stochastic)
    assert y.shape == x.shape
    assert y.stride() == dense(x).stride()
    assert torch.equal(y, wanted[0])
    assert saturated == wanted[1] == ((x > 2 - 2**-10) | (x < -2)).sum()
    assert largest == x.abs().max()


@each_isa
@MODES
@pytest.mark.parametrize("form", [(16, 14), (8, 4), (20, 18), (24, 12)])
def test_on_the_grid_within_the_range_and_idempotent(
    isa: str, stochastic: bool, form: tuple[int, int]
) -> None:
    word, fraction = form
    with instruction_set(isa):
        y, _, _ = fixed_point(3 * rand(10_001), word, fraction, 3, stochastic)
        again, saturated, _ = fixed_point(y, word, fraction, 4, stochastic)
    steps = y * 2.0**fraction
    assert torch.equal(steps, steps.round())
    assert steps.max() <= 2 ** (word - 1) - 1
    assert steps.min() >= -(2 ** (word - 1))
    assert torch.equal(again, y)
    assert not saturated


@each_isa
def test_stochastic_rounding_is_unbiased_and_nearest_is_not(isa: str) -> None:
    x = torch.tensor([0.3, -0.3, 1.00003, -1.77777, 2**-14 * 0.1, -(2**-14) * 0.01, 2**-14 * 1e-3])
    draws = 100_000
    with instruction_set(isa):
        y = fixed_point(x.repeat(draws), 16, 14, 77, True)[0].double().view(draws, -1)
        nearest = fixed_point(x, 16, 14, 0, False)[0].double()
    share = (x.double() * 2**14) % 1
    deviation = 2**-14 * (share * (1 - share)).sqrt()
    error = (y.mean(0) - x.double()).abs()
    assert (error <= 5 * deviation / draws**0.5).all()
    assert ((nearest - x.double()).abs() > 5 * deviation / draws**0.5).any()
    # the variance law eps**2 p (1 - p), within 5 deviations of the variance of Bernoulli draws
    law = share * (1 - share)
    spread = (law * (1 - 4 * law) / draws + 2 * law**2 / draws**2).sqrt()
    assert ((y.var(0) * 2**28 - law).abs() <= 5 * spread + 1e-9).all()
    assert ((y - x.double()).abs() < 2**-14).all()


@each_isa
@MODES
def test_ends_of_the_range(isa: str, stochastic: bool) -> None:
    x = torch.tensor(
        [1e9, -1e9, float("inf"), float("-inf"), 1.99999, -2.0, -2.00001, 2 - 2**-14, float("nan")]
    )
    with instruction_set(isa):
        y, saturated, largest = fixed_point(x.repeat(40), 16, 14, 1, stochastic)
    top = 2 - 2**-14
    wanted = torch.tensor([top, -2.0, top, -2.0, top, -2.0, -2.0, top])
    assert torch.equal(y.view(40, -1)[:, :8], wanted.expand(40, -1))
    assert y.view(40, -1)[:, 8].isnan().all()
    assert saturated == 6 * 40
    assert largest == torch.inf


@each_isa
def test_ties_go_up_when_rounding_to_nearest(isa: str) -> None:
    x = torch.tensor([0.5, -0.5, 1.5, -1.5, 2.5, 0.49999997, -0.50000006]).repeat(10)
    with instruction_set(isa):
        y, _, _ = fixed_point(x, 8, 0, 0, False)
    assert torch.equal(y.view(10, -1), torch.tensor([1.0, 0.0, 2.0, -1.0, 3.0, 0.0, -1.0]).expand(10, -1))


def test_the_operator_is_well_formed() -> None:
    torch.library.opcheck(fixed_point, (rand(24).view(4, 6), 16, 14, 9, True))


def test_what_it_cannot_do_is_refused() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        with pytest.raises(UnsupportedError, match=r"allowed: torch\.float32"):
            fixed_point(torch.zeros(4, dtype=dtype), 16, 14, 1, True)
    for word, fraction in ((25, 10), (0, 0), (16, 101)):
        with pytest.raises(SettingsError, match="24"):
            fixed_point(torch.zeros(4), word, fraction, 1, True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets, tells of infinities
@MODES
def test_triton_equals_the_reference(triton_interpreter: None, stochastic: bool) -> None:
    from hasten.kernels.gpu.fixed_point import fixed_point as triton

    x = torch.cat([torch.tensor(ODD), rand(3000)])
    y = torch.empty_like(x)
    saturated, largest = triton(x, y, 16, 12, 2**62 + 99, stochastic)
    wanted = expected(x, 16, 12, 2**62 + 99, stochastic)
    assert torch.equal(y.nan_to_num(), wanted[0].nan_to_num())
    assert torch.equal(y.isnan(), wanted[0].isnan())
    assert (saturated, largest) == (wanted[1], wanted[2])
