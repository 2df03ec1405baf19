"""Lookahead as the record recipe uses it: slow weights whose decay grows over training, copied back each
time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import SettingsError
from hasten.optim.average import check_names, float_tensors, wide_copies


def lookahead_decay(step: int, total: int, every: int = 5, base: float = 0.95, power: float = 3.0) -> float:
    """Return the slow weights' decay after ``step`` of ``total`` steps: base**every * (step/total)**power."""
    return float(base**every * (step / total) ** power)


class Lookahead:
    """Slow weights of a model, its float buffers (batch norm statistics) included.

    Call `update` after every optimizer step with the number of steps done. Every ``every`` steps the slow
    weights move to the net's by 1 - `lookahead_decay` and are copied into the net; after the last step they
    are copied with decay 1. ``slow`` holds the tensors by state_dict name: surgery on the model must do the
    same to them. Source: training_recipes.md 3.1 (airbench94); the net's state at construction is the first
    slow copy.
    """

    def __init__(
        self, model: nn.Module, total: int, *, every: int = 5, base: float = 0.95, power: float = 3.0
    ) -> None:
        if total < 1 or every < 1 or not 0 <= base <= 1 or power < 0:
            raise SettingsError(
                f"Lookahead: total={total} and every={every} must be >= 1, "
                f"base={base} in [0, 1], power={power} >= 0"
            )
        self.total, self.every, self.base, self.power = total, every, base, power
        self.slow: dict[str, Tensor] = wide_copies(model)

    def update(self, model: nn.Module, step: int) -> bool:
        """Account for ``step`` finished steps (1 to total); returns whether the net's weights changed
        hands."""
        due = step % self.every == 0
        if due:
            self.apply(model, lookahead_decay(step, self.total, self.every, self.base, self.power))
        if step >= self.total:
            self.apply(model, 1.0)
        return due or step >= self.total

    @torch.no_grad()
    def apply(self, model: nn.Module, decay: float) -> None:
        """Move the slow weights to decay * slow + (1 - decay) * net, and copy them into the net.

        Decay 1 leaves the slow weights as they are; decay 0 leaves the net as it is. Raises CheckpointError
        when the model's tensors no longer have the names or shapes of the slow ones.
        """
        fast = float_tensors(model)
        check_names("lookahead", self.slow, fast)
        for key, slow in self.slow.items():
            slow.lerp_(fast[key].to(slow), 1 - decay)
            fast[key].copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        """Return the slow weights (not copied); the settings belong to the recipe."""
        return {"slow": dict(self.slow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the slow weights in; raises CheckpointError when they do not fit."""
        check_names("lookahead", self.slow, state["slow"])
        for key, slow in self.slow.items():
            slow.copy_(state["slow"][key])
