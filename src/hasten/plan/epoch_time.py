"""The time of a step and an epoch, by a formula whose terms are shapes and whose constants a calibration finds.

T_epoch = T_data + n_it (sum of products t + sum of passes + casts + optimizer + T_fix)
t       = max(flops / R(product, dtype), bytes / BW) + tau_call           (the roofline)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from hasten.errors import SettingsError, UnsupportedError
from hasten.kernels.probe import fingerprint
from hasten.plan.precision import bytes_per_element, rate_of_bits
from hasten.plan.trace import Work, trace

OPTIMIZER_PASSES = {"sgd": 3, "momentum": 5, "adam": 7}
WIDEST_EMULATED = 24


class EmulatedError(UnsupportedError, RuntimeError):
    """A speed-up was asked of a format that this machine only emulates, or that no machine at hand has."""


@dataclass(frozen=True)
class Theta:
    """Constants of one machine, from `hasten.plan.calibrate`.

    seconds: by name, of one flop ("output float32", ...), of one byte ("bytes float32" of a product; "norm float32",
    "pass bfloat16", "cast", ...), of one call ("call": alone, "step call": what it takes more within a step), of a step
    ("step": T_fix) and of rounding one element ("convert": c_q). Our additions: of one element of a weight that is laid
    out anew ("weights of output float32", ...) and of one byte of fresh memory ("fresh"). overlap: whether a product
    takes the longer of compute and memory, as in a roofline, or both one after the other. within: time of an operation
    within a step over alone, where its operands may be nearer or farther. errors: the median relative error that the
    fit left, by term. machine, threads: where it holds.
    """

    seconds: dict[str, float]
    machine: str
    threads: int
    overlap: bool = False
    within: float = 1.0
    errors: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise UnsupportedError if these constants are of another machine, other versions or another number of threads."""
        problems = []
        if self.machine != fingerprint():
            problems.append(
                f"they were found on {self.machine}, this machine with its versions is {fingerprint()}"
            )
        if self.threads != torch.get_num_threads():
            problems.append(f"they hold for {self.threads} threads, {torch.get_num_threads()} are set")
        if problems:
            raise UnsupportedError(
                f"the constants of the epoch-time formula do not fit here: {', and '.join(problems)}. Run "
                f"hasten.plan.calibrate() here."
            )

    def of(self, term: str) -> float:
        """Return the seconds of one unit of ``term``. Raises UnsupportedError for one that was not calibrated."""
        if term not in self.seconds:
            raise UnsupportedError(
                f"the constants have nothing for {term!r}; known: {', '.join(sorted(self.seconds))}. Calibrate with that dtype."
            )
        return self.seconds[term]


@dataclass(frozen=True)
class StepTime:
    """The predicted seconds of one step, by term. format: "float32", "bfloat16" or what is not real here.

    emulated: the format is rounded on float32. hypothetical: of hardware that is not there. Neither has a speed-up.
    """

    seconds: dict[str, float]
    format: str
    emulated: bool = False
    hypothetical: bool = False

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    def speedup_over(self, other: StepTime) -> float:
        """Return how many times as fast this step is as ``other``. Raises EmulatedError unless both formats are real here."""
        unreal = [s.format for s in (self, other) if s.emulated or s.hypothetical]
        if unreal:
            raise EmulatedError(
                f"{' and '.join(unreal)} would not run as such on this machine, so no speed-up can be stated for it; compare formats "
                f"that the machine has, such as float32 and bfloat16."
            )
        return other.total / self.total


def terms(work: Work) -> dict[str, float]:
    """Return what an operation has of each constant but its flops and bytes, which `work_seconds` weighs."""
    found = {"call": 1.0, "fresh": work.fresh}
    return found | ({f"weights of {work.term}": work.weights} if work.product else {})


def byte_term(work: Work) -> str:
    """Return the constant by which the bytes of an operation count."""
    return f"bytes {work.term.split()[1]}" if work.product else work.term


def work_seconds(work: Work, theta: Theta, *, faster: float = 1.0, narrower: float = 1.0) -> float:
    """Return the predicted seconds of one operation alone; ``faster`` divides flops, ``narrower`` divides bytes."""
    rest = sum(
        amount * theta.of(name) / (1.0 if name == "call" else narrower)
        for name, amount in terms(work).items()
    )
    memory = work.bytes * theta.of(byte_term(work)) / narrower
    if not work.product:
        return memory + rest
    compute = work.flops * theta.of(work.term) / faster
    return (max(compute, memory) if theta.overlap else compute + memory) + rest


def step_time(
    model: nn.Module,
    inputs: tuple[int, ...],
    theta: Theta,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "momentum",
    emulated: tuple[int, int] | None = None,
    hypothetical_bits: int | None = None,
    gamma: float = 1.0,
) -> StepTime:
    """Return the predicted time of one training step on a batch of shape ``inputs``.

    optimizer: "sgd", "momentum" or "adam". emulated: the fixed-point format <IL, FL> rounded on float32, at c_q for each
    element of every output, grad_input, grad_weight and weight. hypothetical_bits: hardware with R(b) = R(32)
    (32/b)**gamma that keeps tensors in b bits, instead.

    Raises UnsupportedError where ``theta`` was found elsewhere, SettingsError for formats that do not exist.
    """
    theta.check()
    _check_format(dtype, optimizer, emulated, hypothetical_bits)
    works = trace(model, inputs, dtype=dtype)
    faster = narrower = 1.0
    if hypothetical_bits is not None:
        faster = rate_of_bits(1.0, hypothetical_bits, gamma)
        narrower = 4 / bytes_per_element(hypothetical_bits)
    seconds: dict[str, float] = {}
    for work in works:
        kind = work.term.split()[0]
        taken = work_seconds(work, theta, faster=faster, narrower=narrower)
        seconds[kind] = seconds.get(kind, 0.0) + taken * theta.within + theta.of("step call")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds["optimizer"] = OPTIMIZER_PASSES[optimizer] * 4 * parameters * theta.of("pass float32")
    seconds["step"] = theta.of("step")
    if emulated is not None:
        rounded = sum(work.converts for work in works) + parameters
        seconds["convert"] = rounded * theta.of("convert")
    name = str(dtype).removeprefix("torch.")
    if emulated is not None:
        name = f"<{emulated[0]},{emulated[1]}> emulated on float32"
    elif hypothetical_bits is not None:
        name = f"{hypothetical_bits}-bit hardware, gamma {gamma:g}"
    return StepTime(seconds, name, emulated is not None, hypothetical_bits is not None)


def _check_format(
    dtype: torch.dtype, optimizer: str, emulated: tuple[int, int] | None, hypothetical_bits: int | None
) -> None:
    problems = []
    if optimizer not in OPTIMIZER_PASSES:
        problems.append(f"optimizer is {optimizer!r}; allowed: {', '.join(OPTIMIZER_PASSES)}.")
    if emulated is not None and hypothetical_bits is not None:
        problems.append("give one of emulated and hypothetical_bits, not both.")
    if (emulated is not None or hypothetical_bits is not None) and dtype != torch.float32:
        problems.append(f"emulated and hypothetical formats start from float32, not {dtype}.")
    if emulated is not None:
        integer, fraction = emulated
        if integer < 1 or fraction < 0 or integer + fraction > WIDEST_EMULATED:
            problems.append(
                f"emulated=<{integer},{fraction}> is not a format of 1 or more integer bits, 0 or more fraction bits and at most "
                f"{WIDEST_EMULATED} in all, which is what float32's mantissa holds."
            )
    if problems:
        raise SettingsError("step_time: " + " ".join(problems))


def epoch_seconds(step: StepTime, samples: int, batch: int, *, data_seconds: float = 0.0) -> float:
    """Return T_epoch: ceil(samples / batch) steps and ``data_seconds``, what the loader takes for an epoch by itself."""
    if samples < 1 or batch < 1 or not data_seconds >= 0:
        raise SettingsError(
            f"samples (={samples}) and batch (={batch}) must be 1 or more, data_seconds (={data_seconds}) 0 or more."
        )
    return data_seconds + math.ceil(samples / batch) * step.total
