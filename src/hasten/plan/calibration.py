"""The constants of the epoch-time formula, from timed operations of two networks on this machine."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn

from hasten.errors import DataError
from hasten.kernels.probe import fingerprint
from hasten.keyed import permutation
from hasten.plan.epoch_time import OPTIMIZER_PASSES, Theta, byte_term, terms, work_seconds
from hasten.plan.trace import Work, trace

COPIED = 256 * 2**20  # bytes, larger than any cache but the largest
EVICTED = 16 * 2**20  # bytes, larger than the caches of one core
TURNS = 8
ROUNDS = 5  # of the assignment of products to compute or memory
FORMAT = 1

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timed:
    """An operation, or a whole step of several, and its median seconds."""

    works: tuple[Work, ...]
    seconds: float


def time_works(
    works: Sequence[Work],
    *,
    rounds: int = 20,
    budget: float = 60.0,
    clock: Clock = time.perf_counter,
) -> list[Timed]:
    """Time each distinct operation alone, in turn with the others so that the machine's moods hit all alike.

    rounds: of all operations, each in an order of its own, after one for warmth; fewer where ``budget`` seconds are
    spent, but at least 3. The median of each counts.
    """
    distinct = list({work.key(): work for work in works}.values())
    taken: list[list[float]] = [[] for _ in distinct]
    begun, far = clock(), torch.zeros(EVICTED // 4)
    for turn in range(rounds + 1):
        for i in permutation(len(distinct), "calibration", turn).tolist():
            run = distinct[i].replay()  # made anew, so that all of them need not fit into memory
            run()
            far.add_(1.0)  # what was just used is no longer in the nearest caches, as in a step
            start = clock()
            run()
            if turn:
                taken[i].append(clock() - start)
        if turn >= 3 and clock() - begun > budget:
            break
    return [Timed((work,), statistics.median(times)) for work, times in zip(distinct, taken, strict=True)]


def bandwidth_seconds(size: int = COPIED, *, rounds: int = 5, clock: Clock = time.perf_counter) -> float:
    """Return the seconds of one byte, read or written, in a copy of ``size`` bytes."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    times = []
    for turn in range(rounds + 1):
        start = clock()
        target.copy_(source)
        if turn:
            times.append(clock() - start)
    return statistics.median(times) / (2 * size)


def convert_seconds(
    size: int = 2**22,
    *,
    rounds: int = 5,
    convert: Callable[[Tensor], object] | None = None,
    clock: Clock = time.perf_counter,
) -> float:
    """Return c_q, the seconds to round one element stochastically to a fixed-point grid.

    convert: how; the default is plain torch: a random number, floor, clamp.
    """
    x, scale = torch.linspace(-1, 1, size), 2.0**10
    generator = torch.Generator().manual_seed(0)

    def plain(x: Tensor) -> Tensor:
        return (
            torch.rand(x.shape, generator=generator).add_(x, alpha=scale).floor_().div_(scale).clamp_(-32, 32)
        )

    run, times = convert or plain, []
    for turn in range(rounds + 1):
        start = clock()
        run(x)
        if turn:
            times.append(clock() - start)
    return statistics.median(times) / size


def fit(timed: Sequence[Timed], byte_seconds: float | None = None, *, overlap: bool | None = None) -> Theta:
    """Return the constants that fit operations timed alone, with the median relative error left for each term.

    Non-negative least squares on relative errors. With ``overlap`` products start as limited by compute; those whose
    bytes take longer by the constants found are then taken as limited by memory, and all is fitted again, at most 5
    times. None tries both and keeps the better. byte_seconds: of a large copy, a row more for the bytes of products.
    """
    if overlap is None:
        both = [fit(timed, byte_seconds, overlap=o) for o in (False, True)]
        return min(both, key=lambda theta: statistics.median(_errors(timed, theta)))
    works = [t.works[0] for t in timed]
    names = sorted({n for w in works for n in (w.term, byte_term(w), *terms(w))})
    column = {name: i for i, name in enumerate(names)}
    large = [n for n in names if n.startswith("bytes ")] if byte_seconds else []
    seconds = np.array([*(t.seconds for t in timed), *[byte_seconds or 0.0] * len(large)])
    limit = ["" if not overlap or not w.product else "compute" for w in works]
    theta = Theta({}, "", 0, overlap)
    for _ in range(ROUNDS if overlap else 1):
        rows = np.zeros((len(seconds), len(names)))
        for row, work, by in zip(rows, works, limit, strict=False):
            for name, amount in terms(work).items():
                row[column[name]] = amount
            if work.product and by != "memory":
                row[column[work.term]] = work.flops
            if by != "compute":
                row[column[byte_term(work)]] = work.bytes
        for row, name in zip(rows[len(works) :], large, strict=True):
            row[column[name]] = 1.0
        found = _relative_nnls(rows, seconds)
        theta = Theta(dict(zip(names, found.tolist(), strict=True)), "", 0, overlap)
        again = _limits(works, theta) if overlap else limit
        if again == limit:
            break
        limit = again
    errors: dict[str, list[float]] = {}
    for t, error in zip(timed, _errors(timed, theta), strict=True):
        errors.setdefault(t.works[0].term, []).append(error)
    return replace(theta, errors={term: statistics.median(values) for term, values in errors.items()})


def _errors(timed: Sequence[Timed], theta: Theta) -> list[float]:
    return [abs(sum(work_seconds(w, theta) for w in t.works) / t.seconds - 1) for t in timed]


def _limits(works: Sequence[Work], theta: Theta) -> list[str]:
    """Return what limits each operation: "compute" or "memory" for products, "" for others."""
    found = []
    for w in works:
        memory = w.product and w.bytes * theta.of(byte_term(w)) > w.flops * theta.of(w.term)
        found.append("" if not w.product else "memory" if memory else "compute")
    for term in {w.term for w in works if w.product}:
        mine = [i for i, w in enumerate(works) if w.term == term]
        if all(found[i] == "memory" for i in mine):  # a rate without a row would be lost
            found[max(mine, key=lambda i: works[i].flops / works[i].bytes)] = "compute"
    return found


def fit_steps(theta: Theta, steps: Sequence[Timed], extra: Sequence[float]) -> Theta:
    """Return ``theta`` with what makes a step of operations alone: ``within``, "step call" and "step" (T_fix).

    extra: seconds of the optimizer in each step, by the formula.
    """
    alone = np.array([sum(work_seconds(w, theta) for w in s.works) for s in steps])
    rows = np.array([[a, len(s.works), 1.0] for a, s in zip(alone, steps, strict=True)])
    found = _relative_nnls(rows, np.array([s.seconds for s in steps]) - np.array(extra))
    within, call, fixed = found.tolist()
    return replace(theta, within=within, seconds={**theta.seconds, "step call": call, "step": fixed})


def _relative_nnls(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x >= 0 that makes ``rows @ x`` relatively closest to ``seconds``.

    Weights are found in turns from both: relative to ``seconds`` alone, half of the time would cost less than twice of
    it, and all would come out too short; with these powers both cost the same. Columns are scaled, as they differ by 1e12.
    """
    weight = 1 / seconds
    found = np.zeros(rows.shape[1])
    for _ in range(TURNS):
        weighted = rows * weight[:, None]
        scale = np.linalg.norm(weighted, axis=0)
        scale[scale == 0] = 1.0
        found = nnls(weighted / scale, seconds * weight)[0] / scale
        weight = np.maximum(rows @ found, 1e-2 * seconds) ** -0.75 * seconds**-0.25
    return np.asarray(found, dtype=np.float64)


def step_seconds(
    model: nn.Module,
    inputs: tuple[int, ...],
    dtype: torch.dtype,
    *,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> float:
    """Return the median seconds of a plain training step in channels_last with SGD and momentum; the model is changed."""
    model = model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(inputs, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(inputs[0], dtype=torch.int64)
    times = []
    for turn in range(rounds + 2):
        start = clock()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(x)
        loss = nn.functional.cross_entropy(out.float(), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if turn > 1:
            times.append(clock() - start)
    return statistics.median(times)


def calibrate(
    networks: Sequence[Callable[[], nn.Module]],
    inputs: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    *,
    rounds: int = 20,
    budget: float = 60.0,
    clock: Clock = time.perf_counter,
) -> Theta:
    """Return the constants of this machine, from every distinct operation of the networks on these batches.

    networks: functions that build one. inputs: shapes of batches (N, C, H, W). budget: seconds for the operations
    alone; whole steps come on top. clock: what is timed; time.process_time leaves out what other programs take, and is
    right for one thread only.
    """
    cases = [(build, shape, dtype) for build in networks for shape in inputs for dtype in dtypes]
    works = [trace(build(), shape, dtype=dtype) for build, shape, dtype in cases]
    timed = time_works([w for each in works for w in each], rounds=rounds, budget=budget, clock=clock)
    theta = fit(timed, bandwidth_seconds(clock=clock))
    steps, extra = [], []
    for (build, shape, dtype), each in zip(cases, works, strict=True):
        model = build()
        parameters = sum(p.numel() for p in model.parameters())
        steps.append(Timed(tuple(each), step_seconds(model, shape, dtype, clock=clock)))
        extra.append(OPTIMIZER_PASSES["momentum"] * 4 * parameters * theta.of("pass float32"))
    theta = fit_steps(theta, steps, extra)
    constants = {**theta.seconds, "convert": convert_seconds(clock=clock)}
    return replace(theta, seconds=constants, machine=fingerprint(), threads=torch.get_num_threads())


def store_theta(theta: Theta, path: str | Path) -> None:
    """Write the constants as JSON, whole or not at all."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(
        json.dumps({"format": FORMAT, **asdict(theta)}, indent=1, sort_keys=True), encoding="utf-8"
    )
    os.replace(part, path)


def load_theta(path: str | Path) -> Theta:
    """Return the constants that `store_theta` wrote.

    Raises DataError for a file that is none, UnsupportedError for constants of another machine, other versions or
    another number of threads.
    """
    try:
        held: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if held.pop("format") != FORMAT:
            raise ValueError("another format")
        seconds = {str(k): float(v) for k, v in held["seconds"].items()}
        errors = {str(k): float(v) for k, v in held["errors"].items()}
        theta = Theta(
            seconds,
            str(held["machine"]),
            int(held["threads"]),
            bool(held["overlap"]),
            float(held["within"]),
            errors,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{Path(path).name} does not hold constants of the epoch-time formula ({type(error).__name__}: {error}); run "
            f"hasten.plan.calibrate() and store_theta again."
        ) from error
    theta.check()
    return theta
