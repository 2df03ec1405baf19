"""What a recipe brings to one run: optimizers, learning rates, averaged weights. Two kinds share one form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from hasten.data import DataSet, Loader, Streams
from hasten.errors import SettingsError
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


Maker = Callable[[nn.Module], Optimizer | Sequence[Optimizer]]


class Plain:
    """The recipe's optimizers or the caller's, one schedule, and an average of the weights where the recipe asks for one.

    The schedule is a factor of the learning rate that each parameter group began with.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, total: int, make: Maker | None = None) -> None:
        self.recipe, self.model, self.total = recipe, model, total
        self.optimizers: tuple[Optimizer, ...] = (
            recipe.optimizers(model) if make is None else made(make, model)
        )
        self.highest = [[float(group["lr"]) for group in o.param_groups] for o in self.optimizers]
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
        factor, largest = self.recipe.factor(min(1.0, step / self.total)), 0.0
        for optimizer, rates in zip(self.optimizers, self.highest, strict=True):
            for number, group in enumerate(optimizer.param_groups):
                # a group that a method has added trains at the rate of the first
                group["lr"] = rates[number if number < len(rates) else 0] * factor * scale
                largest = max(largest, group["lr"])
        return largest

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


def made(make: Maker, model: nn.Module) -> tuple[Optimizer, ...]:
    """Return the optimizers that the caller's ``make`` builds for ``model``. Raises SettingsError for anything else."""
    if not callable(make):
        raise SettingsError(
            f"optimizer is a {type(make).__name__}; give a function from the network to its optimizer, such as "
            f"lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3)."
        )
    found = make(model)
    several = (
        (found,) if isinstance(found, Optimizer) else tuple(found) if isinstance(found, list | tuple) else ()
    )
    if not several or not all(isinstance(o, Optimizer) for o in several):
        raise SettingsError(
            f"optimizer: the function given returned a {type(found).__name__}; it must take the model and return an "
            f"optimizer or several, such as lambda model: torch.optim.Adam(model.parameters(), lr=1e-3)."
        )
    return several


def regimen(
    recipe: Recipe, model: nn.Module, per_epoch: int, total: int, make: Maker | None = None
) -> Regimen:
    """Return the run of ``recipe`` on ``model``, by the caller's optimizers where ``make`` builds them.

    Raises UnsupportedError for a record recipe on another network, SettingsError for one with the caller's optimizers.
    """
    if recipe.record is None:
        return Plain(recipe, model, total, make)
    if make is not None:
        raise SettingsError("a record recipe has its own optimizers; give another recipe, or no optimizer.")
    return Record(recipe, model, per_epoch)


def whiten(model: nn.Module, data: DataSet | Streams, inputs: Tensor) -> None:
    """Set the first layer of a record net from training images, once; leave other networks alone.

    These are the first 5000 of a set in memory, as they are; else ``inputs``, a batch as training sees it.
    """
    if hasattr(model, "init_whitening") and not model.whitened:
        if isinstance(data, DataSet):
            n = min(5000, data.train_count)
            loader = Loader(data.train, n, shuffle=False, drop_last=False, device=inputs.device)
            inputs = next(loader.epoch(0)).inputs
        model.init_whitening(inputs)  # type: ignore[operator]
