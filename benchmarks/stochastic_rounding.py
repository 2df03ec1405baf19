"""Stochastic rounding of float32 to bfloat16 against copies: torch's own conversion, and float32 to float32 of equal bytes.

Rounding reads 4 bytes an element and writes 2; the plain copy moves as many in all, of 3/4 of the elements. Operands are
written before they are read, for memory never written is a page of zeros in the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import claim, store
from hasten import keyed
from hasten.kernels.native import extension, flat, instruction_set
from hasten.measure.environment import environment

CLAIM = "stochastic rounding to bfloat16 >= 80% of the bandwidth of a copy, on large tensors with 2 threads"
MINUTES = 2
SIZES, ROUNDS, TARGET = (1 << 22, 1 << 24, 1 << 26), 41, 0.8


def timed(n: int, threads: int, rounds: int) -> dict[str, float]:
    """Return the median of gigabytes a second of each form, run in turn; and the kernel's share of each copy, pairwise."""
    native = extension()
    assert native is not None, "this benchmark is of the native kernel; build it"
    g = keyed.generator("stochastic_rounding")
    x, y = torch.randn(n, generator=g), torch.zeros(n, dtype=torch.bfloat16)
    a, b = torch.randn(3 * n // 4, generator=g), torch.zeros(3 * n // 4)
    torch.set_num_threads(threads)
    forms: dict[str, Callable[[], object]] = {
        "stochastic": lambda: native.round_bfloat16(flat(x), flat(y), 12345, threads),
        "conversion": lambda: y.copy_(x),
        "copy": lambda: b.copy_(a),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    found = {f"{name} GB/s": 6 * n / statistics.median(taken) / 1e9 for name, taken in seconds.items()}
    for other in ("conversion", "copy"):
        shares = [t / s for s, t in zip(seconds["stochastic"], seconds[other], strict=True)]
        found[f"share of {other}"] = statistics.median(shares)
    return found


def main(smoke: bool = False) -> None:
    """Time every size with one thread and with two, and store the shares."""
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        for n in (1 << 16,) if smoke else SIZES:
            for threads in (1, 2):
                row = {"elements": n, "threads": threads, **timed(n, threads, 3 if smoke else ROUNDS)}
                rows.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    finally:
        torch.set_num_threads(before)
    claims = []
    if not smoke:
        large = next(row for row in rows if row["elements"] == SIZES[-1] and row["threads"] == 2)
        for other in ("conversion", "copy"):
            share = large[f"share of {other}"]
            words = {
                "conversion": "torch's float32->bfloat16 copy_",
                "copy": "a float32 copy of as many bytes",
            }
            claims.append(
                claim("limited_precision", f"stochastic rounding to bfloat16, {SIZES[-1]} elements, 2 threads, over {words[other]}",
                      f"{share:.2f}x its bandwidth ({large['stochastic GB/s']:.1f} GB/s)", target=f">= {TARGET:g}x",
                      met=share >= TARGET)
            )  # fmt: skip
    record = {
        "claim": CLAIM, "rows": rows, "instruction_set": instruction_set(), "machine": environment().get("cpu"),
    }  # fmt: skip
    store("stochastic_rounding", record, smoke, claims)
