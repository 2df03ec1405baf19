"""The places of a training step at which a method can act, in the order of the step.

A method names the places it reads and writes. From these names alone follow the order in which methods run (a writer
before its readers) and whether two of them can be combined: at a place with the rule ``one`` only one method may write,
at a place with the rule ``layer`` one method for each layer, at a place with the rule ``many`` contributions stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hasten.errors import ConflictError

if TYPE_CHECKING:
    from hasten.contract import Method


@dataclass(frozen=True)
class Place:
    """One place in the step: where it lies, how many methods may write there, and what is found there."""

    stage: str
    rule: Literal["one", "layer", "many"]
    meaning: str


PLACES: dict[str, Place] = {
    "samples": Place("batch", "one", "which samples of the stream reach the network"),
    "batch.size": Place("batch", "one", "how many samples a step takes"),
    "inputs": Place("batch", "one", "size and content of the images"),
    "layout": Place("forward", "one", "memory format of model and images"),
    "precision": Place("forward", "one", "number format of the arithmetic"),
    "graph": Place("forward", "one", "how the model is executed: eager or compiled"),
    "pooling": Place("forward", "layer", "how a pooling layer picks its outputs"),
    "normalization": Place("forward", "layer", "what normalises a layer's output"),
    "x": Place("products", "many", "transforms of a layer's input"),
    "w": Place("products", "many", "transforms of a layer's weight"),
    "grad_output": Place("products", "many", "transforms of the gradient of a layer's output"),
    "in_channels": Place("products", "layer", "which input channels the products sum over"),
    "out_channels": Place("products", "layer", "which output channels the backward products use"),
    "batch": Place("products", "layer", "which samples grad_weight sums over"),
    "output": Place("products", "layer", "the kernel of output = x * w"),
    "grad_input": Place("products", "layer", "the kernel of grad_input = grad_output * w"),
    "grad_weight": Place("products", "layer", "the kernel of grad_weight = x * grad_output"),
    "saved": Place("products", "layer", "how a layer's input is stored until backward"),
    "loss.weights": Place("loss", "one", "the weight of each sample in the loss"),
    "loss.blend": Place("loss", "one", "what the loss of the labels is blended with"),
    "loss.terms": Place("loss", "many", "terms added to the loss"),
    "losses": Place("loss", "many", "the loss of each sample"),
    "gradients": Place("update", "many", "changes of the parameter gradients"),
    "update": Place("update", "one", "when and how the optimizer steps"),
    "structure": Place("between", "one", "the shape of the network"),
}
_ORDER = {name: position for position, name in enumerate(PLACES)}


def clash(a: Method, b: Method) -> str | None:
    """Return why ``a`` and ``b`` can never run together, or None. Clashes on single layers show at attach."""
    shared = sorted((a.writes & b.writes), key=_ORDER.__getitem__)
    for place in shared:
        if PLACES[place].rule == "one":
            return (
                f"{a.spec.name} and {b.spec.name} both decide {PLACES[place].meaning} (place {place!r}), and only one "
                f"method can; keep one of the two."
            )
    for first, second in ((a, b), (b, a)):
        forbidden = sorted(first.spec.excludes & second.writes, key=_ORDER.__getitem__)
        if forbidden:
            place = forbidden[0]
            return (
                f"{first.spec.name} cannot run with {second.spec.name}, which decides {PLACES[place].meaning} "
                f"(place {place!r}): {first.spec.excludes_reason} Keep one of the two."
            )
    return None


def ordered(methods: Sequence[Method]) -> list[Method]:
    """Return ``methods`` in the order in which they act: by place, a writer before its readers.

    Raises ConflictError if a method is given twice, two cannot be combined, or they read each other in a circle.
    """
    problems = []
    for position, method in enumerate(methods):
        for other in methods[:position]:
            if other.spec.name == method.spec.name:
                problems.append(f"{method.spec.name} is given twice; give one with the settings you want.")
            elif reason := clash(other, method):
                problems.append(reason)
    if problems:
        raise ConflictError(" ".join(problems))

    # by name where places tie, so that the order never depends on the order in which methods were given
    waiting = sorted(
        methods, key=lambda m: (min((_ORDER[p] for p in m.writes), default=len(_ORDER)), m.spec.name)
    )
    order: list[Method] = []
    while waiting:
        free = [m for m in waiting if not any(other.writes & m.reads for other in waiting if other is not m)]
        if not free:
            names = ", ".join(m.spec.name for m in circle(waiting))
            raise ConflictError(
                f"{names} each read what another of them writes, so no order exists; drop one of them."
            )
        waiting.remove(free[0])
        order.append(free[0])
    return order


def circle(methods: Sequence[Method]) -> list[Method]:
    """Return methods that read each other in a circle; every one of ``methods`` must read what another writes."""
    path = [methods[0]]
    while True:
        writer = next(m for m in methods if m is not path[-1] and m.writes & path[-1].reads)
        if writer in path:
            return path[path.index(writer) :]
        path.append(writer)
