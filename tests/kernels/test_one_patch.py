"""The one-patch weight gradient: its meaning by a plain loop, and every form equal to the reference.

Small whole numbers make float32 sums exact in any order and ties frequent, so forms are compared bit for bit.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.one_patch import POSITIONS, WEIGHTS, one_patch
from hasten.kernels.reference.one_patch import one_patch as reference

VARIANTS = list(product(POSITIONS, WEIGHTS))
#         n  o   c   hi  wi  kernel  stride  padding
SHAPES = [
    (1, 1, 1, 2, 2, (2, 2), (1, 1), (0, 0)),
    (2, 3, 5, 7, 6, (3, 3), (1, 1), (1, 1)),
    (3, 17, 33, 5, 9, (3, 3), (2, 2), (1, 1)),
    (2, 70, 3, 11, 8, (2, 3), (1, 2), (0, 1)),
    (2, 16, 16, 17, 19, (3, 3), (1, 1), (1, 1)),
    (1, 5, 40, 6, 6, (5, 5), (3, 1), (2, 2)),
    (2, 130, 100, 4, 4, (3, 3), (1, 1), (1, 1)),
    (2, 4, 2, 3, 3, (3, 3), (1, 1), (3, 3)),
    (70, 9, 8, 3, 3, (2, 2), (1, 1), (1, 1)),
    (7, 2, 64, 34, 33, (3, 3), (1, 1), (0, 0)),
    (3, 300, 64, 34, 33, (3, 3), (1, 1), (1, 1)),
]


def whole(*shape: int, key: int, largest: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(key)
    return torch.randint(-largest, largest + 1, shape, generator=g).float()


def operands(shape: tuple[int, int, int, int, int, tuple[int, int], tuple[int, int], tuple[int, int]], key: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, o, c, hi, wi, kernel, stride, padding = shape
    ho, wo = (
        (size + 2 * p - k) // s + 1 for size, k, s, p in zip((hi, wi), kernel, stride, padding, strict=True)
    )
    return whole(n, o, ho, wo, key=key), whole(n, c, hi, wi, key=key + 1)


def by_loops(g: Tensor, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], position: str, weight: str) -> Tensor:  # fmt: skip
    n, o, ho, wo = g.shape
    _, c, hi, wi = x.shape
    result = torch.zeros(o, c, *kernel)
    for image, channel in product(range(n), range(o)):
        places = [(i, j) for i in range(ho) for j in range(wo)]
        values = [float(g[image, channel, i, j]) for i, j in places]
        ranks = [abs(v) for v in values] if position == "argmax_abs" else values
        at = ranks.index(max(ranks))
        i, j = places[at] if position != "fixed" else (min(1, ho - 1), min(1, wo - 1))
        t = sum(values) if weight == "sum" else float(g[image, channel, i, j])
        for u, v in product(range(kernel[0]), range(kernel[1])):
            row, column = i * stride[0] + u - padding[0], j * stride[1] + v - padding[1]
            if 0 <= row < hi and 0 <= column < wi:
                result[channel, :, u, v] += t * x[image, :, row, column]
    return result


@pytest.mark.parametrize(("position", "weight"), VARIANTS)
@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[7:8])
def test_the_reference_is_the_formula(shape: tuple, position: str, weight: str) -> None:  # type: ignore[type-arg]
    g, x = operands(shape)
    kernel, stride, padding = shape[5:]
    got = reference(g, x, list(kernel), list(stride), list(padding), position, weight)
    assert torch.equal(got, by_loops(g, x, kernel, stride, padding, position, weight))


def test_a_patch_at_each_corner_reaches_into_the_padding() -> None:
    x = whole(4, 3, 5, 6, key=1)
    g = torch.zeros(4, 2, 5, 6)
    for image, (i, j) in enumerate([(0, 0), (0, 5), (4, 0), (4, 5)]):
        g[image, :, i, j] = torch.tensor([2.0, -3.0])
    exact = torch.ops.aten.convolution_backward(
        g, x, torch.zeros(2, 3, 3, 3), [2], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    for form in (one_patch, reference):
        assert torch.equal(form(g, x, [3, 3], [1, 1], [1, 1]), exact)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_equals_the_reference(shape: tuple, dtype: torch.dtype, isa: str) -> None:  # type: ignore[type-arg]
    kernel, stride, padding = (list(v) for v in shape[5:])
    for key, (position, weight) in enumerate(VARIANTS):
        g, x = (v.to(dtype) for v in operands(shape, key))
        expected = reference(g, x, kernel, stride, padding, position, weight).to(dtype)
        for memory in (torch.channels_last, torch.contiguous_format):
            a, b = g.contiguous(memory_format=memory), x.contiguous(memory_format=memory)
            with instruction_set(isa), poisoned_memory():
                got = one_patch(a, b, kernel, stride, padding, position, weight)
            assert got.dtype == dtype
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, expected), (position, weight, memory)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_numbers(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    g = torch.randn(9, 48, 12, 12, generator=generator).to(dtype)
    x = torch.randn(9, 40, 12, 12, generator=generator).to(dtype)
    expected = reference(g, x, [3, 3], [1, 1], [1, 1])
    with instruction_set(isa):
        got = one_patch(g, x, [3, 3], [1, 1], [1, 1]).float()
    bound = 2e-6 if dtype == torch.float32 else 2**-8
    assert (got - expected).abs().max() <= bound * expected.abs().max()


@each_isa
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, layout: str) -> None:
    g, x = operands(SHAPES[2])
    expected = reference(g, x, [3, 3], [2, 2], [1, 1])
    with instruction_set(isa), poisoned_memory():
        assert torch.equal(one_patch(layouts(g)[layout], x, [3, 3], [2, 2], [1, 1]), expected)
        assert torch.equal(one_patch(g, layouts(x)[layout], [3, 3], [2, 2], [1, 1]), expected)


def test_the_number_of_threads_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(6)
    before, found = torch.get_num_threads(), []
    g, x = (
        torch.randn(20, c, 9, 9, generator=generator).contiguous(memory_format=torch.channels_last)
        for c in (70, 66)
    )
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(one_patch(g, x, [3, 3], [1, 1], [1, 1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_no_images_and_other_dtypes_take_the_reference() -> None:
    assert torch.equal(
        one_patch(torch.zeros(0, 4, 5, 5), torch.zeros(0, 3, 5, 5), [3, 3], [1, 1], [1, 1]),
        torch.zeros(4, 3, 3, 3),
    )
    g, x = operands(SHAPES[1])
    got = one_patch(g.double(), x.double(), [3, 3], [1, 1], [1, 1])
    assert got.dtype == torch.float64
    assert torch.equal(got.float(), reference(g, x, [3, 3], [1, 1], [1, 1]))


def test_a_nan_in_the_gradient_is_not_lost() -> None:
    g, x = operands(SHAPES[1])
    g[1, 2, 3, 3] = torch.nan
    assert one_patch(g, x, [3, 3], [1, 1], [1, 1])[2].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"position": "corner"}, "argmax_abs, argmax, fixed"), ({"weight": "mean"}, "sum, max_value"),
     ({"stride": [2, 2]}, "is not that of x"), ({"padding": [0, 0]}, "is not that of x")],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(change: dict[str, object], message: str) -> None:
    g, x = operands(SHAPES[1])
    given = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], **change}
    with pytest.raises(UnsupportedError, match=message):
        one_patch(g, x, **given)
    with pytest.raises(UnsupportedError, match="floating point"):
        one_patch(g.int(), x.int(), [3, 3], [1, 1], [1, 1])


def test_the_operator_is_well_formed() -> None:
    g, x = operands(SHAPES[1])
    torch.library.opcheck(one_patch, (g, x, [3, 3], [1, 1], [1, 1], "argmax", "max_value"))


@pytest.mark.parametrize(
    "shape", [SHAPES[1], SHAPES[2], SHAPES[3], (18, 17, 5, 9, 8, (3, 3), (1, 1), (1, 1))]
)
def test_triton_equals_the_reference(triton_interpreter: None, shape: tuple) -> None:  # type: ignore[type-arg]
    from hasten.kernels.gpu.one_patch import one_patch as triton

    kernel, stride, padding = shape[5:]
    for dtype, (key, (position, weight)) in product((torch.float32, torch.bfloat16), enumerate(VARIANTS)):
        g, x = (v.to(dtype).contiguous(memory_format=torch.channels_last) for v in operands(shape, key))
        got = torch.full((g.shape[1], x.shape[1], *kernel), torch.nan).contiguous(
            memory_format=torch.channels_last
        )
        triton(g, x, got, kernel, stride, padding, position, weight)
        expected = reference(g, x, list(kernel), list(stride), list(padding), position, weight)
        assert torch.equal(got, expected), (position, weight)
