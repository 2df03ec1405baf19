"""Which number format this machine computes convolutions fastest in, found by a timed probe."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F

from hasten import keyed
from hasten.errors import UnsupportedError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# (major, minor) compute capability from which a GPU has units for the format
CAPABILITY = {"bfloat16": (8, 0), "float16": (7, 0)}


@cache
def conv_seconds(channels_last: bool, *names: str) -> dict[str, float]:
    """Return the seconds that a 3x3 convolution, forward and backward, takes in each dtype on this CPU.

    x is (16, 64, 16, 16). The dtypes take turns, and the best of twelve counts, since other processes may
    disturb most of them. About 100 ms, once per process.
    """
    g = keyed.generator("conv_seconds")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(16, 64, 16, 16, generator=g).to(memory_format=layout).requires_grad_()
    w = (torch.randn(64, 64, 3, 3, generator=g) / 24).to(memory_format=layout).requires_grad_()
    best = dict.fromkeys(names, float("inf"))
    for turn in range(13):
        for name in names:
            start = time.perf_counter()
            with torch.autocast("cpu", DTYPES[name]) if name != "float32" else nullcontext():
                y = F.conv2d(x, w, padding=1)
            torch.autograd.grad(y, (x, w), y)
            if turn:  # the first turn prepares the kernels
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def choose_dtype(wish: str, device: torch.device, channels_last: bool, force: bool) -> tuple[str, str]:
    """Return the dtype to train in and why, a sentence part.

    "auto" takes bfloat16 if it is at least a tenth faster than float32 (our choice), and never float16, which
    decides about updates too. Raises UnsupportedError for a wish slower than float32, unless ``force``.
    """
    if wish == "float32":
        return wish, "dtype='float32' was asked for"
    name = "bfloat16" if wish == "auto" else wish
    if wish != "auto" and force:
        return name, "dtype was forced"
    if device.type == "cpu":
        seconds = conv_seconds(channels_last, "float32", name)
        ratio = seconds[name] / seconds["float32"]
        slow = f"a {name} convolution takes {ratio:.2f} times as long as one in float32 on this CPU"
        good = ratio < 0.9
    elif device.type == "cuda":
        have = torch.cuda.get_device_capability(device)
        slow = f"this GPU (compute capability {have[0]}.{have[1]}) has no units for {name}"
        good = have >= CAPABILITY[name]
    else:
        slow = f"{name} on a device of type {device.type!r} is not known to be faster"
        good = False
    if good:
        return name, f"{name} is faster than float32 here"
    if wish == "auto":
        return "float32", f"{slow}, so it stays in float32"
    raise UnsupportedError(f"mixed_precision: {slow}; use dtype='auto', or force=True to do it all the same.")
