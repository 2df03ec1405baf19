"""Trained networks that several benchmarks of pruning begin with, and training on from them: made once, then found."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.common import WORK, cifar10, strong
from hasten import STRONG, fit
from hasten.contract import Method
from hasten.loop import Result

BASE_RATE, MORE_RATE = 0.1, 0.05


@dataclass(frozen=True)
class Start:
    """A network trained for ``before`` epochs on ``images`` images of CIFAR-10 by the strong recipe, then for ``epochs``.

    Runs are kept in the benchmarks' folder and continued where they were stopped; smoke runs are short and not kept.
    """

    model: str
    images: int
    before: float
    epochs: float

    def base(self, smoke: bool) -> Result:
        """Return the first run, without any method but those of the strong baseline."""
        return self._run("base", self.model, self.before, BASE_RATE, [], smoke)

    def on(self, name: str, base: Result, methods: list[Method], smoke: bool, times: float = 1.0) -> Result:
        """Return the run called ``name`` that goes on from ``base`` with ``methods``; none for the control.

        times: how often as long as ``epochs``.
        """
        assert base.model is not None
        return self._run(name, base.model, times * self.epochs, MORE_RATE, methods, smoke)

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.before:g} epochs of the strong recipe (lr {BASE_RATE:g}), "
            f"then {self.epochs:g} (lr {MORE_RATE:g})"
        )

    def _run(
        self, name: str, model: str | nn.Module, epochs: float, lr: float, methods: list[Method], smoke: bool
    ) -> Result:
        data = cifar10().stratified(320, 100) if smoke else cifar10().stratified(self.images)
        recipe = STRONG.with_(lr=lr, epochs=epochs, eval_every=0.0)
        if smoke:
            recipe = recipe.with_(epochs=1.0, batch_size=32)
        kept = nullcontext(str(WORK / "trained")) if not smoke else tempfile.TemporaryDirectory()
        with kept as folder:
            after = "" if name == "base" else f"-{epochs:g}"
            out = Path(folder) / f"{self.model}-{self.images}-{self.before:g}{after}-{name}"
            result = fit(model, data, [strong(), *methods], recipe=recipe, out=out)
        print(
            f"{self.model} {name}: {100 * result.accuracy:.2f}% in {result.seconds_train:.0f} s", flush=True
        )
        return result


RESNET56 = Start("resnet56", 15_000, 8.0, 12.0)
VGG16 = Start("vgg16", 5_000, 10.0, 6.0)
