"""Convolutions of 16-bit fixed-point numbers: sums are exact, whatever the numbers are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor

from hasten import keyed
from hasten.errors import UnsupportedError
from hasten.kernels import fixed_conv as op
from hasten.kernels.fixed_point import fixed_point
from hasten.kernels.native import extension
from hasten.kernels.reference import fixed_conv as reference

SHAPES: list[dict[str, Any]] = [
    {"n": 3, "c": 5, "o": 7, "size": (9, 6), "k": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)},
    {"n": 4, "c": 64, "o": 40, "size": (8, 8), "k": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)},
    {"n": 2, "c": 34, "o": 32, "size": (7, 10), "k": (1, 1), "stride": (2, 1), "padding": (0, 0), "dilation": (1, 1)},
    {"n": 1, "c": 1, "o": 1, "size": (5, 5), "k": (5, 5), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)},
    {"n": 2, "c": 6, "o": 33, "size": (11, 12), "k": (3, 2), "stride": (3, 2), "padding": (2, 1), "dilation": (2, 1)},
    {"n": 5, "c": 3, "o": 16, "size": (8, 8), "k": (2, 2), "stride": (1, 1), "padding": (2, 2), "dilation": (1, 1)},
]  # fmt: skip


def rand(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("fixed_conv", key))


def grid(x: Tensor, fraction: int) -> Tensor:
    return fixed_point(x, 16, fraction, 1, False)[0]


def operands(s: dict[str, Any], spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, w and grad_output of a shape on the grids of 10, 14 and 12 bits."""
    x = grid(spread * rand(s["n"], s["c"], *s["size"]), 10)
    w = grid(0.3 * spread * rand(s["o"], s["c"], *s["k"], key=1), 14)
    y = torch.conv2d(x, w, None, s["stride"], s["padding"], s["dilation"])
    return x, w, grid(0.5 * spread * rand(*y.shape, key=2), 12)


@each_isa
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['k']}-{s['stride']}-{s['c']}")
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_every_product_equals_the_reference_bit_for_bit(
    isa: str, shape: dict[str, Any], spread: float
) -> None:
    x, w, g = operands(shape, spread)
    how = shape["stride"], shape["padding"], shape["dilation"]
    with instruction_set(isa), poisoned_memory():
        y = op.fixed_conv(x, w, 10, 14, *how)
        gx = op.fixed_conv_input(g, w, shape["size"], 12, 14, *how)
        gw = op.fixed_conv_weight(g, x, shape["k"], 12, 10, *how)
    assert torch.equal(y, reference.fixed_conv(x, w, 10, 14, *how))
    assert torch.equal(gx, reference.fixed_conv_input(g, w, shape["size"], 12, 14, *how))
    assert torch.equal(gw, reference.fixed_conv_weight(g, x, shape["k"], 12, 10, *how))
    exact = torch.conv2d(x.double(), w.double(), None, *how)
    assert torch.equal(y, exact.float())


@each_isa
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, layout: str) -> None:
    shape = SHAPES[1]
    x, w, g = operands(shape)
    how = shape["stride"], shape["padding"], shape["dilation"]
    with instruction_set(isa), poisoned_memory():
        a, b, c = (layouts(t)[layout] for t in (x, w, g))
        y = op.fixed_conv(a, b, 10, 14, *how)
        gx = op.fixed_conv_input(c, b, shape["size"], 12, 14, *how)
        gw = op.fixed_conv_weight(c, a, shape["k"], 12, 10, *how)
    assert torch.equal(y, reference.fixed_conv(x, w, 10, 14, *how))
    assert torch.equal(gx, reference.fixed_conv_input(g, w, shape["size"], 12, 14, *how))
    assert torch.equal(gw, reference.fixed_conv_weight(g, x, shape["k"], 12, 10, *how))


@each_isa
@pytest.mark.parametrize("c", [2, 64, 300])
@pytest.mark.parametrize(("x_end", "w_end"), [(32767, 32767), (-32768, 32767), (32767, -32768), (100, 32767)])
def test_the_largest_numbers_do_not_overflow(isa: str, c: int, x_end: int, w_end: int) -> None:
    x = torch.full((1, c, 4, 4), float(x_end))
    w = torch.full((3, c, 3, 3), float(w_end))
    with instruction_set(isa):
        y = op.fixed_conv(x, w, 0, 0, (1, 1), (1, 1), (1, 1))
    assert torch.equal(y, torch.conv2d(x.double(), w.double(), padding=1).float())
    assert y.abs().max() > 2**31 or abs(x_end) == 100


def test_what_cannot_be_proved_takes_the_reference_path() -> None:
    """(-2**15)**2 + (-2**15)**2 is 2**31: even one pair overflows, so the native kernel declines."""
    native = extension()
    if native is None:
        pytest.skip("the extension is not built")
    x, w = torch.full((1, 2, 3, 3), -32768.0), torch.full((32, 2, 1, 1), -32768.0)
    sizes = [1, 3, 3, 2, 32, 1, 1, 3, 3, 1, 1, 1, 1]
    x16, w16 = torch.full((18,), -32768, dtype=torch.int16), torch.full((64,), -32768, dtype=torch.int16)
    y = torch.empty(9 * 32)
    assert not native.fixed_conv(x16, w16, y, sizes, 32768, 1.0, 1)
    assert torch.equal(op.fixed_conv(x, w, 0, 0, (1, 1), (0, 0), (1, 1)), torch.full((1, 32, 3, 3), 2.0**31))


def test_threads_do_not_change_the_result() -> None:
    x, w, g = operands({**SHAPES[1], "n": 24, "size": (16, 16)}, 10.0)
    how = (2, 2), (1, 1), (1, 1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(
                [op.fixed_conv(x, w, 10, 14, *how), op.fixed_conv_weight(g, x, (3, 3), 12, 10, *how)]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_operators_are_well_formed() -> None:
    x, w, g = operands(SHAPES[0])
    how = [1, 1], [1, 1], [1, 1]
    torch.library.opcheck(op.fixed_conv, (x, w, 10, 14, *how))
    torch.library.opcheck(op.fixed_conv_input, (g, w, [9, 6], 12, 14, *how))
    torch.library.opcheck(op.fixed_conv_weight, (g, x, [3, 3], 12, 10, *how))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"allowed: torch\.float32 with 4"):
        op.fixed_conv(torch.zeros(1, 2, 3, 3).double(), torch.zeros(2, 2, 1, 1), 0, 0, (1, 1), (0, 0), (1, 1))
    with pytest.raises(UnsupportedError, match="with 2 dimensions"):
        op.fixed_conv(torch.zeros(2, 3), torch.zeros(2, 2, 1, 1), 0, 0, (1, 1), (0, 0), (1, 1))
