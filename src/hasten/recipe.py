"""Training recipes as data: what the plain and the strong baseline do, and everything a run can vary."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Optimizer

from hasten.data.augment import AlternatingFlip, Crop, Cutout, Flip, Transform
from hasten.errors import SettingsError, unknown
from hasten.models import record_recipe
from hasten.optim import schedules
from hasten.optim.groups import decay_groups

AUGMENTATIONS: dict[str, Transform] = {
    "crop": Crop(pad=4),
    "crop2": Crop(pad=2),
    "flip": Flip(),
    "alternating_flip": AlternatingFlip(),
    "cutout": Cutout(size=8),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained apart from any method.

    epochs: passes over the data, may be a fraction. batch_size: samples a step. lr, momentum, nesterov, weight_decay:
    of SGD as in PyTorch. decay_norms: whether weight decay also acts on biases and normalisation. schedule: shape of
    the learning rate over the run, warmup: the share of the run
    in which it rises first. label_smoothing: of cross-entropy. augment: names in
    ``AUGMENTATIONS``; flips are left out on data they would relabel. ema: decay a step of the averaged weights that
    are evaluated at the end, or None. eval_every: epochs between evaluations; 0 for only the last.
    record: name of a record recipe (B2, B2-small, B2-muon, ...), for record nets: optimizers, rates, schedule and
    lookahead are then that recipe's, and lr, momentum, weight_decay, schedule, warmup and ema are not used.
    """

    epochs: float = 10.0
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_norms: bool = False
    schedule: Literal["constant", "step", "cosine", "linear"] = "linear"
    warmup: float = 0.2
    label_smoothing: float = 0.0
    augment: tuple[str, ...] = ("crop", "flip")
    ema: float | None = None
    eval_every: float = 1.0
    record: str | None = None

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(default, float) and not (number and math.isfinite(value)):
                problems.append(f"{field.name} (={value!r}) must be a finite number.")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int):
            problems.append(f"batch_size (={self.batch_size!r}) must be a whole number.")
        if problems:
            raise SettingsError("recipe: " + " ".join(problems))
        for name, low in (("epochs", 0.0), ("lr", 0.0)):
            if not getattr(self, name) > low:
                problems.append(f"{name} (={getattr(self, name)}) must be above {low:g}.")
        if not 1 <= self.batch_size <= 2**20:
            problems.append(f"batch_size (={self.batch_size}) must be between 1 and {2**20}.")
        for name in ("momentum", "label_smoothing", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} (={getattr(self, name)}) must be in [0, 1).")
        for name in ("weight_decay", "eval_every"):
            if getattr(self, name) < 0:
                problems.append(f"{name} (={getattr(self, name)}) must be 0 or more.")
        if self.ema is not None and not 0 < self.ema < 1:
            problems.append(f"ema (={self.ema}) must be in (0, 1) or None.")
        if self.schedule not in schedules.BY_NAME:
            problems.append(
                f"schedule (={self.schedule!r}) must be one of {', '.join(sorted(schedules.BY_NAME))}."
            )
        if problems:
            raise SettingsError("recipe: " + " ".join(problems))
        if self.record is not None and self.record not in record_recipe.RECIPES:
            raise unknown("record recipe", self.record, record_recipe.RECIPES, SettingsError)
        for name in self.augment:
            if name not in AUGMENTATIONS:
                raise unknown("augmentation", name, AUGMENTATIONS, SettingsError)

    def with_(self, **changes: Any) -> Recipe:
        """Return this recipe with some settings changed. Raises SettingsError for an unknown one."""
        allowed = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in allowed:
                raise unknown("recipe setting", name, allowed, SettingsError)
        if "augment" in changes:
            changes["augment"] = tuple(changes["augment"])
        return dataclasses.replace(self, **changes)

    def scaled(self, budget: float) -> Recipe:
        """Return this recipe for ``budget`` times the epochs, its schedule fully run in them."""
        return self.with_(epochs=self.epochs * budget)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return SGD over the trainable parameters of ``model``."""
        groups = decay_groups(model, self.weight_decay, all_parameters=self.decay_norms)
        return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov and self.momentum > 0)

    def factor(self, progress: float) -> float:
        """Return the learning rate at ``progress`` in [0, 1], as a share of ``lr``."""
        return schedules.BY_NAME[self.schedule](progress, self.warmup)

    def augmentations(self, flip_ok: bool) -> tuple[Transform, ...]:
        """Return the augmentations in order; flips only where ``flip_ok``."""
        names = [n for n in self.augment if flip_ok or "flip" not in n]
        return tuple(AUGMENTATIONS[n] for n in names)


# The two baselines of every comparison (tiers B0 and B1 of the measuring rules). The strong one runs with
# mixed_precision() as its only method.
PLAIN = Recipe(schedule="cosine", warmup=0.0, decay_norms=True, nesterov=False)
STRONG = Recipe(schedule="linear", warmup=0.2, label_smoothing=0.1, ema=0.99)
# The record nets' own recipe (tier B2); the accuracy is without test-time views.
_RECORD = Recipe(
    epochs=9.9, batch_size=1024, label_smoothing=0.2, augment=("crop2", "alternating_flip"), record="B2"
)

RECIPES: dict[str, Recipe] = {
    "plain": PLAIN,
    "strong": STRONG,
    "record": _RECORD,
    "record-small": _RECORD.with_(epochs=8.0, batch_size=512, record="B2-small"),
}
