"""The arms of a comparison: ways of training the same network on the same data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hasten.contract import Method
from hasten.errors import SettingsError
from hasten.places import ordered
from hasten.recipe import PLAIN, STRONG, Recipe
from hasten.registry import method

Kind = Literal["baseline", "strong", "method", "stack"]


@dataclass(frozen=True)
class Arm:
    """One way of training: a recipe and methods, and where given an optimizer, a loss or a whole loop as `hasten.fit` takes them.

    kind: "baseline" is plain PyTorch, "strong" what every method has to beat.
    """

    name: str
    recipe: Recipe
    methods: tuple[Method, ...] = ()
    kind: Kind = "method"
    label: str = ""
    optimizer: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    train_fn: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "._+-" for c in self.name):
            raise SettingsError(f"arm name {self.name!r}: use letters, digits, '.', '_', '+' and '-'.")
        ordered(self.methods)  # a conflict shows now, not after the first hour

    @property
    def title(self) -> str:
        """What a table calls the arm."""
        return self.label or self.name

    def describe(self) -> dict[str, Any]:
        """Return what defines the arm's runs, as plain JSON."""
        return {
            "recipe": dataclasses.asdict(self.recipe) | {"augment": list(self.recipe.augment)},
            "methods": [repr(m) for m in self.methods],
        }

    def at(self, share: float) -> Recipe:
        """Return the recipe for ``share`` of the epochs, its schedule fully run, evaluated once at the end."""
        return self.recipe.scaled(share).with_(eval_every=0.0)

    def with_epochs(self, epochs: float) -> Arm:
        """Return the arm with another full budget."""
        return dataclasses.replace(self, recipe=self.recipe.with_(epochs=epochs))


def baselines(plain: Recipe = PLAIN, strong: Recipe = STRONG, **given: Any) -> list[Arm]:
    """Return the two baselines of every comparison: plain PyTorch, and the system-optimised one.

    given: an optimizer, a loss or a loop that both have, as in `Arm`.
    """
    return [
        Arm("plain", plain, (), "baseline", "plain PyTorch", **given),
        Arm("strong", strong, (method("mixed_precision"),), "strong", "strong (bf16, NHWC)", **given),
    ]


def stacks(strong: Arm, methods: Sequence[Method], *, leave_one_out: bool = True) -> list[Arm]:
    """Return each method added to the strong baseline, all of them together, and that stack less one method each.

    Where a method is one of the strong baseline's own, the question is what it brings alone: the baseline comes first in the list, without it.
    Raises ConflictError if the methods cannot be stacked.
    """
    asked = {m.spec.name for m in methods}
    own = tuple(m for m in strong.methods if m.spec.name not in asked)
    arms = []
    base = strong
    if len(own) < len(strong.methods):
        without = "-".join(m.spec.name for m in strong.methods if m.spec.name in asked)
        base = dataclasses.replace(
            strong, name=f"strong-without-{without}", methods=own, label=f"strong without {without}"
        )
        arms.append(base)

    def added(chosen: Sequence[Method], name: str, kind: Kind, label: str) -> Arm:
        return dataclasses.replace(base, name=name, methods=(*own, *chosen), kind=kind, label=label)

    arms += [added([m], m.spec.name, "method", f"+ {m.spec.name}") for m in methods]
    if len(methods) > 1:
        name = "+".join(m.spec.name for m in methods)
        arms.append(added(methods, name, "stack", "+ all of them"))
        if leave_one_out and len(methods) > 2:
            for left in methods:
                rest = [m for m in methods if m is not left]
                arms.append(
                    added(rest, f"{name}-without-{left.spec.name}", "stack", f"+ all but {left.spec.name}")
                )
    return arms


def usual(methods: Sequence[Method] = (), plain: Recipe = PLAIN, strong: Recipe = STRONG, *,
          leave_one_out: bool = True, **given: Any) -> list[Arm]:  # fmt: skip
    """Return the arms of a comparison of ``methods``: plain, strong, each method on strong, and their stacks."""
    both = baselines(plain, strong, **given)
    added = stacks(both[1], methods, leave_one_out=leave_one_out)
    replaced = any(arm.kind == "strong" for arm in added)
    return [both[0], *([] if replaced else [both[1]]), *added]
