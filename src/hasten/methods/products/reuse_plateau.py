"""Tell when the training loss has stopped falling (our choice: the paper's rule is not known)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Plateau:
    """Follows the moving average of the loss; asked once an epoch.

    decay: of the average over steps, which is corrected for its start. improvement: relative fall of the average that
    counts. patience: epochs without it after which `epoch` fires.
    """

    decay: float = 0.98
    improvement: float = 0.005
    patience: int = 1
    sum: float = 0.0
    weight: float = 0.0
    best: float | None = None
    stale: int = 0

    def step(self, loss: float) -> None:
        """Take in the loss of a step."""
        self.sum = self.decay * self.sum + (1 - self.decay) * loss
        self.weight = self.decay * self.weight + (1 - self.decay)

    @property
    def average(self) -> float:
        """The moving average; 0 before the first step."""
        return self.sum / self.weight if self.weight else 0.0

    def epoch(self) -> bool:
        """Return whether the loss has stopped falling, at the end of an epoch; if so, begin anew from here."""
        if not self.weight:
            return False
        now = self.average
        if self.best is None or now < self.best - self.improvement * abs(self.best):
            self.best, self.stale = now, 0
            return False
        self.stale += 1
        if self.stale < self.patience:
            return False
        self.best, self.stale = now, 0
        return True

    def state(self) -> dict[str, float | int | None]:
        """Return what has been learnt."""
        return {"sum": self.sum, "weight": self.weight, "best": self.best, "stale": self.stale}

    def load(self, state: dict[str, float | int | None]) -> None:
        """Take back what `state` gave."""
        self.sum, self.weight = float(state["sum"] or 0.0), float(state["weight"] or 0.0)
        self.best = None if state["best"] is None else float(state["best"])
        self.stale = int(state["stale"] or 0)
