"""Copy some channels of a tensor out, or back into zeros, at the speed of memory.

Selecting channels pays only if the copy is much cheaper than the product it shrinks. Under channels_last,
the layout in which convolutions are fast on a CPU, the channels are the innermost dimension;
``index_select`` on it moves one element at a time and costs about as much as the convolution. Read as rows
of wider words, the same copy by ``gather`` runs near memory speed::

    bf16, block of 4 channels        c0 c1 c2 c3 | c4 c5 c6 c7 | ...
    seen as one int64 word each      [   w0     ]  [   w1     ]

So a selection made of whole aligned blocks (4 channels of bf16 fill a word) is several times cheaper to
copy than one of scattered channels. In a contiguous (NCHW) tensor a channel is a whole plane and
``index_select`` is the right tool.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def take(x: Tensor, dim: int, index: Tensor, block: int = 1) -> Tensor:
    """Return the slices ``index`` of ``x`` along ``dim``, in the memory format of ``x``.

    ``block`` promises that ``index`` consists of whole aligned blocks: for every multiple ``i`` of ``block``,
    ``index[i:i+block]`` counts up by one from a multiple of ``block``. It changes the speed, not the values.
    """
    if dim == 0 and _channels_last(x) and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    if not _innermost(x, dim):
        return x.index_select(dim, index)
    rows = _rows(x, dim)
    lane = _lane(rows, rows.shape[1], block)
    words = rows.view(_WORDS[lane * rows.element_size()])
    picked = torch.gather(words, 1, _word_index(index, lane).expand(words.shape[0], -1))
    return _unrows(picked.view(x.dtype), x.shape, dim)


def put(
    values: Tensor, dim: int, index: Tensor, size: int, *, block: int = 1, repeats: bool = False
) -> Tensor:
    """Return zeros with ``size`` slices along ``dim`` into which ``values`` went at ``index``.

    The transpose of `take`. With ``repeats`` an index may occur several times, and its slices are added up.
    """
    if repeats or not _innermost(values, dim):
        shape = [*values.shape]
        shape[dim] = size
        layout = torch.channels_last if _channels_last(values) else torch.contiguous_format
        zeros = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=layout).zero_()
        return zeros.index_add_(dim, index, values) if repeats else zeros.index_copy_(dim, index, values)
    rows = _rows(values, dim)
    lane = _lane(rows, size, block)
    word = _WORDS[lane * rows.element_size()]
    zeros = torch.zeros(rows.shape[0], size // lane, dtype=word, device=values.device)
    zeros.scatter_(1, _word_index(index, lane).expand(rows.shape[0], -1), rows.view(word))
    return _unrows(zeros.view(values.dtype), values.shape, dim)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _last(x: Tensor, dim: int) -> bool:
    return dim % x.dim() == x.dim() - 1


def _innermost(x: Tensor, dim: int) -> bool:
    """Whether ``dim`` is innermost in a dense CPU tensor, where rows of words are the fastest copy."""
    if x.device.type != "cpu" or x.dim() < 2 or x.element_size() not in _WORDS or x.numel() == 0:
        return False
    return x.is_contiguous() if _last(x, dim) else dim == 1 and _channels_last(x)


def _rows(x: Tensor, dim: int) -> Tensor:
    """View (N, C, H, W) in channels_last with ``dim`` 1, or (..., C) with the last ``dim``, as (rows, C).

    It copies only in a compiled graph whose tensors are laid out otherwise than when it was traced.
    """
    rows = x.reshape(-1, x.shape[-1]) if _last(x, dim) else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return rows.contiguous()


def _unrows(rows: Tensor, like: torch.Size, dim: int) -> Tensor:
    if dim % len(like) == len(like) - 1:
        return rows.view(*like[:-1], rows.shape[1])
    n, _, h, w = like
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)


def _word_index(index: Tensor, lane: int) -> Tensor:
    return index if lane == 1 else index[::lane] // lane


def _lane(rows: Tensor, size: int, block: int) -> int:
    """Return how many channels go into a word of at most 8 bytes; ``size`` is the width unselected."""
    lane = 1
    while (
        lane * 2 * rows.element_size() <= 8
        and block % (lane * 2) == 0
        and rows.shape[1] % (lane * 2) == 0
        and size % (lane * 2) == 0
        and rows.storage_offset() % (lane * 2) == 0
    ):
        lane *= 2
    return lane
