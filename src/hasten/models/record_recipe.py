"""The record recipe (training_recipes.md 3.1) as data, with the optimizers, schedule and lookahead.

model = models.build("record-small", seed=0)
model.init_whitening(images[:5000])                      # normalised training images
training = make(model, steps_per_epoch, base="B2-small")
for step in range(training.total_steps):
    training.before_step(step)
    training.loss(model(inputs), targets).backward()
    training.update()                                    # optimizers, then zero_grad
    training.after_step(step + 1)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten import errors
from hasten.errors import SettingsError, UnsupportedError
from hasten.models.record import RecordNet
from hasten.optim.groups import norm_parameters, torch_rates
from hasten.optim.lookahead import Lookahead
from hasten.optim.muon import Muon
from hasten.optim.schedules import linear, record94, record96


@dataclass(frozen=True)
class RecordRecipe:
    """All settings of one record run.

    Rates of the "sgd" variant are decoupled: per 1024 examples of a summed loss (`torch_rates`). Those of
    "muon" are PyTorch's own: ``lr`` is Muon's for the filters, ``bias_lr`` and ``head_lr`` SGD's,
    ``weight_decay`` is per example. ``translate`` is the reflect-padded random crop, ``cutout`` the side of
    its square, 0 for none; flips alternate. ``tta_level`` must be told with the accuracy. The first
    ``whiten_images`` training images set the first layer.
    """

    model: str
    variant: str
    epochs: float
    batch_size: int
    lr: float
    weight_decay: float
    momentum: float = 0.85
    bias_scale: float = 64.0
    bias_lr: float = 0.053
    head_lr: float = 0.67
    muon_momentum: float = 0.6
    schedule: str = "record94"
    lookahead: bool = True
    label_smoothing: float = 0.2
    whiten_bias_epochs: int = 3
    whiten_images: int = 5000
    translate: int = 2
    cutout: int = 0
    tta_level: int = 2


_B2 = RecordRecipe("record94", "sgd", 9.9, 1024, lr=11.5, weight_decay=0.0153)
_MUON = RecordRecipe(
    "record94", "muon", 8.0, 2000, lr=0.24, weight_decay=2e-6, schedule="linear", lookahead=False
)

RECIPES: dict[str, RecordRecipe] = {
    "B2": _B2,
    "B2-muon": _MUON,
    # Our choice: a batch of 512 gives a CPU enough steps, and the decoupled rates carry over to it.
    "B2-small": dataclasses.replace(_B2, model="record-small", epochs=8.0, batch_size=512),
    "B2-small-muon": dataclasses.replace(_MUON, model="record-small", batch_size=512),
    "record95": dataclasses.replace(_B2, model="record95", lr=10.0, epochs=15.0),
    "record96": dataclasses.replace(
        _B2,
        model="record96",
        lr=9.0,
        weight_decay=0.012,
        epochs=37.0,
        translate=4,
        cutout=12,
        schedule="record96",
    ),
}

_SCHEDULES = {"record94": record94, "record96": record96, "linear": linear}


class RecordTraining:
    """What one record run needs besides model and data: optimizers, schedule, lookahead, loss.

    ``optimizers`` hold every trainable parameter once, in named groups. Call `before_step` with the number of
    steps done, and `after_step` with that number after the update.
    """

    def __init__(
        self, model: RecordNet, recipe: RecordRecipe, steps_per_epoch: int, epochs: float, reduction: str
    ) -> None:
        self.model, self.recipe, self.reduction = model, recipe, reduction
        self.total_steps = math.ceil(steps_per_epoch * epochs)
        self.whiten_steps = min(recipe.whiten_bias_epochs * steps_per_epoch, self.total_steps)
        optimizers = _muon if recipe.variant == "muon" else _sgd
        self.optimizers: tuple[torch.optim.Optimizer, ...] = optimizers(model, recipe, reduction)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.lookahead = Lookahead(model, self.total_steps) if recipe.lookahead else None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the label-smoothed cross-entropy of (N, K) logits in the reduction this run was made for."""
        smoothing = self.recipe.label_smoothing
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing, reduction=self.reduction)

    def factor(self, step: int) -> float:
        """Return the learning-rate factor of step ``step``, counted from 0."""
        return _SCHEDULES[self.recipe.schedule](step / self.total_steps)

    def before_step(self, step: int) -> None:
        """Set the learning rates of step ``step``; freeze the whitening bias after its epochs."""
        bias = self.model.whiten.bias
        assert bias is not None
        trains = step < self.whiten_steps
        if bias.requires_grad != trains:
            bias.requires_grad_(trains)
            bias.grad = None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                factor = self.factor(step)
                if group["name"] == "whitening bias" and self.recipe.variant == "muon":
                    factor = max(0.0, 1 - step / self.whiten_steps)
                group["lr"] = group["initial_lr"] * factor

    def update(self) -> None:
        """Step all optimizers and drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def after_step(self, step: int) -> None:
        """Run lookahead after ``step`` finished steps."""
        if self.lookahead is not None:
            self.lookahead.update(self.model, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizers and lookahead; the step is the caller's."""
        state: dict[str, Any] = {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        if self.lookahead is not None:
            state["lookahead"] = self.lookahead.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same recipe."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.lookahead is not None:
            self.lookahead.load_state_dict(state["lookahead"])


def _split(model: RecordNet) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return (norm biases, convolution filters, whitening bias), of the trainable parameters but the head."""
    norms = norm_parameters(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    filters = [p for p in trainable if p.ndim == 4]
    bias = model.whiten.bias
    assert isinstance(bias, nn.Parameter)
    return [p for p in trainable if p in norms], filters, [bias]


def _group(
    name: str, params: list[nn.Parameter], lr: float, weight_decay: float, mean: int
) -> dict[str, Any]:
    """Return a group; with a mean loss (``mean`` = batch size, else 1) lr grows and decay shrinks by it."""
    return {"name": name, "params": params, "lr": lr * mean, "weight_decay": weight_decay / mean}


def _sgd(model: RecordNet, recipe: RecordRecipe, reduction: str) -> tuple[torch.optim.Optimizer, ...]:
    rates = torch_rates(
        recipe.lr,
        recipe.weight_decay,
        batch_size=recipe.batch_size,
        momentum=recipe.momentum,
        bias_scale=recipe.bias_scale,
    )
    mean = recipe.batch_size if reduction == "mean" else 1
    norms, filters, whiten_bias = _split(model)
    groups = [
        _group("norm biases", norms, rates.bias_lr, rates.bias_weight_decay, mean),
        _group("weights", [*filters, *model.head.parameters()], rates.lr, rates.weight_decay, mean),
        _group("whitening bias", whiten_bias, rates.lr, rates.weight_decay, mean),
    ]
    return (torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=True),)


def _muon(model: RecordNet, recipe: RecordRecipe, reduction: str) -> tuple[torch.optim.Optimizer, ...]:
    mean = recipe.batch_size if reduction == "mean" else 1
    shrink = recipe.weight_decay * recipe.batch_size
    norms, filters, whiten_bias = _split(model)
    groups = [
        _group("whitening bias", whiten_bias, recipe.bias_lr, shrink / recipe.bias_lr, mean),
        _group("norm biases", norms, recipe.bias_lr, shrink / recipe.bias_lr, mean),
        _group("head", list(model.head.parameters()), recipe.head_lr, shrink / recipe.head_lr, mean),
    ]
    sgd = torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=True)
    # Orthogonalised updates do not see the loss's scale, so a mean loss changes nothing here.
    filter_group = {"name": "filters", "params": filters}
    return sgd, Muon([filter_group], lr=recipe.lr, momentum=recipe.muon_momentum, nesterov=True)


def make(
    model: nn.Module,
    steps_per_epoch: int,
    epochs: float | None = None,
    variant: str | None = None,
    *,
    base: str | RecordRecipe = "B2",
    reduction: str = "sum",
) -> RecordTraining:
    """Set up a record run of ``model`` for ``epochs`` (the recipe's own when None).

    ``base`` is a name in `RECIPES` or a recipe of your own; ``variant`` "muon" or "sgd" chooses that form of
    a named base. ``reduction`` "mean" rescales the rates so that a mean loss trains alike. Schedule and
    lookahead always span exactly the epochs given.

    Raises UnknownName, SettingsError (numbers) and UnsupportedError: a model that is no record net, is of the
    other variant, or whose whitening layer has not been set from data.
    """
    recipe = _recipe(base, variant)
    epochs = recipe.epochs if epochs is None else epochs
    problems = []
    if steps_per_epoch < 1:
        problems.append(f"steps_per_epoch (={steps_per_epoch}) must be at least 1")
    if not epochs > 0:
        problems.append(f"epochs (={epochs}) must be above 0")
    if reduction not in ("sum", "mean"):
        problems.append(f"reduction (={reduction!r}) must be 'sum' or 'mean'")
    if problems:
        raise SettingsError("record recipe: " + "; ".join(problems))
    if not isinstance(model, RecordNet):
        raise UnsupportedError(
            f"the record recipe trains record nets, got {type(model).__name__}: build {recipe.model!r}"
        )
    if model.variant != recipe.variant:
        raise UnsupportedError(
            f"the model is of variant {model.variant!r}, the recipe of {recipe.variant!r}: "
            "their heads differ; "
            f"build({recipe.model!r}, variant={recipe.variant!r})"
        )
    if not model.whitened:
        raise UnsupportedError(
            "the whitening layer is still random: call model.init_whitening(images) with the first "
            f"{recipe.whiten_images} normalised training images"
        )
    return RecordTraining(model, recipe, steps_per_epoch, epochs, reduction)


def _recipe(base: str | RecordRecipe, variant: str | None) -> RecordRecipe:
    if variant not in (None, "sgd", "muon"):
        raise SettingsError(f"record recipe: variant (={variant!r}) must be 'sgd' or 'muon'")
    if isinstance(base, RecordRecipe):
        if variant not in (None, base.variant):
            raise SettingsError(
                f"record recipe: variant (={variant!r}) contradicts the given {base.variant!r}"
            )
        return base
    name = base if variant is None else base.removesuffix("-muon") + ("-muon" if variant == "muon" else "")
    if name not in RECIPES:
        raise errors.unknown("record recipe", name, RECIPES)
    return RECIPES[name]
