"""Products that skip zeros: equal to the dense ones for every geometry, density, dtype, layout and instruction set."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels import zero_skip
from hasten.kernels.gpu import zero_skip as gpu
from hasten.kernels.native import extension
from hasten.kernels.reference import zero_skip as reference


class Case(NamedTuple):
    n: int
    h: int
    w: int
    c: int
    o: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def rest(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)


CASES = [
    Case(3, 7, 9, 16, 16),
    Case(2, 8, 8, 64, 40),  # three taps of four vectors, channels of grad_output no multiple of 16
    Case(2, 4, 4, 64, 40, (5, 5), padding=(2, 2)),
    Case(5, 2, 2, 48, 33),  # most taps fall outside
    Case(3, 11, 10, 3, 17, (7, 7), (2, 2), (3, 3)),  # few channels: taps merged
    Case(2, 16, 16, 3, 20, (11, 11), (4, 4), (5, 5)),
    Case(2, 9, 9, 20, 8, (3, 2), (2, 1), (1, 0), (2, 2)),  # channels no multiple of 16, dilated
    Case(2, 9, 8, 96, 24, (1, 1), (2, 2), (0, 0)),
    Case(2, 9, 9, 36, 8, padding=(4, 3)),  # outputs that meet only padding
    Case(3, 17, 16, 128, 24),
    Case(7, 1, 1, 384, 50, (1, 1), padding=(0, 0)),
    Case(2, 9, 9, 10, 8, (1, 1), padding=(0, 0)),
    Case(2, 5, 13, 32, 5, (1, 6), (1, 3), (0, 2)),  # more taps than a tile holds
    Case(1, 6, 6, 272, 18, dilation=(2, 1)),
    Case(33, 3, 3, 16, 16, (3, 3)),
]


def made(case: Case, density: float, dtype: torch.dtype, key: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_output, x, w), channels last."""
    random = torch.Generator().manual_seed(100 * key + case.h * case.c)
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            (case.h, case.w), case.kernel, case.stride, case.padding, case.dilation, strict=True
        )
    ]
    g = torch.randn(case.n, case.o, *sizes, generator=random)
    g = g * (torch.rand(g.shape, generator=random) < density)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=random)
    w = torch.randn(case.o, case.c, *case.kernel, generator=random)
    g, x, w = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (g, x, w))
    return g, x, w


def products(case: Case, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return (
        zero_skip.grad_input(g, w, list(x.shape), *case.rest),
        zero_skip.grad_weight(g, x, list(w.shape[2:]), *case.rest),
    )


def exact(case: Case, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    g, x, w = g.double(), x.double(), w.double()
    return (
        reference.grad_input(g, w, list(x.shape), *case.rest),
        reference.grad_weight(g, x, list(w.shape[2:]), *case.rest),
    )


def close(got: Tensor, wanted: Tensor) -> bool:
    """Equal to 1e-5 of the largest; in bfloat16 to a rounding of the result."""
    error = (got.double() - wanted).abs()
    size = 1e-5 * (wanted.abs().max() + 1e-30)
    return bool((error <= size + (2.0**-8 * wanted.abs() if got.dtype == torch.bfloat16 else 0)).all())


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_dense_products(isa: str, dtype: torch.dtype, case: Case) -> None:
    for key, density in enumerate((0.0, 0.1, 0.5, 1.0)):
        tensors = made(case, density, dtype, key)
        with instruction_set(isa), poisoned_memory():
            got = products(case, *tensors)
        for name, a, b in zip(("grad_input", "grad_weight"), got, exact(case, *tensors), strict=True):
            assert a.shape == b.shape, name
            assert a.dtype == dtype, name
            assert a.is_contiguous(memory_format=torch.channels_last), name
            assert close(a, b), f"{name} at density {density}"


@each_isa
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, layout: str) -> None:
    case = Case(3, 6, 5, 32, 18)
    tensors = made(case, 0.3, torch.float32)
    wanted = exact(case, *tensors)
    with instruction_set(isa), poisoned_memory():
        got = products(case, *(layouts(t)[layout] for t in tensors))
    assert close(got[0], wanted[0])
    assert close(got[1], wanted[1])


def test_what_is_zero_is_not_multiplied() -> None:
    if extension() is None:
        pytest.skip("the extension is not built")
    case = Case(2, 6, 6, 32, 16)
    g, x, w = made(case, 0.2, torch.float32)
    g[:, 3] = 0
    g[1] = 0
    w[3] = torch.nan
    x[1] = torch.inf
    gi, gw = products(case, g, x, w)
    assert gi.isfinite().all()
    assert gw.isfinite().all()
    assert (gw[3] == 0).all()


def test_what_is_not_finite_is_multiplied() -> None:
    case = Case(2, 6, 6, 32, 16)
    g, x, w = made(case, 0.2, torch.float32)
    g[0, 2, 3, 3] = torch.nan
    gi, gw = products(case, g, x, w)
    assert gi[0, :, 2:5, 2:5].isnan().all()
    assert gi[1].isfinite().all()
    assert gw[2].isnan().all()
    assert gw[3].isfinite().all()


@pytest.mark.parametrize(
    "case", [Case(9, 8, 8, 64, 64), Case(40, 2, 2, 48, 130), Case(5, 20, 20, 3, 32)], ids=str
)
def test_threads_do_not_change_a_bit(case: Case) -> None:
    if extension() is None:
        pytest.skip("the extension is not built")
    tensors = made(case, 0.2, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(products(case, *tensors))
    finally:
        torch.set_num_threads(before)
    for gi, gw in found[1:]:
        assert torch.equal(gi, found[0][0])
        assert torch.equal(gw, found[0][1])


def test_other_dtypes_and_mixed_ones_take_the_dense_product() -> None:
    case = Case(2, 6, 6, 8, 16)
    g, x, w = made(case, 0.3, torch.float64)
    wanted = exact(case, g, x, w)
    got = products(case, g, x, w)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_empty_batch() -> None:
    case = Case(0, 6, 6, 16, 16)
    gi, gw = products(case, *made(case, 0.3, torch.float32))
    assert gi.shape == (0, 16, 6, 6)
    assert (gw == 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case(2, 6, 6, 8, 16)
    g, x, w = made(case, 0.3, torch.float32)
    with pytest.raises(UnsupportedError, match="without groups"):
        zero_skip.grad_input(g, w[:, :4], list(x.shape), *case.rest)
    with pytest.raises(UnsupportedError, match="allowed"):
        zero_skip.grad_weight(g[:, :, 1:], x, [3, 3], *case.rest)
    with pytest.raises(UnsupportedError, match="allowed"):
        zero_skip.grad_weight(g, x, [3, 3], [1, 1], [-1, -1], [1, 1])


def test_the_operators_are_well_formed() -> None:
    case = Case(2, 6, 6, 16, 16)
    g, x, w = made(case, 0.3, torch.float32)
    torch.library.opcheck(zero_skip.grad_input, (g, w, list(x.shape), *case.rest))
    torch.library.opcheck(zero_skip.grad_weight, (g, x, [3, 3], *case.rest))


def test_the_form_for_a_gpu_is_the_dense_one() -> None:
    assert gpu.grad_input is reference.grad_input
    assert gpu.grad_weight is reference.grad_weight
