"""The one-patch weight gradient, in Triton. Not yet measured on a GPU.

A program owns some output channels, a tile of a patch's kh * kw * C elements, and every S-th image: for each image it reads the
maps of its channels once for sum and place, then adds the patches to a tile in registers. Programs write their tiles
side by side, and one sum over the S shares follows, so that results do not depend on the order of programs. The maps are
read again for each tile; where there are many tiles (many channels), maps are small.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

CHANNELS, PLACES, SHARES = 16, 64, 16
LARGEST_TILE = 1024


@triton.jit
def _kernel(grad_output, x, parts, n, o, c, hi, wi, wo, places, kh, kw, sh, sw, ph, pw, shares, fixed,
            POSITION: tl.constexpr, WEIGHT: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
            TILE: tl.constexpr):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < o
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    u, v, at_c = k // (kw * c), k // c % kw, k % c
    share = tl.program_id(2)
    total = tl.zeros((CHANNELS, TILE), tl.float32)
    for image in range(share, n, shares):
        maps = grad_output + tl.cast(image, tl.int64) * places * o
        best = tl.full((CHANNELS,), -float("inf"), tl.float32)
        weight = tl.zeros((CHANNELS,), tl.float32)
        q = tl.zeros((CHANNELS,), tl.int32)
        for first in range(0, places, PLACES):
            p = first + tl.arange(0, PLACES)
            inside = (p < places)[:, None] & real[None, :]
            g = tl.load(maps + p[:, None] * o + channel[None, :], inside, other=0.0).to(tl.float32)
            weight += tl.sum(g, 0)
            r = tl.where(inside, tl.abs(g) if POSITION == 0 else g, -float("inf"))
            most = tl.max(r, 0)
            where = tl.min(tl.where(r == most[None, :], p[:, None], places), 0)
            q = tl.where(most > best, where, q)
            best = tl.maximum(best, most)
        if POSITION == 2:
            q = tl.zeros((CHANNELS,), tl.int32) + fixed
        if WEIGHT == 1:
            weight = tl.load(maps + q * o + channel, real, other=0.0).to(tl.float32)
        i = (q // wo * sh - ph)[:, None] + u[None, :]
        j = (q % wo * sw - pw)[:, None] + v[None, :]
        inside = (i >= 0) & (i < hi) & (j >= 0) & (j < wi) & real[:, None] & (k < kh * kw * c)[None, :]
        patch = tl.load(
            x + tl.cast(image, tl.int64) * hi * wi * c + (i * wi + j) * c + at_c[None, :], inside, other=0.0
        )
        total += weight[:, None] * patch.to(tl.float32)
    size = kh * kw * c
    to = parts + (tl.cast(share, tl.int64) * o + channel[:, None]) * size + k[None, :]
    tl.store(to, total, real[:, None] & (k < size)[None, :])


def one_patch(
    grad_output: Tensor, x: Tensor, grad_weight: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], position: str, weight: str,
) -> None:  # fmt: skip
    """Fill float32 ``grad_weight`` (O, C, kh, kw); all tensors in channels_last. See `hasten.kernels.one_patch`."""
    n, o, ho, wo = grad_output.shape
    _, c, hi, wi = x.shape
    kh, kw = kernel_size
    size = kh * kw * c
    tile = min(LARGEST_TILE, triton.next_power_of_2(size))
    shares = min(n, SHARES)
    parts = grad_weight.new_empty(shares, o, kh, kw, c)
    grid = (triton.cdiv(o, CHANNELS), triton.cdiv(size, tile), shares)
    _kernel[grid](
        grad_output, x, parts, n, o, c, hi, wi, wo, ho * wo, kh, kw, stride[0], stride[1], padding[0], padding[1], shares,
        min(1, ho - 1) * wo + min(1, wo - 1), POSITION=("argmax_abs", "argmax", "fixed").index(position),
        WEIGHT=("sum", "max_value").index(weight), CHANNELS=CHANNELS, PLACES=PLACES, TILE=tile,
    )  # fmt: skip
    grad_weight.copy_(parts.sum(0).permute(0, 3, 1, 2))
