"""The weight gradient of a convolution from one patch of x for each image and output channel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def one_patch(
    grad_output: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    position: str = "argmax_abs",
    weight: str = "sum",
) -> Tensor:
    """Return grad_weight (O, C, kh, kw) in float32: ``sum_n t[n,o] * patch(x[n], q[n,o])``.

    grad_output (N, O, Ho, Wo), x (N, C, Hi, Wi). q is the first place in the map of the largest magnitude ("argmax_abs")
    or value ("argmax"), or place (1, 1), or the nearest to it that exists ("fixed"). t is the sum of the map ("sum") or
    its value at q ("max_value").
    """
    n, o, ho, wo = grad_output.shape
    (kh, kw), c = kernel_size, x.shape[1]
    maps = grad_output.float().reshape(n, o, ho * wo)
    if position == "fixed":
        q = maps.new_full((n, o), min(1, ho - 1) * wo + min(1, wo - 1), dtype=torch.int64)
    else:
        q = (maps.abs() if position == "argmax_abs" else maps).argmax(2)
    t = maps.sum(2) if weight == "sum" else maps.gather(2, q[:, :, None])[:, :, 0]
    padded = functional.pad(x.float(), (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
    i, j, image = q // wo * stride[0], q % wo * stride[1], torch.arange(n, device=x.device)[:, None]
    result = torch.empty((o, c, kh, kw), dtype=torch.float32, device=x.device)
    for u in range(kh):
        for v in range(kw):
            # (N, O, C) at a time, where all taps at once would fill the memory
            result[:, :, u, v] = torch.einsum("no,noc->oc", t, padded[image, i + u, j + v])
    return result
