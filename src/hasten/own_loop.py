"""A user's own training function in the place of the ready loop: what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from hasten.data import Batch
from hasten.session import Session


@dataclass(frozen=True)
class TrainingData:
    """The training images for a function of the user's own. shape: (height, width, channels) of an image.

    ``epoch(number)`` yields batches ``(inputs, targets, index)`` on the run's device, shuffled and augmented as keyed by
    the run's seed; ``len`` is the number of batches in an epoch.
    """

    loader: Any
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    device: str
    seed: int

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of epoch ``number`` (0-based)."""
        batches: Iterator[Batch] = self.loader.epoch(number)
        return batches


@dataclass(frozen=True)
class Budget:
    """How long a function of the user's own should train: it must end after ``epochs``, or ``steps``.

    share: what part of the whole run's budget that is, 1.0 for all of it; a schedule is to be fully run within it.
    optimizers: those of the session. ``evaluate()`` returns the accuracy on the test images, in [0, 1]; its time does not
    count.
    """

    epochs: float
    steps: int
    batch_size: int
    share: float
    optimizers: tuple[Optimizer, ...]
    evaluate: Callable[[], float]


TrainFunction = Callable[[Session, TrainingData, Budget], None]
