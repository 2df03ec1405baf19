"""Group quantisation: unbiased, within one step, the size it says, and every form equal to the reference bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.group_quantize import group_dequantize, group_quantize, group_spread, sample_dense
from hasten.kernels.reference import group_quantize as reference
from hasten.keyed import key64

KEY = 2**62 + 12345


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def widths(n: int, *bits: int) -> Tensor:
    return torch.tensor([bits[i % len(bits)] for i in range(n)], dtype=torch.int32)


def there(
    x: Tensor, bits: Tensor, group: int = 256, key: int = KEY, stochastic: bool = True
) -> tuple[Tensor, Tensor]:
    return group_quantize(x, bits, int(bits.sum()), group, key, stochastic)  # type: ignore[no-any-return]


def and_back(x: Tensor, bits: Tensor, group: int = 256, key: int = KEY, stochastic: bool = True) -> Tensor:
    codes, meta = there(x, bits, group, key, stochastic)
    stride = sample_dense(x).stride()
    return group_dequantize(codes, meta, bits, group, x.shape, stride, x.dtype)  # type: ignore[no-any-return]


def by_reference(
    x: Tensor, bits: Tensor, group: int, key: int, stochastic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, meta and the numbers they stand for, from the samples in the order of memory."""
    x = sample_dense(x)
    d = x.numel() // x.shape[0]
    line = x.as_strided((x.shape[0], d), (d, 1), x.storage_offset())
    codes, meta = reference.group_quantize(line.float(), bits, group, key, stochastic)
    y = torch.empty_like(x)
    y.as_strided((x.shape[0], d), (d, 1)).copy_(reference.group_dequantize(codes, meta, bits, d))
    return codes, meta, y


def assert_equals_reference(x: Tensor, bits: Tensor, group: int, stochastic: bool = True) -> None:
    with poisoned_memory():
        codes, meta = there(x, bits, group, KEY, stochastic)
        back = and_back(x, bits, group, KEY, stochastic)
    wanted, frame, y = by_reference(x, bits, group, KEY, stochastic)
    assert torch.equal(codes, wanted)
    assert torch.equal(meta.view(torch.int16), frame.view(torch.int16))
    assert back.stride() == y.stride()
    assert torch.equal(back.isnan(), y.isnan())
    assert torch.equal(back.nan_to_num(), y.nan_to_num())


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 31, 256, 257, 1000, 4096])
def test_every_form_equals_the_reference(isa: str, dtype: torch.dtype, d: int) -> None:
    x = (rand(9, d, seed=d) * torch.exp(rand(9, d, seed=d + 1))).to(dtype)
    with instruction_set(isa):
        for bits in (widths(9, 1, 2, 3, 4, 5, 6, 7, 8), widths(9, 2)):
            assert_equals_reference(x, bits, 256)
        assert_equals_reference(x, widths(9, 2, 4), 256, stochastic=False)


@each_isa
@pytest.mark.parametrize("group", [32, 96, 512, 4096])
def test_other_sizes_of_groups(isa: str, group: int) -> None:
    with instruction_set(isa):
        assert_equals_reference(rand(3, 5, 17, 19), widths(3, 1, 6, 8), group)


@each_isa
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, layout: str) -> None:
    x = layouts(rand(3, 5, 7, 9))[layout]
    with instruction_set(isa):
        assert_equals_reference(x, widths(3, 2), 256)
        y = and_back(x, widths(3, 8))
    assert y.shape == x.shape
    assert (y - x).abs().max() < 0.06
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(
            there(x, widths(3, 2))[1], there(x.permute(0, 2, 3, 1).contiguous(), widths(3, 2))[1]
        )


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 48, 4, 4), (2, 70, 1, 3), (1, 1, 20, 20)])
def test_channels_are_normalised_on_the_way(
    isa: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]
) -> None:
    x = layouts(rand(*shape).to(dtype))[layout]
    scale, shift = 1 + rand(shape[1], seed=1).exp(), 3 * rand(shape[1], seed=2)
    bits = widths(shape[0], 2, 5)
    with instruction_set(isa), poisoned_memory():
        codes, meta = group_quantize(x, bits, int(bits.sum()), 256, KEY, True, scale, shift)
    by = (-1, 1, 1)
    kept = torch.empty_like(sample_dense(x), dtype=torch.float32)
    kept.copy_(x.double() * scale.double().view(by) + shift.double().view(by))
    wanted, frame, _ = by_reference(kept, bits, 256, KEY, True)
    assert torch.equal(codes, wanted)
    assert torch.equal(meta.view(torch.int16), frame.view(torch.int16))


@each_isa
def test_odd_values(isa: str) -> None:
    nan, inf = math.nan, math.inf
    rows = [
        [nan, 1.0],
        [inf, 1.0],
        [-inf, 1.0],
        [0.0, -0.0],
        [1e-40, -1e-42],
        [3e38, -3e38],
        [5.0, 5.0],
        [-7e-36, 0.0],
    ]
    x = torch.tensor(rows).repeat_interleave(128, 1)
    with instruction_set(isa):
        assert_equals_reference(x, widths(8, 2), 256)
        y = and_back(x, widths(8, 2))
    assert y[[0, 1, 2, 5]].isnan().all(), "a group with a NaN, an infinity or too wide a range is all NaN"
    assert (y[3] == 0).all()
    assert (y[4].abs() < 2e-33).all()
    assert (y[6] == 5).all()
    assert y[7].isfinite().all()


def test_a_bad_group_spoils_no_other() -> None:
    x = rand(2, 1024)
    x[1, 300] = math.nan
    y = and_back(x, widths(2, 2))
    assert y[1, 256:512].isnan().all()
    y[1, 256:512] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_round_trip(bits: int) -> None:
    for lanes in (2, 16, 6):
        q = torch.randint(0, 2**bits, (7, 16, lanes), generator=torch.Generator().manual_seed(bits))
        codes = reference._pack(q, bits)
        assert codes.numel() == 7 * 16 * lanes * bits // 8
        assert torch.equal(reference._unpack(codes, 7, 16 * lanes, bits).view_as(q), q)


@pytest.mark.parametrize("shape", [(3, 7, 9, 11), (64, 64, 8, 8), (5, 1, 1, 4097)])
def test_bytes_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    x, n, d = rand(*shape), shape[0], math.prod(shape[1:])
    m = -(-d // 256)
    for b in range(1, 9):
        codes, meta = there(x, widths(n, b))
        assert codes.numel() == -(-n * m * 256 * b // 8)
        assert meta.numel() * meta.element_size() == 4 * n * m
    codes, meta = there(x, widths(n, 2))
    if d >= 4096 and d % 256 == 0:
        assert 15 * (codes.numel() + 2 * meta.numel()) <= 4 * x.numel()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("centre", [0.0, 5.0])
def test_unbiased_and_within_a_step(bits: int, centre: float) -> None:
    """The centred case is the one in which the authors' rounding of (min, scale) after quantising is biased."""
    draws, x = 4000, 0.3 * rand(256) + centre
    y = torch.stack(
        [and_back(x[None].repeat(40, 1), widths(40, bits), key=key64(k)) for k in range(draws // 40)]
    ).view(-1, 256)
    span = x.max() - x.min()
    step = (span + 2**-8 * x.abs().max()) / (2**bits - 1) * (1 + 2**-7)
    assert (y - x).abs().max() <= step
    error = (y.double().mean(0) - x.double()).abs()
    assert (error <= 5 * step / (2 * draws**0.5)).all()
    mean_error = float((y.double().mean(0) - x.double()).mean().abs())
    assert mean_error <= 5 * float(step) / 2 / (draws * 256) ** 0.5, (
        "the mean over all values shows a common shift"
    )
    nearest = and_back(x[None], widths(1, bits), stochastic=False).double() - x.double()
    assert (nearest.abs() > 5 * step / (2 * draws**0.5)).any(), "rounding to nearest must not pass"


def test_variance_is_that_of_stochastic_rounding() -> None:
    x = torch.rand(64, 4096, generator=torch.Generator().manual_seed(1))
    for bits in (1, 2, 4):
        error = (and_back(x, widths(64, bits)) - x).double()
        step = 1 / (2**bits - 1)
        assert 0.155 < float(error.square().mean()) / step**2 < 0.175


def test_same_key_same_codes_and_only_then() -> None:
    x = rand(4, 1000)
    first = there(x, widths(4, 2))[0]
    assert torch.equal(first, there(x, widths(4, 2))[0])
    assert not torch.equal(first, there(x, widths(4, 2), key=KEY + 1)[0])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(first, there(x, widths(4, 2))[0])
    finally:
        torch.set_num_threads(before)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 17, 256, 1000])
def test_spread(isa: str, dtype: torch.dtype, d: int) -> None:
    x = rand(5, d, seed=d).to(dtype)
    with instruction_set(isa):
        got = group_spread(x, 256)
    expected = torch.zeros(5, dtype=torch.float64)
    for first in range(0, d, 256):
        part = x[:, first : first + 256].double()
        expected += (part.amax(1) - part.amin(1)) ** 2
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    bad = x.clone()
    bad[2, -1] = math.nan
    with instruction_set(isa):
        assert group_spread(bad, 256).isnan().tolist() == [False, False, True, False, False]


def test_the_operators_are_well_formed() -> None:
    x, bits = rand(3, 4, 10, 10).contiguous(memory_format=torch.channels_last), widths(3, 1, 2, 5)
    torch.library.opcheck(group_quantize, (x, bits, 8, 256, 9, True))
    torch.library.opcheck(group_quantize, (x, bits, 8, 256, 9, True, torch.ones(4), torch.zeros(4)))
    codes, meta = there(x, bits)
    torch.library.opcheck(group_dequantize, (codes, meta, bits, 256, x.shape, x.stride(), x.dtype))
    torch.library.opcheck(group_spread, (x, 256))


def test_what_is_refused() -> None:
    x, bits = rand(2, 512), widths(2, 2)
    for group in (0, 48, 100, 8192):
        with pytest.raises(UnsupportedError, match="whole multiples of 32"):
            there(x, bits, group)
    with pytest.raises(UnsupportedError, match="allowed: float32"):
        there(x.double(), bits)
    with pytest.raises(UnsupportedError, match="not empty"):
        there(x[:0], bits[:0])
    with pytest.raises(UnsupportedError, match="int32"):
        there(x, bits.long())
    one, more = torch.ones(512), torch.ones(511)
    for scale, shift in ((one, None), (None, one), (one, more), (one.double(), one.double())):
        with pytest.raises(UnsupportedError, match="or neither"):
            group_quantize(x, bits, 4, 256, KEY, True, scale, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_the_reference(triton_interpreter: None, dtype: torch.dtype) -> None:
    from hasten.kernels.gpu.group_quantize import group_dequantize as unpack
    from hasten.kernels.gpu.group_quantize import group_quantize as pack

    x, bits = rand(4, 300).to(dtype), torch.tensor([1, 2, 7, 8], dtype=torch.int32)
    x[1, 70], x[2, 3] = math.nan, math.inf
    for group, stochastic in ((256, True), (256, False), (32, True)):
        wanted, frame, y = by_reference(x, bits, group, KEY, stochastic)
        codes, meta, back = torch.full_like(wanted, 77), torch.full_like(frame, 3.0), torch.full_like(x, 9.0)
        pack(x, bits, group, codes, meta, KEY, stochastic)
        unpack(wanted, frame, bits, group, back)
        assert torch.equal(codes, wanted)
        assert torch.equal(meta.view(torch.int16), frame.view(torch.int16))
        assert torch.equal(back.isnan(), y.isnan())
        assert torch.equal(back.nan_to_num(), y.nan_to_num())
