"""Training recipes as data: what the plain and the strong baseline do, and everything a run can vary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from hasten.data.augment import BY_NAME, Transform
from hasten.errors import SettingsError, unknown
from hasten.models import record_recipe
from hasten.optim import schedules
from hasten.optim.groups import decay_groups, filters_and_rest
from hasten.optim.muon import Muon
from hasten.settings import wrong_types

OptimizerName = Literal["sgd", "adamw", "rmsprop", "muon"]
ScheduleName = Literal["constant", "step", "cosine", "linear", "one_cycle"]

# what an optimizer starts from where nothing else is said: the other settings' defaults are SGD's
OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 0.05},
    "rmsprop": {"lr": 1e-3, "weight_decay": 1e-5},
    "muon": {"lr": 2e-3, "weight_decay": 0.05},
}

# every setting's meaning, for `hasten train --set help`
MEANING: dict[str, str] = {
    "epochs": "passes over the data; may be a fraction",
    "batch_size": "samples a step",
    "optimizer": "sgd, adamw, rmsprop, or muon (filters of convolutions; AdamW for the rest); brings its own lr and weight_decay",
    "lr": "highest learning rate",
    "momentum": "of SGD and RMSprop",
    "nesterov": "whether SGD's momentum is Nesterov's",
    "betas": "decay of both averages of AdamW; the second is also RMSprop's alpha",
    "eps": "added to the denominator by AdamW and RMSprop",
    "weight_decay": "shrinks weights: with the gradient in SGD and RMSprop, decoupled in AdamW and Muon",
    "decay_norms": "whether weight decay also acts on biases and normalisation",
    "schedule": "shape of the learning rate over the run: constant, step, cosine, linear or one_cycle",
    "warmup": "share of the run in which the learning rate rises first",
    "clip_norm": "largest norm of all gradients together, or None",
    "accumulate": "parts that a batch is cut into to save memory; the gradient stays that of the whole batch",
    "label_smoothing": "of cross-entropy",
    "augment": "augmentations, in order; flips are left out on data they would relabel",
    "ema": "decay a step of the averaged weights that are evaluated, or None",
    "eval_every": "epochs between evaluations; 0 for only the last",
    "record": "name of a record recipe (B2, ...) for record nets, which then sets optimizers, rates and schedule",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained apart from any method. ``MEANING`` says what each setting means.

    ``with_(optimizer=...)`` brings that optimizer's own lr and weight_decay (``OPTIMIZER_DEFAULTS``) where the call does
    not give them. ``augment``: names in ``hasten.data.augment.BY_NAME``. With ``record``, lr, momentum, weight_decay,
    schedule, warmup and ema are not used. Raises SettingsError, naming every setting that is wrong.
    """

    epochs: float = 10.0
    batch_size: int = 128
    optimizer: OptimizerName = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 5e-4
    decay_norms: bool = False
    schedule: ScheduleName = "linear"
    warmup: float = 0.2
    clip_norm: float | None = None
    accumulate: int = 1
    label_smoothing: float = 0.0
    augment: tuple[str, ...] = ("crop", "flip")
    ema: float | None = None
    eval_every: float = 1.0
    record: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "augment", tuple(self.augment) if isinstance(self.augment, list) else self.augment
        )
        object.__setattr__(self, "betas", tuple(self.betas) if isinstance(self.betas, list) else self.betas)
        problems = wrong_types(self, words=True) or list(self._out_of_range())
        if problems:
            raise SettingsError("recipe: " + " ".join(problems))
        if self.record is not None and self.record not in record_recipe.RECIPES:
            raise unknown("record recipe", self.record, record_recipe.RECIPES, SettingsError)
        for name in self.augment:
            if name not in BY_NAME:
                raise unknown("augmentation", name, BY_NAME, SettingsError)

    def _out_of_range(self) -> list[str]:
        problems = [f"{name} (={getattr(self, name)}) must be above 0."
                    for name in ("epochs", "lr", "eps") if not getattr(self, name) > 0]  # fmt: skip
        if not 1 <= self.batch_size <= 2**20:
            problems.append(f"batch_size (={self.batch_size}) must be between 1 and {2**20}.")
        if not 1 <= self.accumulate <= self.batch_size:
            problems.append(
                f"accumulate (={self.accumulate}) must be between 1 and batch_size (={self.batch_size})."
            )
        problems += [f"{name} (={getattr(self, name)}) must be in [0, 1)."
                     for name in ("momentum", "label_smoothing", "warmup") if not 0 <= getattr(self, name) < 1]  # fmt: skip
        problems += [f"{name} (={getattr(self, name)}) must be 0 or more."
                     for name in ("weight_decay", "eval_every") if getattr(self, name) < 0]  # fmt: skip
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas (={self.betas}) must be in [0, 1).")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.append(f"clip_norm (={self.clip_norm}) must be above 0 or None.")
        if self.ema is not None and not 0 < self.ema < 1:
            problems.append(f"ema (={self.ema}) must be in (0, 1) or None.")
        return problems

    def with_(self, **changes: Any) -> Recipe:
        """Return this recipe with some settings changed. Raises SettingsError for an unknown one."""
        allowed = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in allowed:
                raise unknown("recipe setting", name, allowed, SettingsError)
        if isinstance(changes.get("augment"), str):
            changes["augment"] = (changes["augment"],) if changes["augment"] else ()
        if changes.get("optimizer", self.optimizer) != self.optimizer:
            changes = OPTIMIZER_DEFAULTS.get(changes["optimizer"], {}) | changes
        return dataclasses.replace(self, **changes)

    def scaled(self, budget: float) -> Recipe:
        """Return this recipe for ``budget`` times the epochs, its schedule fully run in them."""
        return self.with_(epochs=self.epochs * budget)

    def optimizers(self, model: nn.Module) -> tuple[Optimizer, ...]:
        """Return the optimizers that together hold every trainable parameter of ``model`` once.

        On an accelerator they are fused where PyTorch has it. Raises UnsupportedError for Muon on a model without
        convolutions.
        """
        groups = decay_groups(model, self.weight_decay, all_parameters=self.decay_norms)
        on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
        fused: dict[str, Any] = {} if on_cpu else {"fused": True}
        if self.optimizer == "sgd":
            nesterov = self.nesterov and self.momentum > 0
            return (SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=nesterov, **fused),)
        if self.optimizer == "rmsprop":
            return (RMSprop(groups, lr=self.lr, alpha=self.betas[1], eps=self.eps, momentum=self.momentum),)
        if self.optimizer == "adamw":
            return (AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, **fused),)
        filters, rest = filters_and_rest(groups)
        muon = Muon(filters, lr=self.lr, momentum=self.momentum, steps=5, rescale=False)
        return (muon, AdamW(rest, lr=self.lr, betas=self.betas, eps=self.eps, **fused)) if rest else (muon,)

    def factor(self, progress: float) -> float:
        """Return the learning rate at ``progress`` in [0, 1], as a share of ``lr``."""
        return schedules.BY_NAME[self.schedule](progress, self.warmup)

    def describe(self) -> str:
        """Return the recipe in a few words, as "SGD lr 0.1, batch 128, 10 epochs"."""
        if self.record is not None:
            return f"record {self.record}, batch {self.batch_size}, {self.epochs:g} epochs"
        name = {"sgd": "SGD", "adamw": "AdamW", "rmsprop": "RMSprop", "muon": "Muon"}[self.optimizer]
        return f"{name} lr {self.lr:g}, batch {self.batch_size}, {self.epochs:g} epochs"

    def augmentations(self, flip_ok: bool) -> tuple[Transform, ...]:
        """Return the augmentations in order; flips only where ``flip_ok``."""
        names = [n for n in self.augment if flip_ok or "flip" not in n]
        return tuple(BY_NAME[n] for n in names)


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
