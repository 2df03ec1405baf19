"""Exponential moving average of a model's weights and statistics, for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import SettingsError
from hasten.optim.average import check_names, float_tensors, wide_copies


class EMA:
    """An average of weights and float buffers: average <- decay * average + (1 - decay) * net.

    ``decay`` is per optimizer step. With ``warmup`` the decay of update t is at most t / (t + 10), so that
    the start of training is forgotten soon. ``average`` holds the tensors by state_dict name: surgery on the
    model must do the same to them; weights of 16 bits are averaged in float32, which small steps need. Integer buffers stay the net's own. Raises SettingsError.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise SettingsError(f"EMA: decay (={decay}) must be in [0, 1)")
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self.average: dict[str, Tensor] = wide_copies(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present tensors into the average; call it once after each optimizer step."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10)) if self.warmup else self.decay
        fast = float_tensors(model)
        check_names("EMA", self.average, fast)
        for key, average in self.average.items():
            average.lerp_(fast[key].to(average), 1 - decay)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Forget the past: the average is the model's present tensors."""
        self.updates = 0
        for key, value in float_tensors(model).items():
            self.average[key].copy_(value)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into ``model``."""
        target = float_tensors(model)
        check_names("EMA", self.average, target)
        for key, average in self.average.items():
            target[key].copy_(average)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let ``model`` carry the average inside the block, and its own tensors again after it."""
        own = {key: value.clone() for key, value in float_tensors(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for key, value in float_tensors(model).items():
                    value.copy_(own[key])

    def state_dict(self) -> dict[str, Any]:
        """Return the average (not copied) and the number of updates."""
        return {"average": dict(self.average), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state in; raises CheckpointError when it does not fit the model."""
        check_names("EMA", self.average, state["average"])
        for key, average in self.average.items():
            average.copy_(state["average"][key])
        self.updates = int(state["updates"])
