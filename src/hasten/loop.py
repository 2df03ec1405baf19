"""The ready training loop: data, schedule, evaluation, logs, checkpoints and exact resume around a Session."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten import keyed
from hasten.checkpoint import Loaded, StopSignal, Store, claim_folder, folder_lock
from hasten.contract import Effect, Method
from hasten.data import as_data
from hasten.devices import training_device
from hasten.errors import CheckpointError, HastenError, SettingsError, UnsupportedError, unknown
from hasten.evaluation import check_network, check_task, measured
from hasten.logs import Logs
from hasten.loss import Loss, cross_entropy, understood
from hasten.measure.clock import Clock, device_sync
from hasten.own_loop import Budget, TrainFunction, TrainingData
from hasten.progress import Now, Progress, silent
from hasten.recipe import RECIPES, STRONG, Recipe
from hasten.regimen import Maker, regimen, whiten
from hasten.run_identity import identity_of, source_of
from hasten.session import Session
from hasten.settings import methods_from
from hasten.weights import load_weights

LOG_EVERY = 1.0  # seconds between reading back the losses of a device that runs behind


@dataclass
class Result:
    """What a run came to. accuracy in [0, 1]; seconds by span of the clock; curve rows (seconds, samples, accuracy).

    ``seconds_train`` is the time that counts: everything from the first batch to the last, without evaluation, saving
    and set-up; ``seconds_attach`` of it passed while the methods were attached. ``stopped`` is the signal that ended the run
    early, or 0. ``saved``: whether the last state is on disk. ``validation``: accuracy on the validation part at the end,
    or None where the data has none. ``preprocessing``: what turns pixels into the network's input.
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
    validation: float | None = None
    recipe: Recipe | None = None
    device: str = "cpu"
    preprocessing: dict[str, Any] = field(default_factory=dict)
    seconds_attach: float = 0.0


def fit(
    model: str | nn.Module | Callable[..., nn.Module],
    data: Any = "fashion-mnist-12k",
    methods: Sequence[Method | str] | Method | str = (),
    *,
    recipe: Recipe | str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    save_every: float = 60.0,
    progress: Progress = silent,
    allow_no_effect: bool | Collection[str] = False,
    device: str | None = None,
    on_step: Callable[[int], None] | None = None,
    init: str | Path | Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    optimizer: Maker | None = None,
    train_fn: TrainFunction | None = None,
    share: float = 1.0,
    root: str | Path | None = None,
    size: int | None = None,
) -> Result:
    """Train ``model`` on ``data`` with ``methods`` and return the result.

    model: a known name, a module, a factory, ``file.py:factory`` or ``pkg.mod:factory``. data: all that
    ``hasten.data.as_data`` takes: a known name, a path, arrays, Datasets, DataLoaders; ``root`` and ``size`` (pixels) are
    those of a name or path. methods: methods or their names, as "name" or "name:setting=value". recipe: STRONG where
    none is given. out: folder for logs and checkpoints; a run found there is continued exactly where it was, if its
    settings are the same. save_every: seconds between checkpoints. progress: told of every step, evaluation and message.
    device: the accelerator where none is given and there is one, else the CPU. on_step: called after every step with
    its number.

    init: weights to start from, a file or a state dict (see ``hasten.weights.load_weights``). loss: in the place of the
    recipe's cross-entropy. optimizer: builds the optimizer, or several, for a model, in the place of the recipe's; the
    recipe's schedule is a factor of the learning rates it gives. train_fn: a whole training loop in the place of this
    one, called with (session, data, budget) of ``hasten.own_loop``; such a run is saved at its end only and cannot be
    continued. share: what part of a longer run's budget this one is, for ``train_fn`` to know.

    All randomness is a function of ``seed``; PyTorch's global generator is left as it was found. Raises HastenError
    (its subclasses say what), after saving nothing: the last checkpoint stays as it was.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        torch.manual_seed(keyed.key64(seed, "global"))
        if out is not None:
            out = claim_folder(Path(out))
            stack.enter_context(folder_lock(out))
        run = _Run(
            model, data, methods, recipe=_recipe(recipe), seed=seed, out=out, progress=progress,
            allow_no_effect=allow_no_effect, device=training_device(device), init=init, loss=loss, optimizer=optimizer,
            train_fn=train_fn, root=root, size=size,
        )  # fmt: skip
        stack.callback(run.logs.close)
        if train_fn is not None:
            run.restore()
            run.train_by(train_fn, share)
            return run.result(None)
        stop = stack.enter_context(StopSignal()) if out is not None else None
        run.restore()
        run.train(stop, save_every, on_step)
        return run.result(stop)


def _recipe(given: Recipe | str | None) -> Recipe:
    if isinstance(given, Recipe) or given is None:
        return given or STRONG
    if given in RECIPES:
        return RECIPES[given]
    if isinstance(given, str):
        raise unknown("recipe", given, RECIPES, SettingsError)
    raise SettingsError(
        f"recipe is a {type(given).__name__}; give a Recipe, such as hasten.STRONG.with_(epochs=5), or a name."
    )


class _Run:
    """One run: what ``fit`` builds, and the loop over its steps."""

    def __init__(
        self,
        model: str | nn.Module | Callable[..., nn.Module],
        data: Any,
        methods: Any,
        *,
        recipe: Recipe,
        seed: int,
        out: Path | None,
        progress: Progress,
        allow_no_effect: bool | Collection[str],
        device: str,
        init: str | Path | Mapping[str, Tensor] | None,
        loss: Loss | None,
        optimizer: Maker | None,
        train_fn: TrainFunction | None,
        root: str | Path | None,
        size: int | None,
    ) -> None:
        self.clock = Clock(sync=device_sync(device))
        with self.clock.span("setup"):
            self.recipe, self.seed, self.progress, self.device = recipe, seed, progress, device
            self.messages: list[str] = []
            self._again = Now(progress)
            chosen = methods_from(methods)
            self.data = as_data(data, root=root, size=size)
            source = source_of(model, self.data, seed)
            net = source.make()
            check_network(net)
            if init is not None:
                self.tell(str(load_weights(net, init)))
            net = net.to(device)
            self.batch = recipe.batch_size
            self.loader = self._training(recipe.batch_size)
            self.batch = self.loader.batch_size
            self.test = self.data.evaluation("test", device=device)
            self.total = max(1, round(recipe.epochs * len(self.loader)))
            first = next(iter(self.loader.epoch(0)))
            criterion = understood(loss) if loss is not None else cross_entropy(recipe.label_smoothing)
            check_task(net, first.inputs, first.targets, len(self.data.classes), criterion)
            self._check_methods(chosen, numbered=first.index is not None)
            whiten(net, self.data, first.inputs)
            self.regimen = regimen(recipe, net, len(self.loader), self.total, optimizer)
            self.session = Session(
                net, self.regimen.optimizers, chosen, sample=(first.inputs, first.targets), seed=seed,
                loss=criterion, total_samples=self.total * self.batch, allow_no_effect=allow_no_effect,
                check_gradients=True, clock=self.clock, accumulate=recipe.accumulate, clip_norm=recipe.clip_norm,
            )  # fmt: skip
            self.seconds_attach = self.clock.totals().get("method", 0.0)
            self.regimen.attached()
            self.session.on_restart.append(self.regimen.restart)
            self.session.surgery.followers.append(self.regimen.reshaped)
            self.curve: list[tuple[float, int, float]] = []
            self.step, self.saved = 0, False
            # the position: batches of ``size`` samples done in the epoch; schedules count in the recipe's batches
            self.epoch, self.at, self.size = 0, 0, self.batch
            # steps whose loss is still on the device, and the newest loss that is known
            self._unlogged: list[tuple[dict[str, Any], Tensor]] = []
            self._loss, self._logged = math.nan, time.monotonic()
            self.identity = identity_of(source, self.data, self.session.methods, recipe, seed, init=init, loss=loss,
                                        optimizer=optimizer, train_fn=train_fn)  # fmt: skip
            self.store = None
            if out is not None:
                self.store = Store(out / "checkpoints", on_problem=self._problem)
                if source.recipe is None and train_fn is None:
                    self.tell(
                        "the model is an object without a factory: this run can be resumed only by a program that "
                        "builds the same object again; give a name or file.py:factory to resume from the command line."
                    )
            self.logs = Logs(out)

    def tell(self, text: str) -> None:
        """Let the user know now, and keep it for the result."""
        self.messages.append(text)
        self.progress.message(text)

    def _problem(self, text: str) -> None:
        """As ``tell``, for what may come again at every save."""
        self.messages.append(text)
        self._again.message(text)

    def _training(self, batch: int) -> Any:
        augment = self.recipe.augmentations(self.data.flip_ok)
        loader = self.data.training(batch, seed=self.seed, augment=augment, device=self.device)
        if loader.batch_size != batch:
            if batch != self.recipe.batch_size:
                raise UnsupportedError(
                    f"a method wants batches of {batch}, but the DataLoader given makes its own of {loader.batch_size}; "
                    f"give the Dataset instead."
                )
            self.tell(
                f"batches of {loader.batch_size} come from the DataLoader given; the recipe's {batch} is not used."
            )
        return loader

    def _check_methods(self, methods: Sequence[Method], *, numbered: bool) -> None:
        """Raise UnsupportedError for methods that this data or recipe rules out."""
        if not numbered and (names := [m.spec.name for m in methods if "index" in m.spec.requires]):
            raise UnsupportedError(
                f"{', '.join(names)} keeps something for each sample, and a DataLoader gives samples no numbers; give "
                f"the Dataset instead."
            )
        if self.recipe.record is not None and (
            names := [m.spec.name for m in methods if "batch.size" in m.writes]
        ):
            raise UnsupportedError(
                f"{', '.join(names)} changes the batch size, and a record recipe's rates are made for its own; leave it "
                f"out or give another recipe."
            )

    # -- where the run is
    @property
    def position(self) -> float:
        """Steps done, in steps of the recipe's batch size."""
        per_epoch = len(self.loader)
        steps = per_epoch if self.size == self.batch else self.data.train_count // self.size
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
        if "train_fn" in self.identity:
            raise CheckpointError(
                f"{loaded.path.parent.parent} holds the end of a run that a training function of your own has made; it can "
                f"be neither continued nor repeated there. Give another folder."
            )
        for warning in loaded.warnings:
            self.tell(warning)
        try:
            self._take(loaded)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, HastenError):
                raise
            raise CheckpointError(
                f"{loaded.path} is whole, but does not hold what this run needs ({type(error).__name__}: {error}); it "
                f"was written by another program or version. Give another folder to begin anew."
            ) from error
        self.tell(f"continued from step {self.step} of {self.total} ({loaded.path.name})")

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
        self._settle()
        with self.clock.span("save"):
            self.saved = False
            try:
                logged = self.logs.offsets()
            except OSError as error:
                self._problem(
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
                    "position": [self.epoch, self.at, self.size], "data": self.data.preprocessing(),
                    "accuracy": self.curve[-1][2] if self.curve else None,
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
                self.size = min(session.batch_size or self.size, self.data.train_count)
            loader = self.loader if self.size == self.batch else self._training(self.size)
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

    def _one_step(self, inputs: Tensor, targets: Tensor, index: Tensor | None) -> None:
        session = self.session
        lr = self.regimen.before_step(self.position, self.size / self.batch)
        loss = session.step(inputs, targets, index)
        self.step, self.at = self.step + 1, self.at + 1
        with self.clock.span("optimizer"):
            self.regimen.after_step(self.step)
        record = {"step": self.step, "samples": session.counters["streamed"], "loss": math.nan, "lr": lr}
        self._unlogged.append((record, loss))
        # a device that runs behind is waited for now and then only
        if not behind(loss) or time.monotonic() - self._logged >= LOG_EVERY:
            self._log()
        self.progress.step(round(self.position), self.total, self._loss)

    def _log(self) -> None:
        """Write the steps whose loss was still on the device."""
        waiting, self._unlogged, self._logged = self._unlogged, [], time.monotonic()
        if not waiting:
            return
        values = torch.stack([loss.to(waiting[-1][1].device) for _, loss in waiting]).tolist()
        for (record, _), value in zip(waiting, values, strict=True):
            self.logs.step(record | {"loss": value})
        self._loss = values[-1]

    def _settle(self) -> None:
        """Have the last step checked, where its check is late, and all steps logged."""
        self.session.settle()
        self._log()

    def train_by(self, train: TrainFunction, share: float) -> None:
        """Let a function of the user's own train, then evaluate and save."""
        data = TrainingData(self.loader, tuple(self.data.classes), self.data.shape, self.device, self.seed)
        budget = Budget(
            self.recipe.epochs, self.total, self.batch, share, self.regimen.optimizers, self.evaluate
        )
        before = self.session.counters["updates"]
        with self.clock.span("train"):
            train(self.session, data, budget)
        self.session.settle()
        if self.session.counters["updates"] == before:
            raise HastenError(
                "train_fn returned without an update by the session: call session.step(inputs, targets) or "
                "session.backward(loss) and session.update()."
            )
        self.step = self.session.counters["step"]
        self.epoch, self.at = divmod(self.total, len(self.loader))
        self.evaluate()
        self.save()

    def evaluate(self) -> float:
        """Return the accuracy on the test images, of the averaged weights where the recipe has them."""
        self._settle()
        spans = self.clock.totals()
        accuracy, loss = self._measured(self.test)
        seconds = counted(spans)
        row = (seconds, self.session.counters["streamed"], accuracy)
        self.curve.append(row)
        self.logs.evaluation({"step": self.step, "epoch": self.position / len(self.loader), "samples": row[1],
                              "seconds": f"{seconds:.3f}", "accuracy": accuracy, "loss": loss})  # fmt: skip
        self.progress.evaluation(round(self.position), self.total, accuracy)
        return accuracy

    def _measured(self, loader: Any) -> tuple[float, float]:
        """Return accuracy and mean cross-entropy of the weights to evaluate on the images of ``loader``."""
        with self.clock.span("eval"), ExitStack() as stack:
            stack.enter_context(self.regimen.evaluated())
            return measured(stack.enter_context(self.session.inference()), loader)

    def result(self, stop: StopSignal | None) -> Result:
        """Return what the run came to, with the averaged weights in the exported model."""
        self._settle()
        spans = self.clock.totals()
        validation = None
        if self.position >= self.total:
            self.regimen.finish()
            if self.data.has_validation:
                validation = self._measured(self.data.evaluation("validation", device=self.device))[0]
        return Result(
            accuracy=self.curve[-1][2] if self.curve else 0.0, seconds_train=counted(spans), spans=spans,
            curve=list(self.curve), counters=dict(self.session.counters), witness=self.session.witness(),
            effects=self.session.effects, steps=self.step, stopped=int(stop.requested or 0) if stop else 0,
            messages=self.messages, model=self.session.export(), saved=self.saved,
            validation=validation, recipe=self.recipe, device=self.device, preprocessing=self.data.preprocessing(),
            seconds_attach=self.seconds_attach,
        )  # fmt: skip


def behind(loss: Tensor) -> bool:
    """Return whether reading ``loss`` may wait for a device that runs behind Python."""
    return loss.device.type != "cpu"


def counted(spans: dict[str, float]) -> float:
    """Return the seconds that count towards training: all spans but evaluation, saving and set-up."""
    return sum(seconds for name, seconds in spans.items() if name not in ("eval", "save", "setup"))
