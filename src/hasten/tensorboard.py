"""The course of a run for TensorBoard, beside whatever else shows it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hasten.errors import UnsupportedError
from hasten.progress import Progress, silent


class TensorBoard(Progress):
    """Writes each step's loss and each evaluation's accuracy below ``folder``, and passes all on to ``also``.

    A run that is continued writes anew from the step where it goes on; TensorBoard drops what was there of later ones.
    Raises UnsupportedError if the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, also: Progress = silent) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UnsupportedError(
                f"TensorBoard logs need the package tensorboard ({error}): pip install 'hasten[tensorboard]'."
            ) from error
        self._make: Any = SummaryWriter
        self._folder, self._also = folder, also
        self._writer: Any = None

    def step(self, step: int, total: int, loss: float) -> None:
        if not math.isnan(loss):
            self._write("loss", loss, step)
        self._also.step(step, total, loss)

    def evaluation(self, step: int, total: int, accuracy: float) -> None:
        self._write("accuracy", accuracy, step)
        self._also.evaluation(step, total, accuracy)

    def message(self, text: str) -> None:
        self._also.message(text)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._also.close()

    def _write(self, name: str, value: float, step: int) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=step)
        self._writer.add_scalar(name, value, step)
