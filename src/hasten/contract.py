"""The contract of a method: what it says of itself, its settings, and the hooks by which it acts.

A method is a keyword-only dataclass. Its fields are its settings, stored as given, so that ``repr(method)`` can be
pasted back. What it learns while training is kept apart, in attributes that end with an underscore and are created in
``attach``; ``MethodSpec.state`` names those that a checkpoint must hold.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hasten.errors import SettingsError, unknown
from hasten.places import PLACES
from hasten.settings import wrong_types

if TYPE_CHECKING:
    from hasten.session import Session
    from hasten.surgery import Change

Promise = Literal["autocast", "channels_last", "compile", "ddp"]


@dataclass(frozen=True)
class MethodSpec:
    """What a method says of itself, once for the class.

    ``reads`` and ``writes`` are names of ``hasten.places.PLACES``. ``excludes`` names places that no other method may
    write beside this one, with ``excludes_reason``. ``saves`` is one of the columns a figure may be filed under.
    """

    name: str
    title: str
    paper: str
    saves: Literal["time per step", "samples", "iterations", "memory", "traffic", "data", "inference"]
    acts: str
    writes: frozenset[str]
    reads: frozenset[str] = frozenset()
    excludes: frozenset[str] = frozenset()
    excludes_reason: str = ""
    layers: tuple[str, ...] = ()
    requires: frozenset[Literal["per_example_loss", "progress", "index"]] = frozenset()
    state: tuple[str, ...] = ()
    promises: frozenset[Promise] = frozenset({"autocast", "channels_last", "compile", "ddp"})
    slower_when: str = ""

    def __post_init__(self) -> None:
        for place in sorted(self.reads | self.writes | self.excludes):
            if place not in PLACES:
                raise unknown("place", place, PLACES)


@dataclass
class Effect:
    """What attaching a method did: layers touched and skipped, with a note or reason for each, and the work saved.

    ``work`` is the expected share of training MACs that remains (1.0 = all), where the method can tell beforehand.
    ``emulated`` says that a number format is imitated in another: the run's time then says nothing, and none is reported.
    """

    touched: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    saves: str = ""
    work: float | None = None
    emulated: bool = False

    def lines(self) -> list[str]:
        """Return the effect as text, a line each layer, an emulation first."""
        told = ["  emulated: accuracy as in the format; time and memory are not"] if self.emulated else []
        return (
            told
            + [f"  {name}: {note}" for name, note in self.touched.items()]
            + [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]
        )


@dataclass(slots=True)
class Batch:
    """What one step trains on.

    inputs (N, C, H, W); targets (N,) class numbers or (N, K) shares; index (N,) numbers of the samples in the training
    set, or None; weights (N,) of the samples in the loss, or None for equal ones. ``loss``: before the forward pass, what
    ``Session.step`` returns where a method leaves nothing to train on; in ``observe``, the loss of the step, detached
    and without the terms that methods add.
    """

    inputs: Tensor
    targets: Tensor
    index: Tensor | None = None
    weights: Tensor | None = None
    loss: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def cut(self, start: int, stop: int) -> Batch:
        """Return the batch of the samples from ``start`` up to ``stop``, as views."""
        index, weights = self.index, self.weights
        return Batch(self.inputs[start:stop], self.targets[start:stop], None if index is None else index[start:stop],
                     None if weights is None else weights[start:stop], self.loss)  # fmt: skip

    def take(self, rows: Tensor) -> Batch:
        """Return the batch of these rows; the memory format of the images is kept."""
        return Batch(
            take_rows(self.inputs, rows),
            self.targets.index_select(0, rows),
            None if self.index is None else self.index.index_select(0, rows),
            None if self.weights is None else self.weights.index_select(0, rows),
            self.loss,
        )


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return ``x[rows]`` along the first dimension in the memory format of ``x``.

    ``index_select`` of a channels_last tensor would copy to the contiguous format; images are gathered whole instead.
    """
    if x.dim() == 4 and x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


class Method:
    """Base class of all methods. Subclass it as ``@dataclass(kw_only=True, eq=False)`` and override what you need.

    Hooks that are not overridden cost nothing: a session collects the overridden ones once. In the order of a step:
    ``select``, ``context``, ``blend_loss``, ``loss_terms``, ``observe``, ``backward``, ``gradients``, ``update``, ``after_update``.
    Only in ``after_update`` and ``start_epoch`` may a method change the network's structure, by ``session.surgery``.
    """

    spec: ClassVar[MethodSpec]

    def __post_init__(self) -> None:
        wrong = wrong_types(self)
        try:
            problems = self.problems()
        except (TypeError, ValueError, AttributeError):
            if not wrong:
                raise
            problems = []  # ranges of the wrong type cannot be compared
        # a method's own sentence about a setting says more than its type does
        wrong = wrong or ([] if problems else wrong_types(self, words=True))
        own = set(re.findall(r"\w+", " ".join(problems)))
        problems = [w for w in wrong if w.partition(" ")[0] not in own] + problems
        if problems:
            raise SettingsError(f"{self.spec.name}: " + " ".join(problems))

    # -- what it says of itself
    @property
    def reads(self) -> frozenset[str]:
        """Places this instance reads; settings may narrow the class's."""
        return self.spec.reads

    @property
    def writes(self) -> frozenset[str]:
        """Places this instance writes; settings may narrow the class's."""
        return self.spec.writes

    def problems(self) -> list[str]:
        """Return every setting that is out of range, a sentence each: what was given and what is allowed."""
        return []

    def settings(self) -> dict[str, Any]:
        """Return the settings as given, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return the name with the settings that differ from their defaults, for people."""
        changed = [
            f"{f.name}={value!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) != f.default
        ]
        return f"{self.spec.name}({', '.join(changed)})" if changed else self.spec.name

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Prepare to act on ``session``: claim layers, create state. Return what will be touched."""
        raise NotImplementedError

    def export(self, model: nn.Module) -> None:
        """Turn what this method left in ``model`` (a copy) into plain PyTorch modules."""

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Return the part of the incoming batch to train on; an empty batch skips the update."""
        return batch

    def flush(self) -> Batch | None:
        """Return what is still queued at the end of an epoch, to be trained on now."""
        return None

    def context(self) -> AbstractContextManager[Any]:
        """Return the context in which the forward pass runs (also in evaluation)."""
        raise NotImplementedError

    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """See the detached outputs and per-example losses (N,) of the batch that trains."""

    def blend_loss(self, batch: Batch, outputs: Tensor, loss: Tensor) -> Tensor:
        """Return the loss to train on in the place of ``loss``; only the method that writes "loss.blend" is asked.

        outputs: the network's for this batch, with their graph. loss: that of the labels, the weighted mean where
        ``batch.weights`` are given. The terms of other methods are added to what it returns.
        """
        return loss

    def loss_terms(self) -> Tensor:
        """Return a scalar to add to the loss of this step."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass in the place of ``loss.backward()``."""
        raise NotImplementedError

    def gradients(self) -> None:
        """Change the parameters' gradients after the backward pass."""

    def update(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        """Step the optimizers in the place of the plain ``optimizer.step()``."""
        raise NotImplementedError

    def after_update(self) -> None:
        """Act between two steps."""

    def start_epoch(self, epoch: int) -> None:
        """Act at the start of an epoch (0-based)."""

    def reshaped(self, change: Change) -> None:
        """Follow a change of the network's structure: what is kept by channel or layer must be that of the new one."""

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return counters that show that the method acted; all zero after training is reported as an error."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: tensors, numbers, strings, lists and dicts of these."""
        return {name: getattr(self, name) for name in self.spec.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for name in self.spec.state:
            setattr(self, name, state[name])


def overrides(method: Method, hook: str) -> bool:
    """Return whether the class of ``method`` has its own version of ``hook``."""
    own: Callable[..., Any] = getattr(type(method), hook)
    return own is not getattr(Method, hook)
