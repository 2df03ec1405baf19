"""The epoch-time formula: calibrated on two networks, it predicts epochs of others that it has never seen.

Both formats are measured in turn, epoch by epoch. Beside the held-out epochs: whether operations add up to a step, what
doubling the batch and the width does, and what narrow formats would do on hardware that has them and do when emulated.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import WORK, build, cifar10, claim, store
from hasten.data import DataSet, Loader
from hasten.errors import DataError, UnsupportedError
from hasten.plan import (
    EmulatedError,
    Theta,
    calibrate,
    epoch_seconds,
    load_theta,
    step_time,
    store_theta,
    trace,
)
from hasten.plan.calibration import step_seconds, time_works

CLAIM = "epoch-time formula: epochs of networks not calibrated on, median error <= 15%; bfloat16 over float32 within 10%"
MINUTES = 10
DTYPES = (torch.float32, torch.bfloat16)
CALIBRATED, BATCHES = ("resnet20", "vgg16"), (16, 64, 128)
#         network, batch, images in an epoch
HELD_OUT = (("resnet8", 32, 1920), ("resnet32", 96, 768), ("wrn-16-4", 32, 480), ("vgg19", 32, 480),
            ("resnet18", 48, 384), ("mobilenet-v1", 32, 960))  # fmt: skip
EPOCHS = 3
BITS = (32, 24, 16, 12, 8, 4)


def constants(smoke: bool) -> Theta:
    """Return the constants of this machine: those stored, or new ones where none fit."""
    if smoke:
        return calibrate([partial(build, "resnet8")], [(4, 3, 32, 32)], DTYPES, rounds=3, budget=2.0)
    path = Path(WORK) / "theta.json"
    try:
        return load_theta(path)
    except (DataError, UnsupportedError) as reason:
        print(f"calibrating: {reason}", flush=True)
    networks = [partial(build, name) for name in CALIBRATED]
    theta = calibrate(networks, [(batch, 3, 32, 32) for batch in BATCHES], DTYPES, budget=120.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    store_theta(theta, path)
    return theta


class Trained:
    """A network that trains by the plainest loop, in channels_last, an epoch at a time."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.model = build(name).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.dtype = dtype

    def epoch(self, loader: Loader, number: int) -> float:
        """Return the seconds of one epoch, with the loader's."""
        start = time.perf_counter()
        for batch in loader.epoch(number):
            x = batch.inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                out = self.model(x)
            loss = nn.functional.cross_entropy(out.float(), batch.targets)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return time.perf_counter() - start


def data_seconds(loader: Loader) -> float:
    """Return the median seconds of the loader alone for an epoch."""
    taken = []
    for number in range(EPOCHS):
        start = time.perf_counter()
        for batch in loader.epoch(number):
            batch.inputs.contiguous(memory_format=torch.channels_last)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def held_out(theta: Theta, data: DataSet, smoke: bool) -> list[dict[str, Any]]:
    """Predict and measure epochs of networks, batches and formats that the calibration has not seen."""
    rows: list[dict[str, Any]] = []
    for name, batch, images in (("resnet8", 8, 32),) if smoke else HELD_OUT:
        loader = Loader(data.train.stratified(images), batch, seed=0, shuffle=True, drop_last=False)
        waiting = data_seconds(loader)
        arms = {dtype: Trained(name, dtype) for dtype in DTYPES}
        taken: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
        for number in range(EPOCHS + 1):  # the first is for warmth
            for dtype, arm in arms.items():
                seconds = arm.epoch(loader, number)
                if number:
                    taken[dtype].append(seconds)
        for dtype in DTYPES:
            step = step_time(build(name), (batch, 3, 32, 32), theta, dtype=dtype)
            predicted = epoch_seconds(step, images, batch, data_seconds=waiting)
            measured = statistics.median(taken[dtype])
            rows.append(
                {"network": name, "batch": batch, "images": images, "dtype": str(dtype)[6:], "predicted": predicted,
                 "measured": measured, "epochs": taken[dtype], "data": waiting, "terms": step.seconds,
                 "error": predicted / measured - 1}
            )  # fmt: skip
            print(
                f"{name:14} batch {batch:3} {str(dtype)[6:]:9} predicted {predicted:7.3f} s, measured {measured:7.3f} s, "
                f"{100 * rows[-1]['error']:+.1f}%",
                flush=True,
            )
    return rows


def additivity(smoke: bool) -> list[dict[str, Any]]:
    """Return the sum of operations timed alone beside the whole step."""
    rows = []
    for name, batch in (("resnet8", 8),) if smoke else (("resnet32", 32), ("vgg19", 32)):
        for dtype in DTYPES:
            shape = (batch, 3, 32, 32)
            works = trace(build(name), shape, dtype=dtype)
            alone = {
                t.works[0].key(): t.seconds for t in time_works(works, rounds=3 if smoke else 10, budget=15.0)
            }
            total, whole = sum(alone[w.key()] for w in works), step_seconds(build(name), shape, dtype)
            rows.append(
                {"network": name, "batch": batch, "dtype": str(dtype)[6:], "operations": total, "step": whole}
            )
            print(
                f"{name}, batch {batch}, {str(dtype)[6:]}: operations alone {total:.4f} s, step {whole:.4f} s",
                flush=True,
            )
    return rows


def doubling(theta: Theta, smoke: bool) -> dict[str, Any]:
    """Return the predicted and measured ratio of times as the batch doubles and as the width doubles."""
    found = {}
    small, large = (4, 8) if smoke else (32, 64)
    narrow, wide = ("wrn-10-1", "wrn-10-2") if smoke else ("wrn-16-2", "wrn-16-4")
    cases = {
        "seconds of an epoch, batch doubled": [("resnet20", small, 2.0), ("resnet20", large, 1.0)],
        "step, width doubled": [(narrow, small, 1.0), (wide, small, 1.0)],
    }
    for label, pair in cases.items():
        steps = [step_time(build(name), (batch, 3, 32, 32), theta) for name, batch, _ in pair]
        predicted = [step.total * times for step, (_, _, times) in zip(steps, pair, strict=True)]
        measured = [
            step_seconds(build(name), (batch, 3, 32, 32), torch.float32) * times
            for name, batch, times in pair
        ]
        products = [sum(step.seconds[p] for p in ("output", "grad_input", "grad_weight")) for step in steps]
        found[label] = {
            "predicted": predicted[1] / predicted[0],
            "measured": measured[1] / measured[0],
            # a smoke run's few shapes may be fitted without any cost of arithmetic
            "products": products[1] / products[0] if products[0] else None,
        }
        print(f"{label}: {found[label]}", flush=True)
    return found


def narrow(theta: Theta, smoke: bool) -> dict[str, Any]:
    """Return a step's seconds by bits on hypothetical hardware, beside emulation, which is constant and no gain."""
    model, shape = build("resnet8" if smoke else "resnet20"), (8 if smoke else 128, 3, 32, 32)
    plain = step_time(model, shape, theta)
    emulated = step_time(model, shape, theta, emulated=(2, 14))
    try:
        emulated.speedup_over(plain)
    except EmulatedError:
        pass
    else:
        raise AssertionError("a speed-up was stated for an emulated format")
    found: dict[str, Any] = {"float32": plain.total, "emulated on float32": emulated.total, "emulated": True}
    for gamma in (1.0, 2.0):
        times = {
            bits: step_time(model, shape, theta, hypothetical_bits=bits, gamma=gamma).total for bits in BITS
        }
        found[f"hypothetical hardware, gamma {gamma:g}"] = times
    print(f"seconds of a step: {found}", flush=True)
    return found


def main(smoke: bool = False) -> None:
    """Calibrate, predict, measure, and store every cell."""
    theta = constants(smoke)
    rows = held_out(theta, cifar10(), smoke)
    median = statistics.median(abs(row["error"]) for row in rows)
    ratios = [
        (half["predicted"] / full["predicted"]) / (half["measured"] / full["measured"]) - 1
        for full, half in zip(rows[::2], rows[1::2], strict=True)
    ]
    worst = max(abs(r) for r in ratios)
    values = {
        "claim": CLAIM,
        "settings": {"calibrated": CALIBRATED, "batches": BATCHES, "held_out": HELD_OUT, "epochs": EPOCHS},
        "theta": {
            "seconds": theta.seconds,
            "overlap": theta.overlap,
            "within": theta.within,
            "errors": theta.errors,
        },
        "held_out": rows,
        "ratio_errors": ratios,
        "additivity": additivity(smoke),
        "doubling": doubling(theta, smoke),
        "narrow": narrow(theta, smoke),
    }
    claims = [
        claim((), "epoch-time formula, held-out epochs, median relative error", f"{100 * median:.1f}%", target="<= 15%", met=median <= 0.15),
        claim((), "epoch-time formula, bfloat16 over float32, median error of the ratio", f"{100 * statistics.median(map(abs, ratios)):.1f}%, worst {100 * worst:.1f}%",
              target="<= 10%", met=statistics.median(map(abs, ratios)) <= 0.10),
    ]  # fmt: skip
    store("epoch_time", values, smoke, claims)
