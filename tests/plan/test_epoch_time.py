"""The formula: what it adds up, what doubling does to it, and what it refuses to claim."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.errors import SettingsError, UnsupportedError
from hasten.kernels.probe import fingerprint
from hasten.plan import EmulatedError, StepTime, Theta, epoch_seconds, step_time, trace
from hasten.plan.epoch_time import byte_term, terms, work_seconds

DTYPES = ("float32", "bfloat16")
PRODUCTS = ("output", "grad_input", "grad_weight")


def theta(overlap: bool = True, **changes: float) -> Theta:
    """Constants without any overhead, unless given."""
    seconds = {"call": 0.0, "step call": 0.0, "step": 0.0, "cast": 1e-10, "fresh": 0.0, "convert": 2e-9}
    for dtype in DTYPES:
        seconds |= {f"{p} {dtype}": 1e-11 if dtype == "float32" else 2e-12 for p in PRODUCTS}
        seconds |= {f"weights of {p} {dtype}": 0.0 for p in PRODUCTS}
        seconds |= {f"{kind} {dtype}": 1e-10 for kind in ("norm", "pass", "bytes")}
    names = {name.replace(" ", "_"): name for name in seconds}
    seconds |= {names[name]: value for name, value in changes.items()}
    return Theta(seconds, fingerprint(), torch.get_num_threads(), overlap)


def network(width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )  # fmt: skip


def test_one_operation_is_a_roofline_or_a_sum() -> None:
    work = next(w for w in trace(network(), (4, 3, 16, 16)) if w.term == "grad_weight float32")
    compute, memory = work.flops * 1e-11, work.bytes * 1e-10
    assert work_seconds(work, theta()) == max(compute, memory)
    assert abs(work_seconds(work, theta(overlap=False)) - (compute + memory)) < 1e-15
    slow = theta(bytes_float32=1e-6, call=3.0, weights_of_grad_weight_float32=1e-3)
    expected = work.bytes * 1e-6 + 3.0 + work.weights * 1e-3
    assert abs(work_seconds(work, slow) - expected) < 1e-9
    assert byte_term(work) == "bytes float32"
    assert set(terms(work)) == {"call", "fresh", "weights of grad_weight float32"}


def test_a_step_is_the_sum_of_its_operations() -> None:
    model, constants = network(), theta(call=1e-6, step_call=2e-6, step=5e-4)
    works = trace(model, (4, 3, 16, 16))
    found = step_time(model, (4, 3, 16, 16), constants, optimizer="adam")
    parameters = sum(p.numel() for p in model.parameters())
    expected = (
        sum(work_seconds(w, constants) for w in works) + len(works) * 2e-6 + 5e-4 + 7 * 4 * parameters * 1e-10
    )
    assert abs(found.total - expected) < 1e-12
    assert found.seconds["optimizer"] == 7 * 4 * parameters * 1e-10
    assert found.format == "float32"


def test_an_epoch_counts_the_last_batch_and_the_loader() -> None:
    step = StepTime({"output": 0.5}, "float32")
    assert epoch_seconds(step, 1000, 100) == 5.0
    assert epoch_seconds(step, 1001, 100, data_seconds=2.0) == 7.5
    with pytest.raises(SettingsError, match="samples"):
        epoch_seconds(step, 0, 100)


def test_doubling_the_batch_and_the_width() -> None:
    """Falsifiers: an epoch's steps halve as they double, and convolutions cost four times where compute limits."""
    constants = theta(bytes_float32=0.0)
    one, two = (step_time(network(64), (b, 3, 16, 16), constants) for b in (32, 64))
    a, b = epoch_seconds(one, 6400, 32), epoch_seconds(two, 6400, 64)
    fixed = one.seconds["optimizer"]
    assert abs(two.total - fixed - 2 * (one.total - fixed)) < 0.01 * one.total
    assert 0.95 < b / a <= 1.0
    narrow, wide = (
        sum(w.flops for w in trace(network(width), (8, 3, 16, 16)) if w.term == "grad_input float32")
        for width in (64, 128)
    )
    assert wide == 4 * narrow
    times = [
        step_time(network(width), (8, 3, 16, 16), constants).seconds["grad_input"] for width in (64, 128)
    ]
    assert abs(times[1] / times[0] - 4) < 1e-9


def test_emulation_costs_each_rounding_and_is_never_a_gain() -> None:
    model, shape = network(), (4, 3, 16, 16)
    plain = step_time(model, shape, theta())
    emulated = [step_time(model, shape, theta(), emulated=f) for f in ((2, 14), (4, 4), (1, 0))]
    parameters = sum(p.numel() for p in model.parameters())
    rounded = sum(w.converts for w in trace(model, shape)) + parameters
    outputs, weights = 2 * 4 * 32 * 16 * 16 + 4 * 4, 3 * 32 * 9 + 32 * 32 * 9 + 32 * 4
    inputs = 4 * 32 * 16 * 16 + 4 * 32
    assert rounded == outputs + inputs + weights + parameters
    for step in emulated:
        assert abs(step.total - plain.total - rounded * 2e-9) < 1e-12, (
            "constant in the number of bits, above float32"
        )
        for pair in ((step, plain), (plain, step)):
            with pytest.raises(EmulatedError, match="no speed-up can be stated"):
                pair[0].speedup_over(pair[1])
    assert issubclass(EmulatedError, RuntimeError)
    half = step_time(model, shape, theta(), dtype=torch.bfloat16)
    assert half.speedup_over(plain) == plain.total / half.total


def test_hypothetical_hardware() -> None:
    model, shape = network(64), (32, 3, 16, 16)
    constants = theta(bytes_float32=0.0)
    plain = step_time(model, shape, constants)
    same = step_time(model, shape, constants, hypothetical_bits=32, gamma=2)
    assert same.seconds == plain.seconds
    for gamma, factor in ((1.0, 2.0), (2.0, 4.0)):
        half = step_time(model, shape, constants, hypothetical_bits=16, gamma=gamma)
        assert abs(plain.seconds["grad_input"] / half.seconds["grad_input"] - factor) < 1e-9
        assert abs(plain.seconds["norm"] / half.seconds["norm"] - 2) < 1e-9
        with pytest.raises(EmulatedError):
            half.speedup_over(plain)


def test_constants_of_another_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = theta()
    monkeypatch.setattr("hasten.plan.epoch_time.fingerprint", lambda: "another")
    with pytest.raises(UnsupportedError, match=r"hasten\.plan\.calibrate"):
        step_time(network(), (4, 3, 16, 16), constants)
    monkeypatch.undo()
    other = Theta(constants.seconds, constants.machine, constants.threads + 1)
    with pytest.raises(UnsupportedError, match="threads"):
        step_time(network(), (4, 3, 16, 16), other)
    with pytest.raises(UnsupportedError, match="float16"):
        step_time(network(), (4, 3, 16, 16), constants, dtype=torch.float16)


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "lion"}, {"emulated": (0, 4)}, {"emulated": (2, -1)}, {"emulated": (5, 20)},
     {"emulated": (2, 14), "hypothetical_bits": 8}, {"emulated": (2, 14), "dtype": torch.bfloat16},
     {"hypothetical_bits": 0}],
)  # fmt: skip
def test_formats_that_do_not_exist_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        step_time(network(), (4, 3, 16, 16), theta(), **settings)  # type: ignore[arg-type]
