"""The ready training loop: data, schedule, evaluation, logs, checkpoints and exact resume around a Session."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten import keyed, models
from hasten.checkpoint import Loaded, StopSignal, Store, claim_folder
from hasten.contract import Effect, Method
from hasten.data import DataSet, Images, Loader, load
from hasten.errors import CheckpointError, HastenError, UnsupportedError
from hasten.logs import Logs
from hasten.loss import cross_entropy
from hasten.measure.clock import Clock, device_sync
from hasten.progress import Progress, silent
from hasten.recipe import Recipe
from hasten.regimen import regimen, whiten
from hasten.session import Session


@dataclass
class Result:
    """What a run came to. accuracy in [0, 1]; seconds by span of the clock; curve rows (seconds, samples, accuracy).

    ``seconds_train`` is the time that counts: everything from the first batch to the last, without evaluation, saving
    and set-up. ``stopped`` is the signal that ended the run early, or 0. ``saved``: whether the last state is on disk.
    """

    accuracy: float
    seconds_train: float
    spans: dict[str, float]
    curve: list[tuple[float, int, float]]
    counters: dict[str, int]
    witness: dict[str, dict[str, float]]
    effects: dict[str, Effect]
    steps: int
    stopped: int = 0
    messages: list[str] = field(default_factory=list)
    model: nn.Module | None = None
    saved: bool = False


def fit(
    model: str | nn.Module | Callable[[], nn.Module],
    data: str | Path | DataSet = "fashion-mnist-12k",
    methods: Sequence[Method] = (),
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    save_every: float = 60.0,
    progress: Progress = silent,
    allow_no_effect: bool = False,
    device: str = "cpu",
    on_step: Callable[[int], None] | None = None,
) -> Result:
    """Train ``model`` on ``data`` with ``methods`` and return the result.

    model: a known name, a module, a factory, ``file.py:factory`` or ``pkg.mod:factory``. data: a known name, a path,
    or a DataSet. out: folder for logs and checkpoints; a run found there is continued exactly where it was, if its
    settings are the same. save_every: seconds between checkpoints. progress: told of every step and evaluation.
    on_step: called after every step with its number, for callers that must act there.

    All randomness is a function of ``seed``; PyTorch's global generator is left as it was found. Raises HastenError
    (its subclasses say what), after saving nothing: the last checkpoint stays as it was.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        torch.manual_seed(keyed.key64(seed, "global"))
        run = _Run(model, data, methods, recipe or Recipe(), seed, out, progress, allow_no_effect, device)
        stack.callback(run.logs.close)
        stop = stack.enter_context(StopSignal()) if out is not None else None
        run.restore()
        run.train(stop, save_every, on_step)
        return run.result(stop)


class _Run:
    """One run: what ``fit`` builds, and the loop over its steps."""

    def __init__(
        self,
        model: str | nn.Module | Callable[[], nn.Module],
        data: str | Path | DataSet,
        methods: Sequence[Method],
        recipe: Recipe,
        seed: int,
        out: str | Path | None,
        progress: Progress,
        allow_no_effect: bool,
        device: str,
    ) -> None:
        self.clock = Clock(sync=device_sync(device))
        with self.clock.span("setup"):
            self.data = data if isinstance(data, DataSet) else load(str(data))
            self.recipe, self.seed, self.progress, self.device = recipe, seed, progress, device
            self.messages: list[str] = []
            train = self.data.train
            source = models.resolve(model, num_classes=len(train.classes), in_channels=train.shape[2],
                                    image_size=train.shape[0], seed=seed)  # fmt: skip
            net = source.make().to(device)
            self.loader = self._training(recipe.batch_size)
            self.test = self._loader(self.data.test, min(500, len(self.data.test)), (), shuffle=False)
            self.total = max(1, round(recipe.epochs * len(self.loader)))
            first = next(iter(self.loader.epoch(0)))
            whiten(net, train)
            self.regimen = regimen(recipe, net, len(self.loader), self.total)
            self.session = Session(
                net, self.regimen.optimizers, methods, sample=(first.inputs, first.targets), seed=seed,
                loss=cross_entropy(recipe.label_smoothing), total_samples=self.total * recipe.batch_size,
                allow_no_effect=allow_no_effect, check_gradients=True, clock=self.clock,
            )  # fmt: skip
            self.regimen.attached()
            self.session.on_restart.append(self.regimen.restart)
            self.session.surgery.followers.append(self.regimen.reshaped)
            self.curve: list[tuple[float, int, float]] = []
            self.step, self.saved = 0, False
            # the position: batches of ``size`` samples done in the epoch; schedules count in the recipe's batches
            self.epoch, self.at, self.size = 0, 0, recipe.batch_size
            if recipe.record is not None and any("batch.size" in m.writes for m in methods):
                names = ", ".join(m.spec.name for m in methods if "batch.size" in m.writes)
                raise UnsupportedError(
                    f"{names} changes the batch size, and a record recipe's rates are made for its own; leave it out or "
                    f"give another recipe."
                )
            self.identity = {
                "model": source.recipe or {"object": source.label}, "data": self.data.name, "seed": seed,
                "samples": len(train), "content": fingerprint(train), "recipe": dataclasses.asdict(recipe) | {"augment": list(recipe.augment)},
                "methods": [{"name": m.spec.name, "settings": jsonable(m.settings())} for m in self.session.methods],
            }  # fmt: skip
            self.store, folder = None, None
            if out is not None:
                folder = claim_folder(Path(out))
                self.store = Store(folder / "checkpoints", on_problem=self.messages.append)
                if source.recipe is None:
                    self.messages.append(
                        "the model is an object without a factory: this run can be resumed only by a program that "
                        "builds the same object again; give a name or file.py:factory to resume from the command line."
                    )
            self.logs = Logs(folder)

    def _loader(self, images: Images, batch: int, augment: Sequence[Any], *, shuffle: bool) -> Loader:
        return Loader(images, batch, seed=self.seed, augment=tuple(augment), shuffle=shuffle, drop_last=shuffle,
                      device=self.device)  # fmt: skip

    def _training(self, batch: int) -> Loader:
        images = self.data.train
        return self._loader(images, batch, self.recipe.augmentations(self.data.flip_ok), shuffle=True)

    @property
    def position(self) -> float:
        """Steps done, in steps of the recipe's batch size."""
        per_epoch = len(self.loader)
        steps = len(self.data.train) // self.size
        return self.epoch * per_epoch + self.at * per_epoch / steps

    # -- resume
    def restore(self) -> None:
        """Continue from the newest good checkpoint, if there is one."""
        if self.store is None:
            return
        loaded = self.store.load(self.identity)
        if loaded is None:
            self.logs.rewind({})
            return
        self.messages += loaded.warnings
        try:
            self._take(loaded)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, HastenError):
                raise
            raise CheckpointError(
                f"{loaded.path} is whole, but does not hold what this run needs ({type(error).__name__}: {error}); it "
                f"was written by another program or version. Give another folder to begin anew."
            ) from error
        self.messages.append(f"continued from step {self.step} of {self.total} ({loaded.path.name})")

    def _take(self, loaded: Loaded) -> None:
        state = loaded.parts["state"]
        self.session.load_state_dict(
            {
                "model": loaded.parts["model"],
                "optimizers": loaded.parts["optim"]["optimizers"],
                "methods": {name: loaded.parts[f"method-{name}"] for name in state["methods"]},
                "counters": state["counters"],
                "structure": state.get("structure", []),
                "batch_size": state.get("batch_size"),
            }
        )
        self.regimen.load_state_dict(loaded.parts["regimen"])
        self.clock.load_state_dict(state["clock"])
        self.curve = [tuple(row) for row in state["curve"]]
        self.step = loaded.step
        self.epoch, self.at, self.size = state["position"]
        torch.set_rng_state(state["rng"])
        self.logs.rewind(state["logs"])

    def save(self) -> None:
        """Write a checkpoint of the present step; where the disk does not let it, say so in the messages."""
        if self.store is None:
            return
        with self.clock.span("save"):
            self.saved = False
            try:
                logged = self.logs.offsets()
            except OSError as error:
                self.messages.append(
                    f"could not write the logs at step {self.step}, so no checkpoint either: "
                    f"{error.strerror or error}. Training goes on; the next save will be tried as planned."
                )
                return
            state = self.session.state_dict()
            parts: dict[str, dict[str, Any]] = {
                "model": state["model"],
                "optim": {"optimizers": state["optimizers"]},
                "regimen": self.regimen.state_dict(),
                "state": {
                    "methods": list(state["methods"]), "counters": state["counters"], "clock": self.clock.state_dict(),
                    "curve": [list(row) for row in self.curve], "rng": torch.get_rng_state(),
                    "logs": logged, "structure": state["structure"], "batch_size": state["batch_size"],
                    "position": [self.epoch, self.at, self.size],
                },
            }  # fmt: skip
            parts |= {f"method-{name}": value for name, value in state["methods"].items()}
            self.saved = self.store.save(self.step, parts, self.identity) is not None

    # -- the loop
    def train(
        self, stop: StopSignal | None, save_every: float, on_step: Callable[[int], None] | None
    ) -> None:
        """Run from the present step to the last, or until a signal asks to stop."""
        per_epoch, session, clock = len(self.loader), self.session, self.clock
        saved = time.monotonic()
        cadence = max(1, round(self.recipe.eval_every * per_epoch)) if self.recipe.eval_every else self.total
        while self.position < self.total:
            if self.at == 0:
                session.start_epoch(self.epoch)
                self.size = min(session.batch_size or self.size, len(self.data.train))
            loader = self.loader if self.size == self.recipe.batch_size else self._training(self.size)
            batches, rest = loader.epoch(self.epoch, self.at), self.total - self.epoch * per_epoch
            for _ in range(self.at, min(len(loader), -(-rest * len(loader) // per_epoch))):
                with clock.span("data"):
                    batch = next(batches)
                before = self.position
                self._one_step(batch.inputs, batch.targets, batch.index)
                if self.at == len(loader):
                    self.epoch, self.at = self.epoch + 1, 0
                    session.end_epoch()
                if self.position // cadence > before // cadence or self.position >= self.total:
                    self.evaluate()
                if on_step is not None:
                    on_step(self.step)
                if stop is not None and stop.requested:
                    self.save()
                    return
                if self.store is not None and time.monotonic() - saved >= save_every:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _one_step(self, inputs: Tensor, targets: Tensor, index: Tensor) -> None:
        session = self.session
        lr = self.regimen.before_step(self.position, self.size / self.recipe.batch_size)
        loss = session.step(inputs, targets, index)
        self.step, self.at = self.step + 1, self.at + 1
        with self.clock.span("optimizer"):
            self.regimen.after_step(self.step)
        record = {"step": self.step, "samples": session.counters["streamed"], "loss": loss.item(),
                  "lr": lr}  # fmt: skip
        self.logs.step(record)
        self.progress.step(round(self.position), self.total, record["loss"])

    def evaluate(self) -> float:
        """Return the accuracy on the test images, of the averaged weights where the recipe has them."""
        spans = self.clock.totals()
        with self.clock.span("eval"), ExitStack() as stack:
            stack.enter_context(self.regimen.evaluated())
            forward = stack.enter_context(self.session.inference())
            right, total_loss, count = 0, 0.0, 0
            for batch in self.test.epoch(0):
                outputs = forward(batch.inputs).float()
                right += int((outputs.argmax(1) == batch.targets).sum())
                total_loss += float(nn.functional.cross_entropy(outputs, batch.targets, reduction="sum"))
                count += len(batch.targets)
        accuracy, seconds = right / count, counted(spans)
        row = (seconds, self.session.counters["streamed"], accuracy)
        self.curve.append(row)
        self.logs.evaluation({"step": self.step, "epoch": self.position / len(self.loader), "samples": row[1],
                              "seconds": f"{seconds:.3f}", "accuracy": accuracy, "loss": total_loss / count})  # fmt: skip
        self.progress.evaluation(round(self.position), self.total, accuracy)
        return accuracy

    def result(self, stop: StopSignal | None) -> Result:
        """Return what the run came to, with the averaged weights in the exported model."""
        spans = self.clock.totals()
        if self.position >= self.total:
            self.regimen.finish()
        return Result(
            accuracy=self.curve[-1][2] if self.curve else 0.0, seconds_train=counted(spans), spans=spans,
            curve=list(self.curve), counters=dict(self.session.counters), witness=self.session.witness(),
            effects=self.session.effects, steps=self.step, stopped=int(stop.requested or 0) if stop else 0,
            messages=self.messages, model=self.session.export(), saved=self.saved,
        )  # fmt: skip


def jsonable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with tuples as lists, as JSON holds them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def fingerprint(images: Images) -> str:
    """Return a digest of all labels and of up to 256 images spread over the set, so that other data is noticed."""
    spread = np.linspace(0, len(images) - 1, min(256, len(images))).astype(np.int64)
    digest = hashlib.sha256(repr((images.pixels.shape, images.classes)).encode())
    digest.update(images.labels.tobytes())
    digest.update(images.pixels[spread].tobytes())
    return digest.hexdigest()[:16]


def counted(spans: dict[str, float]) -> float:
    """Return the seconds that count towards training: all spans but evaluation, saving and set-up."""
    return sum(seconds for name, seconds in spans.items() if name not in ("eval", "save", "setup"))
