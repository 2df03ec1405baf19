"""Equality of state trees to the last bit, and small random states."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch


def raw(tensor: torch.Tensor) -> bytes:
    """Return the values of a tensor as bytes, in row-major order."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def equal(left: Any, right: Any) -> bool:
    """Whether two trees are the same in type, order and every bit; NumPy values may have become tensors."""
    if isinstance(left, np.ndarray | np.generic):
        left = torch.from_numpy(np.array(left, dtype=left.dtype.newbyteorder("="), order="C"))
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and raw(left) == raw(right)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(
            type(a) is type(b) and equal(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    return bool(left == right)


def state(step: int) -> dict[str, dict[Any, Any]]:
    """Return the parts of a small training state that depends on ``step`` alone."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, 2, 2, generator=generator)
    return {
        "model": {
            "conv.weight": weight.contiguous(memory_format=torch.channels_last),
            "head": weight[0, 0, 0].clone(),
        },
        "optim": {"conv.weight": {"momentum": torch.randn(4, 3, 2, 2, generator=generator)}, "head": {}},
        "method-x": {"scores": torch.rand(11, generator=generator).bfloat16(), "kept": (1, 5), 3: math.pi},
        "state": {"step": step, "lr": 0.1 / (step + 1), "best": math.nan},
    }


RECIPE = {"lr": 0.1, "methods": ["x(p=0.5)"], "model": "small"}
