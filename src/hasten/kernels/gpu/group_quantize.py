"""Stochastic rounding of groups to 1 to 8 bits, in Triton. Not yet measured on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.gpu.noise import noise16


@triton.jit
def _raised(x):
    """The positive float32 ``x`` rounded up to bfloat16's digits."""
    return ((x.to(tl.uint32, bitcast=True) + 0xFFFF) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _lowered(x):
    """The float32 ``x`` rounded down to bfloat16's digits."""
    raw = x.to(tl.uint32, bitcast=True)
    return ((raw + (raw >> 31) * 0xFFFF) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _pack(q, at, to, F: tl.constexpr, LANES: tl.constexpr):
    """Store the field of F bits at position ``at`` of the codes q (16, LANES); return where the next one goes."""
    ROWS: tl.constexpr = 16 if F == 1 else 32 // F
    WORDS: tl.constexpr = 16 // ROWS
    field = tl.reshape((q >> at) & ((1 << F) - 1), (WORDS, ROWS, LANES))
    shift = (F * tl.arange(0, ROWS))[None, :, None]
    word = tl.sum(field << shift, 1)  # (WORDS, LANES); no two rows share a bit
    place = tl.arange(0, WORDS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    SIZE: tl.constexpr = 2 if F == 1 else 4
    for k in tl.static_range(SIZE):
        tl.store(to + SIZE * place + k, ((word >> (8 * k)) & 0xFF).to(tl.uint8))
    return to + SIZE * WORDS * LANES


@triton.jit
def _quantize(x, bits, starts, codes, meta, d, per, low, high, G: tl.constexpr, STOCHASTIC: tl.constexpr):
    LANES: tl.constexpr = G // 16
    group = tl.program_id(0).to(tl.int64)
    n, m = group // per, group % per
    at = tl.arange(0, 16)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # beyond the end of the sample its last value stands
    v = tl.load(x + n * d + tl.minimum(m * G + at, d - 1)).to(tl.float32)
    b = tl.load(bits + n)
    odd = tl.sum(tl.sum((tl.abs(v) < float("inf")).to(tl.int32), 1), 0) != G
    v = tl.where(odd, 0.0, v)
    lowest = tl.min(tl.min(v, 1), 0) + 0.0
    lowest = _lowered(lowest)
    part = (1.000001 / ((1 << b) - 1).to(tl.float64)).to(tl.float32)
    step = _raised((tl.max(tl.max(v, 1), 0) - lowest) * part)
    bad = odd | ~(step < float("inf"))
    step = tl.maximum(step, 2.0**-110)
    noise = 65536
    if STOCHASTIC:
        noise = 2 * noise16(low.to(tl.uint32), high.to(tl.uint32), group * G + at).to(tl.int32) + 1
    q = (((v - lowest) * tl.div_rn(131072.0, step)).to(tl.int32) + noise) >> 17
    q = tl.where(bad, 0, q)
    nan = tl.full((), 0x7FC0, tl.int32)
    a = (lowest.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)
    s = (step.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)
    tl.store(meta + 2 * group, tl.where(bad, nan, a).to(tl.int16))
    tl.store(meta + 2 * group + 1, tl.where(bad, nan, s).to(tl.int16))
    to = codes + (tl.load(starts + n) * per + m * b) * (G // 8)
    shift = 0
    if (b & 8) != 0:
        to = _pack(q, shift, to, 8, LANES)
        shift += 8
    if (b & 4) != 0:
        to = _pack(q, shift, to, 4, LANES)
        shift += 4
    if (b & 2) != 0:
        to = _pack(q, shift, to, 2, LANES)
        shift += 2
    if (b & 1) != 0:
        _pack(q, shift, to, 1, LANES)


@triton.jit
def _field(codes, F: tl.constexpr, LANES: tl.constexpr):
    """Return the field of F bits of the codes (16, LANES) that begins at ``codes``."""
    ROWS: tl.constexpr = 16 if F == 1 else 32 // F
    SIZE: tl.constexpr = 2 if F == 1 else 4
    row = tl.arange(0, 16)[:, None]
    place = (row // ROWS) * LANES + tl.arange(0, LANES)[None, :]
    bit = F * (row % ROWS)
    byte = tl.load(codes + SIZE * place + bit // 8).to(tl.int32)
    return (byte >> (bit % 8)) & ((1 << F) - 1)


@triton.jit
def _dequantize(codes, meta, bits, starts, x, d, per, G: tl.constexpr, BFLOAT16: tl.constexpr):
    LANES: tl.constexpr = G // 16
    group = tl.program_id(0).to(tl.int64)
    n, m = group // per, group % per
    b = tl.load(bits + n)
    come = codes + (tl.load(starts + n) * per + m * b) * (G // 8)
    q = tl.zeros((16, LANES), tl.int32)
    shift = 0
    if (b & 8) != 0:
        q += _field(come, 8, LANES) << shift
        come += 8 * G // 8
        shift += 8
    if (b & 4) != 0:
        q += _field(come, 4, LANES) << shift
        come += 4 * G // 8
        shift += 4
    if (b & 2) != 0:
        q += _field(come, 2, LANES) << shift
        come += 2 * G // 8
        shift += 2
    if (b & 1) != 0:
        q += _field(come, 1, LANES) << shift
    lowest = tl.load(meta + 2 * group).to(tl.float32)
    step = tl.load(meta + 2 * group + 1).to(tl.float32)
    at = m * G + tl.arange(0, 16)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    value = lowest + q.to(tl.float32) * step
    if BFLOAT16:  # to the nearest even, by hand, so that every form gives the same bits
        raw = value.to(tl.uint32, bitcast=True)
        raw = tl.where(value == value, (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(x + n * d + at, raw.to(tl.uint16).to(tl.bfloat16, bitcast=True), at < d)
    else:
        tl.store(x + n * d + at, value.to(x.dtype.element_ty), at < d)


def _starts(bits: Tensor) -> Tensor:
    return bits.cumsum(0) - bits


def group_quantize(
    x: Tensor, bits: Tensor, group: int, codes: Tensor, meta: Tensor, key: int, stochastic: bool
) -> None:
    """Fill codes and meta of samples ``x`` (N, D); ``group`` is a power of two."""
    n, d = x.shape
    per = -(-d // group)
    _quantize[(n * per,)](
        x, bits, _starts(bits), codes, meta.view(torch.int16), d, per, key & 0xFFFFFFFF, key >> 32,
        G=group, STOCHASTIC=stochastic,
    )  # fmt: skip


def group_dequantize(codes: Tensor, meta: Tensor, bits: Tensor, group: int, x: Tensor) -> None:
    """Fill samples ``x`` (N, D) with what the codes stand for."""
    n, d = x.shape
    per = -(-d // group)
    _dequantize[(n * per,)](
        codes, meta, bits, _starts(bits), x, d, per, G=group, BFLOAT16=x.dtype == torch.bfloat16
    )
