"""Stochastic rounding of groups of values to 1 to 8 bits, packed.

A sample is a line of numbers, cut into groups of G, of which the last is filled up with the sample's last number. Of
each group its smallest number, rounded down to bfloat16, is kept, and the step between two codes, rounded up to
bfloat16; code q stands for ``lowest + q * step``. (Our choice: rounding before quantising, so that the stored numbers
are those that were used, and nothing is biased.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.kernels.reference.noise import noise16

ROWS = 16
SMALLEST = 2.0**-110
ROOM = 1.000001
POINT = 17  # bits behind the point of the numbers that codes are cut from
FIELDS = ((8, 4), (4, 4), (2, 4), (1, 2))  # (bits, bytes of a word)
INFINITY = 0x7F800000


def group_quantize(
    x: Tensor, bits: Tensor, group: int, key: int, stochastic: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (codes, meta) of samples ``x`` (N, D), float32, in groups of ``group`` (a multiple of 32).

    bits: (N,), 1 to 8. codes: uint8, ``group * bits[n] / 8`` bytes a group, sample after sample. meta: bfloat16
    (N, M, 2), (lowest, step). A code is ``floor((x - lowest) / step + u)``, u uniform by (key, position) on
    a grid of 2^-16, or 1/2 if not ``stochastic``. A group with a number that is infinite or none becomes all NaN.
    """
    n, d = x.shape
    m = -(-d // group)
    filled = torch.cat([x, x[:, -1:].expand(n, m * group - d)], 1).view(n, m, group)
    lowest, step, bad = _frame(filled, bits)
    noise = 2 * noise16(key, n * m * group, x.device) + 1 if stochastic else torch.tensor(1 << (POINT - 1))
    scaled = (filled - lowest[..., None]) * (2.0**POINT / step)[..., None]
    fixed = torch.where(bad[..., None], 0, scaled).to(torch.int64)
    codes = (fixed + (noise.view(n, m, group) if stochastic else noise.to(x.device))) >> POINT
    codes = torch.where(bad[..., None], 0, codes).view(n, m, ROWS, group // ROWS)
    meta = torch.stack([lowest, step], -1).bfloat16()
    meta.view(torch.int16).masked_fill_(bad[..., None], 0x7FC0)  # one NaN, the same everywhere
    packed = [_pack(codes[i], int(b)) for i, b in enumerate(bits.tolist())]
    return torch.cat(packed), meta


def normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``x * scale + shift`` of ``x`` (N, C, ...) by channels, float32, rounded once, in the memory order of ``x``."""
    channels = (-1, *(1,) * (x.dim() - 2))
    y = torch.addcmul(shift.double().view(channels), x.double(), scale.double().view(channels))
    return torch.empty_like(x, dtype=torch.float32).copy_(y)


def group_dequantize(codes: Tensor, meta: Tensor, bits: Tensor, d: int) -> Tensor:
    """Return the numbers (N, d), float32, that the codes stand for."""
    n, m, _ = meta.shape
    widths = [int(b) for b in bits.tolist()]
    group = codes.numel() * 8 // (m * sum(widths))
    parts = torch.split(codes, [m * group * b // 8 for b in widths])
    q = torch.stack([_unpack(part, m, group, b) for part, b in zip(parts, widths, strict=True)])
    low, step = meta.float().unbind(-1)
    return (low[..., None] + q * step[..., None]).view(n, m * group)[:, :d]


def group_spread(x: Tensor, group: int) -> Tensor:
    """Return the sum over groups of the squared range, (N,) float32, of samples ``x`` (N, D)."""
    n, d = x.shape
    m = -(-d // group)
    filled = torch.cat([x, x[:, -1:].expand(n, m * group - d)], 1).view(n, m, group)
    return (filled.amax(-1) - filled.amin(-1)).double().square().sum(1).float()


def _frame(filled: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (lowest, step) of each group, float32 with bfloat16's digits, and which groups have none."""
    low, high = filled.amin(-1) + 0.0, filled.amax(-1)
    lowest = _cut(low, lambda raw: raw + (raw < 0) * 0xFFFF)
    part = (ROOM / (2.0 ** bits.double() - 1)).float().to(filled.device)
    step = _cut((high - lowest) * part[:, None], lambda raw: raw + 0xFFFF)
    bad = ~(filled.isfinite().all(-1) & lowest.isfinite() & step.isfinite())
    return lowest, step.clamp(min=SMALLEST), bad


def _cut(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return float32 ``x`` cut to bfloat16's digits after ``rounded`` has changed its bits (int64)."""
    raw = rounded(x.view(torch.int32).to(torch.int64)) & 0xFFFF0000
    return torch.where(raw >= 1 << 31, raw - (1 << 32), raw).to(torch.int32).view(torch.float32)


def fields(bits: int) -> list[tuple[int, int, int]]:
    """Return (bits, bytes of a word, position in the code) of the fields that a code of ``bits`` bits is cut into."""
    found, at = [], 0
    for width, word in FIELDS:
        if bits & width:
            found.append((width, word, at))
            at += width
    return found


def _pack(q: Tensor, bits: int) -> Tensor:
    """Return the bytes of the codes ``q`` (M, 16, L) of one sample."""
    m, _, lanes = q.shape
    parts = []
    for width, size, at in fields(bits):
        rows = 8 * size // width
        field = ((q >> at) & ((1 << width) - 1)).view(m, ROWS // rows, rows, lanes)
        shifts = width * torch.arange(rows, device=q.device)
        words = (field << shifts[:, None]).sum(2)
        each = 8 * torch.arange(size, device=q.device)
        parts.append(((words[..., None] >> each) & 0xFF).view(m, -1))
    return torch.cat(parts, 1).to(torch.uint8).flatten()


def _unpack(codes: Tensor, m: int, group: int, bits: int) -> Tensor:
    """Return the codes (M, G) of one sample as int64."""
    lanes = group // ROWS
    rest = codes.view(m, -1).to(torch.int64)
    q = torch.zeros(m, ROWS, lanes, dtype=torch.int64, device=codes.device)
    for width, size, at in fields(bits):
        rows = 8 * size // width
        words = ROWS // rows
        field, rest = rest.tensor_split([words * lanes * size], 1)
        each = 8 * torch.arange(size, device=codes.device)
        whole = (field.reshape(m, words, 1, lanes, size) << each).sum(-1)
        shifts = width * torch.arange(rows, device=codes.device)
        part = (whole >> shifts[:, None]) & ((1 << width) - 1)
        q += part.view(m, ROWS, lanes) << at
    return q.view(m, group)
