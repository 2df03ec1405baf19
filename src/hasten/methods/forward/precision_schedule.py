"""Policies (which format in which tensor) and the order in which a run goes through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hasten.methods.forward.fixed_format import ROUNDINGS, Format, format_problems

KINDS = ("fixed", "bfloat16", "float32")
FORMATS = ("f_w", "f_act", "f_err", "f_grad")
SMALL = 8
"""Up to this word length the first and the last layer stay in float32 (recommended by the specification)."""
W, ACT = Format(2, 14), Format(6, 10)


@dataclass(frozen=True)
class Policy:
    """One phase's arithmetic. The formats and roundings matter for "fixed" only."""

    kind: str
    f_w: Format = W
    f_act: Format = ACT
    f_err: Format = ACT
    f_grad: Format = W
    rounding: str = "stochastic"
    rounding_activations: str = "nearest"

    @property
    def shortest(self) -> int:
        """The shortest word of any tensor."""
        return min(f.wl for f in (self.f_w, self.f_act, self.f_err, self.f_grad))

    @property
    def emulated(self) -> bool:
        """Whether the numbers are rounded in float32 memory, which saves nothing."""
        return self.kind == "fixed"

    def __str__(self) -> str:
        if self.kind != "fixed":
            return self.kind
        return (
            f"weights {self.f_w}, activations {self.f_act}, errors {self.f_err}, gradients {self.f_grad}, "
            f"{self.rounding} rounding"
        )


def policy(given: Any, base: Mapping[str, Any]) -> Policy:
    """Return the policy that a setting means: a kind, or changes of the fixed-point settings ``base``."""
    if isinstance(given, str) and given != "fixed":
        return Policy(given)
    chosen = {**base, **(given if isinstance(given, Mapping) else {})}
    f_w, f_act, f_err, f_grad = (Format(*chosen[name]) for name in FORMATS)
    return Policy("fixed", f_w, f_act, f_err, f_grad, chosen["rounding"], chosen["rounding_activations"])


def policy_problems(name: str, given: Any) -> list[str]:
    """Return what is wrong with one policy of the settings."""
    if isinstance(given, str):
        if given in KINDS:
            return []
        return [f"{name} is {given!r}; allowed: {', '.join(map(repr, KINDS))}, or a dict of formats."]
    if not isinstance(given, Mapping):
        return [f"{name} is {given!r}; allowed: {', '.join(map(repr, KINDS))}, or a dict of formats."]
    found = []
    for key, value in given.items():
        if key in FORMATS:
            found += format_problems(f"{name}, {key}", value)
        elif key in ("rounding", "rounding_activations"):
            if value not in ROUNDINGS:
                found.append(f"{name}, {key} is {value!r}; allowed: {', '.join(map(repr, ROUNDINGS))}.")
        else:
            found.append(
                f"{name} has {key!r}; allowed: {', '.join((*FORMATS, 'rounding', 'rounding_activations'))}."
            )
    return found


def schedule_problems(schedule: Any) -> list[str]:
    """Return what is wrong with ((epoch, policy), ...): it begins with epoch 0, and its epochs increase strictly."""
    if not isinstance(schedule, Sequence) or isinstance(schedule, str) or not schedule:
        return [f"schedule is {schedule!r}; allowed: ((0, policy), (epoch, policy), ...) or None."]
    entries = [e for e in schedule if isinstance(e, Sequence) and not isinstance(e, str) and len(e) == 2]
    if len(entries) != len(schedule) or not all(type(epoch) is int for epoch, _ in entries):
        return [f"schedule is {schedule!r}; allowed: pairs (epoch, policy) with whole epochs."]
    epochs = [epoch for epoch, _ in entries]
    found = []
    if epochs[0] != 0:
        found.append(f"schedule begins with epoch {epochs[0]}; allowed: 0, the start of the run.")
    if any(a >= b for a, b in pairwise(epochs)):
        found.append(f"schedule has the epochs {epochs}; allowed: strictly increasing ones.")
    for epoch, given in entries:
        found += policy_problems(f"schedule, epoch {epoch}", given)
    return found


def phase_at(epochs: Sequence[int], epoch: int) -> int:
    """Return which phase holds in ``epoch`` where phase i begins with ``epochs[i]``."""
    return max(i for i, first in enumerate(epochs) if first <= epoch)


@dataclass
class Watch:
    """Counts the epochs without a smaller loss: `stale` of them say that the low precision has given what it can."""

    best: float = float("inf")
    stale: int = 0
    total: float = 0.0
    count: int = 0
    told: float | None = None

    def see(self, loss: float) -> None:
        """Take the training loss of a step into the epoch's mean."""
        self.total, self.count = self.total + loss, self.count + 1

    def end_epoch(self) -> None:
        """Compare the epoch's loss with the best one: the one told since the last epoch, else the mean in training."""
        if self.told is None and not self.count:
            return
        loss = self.told if self.told is not None else self.total / self.count
        self.stale = 0 if loss < self.best else self.stale + 1
        self.best = min(self.best, loss)
        self.total, self.count, self.told = 0.0, 0, None
