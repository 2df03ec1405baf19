"""What a recipe brings to one run: optimizers, learning rates, averaged weights. Two kinds share one form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from hasten.data import Images, Loader
from hasten.models import record_recipe
from hasten.optim.average import float_tensors, wide_copies
from hasten.optim.ema import EMA
from hasten.recipe import Recipe
from hasten.surgery import Change


class Regimen(Protocol):
    """What the loop asks of a recipe's run. Steps count from 0."""

    optimizers: tuple[Optimizer, ...]

    def attached(self) -> None:
        """Begin to average; called when methods have changed the model's parameters as they will."""
        ...

    def restart(self) -> None:
        """Forget what was averaged so far; called when a method changes what the network computes in training."""
        ...

    def reshaped(self, change: Change) -> None:
        """Let averages follow a change of the network's structure."""
        ...

    def before_step(self, step: float, scale: float = 1.0) -> float:
        """Set the learning rates of ``step``, times ``scale``, and return the largest.

        step: in steps of the recipe's batch size, which may be fractions where a method has changed it.
        """
        ...

    def after_step(self, step: int) -> None:
        """Average the weights after ``step`` finished steps."""
        ...

    def evaluated(self) -> Any:
        """Return a context in which the model carries the weights to evaluate."""
        ...

    def finish(self) -> None:
        """Leave the weights to keep in the model."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the optimizers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        ...


class Plain:
    """SGD with one schedule, and an average of the weights where the recipe asks for one."""

    def __init__(self, recipe: Recipe, model: nn.Module, total: int) -> None:
        self.recipe, self.model, self.total = recipe, model, total
        self.optimizers: tuple[Optimizer, ...] = (recipe.optimizer(model),)
        self.ema: EMA | None = None

    def attached(self) -> None:
        """Begin to average; called when methods have changed the model's parameters as they will."""
        self.ema = EMA(self.model, self.recipe.ema) if self.recipe.ema is not None else None

    def restart(self) -> None:
        if self.ema is not None:
            self.ema.restart(self.model)

    def reshaped(self, change: Change) -> None:
        if self.ema is not None:
            self.ema.average = change.follow(self.ema.average, float_tensors(self.model))

    def before_step(self, step: float, scale: float = 1.0) -> float:
        lr = self.recipe.lr * self.recipe.factor(step / self.total) * scale
        for group in self.optimizers[0].param_groups:
            group["lr"] = lr
        return lr

    def after_step(self, step: int) -> None:
        if self.ema is not None:
            self.ema.update(self.model)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        if self.ema is None:
            yield
        else:
            with self.ema.applied(self.model):
                yield

    def finish(self) -> None:
        if self.ema is not None:
            self.ema.copy_to(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ema is None else {"ema": self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


class Record:
    """The record recipe: its own rates, schedule and lookahead, for a record net."""

    def __init__(self, recipe: Recipe, model: nn.Module, per_epoch: int) -> None:
        assert recipe.record is not None
        self.model = model
        self.training = record_recipe.make(
            model, per_epoch, recipe.epochs, base=recipe.record, reduction="mean"
        )
        self.optimizers: tuple[Optimizer, ...] = self.training.optimizers

    def attached(self) -> None:
        """Let lookahead begin from the weights that there are now."""
        ahead = self.training.lookahead
        if ahead is not None:
            ahead.slow = wide_copies(self.model)

    def restart(self) -> None:
        """Lookahead pulls the weights themselves, so nothing old is evaluated."""

    def reshaped(self, change: Change) -> None:
        ahead = self.training.lookahead
        if ahead is not None:
            ahead.slow = change.follow(ahead.slow, float_tensors(self.model))

    def before_step(self, step: float, scale: float = 1.0) -> float:
        assert scale == 1, "a record recipe has its own batch size"
        self.training.before_step(min(int(step), self.training.total_steps - 1))
        return max(float(group["lr"]) for o in self.optimizers for group in o.param_groups)

    def after_step(self, step: int) -> None:
        self.training.after_step(step)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        yield

    def finish(self) -> None:
        """Lookahead's last update has put its weights into the model."""

    def state_dict(self) -> dict[str, Any]:
        return {"record": {k: v for k, v in self.training.state_dict().items() if k != "optimizers"}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.training.lookahead is not None:
            self.training.lookahead.load_state_dict(state["record"]["lookahead"])


def regimen(recipe: Recipe, model: nn.Module, per_epoch: int, total: int) -> Regimen:
    """Return the run of ``recipe`` on ``model``. Raises UnsupportedError for a record recipe on another network."""
    return Plain(recipe, model, total) if recipe.record is None else Record(recipe, model, per_epoch)


def whiten(model: nn.Module, train: Images) -> None:
    """Set the first layer of a record net from the first 5000 training images, once; leave other networks alone."""
    if hasattr(model, "init_whitening") and not model.whitened:
        n = min(5000, len(train))
        loader = Loader(train, n, shuffle=False, drop_last=False, device=next(model.parameters()).device)
        model.init_whitening(next(loader.epoch(0)).inputs)  # type: ignore[operator]
