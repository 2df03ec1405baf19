"""What the kernels' tests share: every instruction set of this machine, memory that is never zero by luck, odd layouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hasten.kernels.native import ISAS, extension


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run with one instruction set; skip the test where it cannot run."""
    native = extension()
    if native is None:
        pytest.skip("the extension is not built")
    before = native.isa()
    if not native.set_isa(name):
        pytest.skip(f"this machine has no {name}")
    try:
        yield
    finally:
        native.set_isa(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Have torch fill every tensor it makes without values with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


each_isa = pytest.mark.parametrize("isa", ISAS)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return tensors equal to 4-D ``x`` in different memory layouts, some of them with gaps."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan if x.is_floating_point() else 77)
    wide[..., ::2] = x
    tall = x.new_full((x.shape[0] + 1, *x.shape[1:]), torch.nan if x.is_floating_point() else 77)
    tall[1:] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "every other column": wide[..., ::2],
        "all but the first": tall[1:],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
