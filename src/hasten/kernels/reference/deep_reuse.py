"""Deep reuse in plain torch: products of a convolution from the means of similar pieces of its input.

Two definitions of the pieces. *Pixel* (our choice, what the kernels compute): the channels of an input pixel are cut into
blocks of L; a patch consists of the pieces of its pixels, so that one clustering serves every tap of the kernel. *Patch*
(from the paper): the unfolded input, with columns in the order (c, kh, kw), is cut into K / L blocks of L columns, and
each is clustered by itself. For a 1x1 kernel they are the same.

In both, a piece is replaced by the mean of its cluster, and the gradients are those of that with the clusters held
fixed. Pieces of zeros form a cluster of their own, which is exact and needs no product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

HIGHEST_BITS = 32


class Clusters(NamedTuple):
    """The clusters of n pieces in each of `blocks` blocks; int32 but for means and scale.

    ids (blocks, n): the row of each piece. keys, counts (blocks, rows), means (blocks, rows, L): hash, members and mean
    of each row. starts (blocks, groups + 1): the first row of each group, which is that of its zeros (perhaps without
    members); the last is the number of rows in use. scale (blocks, n): the length of each piece, or (0,).
    """

    ids: Tensor
    keys: Tensor
    counts: Tensor
    starts: Tensor
    means: Tensor
    scale: Tensor

    @property
    def rows(self) -> Tensor:
        """Rows in use of each block, (blocks,)."""
        return self.starts[:, -1]


def hashes(pieces: Tensor, v: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Return the hash of each piece, int64 in [0, 2**H): bit j is ``(piece @ v)[j] > shift[j]``, the first bit highest.

    pieces (blocks, n, L), v (L, H), shift (blocks, H) or None for zeros (from the paper: strict, so that 0 gives 0).
    scale (blocks, n): lengths of the pieces where ``shift`` is for pieces of length 1.
    """
    projected = pieces @ v.to(pieces.dtype)
    if shift is not None:
        limit = shift.to(pieces.dtype)[:, None]
        projected = projected - (limit if scale is None else limit * scale[..., None])
    bits = v.shape[1]
    value = 1 << torch.arange(bits - 1, -1, -1, device=pieces.device)
    return ((projected > 0) * value).sum(-1)


def cluster(pieces: Tensor, v: Tensor, shift: Tensor | None, groups: int, norm: bool) -> Clusters:
    """Return the clusters of ``pieces`` (blocks, n, L): equal hashes in one block and one of ``groups`` equal parts of n.

    norm: cluster unit vectors, for which ``shift`` is then, and keep the lengths. Rows are numbered in the order of first
    appearance.
    """
    blocks, n, length = pieces.shape
    capacity, each, device = n + groups, n // groups, pieces.device
    dtype = pieces.dtype if pieces.dtype == torch.float64 else torch.float32
    pieces = pieces.to(dtype)
    scale = torch.linalg.vector_norm(pieces, dim=-1) if norm else pieces.new_ones(blocks, n)
    empty = (pieces == 0).all(-1) | ((scale == 0) if norm else False)
    scale = torch.where(empty, 1.0, scale)
    key = hashes(pieces, v, shift, scale)
    ids = torch.zeros(blocks, n, dtype=torch.int64, device=device)
    keys = torch.zeros(blocks, capacity, dtype=torch.int64, device=device)
    starts = torch.zeros(blocks, groups + 1, dtype=torch.int64, device=device)
    for block in range(blocks):
        row = 0
        for group in range(groups):
            here = slice(group * each, (group + 1) * each)
            starts[block, group] = row
            found, at = torch.unique(
                torch.where(empty[block, here], -1, key[block, here]), return_inverse=True
            )
            first = torch.full_like(found, each).scatter_reduce(
                0, at, torch.arange(each, device=device), "amin"
            )
            first = torch.where(found == -1, -1, first)  # the zeros come before all
            rank = torch.empty_like(found)
            rank[first.argsort()] = torch.arange(len(found), device=device)
            if found[0] != -1:
                rank += 1
            ids[block, here] = row + rank[at]
            keys[block, row + rank] = found.clamp(min=0)
            row += int(rank.max()) + 1
        starts[block, groups] = row
    counts = torch.zeros(blocks, capacity, dtype=torch.int64, device=device)
    counts.scatter_add_(1, ids, torch.ones_like(ids))
    means = torch.zeros(blocks, capacity, length, dtype=dtype, device=device)
    unit = pieces / scale[..., None]
    means.scatter_add_(1, ids[..., None].expand(-1, -1, length), unit)
    means /= counts.clamp(min=1)[..., None]
    keys = torch.where(keys >= 1 << 31, keys - (1 << 32), keys)
    ids, keys, counts, starts = (t.to(torch.int32) for t in (ids, keys, counts, starts))
    return Clusters(ids, keys, counts, starts, means, scale if norm else means.new_empty(0))


def replaced(clusters: Clusters) -> Tensor:
    """Return the pieces (blocks, n, L) with every piece replaced by the mean of its cluster, at its own length."""
    index = clusters.ids.long()[..., None].expand(-1, -1, clusters.means.shape[-1])
    values = clusters.means.gather(1, index)
    return values * clusters.scale[..., None] if clusters.scale.numel() else values


def members_mean(gradient: Tensor, clusters: Clusters) -> Tensor:
    """Return the gradient of the pieces, given that of `replaced`: the mean over each cluster.

    Where pieces have lengths s the mean is weighted: sum(s g) / sum(s) (our choice). The derivative with s held constant is
    mean(s g) / s of the member, which grows without bound for a short piece in a cluster of long ones.
    """
    scaled = clusters.scale.numel() > 0
    weight = (
        clusters.scale[..., None].to(gradient.dtype) if scaled else gradient.new_ones(*clusters.ids.shape, 1)
    )
    index = clusters.ids.long()[..., None]
    sums = gradient.new_zeros(clusters.means.shape).scatter_add_(
        1, index.expand_as(gradient), gradient * weight
    )
    total = gradient.new_zeros(*clusters.counts.shape, 1).scatter_add_(1, index, weight)
    return (sums / torch.where(total == 0, 1, total)).gather(1, index.expand_as(gradient))


# -- pixel: the pieces of the input itself


def pixel_pieces(x: Tensor, length: int) -> Tensor:
    """Return the pieces (C / length, B H W, length) of x (B, C, H, W)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1] // length, length).transpose(0, 1)


def pixel_image(pieces: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return x (B, C, H, W), in channels_last, of its pieces; shape is (B, H, W)."""
    b, h, w = shape
    return pieces.transpose(0, 1).reshape(b, h, w, -1).permute(0, 3, 1, 2)


def pixel_output(
    clusters: Clusters,
    w: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Return the convolution (B, O, H', W') of the input with its pieces replaced."""
    x = pixel_image(replaced(clusters), shape)
    return functional.conv2d(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)


def pixel_products(clusters: Clusters, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return (z (rows of all blocks, taps, O), first (blocks + 1,)): the products of every row that is in use."""
    o, _, kh, kw = w.shape
    length = clusters.means.shape[-1]
    rows = clusters.rows.tolist()
    first = torch.tensor([0, *rows]).cumsum(0)
    parts = []
    for block, n in enumerate(rows):
        kernel = w[:, block * length : (block + 1) * length].to(clusters.means.dtype).flatten(2)
        right = kernel.permute(1, 2, 0).reshape(length, -1)
        parts.append((clusters.means[block, :n] @ right).view(n, kh * kw, o))
    return torch.cat(parts), first


def pixel_assembled(
    clusters: Clusters,
    z: Tensor,
    first: Tensor,
    w_like: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Return the output (B, O, H', W') assembled from rows of products, as `pixel_products` gives them."""
    o, _, kh, kw = w_like.shape
    b, h, width = shape
    maps = z.new_zeros(b * h * width, kh * kw, o)
    for block in range(clusters.ids.shape[0]):
        rows = z[first[block] + clusters.ids[block].long()]
        maps += rows * clusters.scale[block][:, None, None] if clusters.scale.numel() else rows
    padded = functional.pad(
        maps.view(b, h, width, kh * kw, o), (0, 0, 0, 0, padding[1], padding[1], padding[0], padding[0])
    )
    high, wide = (
        (h + 2 * padding[0] - kh) // stride[0] + 1,
        (width + 2 * padding[1] - kw) // stride[1] + 1,
    )
    y = z.new_zeros(b, high, wide, o)
    for tap in range(kh * kw):
        i, j = divmod(tap, kw)
        y += padded[
            :,
            i : i + (high - 1) * stride[0] + 1 : stride[0],
            j : j + (wide - 1) * stride[1] + 1 : stride[1],
            tap,
        ]
    if bias is not None:
        y += bias.to(y.dtype)
    return y.permute(0, 3, 1, 2)


def pixel_gradients(
    grad_output: Tensor,
    clusters: Clusters,
    w: Tensor,
    shape: tuple[int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return (grad_input (B, C, H, W), grad_weight (O, C, kh, kw)) of `pixel_output` with the clusters held fixed.

    They are its derivatives; where pieces have lengths grad_input is as `members_mean` says.
    """
    x = pixel_image(replaced(clusters), shape)
    grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
        grad_output.to(x.dtype),
        x,
        w.to(x.dtype),
        None,
        stride,
        padding,
        (1, 1),
        False,
        (0, 0),
        1,
        (True, True, False),
    )
    pieces = members_mean(pixel_pieces(grad_x, clusters.means.shape[-1]), clusters)
    return pixel_image(pieces, shape), grad_w


# -- patch: the pieces of the unfolded input


def patch_pieces(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], length: int
) -> Tensor:
    """Return the pieces (K / length, B H' W', length) of the unfolded x, the last block padded with zeros if need be."""
    columns = functional.unfold(x, kernel, 1, padding, stride).transpose(1, 2).flatten(0, 1)
    short = -columns.shape[1] % length
    return functional.pad(columns, (0, short)).view(len(columns), -1, length).transpose(0, 1)


def patch_output(clusters: Clusters, w: Tensor, bias: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    """Return the output (B, O, H', W'); ``shape`` is (B, H', W')."""
    b, high, wide = shape
    columns = replaced(clusters).transpose(0, 1).flatten(1)
    right = w.flatten(1).to(columns.dtype)
    y = columns[:, : right.shape[1]] @ right.t()
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.view(b, high, wide, -1).permute(0, 3, 1, 2)


def patch_gradients(
    grad_output: Tensor,
    clusters: Clusters,
    w: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return (grad_input, grad_weight) of `patch_output` for an input of ``size`` (H, W), clusters held fixed."""
    columns = replaced(clusters).transpose(0, 1).flatten(1)
    k, length = w[0].numel(), clusters.means.shape[-1]
    grad = grad_output.permute(0, 2, 3, 1).reshape(-1, w.shape[0]).to(columns.dtype)
    grad_w = (grad.t() @ columns[:, :k]).view(w.shape)
    back = functional.pad(grad @ w.flatten(1).to(grad.dtype), (0, -k % length))
    back = members_mean(back.view(len(back), -1, length).transpose(0, 1), clusters)
    back = back.transpose(0, 1).flatten(1)[:, :k].reshape(grad_output.shape[0], -1, k).transpose(1, 2)
    kernel = (w.shape[2], w.shape[3])
    return functional.fold(back, size, kernel, 1, padding, stride), grad_w
