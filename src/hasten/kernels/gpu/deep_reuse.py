"""Deep reuse, in Triton: hashes, means of clusters, and the sums over clusters. Not yet measured on a GPU.

Clusters are found by sorting the hashes, and every sum runs over a cluster's members in their order, so that no atomic
addition is needed and results do not vary. The products of cluster means are torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.reference.deep_reuse import Clusters, pixel_image


@triton.jit
def _hash(
    x,
    v,
    shift,
    key,
    empty,
    norm,
    n,
    channels,
    length,
    bits,
    SCALED: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, H)
    total = tl.zeros((BLOCK, H), dtype=tl.float32)
    square = tl.zeros((BLOCK,), dtype=tl.float32)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for e in range(length):
        value = tl.load(x + i.to(tl.int64) * channels + block * length + e, i < n, other=0.0).to(tl.float32)
        column = tl.load(v + e * bits + j, j < bits, other=0.0)
        total += value[:, None] * column[None, :]
        square += value * value
        largest = tl.maximum(largest, tl.abs(value))
    limit = tl.load(shift + block * bits + j, j < bits, other=0.0)
    limits = limit[None, :] * (tl.sqrt(square)[:, None] if SCALED else 1.0)
    one = (total > limits) & (j < bits)[None, :]
    weight = tl.full((H,), 1, tl.int64) << tl.maximum(bits - 1 - j, 0).to(tl.int64)
    hashed = tl.sum(tl.where(one, weight[None, :], 0), axis=1)
    at = block.to(tl.int64) * n + i
    tl.store(key + at, hashed, i < n)
    tl.store(empty + at, (largest == 0).to(tl.int8), i < n)
    tl.store(norm + at, tl.sqrt(square), i < n)


@triton.jit
def _mean(
    x, order, begin, row_block, means, scale, n, channels, length, rows, SCALED: tl.constexpr, L: tl.constexpr
):
    """means[row] = the mean of its members; ``begin`` (rows + 1,) delimits them in ``order``."""
    row = tl.program_id(0)
    e = tl.arange(0, L)
    first, last = tl.load(begin + row), tl.load(begin + row + 1)
    block = tl.load(row_block + row)
    total = tl.zeros((L,), dtype=tl.float32)
    for k in range(first, last):
        p = tl.load(order + k)
        value = tl.load(x + p * channels + block * length + e, e < length, other=0.0).to(tl.float32)
        if SCALED:
            value = value / tl.load(scale + block * n + p)
        total += value
    count = tl.maximum(last - first, 1).to(tl.float32)
    tl.store(means + row.to(tl.int64) * length + e, total / count, e < length)


@triton.jit
def _assemble(z, ids, first, scale, bias, y, n, high, wide, out_high, out_wide, m, blocks, kh, kw, sh, sw, ph, pw, outs,
              SCALED: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * M + tl.arange(0, M)
    image, r, c = i // (out_high * out_wide), i // out_wide % out_high, i % out_wide
    total = tl.zeros((ROWS, M), dtype=tl.float32)
    if BIAS:
        total += tl.load(bias + j, j < m, other=0.0).to(tl.float32)[None, :]
    for tap in range(kh * kw):
        row, column = r * sh - ph + tap // kw, c * sw - pw + tap % kw
        inside = (i < outs) & (row >= 0) & (row < high) & (column >= 0) & (column < wide)
        p = ((image * high + row) * wide + column).to(tl.int64)
        for block in range(blocks):
            at = block * n + p
            q = tl.load(first + block) + tl.load(ids + at, inside, other=0)
            mask = inside[:, None] & (j < m)[None, :]
            value = tl.load(z + (q[:, None] * (kh * kw) + tap) * m + j[None, :], mask, other=0.0).to(
                tl.float32
            )
            if SCALED:
                value = value * tl.load(scale + at, inside, other=0.0)[:, None]
            total += value
    tl.store(
        y + i.to(tl.int64)[:, None] * m + j[None, :],
        total.to(y.dtype.element_ty),
        (i < outs)[:, None] & (j < m)[None, :],
    )


@triton.jit
def _sum(grad, order, begin, row_block, scale, g, n, high, wide, out_high, out_wide, m, kh, kw, sh, sw, ph, pw,
         SCALED: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """g[row, tap] = the sum over its members of grad_output where it sees them through that tap."""
    row, tap = tl.program_id(0), tl.program_id(1)
    j = tl.program_id(2) * M + tl.arange(0, M)
    begins, ends = tl.load(begin + row), tl.load(begin + row + 1)
    block = tl.load(row_block + row)
    total = tl.zeros((M,), dtype=tl.float32)
    for k in range(begins, ends):
        p = tl.load(order + k)
        image, r, c = p // (high * wide), p // wide % high, p % wide
        up, left = r + ph - tap // kw, c + pw - tap % kw
        to_r, to_c = up // sh, left // sw
        seen = (
            (up >= 0)
            & (left >= 0)
            & (up % sh == 0)
            & (left % sw == 0)
            & (to_r < out_high)
            & (to_c < out_wide)
        )
        at = ((image * out_high + to_r) * out_wide + to_c) * m
        value = tl.load(grad + at + j, seen & (j < m), other=0.0).to(tl.float32)
        if SCALED:
            value = value * tl.load(scale + block * n + p)
        total += value
    tl.store(g + (row.to(tl.int64) * (kh * kw) + tap) * m + j, total, j < m)


def _rows(found: Clusters) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (first (blocks + 1,), members sorted by row, begin (rows + 1,), block of each row (rows,)), all int64."""
    rows = found.rows.long()
    first = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
    everywhere = (found.ids.long() + first[:-1, None]).flatten()
    order = everywhere.argsort(stable=True) % found.ids.shape[1]
    begin = torch.cat([rows.new_zeros(1), torch.bincount(everywhere, minlength=int(first[-1])).cumsum(0)])
    return first, order, begin, torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows)


def cluster(x: Tensor, v: Tensor, shift: Tensor | None, groups: int, norm: bool) -> Clusters:
    """Return the clusters of x (B, C, H, W) as `reference.deep_reuse.cluster` numbers them."""
    length, bits = v.shape
    line = x.detach().permute(0, 2, 3, 1).contiguous()
    n, channels, blocks, device = line.numel() // x.shape[1], x.shape[1], x.shape[1] // length, x.device
    key = torch.empty(blocks, n, dtype=torch.int64, device=device)
    empty = torch.empty(blocks, n, dtype=torch.int8, device=device)
    norms = torch.empty(blocks, n, device=device)
    limit = torch.zeros(blocks, bits, device=device) if shift is None else shift.float().contiguous()
    _hash[(triton.cdiv(n, 64), blocks)](
        line, v.float().contiguous(), limit, key, empty, norms, n, channels, length, bits,
        SCALED=norm, L=triton.next_power_of_2(length), H=max(16, triton.next_power_of_2(bits)), BLOCK=64,
    )  # fmt: skip
    nothing = (empty != 0) | ((norms == 0) if norm else False)
    scale = torch.where(nothing, 1.0, norms) if norm else norms.new_empty(0)

    # equal (block, group, hash), found by sorting; zeros have -1, and each group has that row even without members
    at = torch.arange(n, device=device) // (n // groups)
    places = torch.arange(blocks, device=device)[:, None] * groups + at
    named = (places << 33) + torch.where(nothing, 0, key + 1)
    zeros = torch.arange(blocks * groups, device=device) << 33
    found, row = torch.unique(torch.cat([zeros, named.flatten()]), return_inverse=True)
    row = row[blocks * groups :]
    index = torch.arange(n, device=device).repeat(blocks)
    earliest = torch.full_like(found, n).scatter_reduce(0, row, index, "amin")
    place, hashed = found >> 33, found & ((1 << 33) - 1)
    earliest = torch.where(hashed == 0, -1, earliest)
    number = torch.empty_like(found)
    number[(place * (n + 2) + earliest + 1).argsort()] = torch.arange(len(found), device=device)
    count_of_place = torch.bincount(place, minlength=blocks * groups)
    start = torch.cat([count_of_place.new_zeros(1), count_of_place.cumsum(0)])
    base = start[: blocks * groups : groups]
    ids = (number[row].view(blocks, n) - base[:, None]).int()
    starts = torch.cat([start[:-1].view(blocks, groups), start[groups::groups, None]], 1) - base[:, None]
    rows = n + groups
    where = (place // groups) * rows + number - base[place // groups]
    keys = torch.zeros(blocks * rows, dtype=torch.int64, device=device)
    keys[where] = torch.where(hashed == 0, 0, hashed - 1)
    keys = torch.where(keys >= 1 << 31, keys - (1 << 32), keys)
    counts = torch.zeros(blocks * rows, dtype=torch.int64, device=device)
    counts.scatter_add_(0, ids.long().add(torch.arange(blocks, device=device)[:, None] * rows).flatten(),
                        torch.ones(blocks * n, dtype=torch.int64, device=device))  # fmt: skip
    means = torch.zeros(blocks, rows, length, device=device)
    result = Clusters(
        ids, keys.view(blocks, rows).int(), counts.view(blocks, rows).int(), starts.int(), means, scale
    )
    first, order, begin, block = _rows(result)
    packed = torch.empty(int(first[-1]), length, device=device)
    _mean[(len(packed),)](
        line, order, begin, block, packed, scale if norm else norms, n, channels, length, rows,
        SCALED=norm, L=triton.next_power_of_2(length),
    )  # fmt: skip
    inside = torch.arange(len(packed), device=device) - first[block]
    means[block, inside] = packed
    return result


def output(
    found: Clusters,
    z: Tensor,
    first: Tensor,
    w: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    y: Tensor,
) -> None:
    """Fill y (B, O, H', W'), in channels_last, from the rows of products z (rows, taps, O)."""
    (b, h, width), (o, _, kh, kw) = shape, w.shape
    high, wide = y.shape[2], y.shape[3]
    outs, scaled = b * high * wide, found.scale.numel() > 0
    _assemble[(triton.cdiv(outs, 16), triton.cdiv(o, 64))](
        z.contiguous(), found.ids, first.to(z.device), found.scale if scaled else z, z if bias is None else bias,
        y.permute(0, 2, 3, 1), b * h * width, h, width, high, wide, o, found.ids.shape[0], kh, kw, *stride, *padding, outs,
        SCALED=scaled, BIAS=bias is not None, ROWS=16, M=64,
    )  # fmt: skip


def gradients(
    grad_output: Tensor,
    found: Clusters,
    w: Tensor,
    shape: tuple[int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (grad_input, grad_weight), each (0,) where not wanted."""
    (b, h, width), (o, c, kh, kw) = shape, w.shape
    grad = grad_output.detach().permute(0, 2, 3, 1).contiguous()
    first, order, begin, block = _rows(found)
    taps, length, scaled = kh * kw, found.means.shape[-1], found.scale.numel() > 0
    g = torch.empty(len(block), taps, o, device=grad.device)
    _sum[(len(block), taps, triton.cdiv(o, 64))](
        grad, order, begin, block, found.scale if scaled else g, g, b * h * width, h, width, grad.shape[1], grad.shape[2],
        o, kh, kw, *stride, *padding, SCALED=scaled, M=64,
    )  # fmt: skip
    grad_w = torch.empty(o, kh, kw, c, device=grad.device)
    pieces = torch.empty(found.ids.shape[0], b * h * width, length, device=grad.device)
    for at, (begins, ends) in enumerate(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)):
        n, part = ends - begins, slice(at * length, (at + 1) * length)
        sums = g[begins:ends].view(n, taps * o)
        if to_weight:
            grad_w[..., part] = (found.means[at, :n].t() @ sums).view(length, kh, kw, o).permute(3, 1, 2, 0)
        if to_input:
            kernel = w[:, part].float().permute(2, 3, 0, 1).reshape(taps * o, length)
            rows = found.ids[at].long()
            weight = found.scale[at] if scaled else torch.ones_like(rows, dtype=torch.float32)
            total = torch.zeros(n, device=grad.device).scatter_add_(0, rows, weight)
            back = (sums @ kernel) / torch.where(total == 0, 1, total)[:, None]
            pieces[at] = back[rows]
    last = torch.channels_last
    return (
        pixel_image(pieces, shape).to(w.dtype, memory_format=last, copy=True) if to_input else w.new_empty(0),
        grad_w.permute(0, 3, 1, 2).to(w.dtype, memory_format=last) if to_weight else w.new_empty(0),
    )
