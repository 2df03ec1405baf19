"""The arms of a comparison: ways of training the same network on the same data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hasten.contract import Method
from hasten.errors import SettingsError
from hasten.places import ordered
from hasten.recipe import PLAIN, STRONG, Recipe
from hasten.registry import method

Kind = Literal["baseline", "strong", "method", "stack", "control"]


@dataclass(frozen=True)
class Arm:
    """One way of training: a recipe and methods. ``budget`` is a control's share of the strong baseline's epochs."""

    name: str
    recipe: Recipe
    methods: tuple[Method, ...] = ()
    kind: Kind = "method"
    label: str = ""
    budget: float = field(default=1.0)

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "._+-" for c in self.name):
            raise SettingsError(f"arm name {self.name!r}: use letters, digits, '.', '_', '+' and '-'.")
        ordered(self.methods)  # a conflict shows now, not after the first hour

    def describe(self) -> dict[str, Any]:
        """Return what defines the arm's runs, as plain JSON."""
        return {
            "recipe": dataclasses.asdict(self.recipe) | {"augment": list(self.recipe.augment)},
            "methods": [repr(m) for m in self.methods],
        }

    def key(self, seed: int, common: dict[str, Any]) -> str:
        """Return the name under which the arm's run of ``seed`` is stored: changes with anything that shapes it."""
        text = json.dumps({**self.describe(), "arm": self.name, "seed": seed, **common}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def baselines(plain: Recipe = PLAIN, strong: Recipe = STRONG) -> list[Arm]:
    """Return the two baselines of every comparison: plain PyTorch, and the system-optimised one."""
    return [
        Arm("plain", plain, (), "baseline", "plain PyTorch"),
        Arm(
            "strong",
            strong,
            (method("mixed_precision"),),
            "strong",
            "strong (bf16, NHWC)",
        ),
    ]


def controls(strong: Arm, budgets: Sequence[float] = (0.5, 0.65, 0.8)) -> list[Arm]:
    """Return the strong baseline at shorter budgets, each with its learning rate fully decayed."""
    return [
        Arm(f"strong-{share:g}", strong.recipe.scaled(share), strong.methods, "control", f"strong, {share:.0%} of its epochs", share)
        for share in budgets
    ]  # fmt: skip


def stacks(strong: Arm, methods: Sequence[Method], *, leave_one_out: bool = True) -> list[Arm]:
    """Return each method added to the strong baseline, all of them together, and that stack less one method each.

    The strong baseline's own methods stay in every arm. Raises ConflictError if the methods cannot be stacked.
    """
    base = strong.methods
    arms = [Arm(m.spec.name, strong.recipe, (*base, m), "method", f"+ {m.spec.name}") for m in methods]
    if len(methods) > 1:
        name = "+".join(m.spec.name for m in methods)
        arms.append(Arm(name, strong.recipe, (*base, *methods), "stack", "all of them"))
        if leave_one_out and len(methods) > 2:
            for left in methods:
                rest = tuple(m for m in methods if m is not left)
                arms.append(Arm(f"{name}-without-{left.spec.name}", strong.recipe, (*base, *rest), "stack", f"all but {left.spec.name}"))  # fmt: skip
    return arms
