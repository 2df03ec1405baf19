"""Copies of channels equal plain indexing, in every layout and dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.products import put, take


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, torch.Tensor, int]:
    """A tensor in some layout, a dimension, and an index made of whole blocks."""
    block = draw(st.sampled_from([1, 2, 4, 8, 16]))
    blocks = draw(st.integers(1, 5))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = blocks * block + draw(st.sampled_from([0, 0, 1, 2]))
    kind = draw(st.sampled_from(["nchw", "nhwc", "linear", "offset", "transposed", "weight"]))
    n, h, w = (draw(st.integers(1, 4)) for _ in range(3))
    x = torch.randn(n, size, h, w, generator=seed)
    dim = 1
    if kind == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind in {"linear", "offset"}:
        x, dim = x.permute(0, 2, 3, 1).contiguous(), -1
    elif kind == "transposed":
        x, dim = x[:, :, 0, 0].t().contiguous().t(), -1
    elif kind == "weight":
        x = x[:, :, :1, :1].contiguous()
    x = x.to(draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])))
    if kind == "offset":
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    chosen = torch.randperm(blocks, generator=seed)[: draw(st.integers(1, blocks))].sort().values
    return x, dim, (chosen[:, None] * block + torch.arange(block)).flatten(), block


@given(cases())
@settings(max_examples=150, deadline=None)
def test_take_and_put_equal_indexing(case: tuple[torch.Tensor, int, torch.Tensor, int]) -> None:
    x, dim, index, block = case
    taken = take(x, dim, index, block)
    assert torch.equal(taken, x.index_select(dim, index))
    back = put(taken, dim, index, x.shape[dim], block=block)
    wanted = torch.zeros_like(x).index_copy(dim, index, x.index_select(dim, index))
    assert torch.equal(back, wanted)
    if taken.is_contiguous() and taken.is_contiguous(memory_format=torch.channels_last):
        return  # so few channels that the layouts are one
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        assert taken.is_contiguous(memory_format=torch.channels_last)
        assert back.is_contiguous(memory_format=torch.channels_last)
    elif x.is_contiguous():
        assert taken.is_contiguous()
        assert back.is_contiguous()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_repeated_indices_are_added_up(layout: torch.memory_format) -> None:
    values = torch.randn(2, 5, 3, 4).contiguous(memory_format=layout)
    back = put(values, 1, torch.tensor([0, 2, 2, 2, 6]), 7, repeats=True)
    assert back.is_contiguous(memory_format=layout)
    torch.testing.assert_close(back[:, 2], values[:, 1:4].sum(1))
    assert torch.equal(back[:, 6], values[:, 4])
    assert back[:, [1, 3, 4, 5]].abs().sum() == 0


def test_values_that_are_not_finite_stay_in_their_channel() -> None:
    x = torch.zeros(2, 8, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[:, 5] = float("inf")
    x[:, 6] = float("nan")
    index = torch.tensor([1, 3, 5])
    taken = take(x, 1, index)
    assert torch.isfinite(taken[:, :2]).all()
    assert torch.isinf(taken[:, 2]).all()


def test_rows_keep_the_memory_format() -> None:
    x = torch.randn(6, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    index = torch.tensor([0, 3, 3, 5])
    taken = take(x, 0, index)
    assert torch.equal(taken, x[index])
    assert taken.is_contiguous(memory_format=torch.channels_last)
