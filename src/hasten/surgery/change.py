"""What a change of structure did, for everything that keeps tensors beside the model: averages, masks, statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from hasten.surgery.edits import Edit
from hasten.surgery.labels import Array
from hasten.surgery.reshape import Move, Reshape, moved


@dataclass(eq=False)
class Step:
    """One part of a change: index maps by tensor name, positions kept by (module, role), and names that changed."""

    moves: Mapping[str, list[Move]] = field(default_factory=dict)
    slots: Mapping[tuple[str, str], Array] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()


@dataclass(eq=False)
class Change:
    """A finished change: its edits and, in order, the steps by which tensors follow."""

    edits: Sequence[Edit]
    steps: list[Step] = field(default_factory=list)

    def follow(self, tensors: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``tensors``, kept by the names of the model's tensors before the change, as they are after it.

        ``current`` are the model's own tensors now, of which new ones are copied.
        """
        kept = dict(tensors)
        for step in self.steps:
            kept = {
                step.renamed.get(name, name): moved(tensor, step.moves[name])
                if name in step.moves
                else tensor
                for name, tensor in kept.items()
                if name not in step.gone
            }
        return {
            name: kept[name] if name in kept else tensor.detach().clone() for name, tensor in current.items()
        }

    def positions(self, module: str, role: str, count: int) -> Array | None:
        """Return where each present channel of ``module`` lay among the ``count`` before; None if the module is gone.

        role is "in", "out" or "norm"; ``module`` is its name before the change.
        """
        index = np.arange(count)
        name = module
        for step in self.steps:
            if any(tensor.rpartition(".")[0] == name for tensor in step.gone):
                return None
            if (name, role) in step.slots:
                index = index[step.slots[name, role].ravel()]
            name = next((new.rpartition(".")[0] for old, new in step.renamed.items()
                         if old.rpartition(".")[0] == name), name)  # fmt: skip
        return index


def names(model: nn.Module) -> dict[tuple[int, str], str]:
    """Return the name of every parameter and buffer by the module that owns it and its name there."""
    return {
        (id(module), attribute): f"{name}.{attribute}" if name else attribute
        for name, module in model.named_modules()
        for attribute in (*module._parameters, *module._buffers)
    }


def swap_step(before: Mapping[tuple[int, str], str], after: Mapping[tuple[int, str], str]) -> Step:
    """Return the step of a change of modules, from the names before and after."""
    renamed = {name: after[key] for key, name in before.items() if key in after and after[key] != name}
    return Step(renamed=renamed, gone=frozenset(name for key, name in before.items() if key not in after))


def reshape_step(reshape: Reshape) -> Step:
    """Return the step of a change of widths."""
    return Step(moves=reshape.moves, slots=reshape.slots)
