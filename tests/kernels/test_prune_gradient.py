"""Stochastic pruning of gradients: unbiased, to 0 or +-tau, and every form equal to the reference bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.native import dense
from hasten.kernels.prune_gradient import prune_gradient
from hasten.kernels.reference import prune_gradient as reference

ODD = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-40, -1e-45, 3e38, float("inf"), float("-inf"), float("nan")]


def randn(*shape: int, key: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key))


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def expected(g: Tensor, tau: float, key: int) -> tuple[Tensor, Tensor]:
    g = dense(g)
    y = torch.empty_like(g)
    line, totals = reference.prune_gradient(g.as_strided((g.numel(),), (1,)), tau, key)
    y.as_strided((y.numel(),), (1,)).copy_(line)
    return y, totals


def agree(got: Tensor, wanted: Tensor) -> bool:
    return torch.equal(got[1:], wanted[1:]) and torch.allclose(got[0], wanted[0], rtol=1e-6, equal_nan=True)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 15, 31, 32, 33, 1000, 4097, 70001])
def test_every_form_equals_the_reference(isa: str, dtype: torch.dtype, n: int) -> None:
    g = (randn(n, key=n) * (randn(n, key=n + 1) > -0.5)).to(dtype)
    for tau in (0.0, 0.77, 1e-3, 50.0):
        wanted = expected(g, tau, 2**61 + n)
        with instruction_set(isa), poisoned_memory():
            got = prune_gradient(g, tau, 2**61 + n)
        assert same_bits(got[0], wanted[0])
        assert agree(got[1], wanted[1])
    assert same_bits(prune_gradient(g, 0.0, 3)[0], g), "tau 0 must return the very bits"


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_values(isa: str, dtype: torch.dtype) -> None:
    g = torch.tensor(ODD, dtype=dtype).repeat(50)
    wanted = expected(g, 0.5, 9)
    with instruction_set(isa):
        y, totals = prune_gradient(g, 0.5, 9)
    assert same_bits(y, wanted[0])
    assert agree(totals, wanted[1])
    assert not math.isfinite(totals[0].item())
    rows = y.view(50, -1).float()
    assert (rows[:, :2] == 0).all()
    assert (rows[:, 2:6] == torch.tensor([1.0, -1.0, 0.5, -0.5])).all()
    assert (rows[:, 9] == torch.inf).all()
    assert (rows[:, 10] == -torch.inf).all()
    assert rows[:, 11].isnan().all()


@each_isa
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, layout: str) -> None:
    g = layouts(randn(3, 5, 7, 9, key=1))[layout]
    with instruction_set(isa), poisoned_memory():
        y, totals = prune_gradient(g, 0.8, 5)
    wanted = expected(g, 0.8, 5)
    assert y.shape == g.shape
    assert y.stride() == dense(g).stride()
    assert same_bits(y, wanted[0])
    assert agree(totals, wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unbiased(dtype: torch.dtype) -> None:
    tau, draws = 0.7, 100_000
    level = torch.tensor(tau, dtype=dtype).double()
    g = (torch.tensor([0.0, 0.1, -0.1, 0.5, -0.9, 0.9, 2.0, -2.0]) * tau).to(dtype)
    y = prune_gradient(g.repeat(draws), tau, 42)[0].double().view(draws, -1)
    error = (y.mean(0) - g.double()).abs()
    share = (g.double().abs() / level).clamp(max=1)
    spread = level * (share * (1 - share)).sqrt() / draws**0.5
    assert (error <= 5 * spread + 2**-17 * tau).all()
    assert (y[:, 0] == 0).all()
    # the variance is |g| (tau - |g|)
    wanted = (g.double().abs() * (level - g.double().abs())).clamp(min=0)
    assert (y.var(0) - wanted).abs().max() < 0.01 * tau * tau


def test_only_three_outcomes() -> None:
    g = randn(50_000, key=4)
    y, totals = prune_gradient(g, 1.3, 8)
    large = g.abs() >= 1.3
    assert torch.equal(y[large], g[large])
    small = y[~large]
    level = torch.tensor(1.3)
    assert ((small == 0) | (small == level) | (small == -level)).all()
    assert (y * g >= 0).all(), "a sign flipped"
    assert totals[1:].tolist() == [0.0, float((small == 0).sum()), float((small != 0).sum())]
    assert math.isclose(totals[0].item(), g.double().abs().sum().item(), rel_tol=1e-6)


def test_noise_is_a_function_of_the_key() -> None:
    g = randn(4000, key=5)
    one, same, other = (prune_gradient(g, 1.0, key)[0] for key in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_threads_do_not_change_the_result() -> None:
    g = randn(300_001, key=6)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(prune_gradient(g, 1.0, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, found[0][0]) and torch.equal(b, found[0][1]) for a, b in found)


def test_other_dtypes_take_the_reference_and_integers_are_refused() -> None:
    for dtype in (torch.float64, torch.float16):
        g = randn(2000, key=7).to(dtype)
        y, totals = prune_gradient(g, 0.9, 3)
        assert y.dtype == dtype
        assert totals[1:].sum() == (g.double().abs() < torch.tensor(0.9, dtype=dtype).double()).sum()
    with pytest.raises(UnsupportedError, match="floating point"):
        prune_gradient(torch.zeros(4, dtype=torch.int32), 1.0, 1)
    for tau in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UnsupportedError, match="0 or more and finite"):
            prune_gradient(torch.zeros(4), tau, 1)


def test_the_operator_is_well_formed() -> None:
    torch.library.opcheck(prune_gradient, (randn(4, 6, key=1), 0.5, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_the_reference(triton_interpreter: None, dtype: torch.dtype) -> None:
    from hasten.kernels.gpu.prune_gradient import prune_gradient as triton

    odd = [
        x for x in ODD if not 0 < abs(x) < 1e-30
    ]  # the interpreter reads bfloat16's subnormal numbers as 0
    g = torch.cat([torch.tensor(odd), randn(3000, key=2)]).to(dtype)
    y = torch.empty_like(g)
    totals = triton(g, y, torch.tensor(0.8, dtype=dtype).item(), 2**62 + 99)
    wanted = expected(g, 0.8, 2**62 + 99)
    assert torch.equal(y.nan_to_num(7.0), wanted[0].nan_to_num(7.0))
    assert agree(totals, wanted[1])
