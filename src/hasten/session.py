"""One training run: a plain model, plain optimizers and a list of methods, driven by the caller's own loop."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hasten import loss as losses
from hasten.contract import Batch, Effect, Method, overrides
from hasten.diagnose import first_non_finite, layer_shapes
from hasten.errors import (
    CheckpointError,
    HastenError,
    NoEffectError,
    NonFiniteError,
    SettingsError,
    UnsupportedError,
)
from hasten.finite import Verdict, all_finite, apply_if, gradients_of
from hasten.measure.clock import Clock
from hasten.optim.named import load_named_state, named_state
from hasten.places import ordered
from hasten.products import Plan, install, planned, uninstall
from hasten.settings import methods_from
from hasten.surgery import Change, Surgeon, check_training_state, replace_module
from hasten.surgery.gates import dissolve


class Session:
    """Applies ``methods`` to the training of ``model`` by ``optimizer``.

    model: an ``nn.Module``, or one wrapped in DistributedDataParallel. Parts of it that are in eval mode stay so, unless
    the whole model is. optimizer: one optimizer or several that together hold every trainable parameter once. methods:
    methods or their names. sample: one batch ``(inputs, targets)`` as training will see it, for shapes only. loss:
    ``loss(outputs, targets)`` -> scalar, or a loss module; methods that weigh or choose samples need it to take
    ``reduction="none"`` as PyTorch's do. total_samples: samples the whole run will stream, which methods with a
    schedule need. seed: key of all randomness of the methods. accumulate: parts that ``step`` cuts a batch into, to save
    memory; the gradient is that of the whole batch (batch norm sees the parts). clip_norm: largest norm of all gradients
    together. late_check: whether a loss or gradient that is not finite is reported one step late, its own update held
    back, so that Python never waits for the device; by default on an accelerator only.

    ``step`` does all that a step needs. For a loop of your own, such as to accumulate over batches, call its parts::

        for number, (inputs, targets) in enumerate(batches):
            loss = loss_function(session.forward(inputs), targets) / 4
            session.backward(loss)
            if number % 4 == 3:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                session.update()

    ``batch_size`` is what a method wants from the next epoch on: load batches of that size, at the scheduled learning
    rate times their growth; None while no method has asked. ``fit`` does so.

    Raises ConflictError if two methods claim one place, NoEffectError if a method would change nothing (unless
    ``allow_no_effect``, True for all or a list of names), UnsupportedError if one cannot work here. Nothing is changed before all have agreed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        methods: Sequence[Method | str] | Method | str = (),
        *,
        sample: tuple[Tensor, Tensor],
        loss: losses.Loss | None = None,
        seed: int = 0,
        total_samples: int | None = None,
        allow_no_effect: bool | Collection[str] = False,
        check_gradients: bool = False,
        clock: Clock | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        late_check: bool | None = None,
    ) -> None:
        self.wrapper = model
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._call: Callable[[Tensor], Any] = model
        self.optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        self.sample, self.seed, self.total_samples = sample, seed, total_samples
        self.loss = losses.understood(loss) if loss is not None else losses.cross_entropy()
        self.check_gradients = check_gradients
        self.clock = clock if clock is not None else Clock(enabled=False)
        self.counters = {"step": 0, "epoch": 0, "streamed": 0, "forward": 0, "backward": 0, "updates": 0}
        self.effects: dict[str, Effect] = {}
        self.methods: list[Method] = [copy.copy(m) for m in ordered(methods_from(methods))]
        if accumulate < 1 or (clip_norm is not None and not clip_norm > 0):
            raise SettingsError(
                f"Session: accumulate (={accumulate}) must be 1 or more, clip_norm (={clip_norm}) above 0 or None."
            )
        self.accumulate, self.clip_norm = accumulate, clip_norm
        self._edits: list[Callable[[], None]] = []
        self._wraps: list[Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = []
        self.on_restart: list[Callable[[], None]] = []
        # the state of a step: gradients begun, samples and batch seen since the last update, verdicts not yet read
        self._begun, self._within = False, False
        self._unused = 0
        self._seen: Batch = Unlabelled(sample[0][:0])
        self._incoming: Tensor | None = None
        self._outputs: Any = None
        self._late = sample[0].device.type != "cpu" if late_check is None else late_check
        self._ok: Tensor | None = None
        self._pending: Verdict | None = None

        refuse_closures(self.optimizers)
        check_training_state(self.model, self.optimizers)
        self.batch_size: int | None = None
        self.surgery = Surgeon(self.model, self.optimizers, sample[0])
        modes = {name: module.training for name, module in self.model.named_modules()}
        self._attach(allow_no_effect)
        self._collect_hooks()
        self.surgery.followers.append(self._reshaped)
        if any(modes.values()):
            for name, module in self.model.named_modules():
                module.training = modes.get(name, module.training)
        else:
            self.model.train()

    @property
    def forward(self) -> Callable[[Tensor], Any]:
        """The model as training calls it, in the precision and with the layers of the methods: ``forward(inputs)``.

        Assign to it to have the model called in another way, as by ``torch.compile``.
        """
        call = self._call

        def outputs(inputs: Tensor) -> Any:
            if not torch.is_grad_enabled() or self._within:
                with self._inside():
                    return call(inputs)
            self.counters["streamed"] += len(inputs)
            self.counters["forward"] += len(inputs)
            self._unused += len(inputs)
            batch: Batch = Unlabelled(inputs)
            if not self._needs_step:  # else ``backward`` will say so
                with self.clock.span("method"):
                    for method in self._select:
                        batch = method.select(batch)
            self._seen = batch
            with self.clock.span("forward"), self._inside():
                self._outputs = call(batch.inputs)
            return self._outputs

        return outputs

    @forward.setter
    def forward(self, call: Callable[[Tensor], Any]) -> None:
        self._call = call

    # -- what methods use while they attach
    def layers(self, *kinds: type[nn.Module]) -> list[tuple[str, nn.Module]]:
        """Return (name, module) of every submodule of these kinds, each module once, in the model's order."""
        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, kinds)]

    def shapes(self) -> dict[str, tuple[torch.Size, torch.Size]]:
        """Return (input shape, output shape) of every leaf module for the sample batch."""
        return layer_shapes(self.model, self.sample[0])

    def plan(self, layer: str) -> Plan:
        """Return the product plan of the layer called ``layer``, put in when first asked for.

        Raises UnsupportedError if the layer cannot carry one; ``hasten.products.supported`` says so beforehand.
        """
        return install(self.model.get_submodule(layer), layer)

    def edit(self, change: Callable[[], None]) -> None:
        """Run ``change`` once every method has attached; until then the model stays as it was."""
        self._edits.append(change)

    def replace(self, name: str, new: nn.Module) -> None:
        """Put ``new`` in the place of the submodule ``name`` once every method has attached."""
        self.edit(lambda: void(replace_module(self.model, name, new)))

    def restart_averages(self) -> None:
        """Have averages of the weights begin anew: a method has changed what the network computes in training.

        Running statistics from before would otherwise be averaged with those from after. Who keeps an average puts a
        callback into ``on_restart``.
        """
        for restart in self.on_restart:
            restart()

    def wrap(self, around: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]) -> None:
        """Have the model called through ``around(model)``, now and whenever its structure has changed."""
        self._wraps.append(around)
        self._call = around(self._call)

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]. Raises HastenError if ``total_samples`` was not given."""
        if self.total_samples is None:
            raise HastenError(
                "a method follows a schedule: give Session(..., total_samples=epochs * len(training set))."
            )
        return min(1.0, self.counters["streamed"] / self.total_samples)

    # -- the step
    def step(self, inputs: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Train on one batch and return its loss, detached.

        inputs (N, C, H, W), targets (N,), index (N,) numbers of the samples in the training set where the caller knows
        them. Raises NonFiniteError before any weight changes, UnsupportedError if a method needs ``index``.
        """
        clock = self.clock
        batch = Batch(inputs, targets, index)
        if index is None and self._needs_index:
            raise UnsupportedError(
                f"{self._needs_index[0]} keeps something for each sample: give step(inputs, targets, index) with the "
                f"numbers of the samples in the training set."
            )
        self.counters["streamed"] += len(inputs)
        self._incoming = targets
        if self._select:
            with clock.span("method"):
                for method in self._select:
                    batch = method.select(batch)
        return self._train_on(batch, count=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar, to those since the last update; methods' terms of the loss too.

        For a loop of your own, after ``forward``. Raises NonFiniteError if the loss is not finite (see ``late_check``),
        UnsupportedError if a method chooses or weighs samples or reads each step's loss, which ``step`` alone lets it.
        """
        if self._needs_step:
            raise UnsupportedError(
                f"{', '.join(self._needs_step)} acts on a batch and its loss: train by session.step(inputs, targets), or "
                f"leave it out."
            )
        outputs, self._outputs = self._outputs, None
        if self._observe and isinstance(outputs, Tensor):
            self._seen.loss = loss.detach()
            self._let_observe(self._seen, outputs, None)
        self._backpropagate(loss)
        self.counters["backward"] += self._unused
        self._unused = 0

    def update(self) -> None:
        """Apply the gradients since the last update: check, clip, let methods change them, and step the optimizers.

        For a loop of your own, after ``backward``. Raises NonFiniteError before any weight changes, HastenError if there
        was no ``backward``.
        """
        if not self._begun:
            raise HastenError("session.update() without gradients: call session.backward(loss) first.")
        self._apply()
        self.counters["step"] += 1

    def settle(self) -> None:
        """Wait for the check of the last step where it is late. Raises NonFiniteError as ``step`` does."""
        pending, self._pending = self._pending, None
        if pending is not None and not pending.good():
            self._report_non_finite(pending.batch, pending.what, pending.step)

    def _train_on(self, batch: Batch, *, count: bool = False) -> Tensor:
        if not len(batch.inputs):
            self.counters["step"] += count
            return batch.loss if batch.loss is not None else torch.zeros(())
        self.counters["forward"] += len(batch.inputs)
        self._seen = batch
        parts = self._parts(batch)
        if len(parts) == 1:
            loss = self._part(batch, batch, observe=True)
        else:
            loss = self._in_parts(batch, parts)
        self.counters["backward"] += len(batch.inputs)
        self._apply()
        self.counters["step"] += count
        return loss

    def _parts(self, batch: Batch) -> list[Batch]:
        rows = range(len(batch))
        if self.accumulate == 1 or len(rows) == 1:
            return [batch]
        ends = [len(rows) * k // self.accumulate for k in range(self.accumulate + 1)]
        return [batch.cut(a, b) for a, b in pairwise(ends) if b > a]

    def _part(self, part: Batch, whole: Batch, *, observe: bool) -> Tensor:
        """Run one part of a batch forward and backward, and return its share of the loss, detached."""
        with self.clock.span("forward"), self._inside():
            outputs, loss, each = self._forward_loss(part)
            if part is not whole:
                share = self._share(part, whole, outputs)
                # the mean over a part in which no sample counts is 0 / 0
                loss = loss * share if share else outputs.sum() * 0.0
                part.loss = loss.detach()
            if observe:
                self._let_observe(part, outputs, each)
            else:
                self._looked.append((outputs.detach(), None if each is None else each.detach()))
            loss = self._with_terms(loss)
            del outputs, each
        self._backpropagate(loss, terms=False)
        return loss.detach()

    def _in_parts(self, batch: Batch, parts: list[Batch]) -> Tensor:
        """Run the parts of ``batch``; methods observe the whole, as if it had been run at once."""
        self._looked: list[tuple[Tensor, Tensor | None]] = []
        total = torch.zeros((), device=batch.inputs.device)
        for number, part in enumerate(parts):
            with self._alone() if number < len(parts) - 1 else nullcontext():
                total = total + self._part(part, batch, observe=False)
        batch.loss = torch.stack([p.loss for p in parts if p.loss is not None]).sum()
        if self._observe:
            each = [e for _, e in self._looked if e is not None]
            self._let_observe(
                batch, torch.cat([o for o, _ in self._looked]), torch.cat(each) if each else None
            )
        self._looked = []
        return total

    def _alone(self) -> AbstractContextManager[None]:
        """Return a context in which ranks do not exchange gradients yet."""
        wrapper = self.wrapper
        return wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else nullcontext()

    def _share(self, part: Batch, whole: Batch, outputs: Tensor) -> float:
        """Return the factor that makes the means over the parts add up to the mean over the whole."""
        if part.weights is not None:
            return len(part) / len(whole)
        counted = losses.divisor(self.loss, outputs, whole.targets)
        return losses.divisor(self.loss, outputs, part.targets) / counted if counted else 1.0

    def _forward_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the outputs for ``batch``, the loss without the methods' terms, and each sample's where it is known."""
        outputs = self._call(batch.inputs)
        each = None
        if batch.weights is not None:
            each = self.loss(outputs, batch.targets, reduction="none")
            loss = losses.weighted_mean(each, batch.weights) * self._scale(outputs)
        else:
            # the loss's own mean, which a mean of each sample's loss would not equal in the last bit
            loss = self.loss(outputs, batch.targets)
            if self._per_example and self._observe:
                with torch.no_grad():
                    each = self.loss(outputs, batch.targets, reduction="none")
        for method in self._blend:
            with self.clock.span("method"):
                loss = method.blend_loss(batch, outputs, loss)
        batch.loss = loss.detach()
        return outputs, loss, each

    def _scale(self, outputs: Tensor) -> float:
        """Return the factor from a mean over samples to the loss's own mean: 1 unless the loss weighs or ignores some.

        It is that of the batch that came in, from which methods have chosen: the mean over the samples chosen, times
        their weights, stands for the mean over all of it.
        """
        targets = self._incoming
        if targets is None:
            return 1.0
        counted = losses.divisor(self.loss, outputs, targets)
        return len(targets) / counted if counted else 1.0

    def _with_terms(self, loss: Tensor) -> Tensor:
        """Return ``loss`` with what methods add to it, once between two updates."""
        if not self._begun:
            for method in self._terms:
                loss = loss + method.loss_terms()
        return loss

    def _let_observe(self, batch: Batch, outputs: Tensor, each: Tensor | None) -> None:
        if self._observe:
            seen = None if each is None else each.detach()
            with self.clock.span("method"):
                for method in self._observe:
                    method.observe(batch, outputs.detach(), seen)

    def _backpropagate(self, loss: Tensor, *, terms: bool = True) -> None:
        with self.clock.span("forward"):
            if terms and self._terms:
                with self._inside():
                    loss = self._with_terms(loss)
            if self._late:
                ok = loss.detach().isfinite().all()
                self._ok = ok if self._ok is None else self._ok & ok
            elif not math.isfinite(loss.item()):
                self._report_non_finite(self._seen, "loss", self.counters["step"])
        with self.clock.span("backward"):
            if not self._begun:
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
            self._begun = True
            self._backward(loss)

    def _apply(self) -> None:
        """Update the weights by the gradients since the last update."""
        clock = self.clock
        self._begun = False
        verdict = self._checked()
        if self._gradients:
            with clock.span("method"):
                for method in self._gradients:
                    method.gradients()
        with clock.span("optimizer"):
            if self.clip_norm is not None:
                held = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
                nn.utils.clip_grad_norm_(held, self.clip_norm)
            if verdict is None:
                self._update(self.optimizers)
            else:
                apply_if(verdict, self._update, self.optimizers, own=self._update is step_all)
        self.counters["updates"] += 1
        if self._after_update:
            with clock.span("method"):
                for method in self._after_update:
                    method.after_update()
        if not self._late:
            self._seen = self._seen.cut(0, 0)

    def _checked(self) -> Tensor | None:
        """Check the gradients where that is asked for; where the check is late, return the verdict on the device.

        The verdict on the step before is read first, so no second update follows one that was held back.
        """
        if not self._late:
            if self.check_gradients:
                self._check_gradients()
            return None
        assert self._ok is not None
        loss_ok, self._ok = self._ok, None
        ok = loss_ok
        if self.check_gradients:
            ok = loss_ok & all_finite(gradients_of(self.optimizers)).to(loss_ok.device)
        self.settle()
        self._pending = Verdict.of(ok, loss_ok, self.counters["step"], self._seen)
        return ok

    # -- between steps
    def start_epoch(self, epoch: int) -> None:
        """Tell the methods that epoch ``epoch`` (0-based) begins."""
        self.counters["epoch"] = epoch
        with self.clock.span("method"):
            for method in self.methods:
                method.start_epoch(epoch)

    def end_epoch(self) -> None:
        """Train on what methods still hold in queues."""
        for method in self.methods:
            if (batch := method.flush()) is not None and len(batch):
                self._train_on(batch)

    @contextmanager
    def inference(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Context in which the model evaluates: eval mode, no gradients, the precision of training."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), self._inside():
                yield self._call
        finally:
            for module, training in modes:  # not model.train(): a module frozen in eval mode stays so
                module.training = training

    def witness(self) -> dict[str, dict[str, float]]:
        """Return, for each method, the counters that show that it acted."""
        return {m.spec.name: m.witness() for m in self.methods}

    # -- state
    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, under the names of the plain model's parameters."""
        self.settle()
        return {
            "model": self.model.state_dict(),
            "optimizers": [named_state(o, self.model) for o in self.optimizers],
            "methods": {m.spec.name: m.state_dict() for m in self.methods},
            "counters": dict(self.counters),
            "structure": self.surgery.records(),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave. Raises HastenError, before changing anything, if methods differ."""
        names = {m.spec.name for m in self.methods}
        if names != set(state["methods"]):
            raise HastenError(
                f"the state was saved with methods {sorted(state['methods'])}, this session has {sorted(names)}; "
                f"create the session with the same methods."
            )
        if len(state["optimizers"]) != len(self.optimizers):
            raise HastenError(
                f"the state holds {len(state['optimizers'])} optimizers, this session has {len(self.optimizers)}."
            )
        # the structure comes first: what was saved has its shapes
        self.surgery.replay(state.get("structure", []))
        self._check_fits(state["model"])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_named_state(optimizer, self.model, saved)
        self.counters.update(state["counters"])
        self.batch_size = state.get("batch_size")
        for method in self.methods:
            method.load_state_dict(state["methods"][method.spec.name])

    def _check_fits(self, saved: dict[str, Any]) -> None:
        """Raise CheckpointError, before anything is loaded, if ``saved`` is of another network."""
        here = {k: v.shape for k, v in self.model.state_dict().items() if isinstance(v, Tensor)}
        there = {k: v.shape for k, v in saved.items() if isinstance(v, Tensor)}
        if here == there:
            return
        wrong = sorted(
            f"{k} ({'x'.join(map(str, there[k])) or 'scalar'} saved, {'x'.join(map(str, here[k])) or 'scalar'} here)"
            for k in here.keys() & there.keys()
            if here[k] != there[k]
        )
        raise CheckpointError(
            f"the saved weights are of another network: only saved {sorted(there.keys() - here.keys())[:5]}, only here "
            f"{sorted(here.keys() - there.keys())[:5]}, other shapes {wrong[:5]}; give the network that was saved."
        )

    def export(self) -> nn.Module:
        """Return a copy of the model as plain PyTorch modules, in eval mode, which runs and loads without hasten."""
        self.settle()
        model = copy.deepcopy(self.model)
        for module in model.modules():
            uninstall(module)
        dissolve(model)
        for method in reversed(self.methods):
            method.export(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        return model.eval()

    # -- construction
    def _attach(self, allow_no_effect: bool | Collection[str]) -> None:
        # what any method asks of the session is settled first, so that attaching cannot fail halfway for it
        self._per_example = any("per_example_loss" in m.spec.requires for m in self.methods)
        self._needs_index = [m.spec.name for m in self.methods if "index" in m.spec.requires]
        for method in self.methods:
            name = method.spec.name
            if "per_example_loss" in method.spec.requires and not losses.has_reduction(self.loss):
                raise UnsupportedError(
                    f"{name} needs the loss of each sample, but the loss given returns one number: pass a loss that "
                    f'takes reduction="none", such as torch.nn.functional.cross_entropy.'
                )
            if "progress" in method.spec.requires and self.total_samples is None:
                raise UnsupportedError(
                    f"{name} follows a schedule over the run: give Session(..., total_samples=epochs * samples)."
                )
        before = planned(self.model)
        try:
            for method in self.methods:
                self.effects[method.spec.name] = self._agreed(method, allow_no_effect)
        except BaseException:
            for name in planned(self.model).keys() - before.keys():
                uninstall(self.model.get_submodule(name))
            raise
        for change in self._edits:
            change()
        if self._edits:
            self._rewrap()
        self.surgery.forget()
        check_training_state(self.model, self.optimizers)

    def _agreed(self, method: Method, allow_no_effect: bool | Collection[str]) -> Effect:
        with self.clock.span("method"):
            effect = method.attach(self)
        allowed = (
            allow_no_effect if isinstance(allow_no_effect, bool) else method.spec.name in allow_no_effect
        )
        if not effect.touched and not allowed:
            reasons = "\n".join(effect.lines()) or "  it found nothing it acts on"
            raise NoEffectError(
                f"{method.spec.name} has no effect on this model; leave it out, or give allow_no_effect=True.\n{reasons}"
            )
        return effect

    def _reshaped(self, change: Change) -> None:
        """Bring everything that hangs on the model's structure in step with a change of it."""
        self._rewrap()
        for method in self.methods:
            if overrides(method, "reshaped"):
                method.reshaped(change)

    def _rewrap(self) -> None:
        """Wrap the model anew by what was wrapped around it, which may know it by the parameters it had."""
        wrapper = self.wrapper
        if isinstance(wrapper, DistributedDataParallel):
            # newer versions of PyTorch warn when this is given at all
            buffers: dict[str, Any] = {} if wrapper.broadcast_buffers else {"broadcast_buffers": False}
            self.wrapper = DistributedDataParallel(
                self.model, device_ids=wrapper.device_ids, process_group=wrapper.process_group,
                static_graph=wrapper.static_graph, find_unused_parameters=wrapper.find_unused_parameters,
                gradient_as_bucket_view=wrapper.gradient_as_bucket_view, **buffers,
            )  # fmt: skip
        if self._wraps or self.wrapper is not wrapper:
            self._call = self.wrapper
            for around in self._wraps:
                self._call = around(self._call)

    def _collect_hooks(self) -> None:
        def having(hook: str) -> list[Method]:
            return [m for m in self.methods if overrides(m, hook)]

        self._select, self._contexts = having("select"), having("context")
        self._blend = [m for m in having("blend_loss") if "loss.blend" in m.writes]
        self._terms, self._observe = having("loss_terms"), having("observe")
        self._gradients, self._after_update = having("gradients"), having("after_update")
        # a class may have these two hooks for some of its settings only; the places it writes tell
        backward = [m for m in having("backward") if "update" in m.writes]
        update = [m for m in having("update") if "update" in m.writes]
        self._backward: Callable[[Tensor], None] = backward[0].backward if backward else Tensor.backward
        self._update: Callable[[tuple[Optimizer, ...]], None] = update[0].update if update else step_all
        self._needs_step = [m.spec.name for m in self.methods if m in self._blend or "samples" in m.writes
                            or m.spec.requires & {"per_example_loss", "index"}]  # fmt: skip
        if backward and self.clip_norm is not None:
            raise UnsupportedError(
                f"clip_norm (={self.clip_norm}) beside {backward[0].spec.name}, which scales the gradients until its own "
                f"update: leave one of them out, or use bfloat16."
            )

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Be inside the methods' contexts, each entered once."""
        if self._within:
            yield
            return
        self._within = True
        try:
            with ExitStack() as stack:
                for method in self._contexts:
                    stack.enter_context(method.context())
                yield
        finally:
            self._within = False

    # -- guards
    def _check_gradients(self) -> None:
        grads = gradients_of(self.optimizers)
        total = torch.stack(torch._foreach_norm(grads)).sum() if grads else torch.zeros(())
        # a norm can overflow though every gradient is finite, so the gradients themselves decide
        if not math.isfinite(total.item()) and not all(g.isfinite().all() for g in grads):
            self._report_non_finite(self._seen, "gradient", self.counters["step"])

    def _report_non_finite(self, batch: Batch, what: str, step: int) -> None:
        self._begun, self._ok = False, None
        if what == "loss":
            with self._inside():
                where = first_non_finite(self.model, batch.inputs)
        else:
            bad = [
                n
                for n, p in self.model.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            where = f"the gradient of {bad[0]}" if bad else "a gradient"
        raise NonFiniteError(
            f"the {what} became NaN or infinite at step {step} (0-based), first seen in {where}. "
            f"No weight was changed (running statistics may have seen this batch). Lower the "
            f"learning rate, check the data, or resume from the last checkpoint."
        )


class Unlabelled(Batch):
    """A batch of which the session knows no targets: the loop is the user's own, and so is the loss."""

    __slots__ = ()

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.index = self.weights = self.loss = None

    def __reduce__(self) -> tuple[type[Unlabelled], tuple[Tensor]]:  # a copy must not ask for the targets
        return Unlabelled, (self.inputs,)

    def cut(self, start: int, stop: int) -> Batch:
        """Return the batch of the samples from ``start`` up to ``stop``."""
        return Unlabelled(self.inputs[start:stop])

    @property
    def targets(self) -> Tensor:  # type: ignore[override]
        """Raise UnsupportedError: a method that reads targets must be given them."""
        raise UnsupportedError(
            "a method of this session reads the targets: train by session.step(inputs, targets), or leave it out."
        )


def refuse_closures(optimizers: tuple[Optimizer, ...]) -> None:
    """Raise UnsupportedError for an optimizer whose step runs the model again by a closure, as LBFGS's does."""
    for optimizer in optimizers:
        parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
        if parameter is not None and parameter.default is parameter.empty:
            raise UnsupportedError(
                f"{type(optimizer).__name__} runs the model itself, by a closure, in each of its steps; a session runs it "
                f"once a step. Use an optimizer without one, such as SGD or AdamW."
            )


def step_all(optimizers: tuple[Optimizer, ...]) -> None:
    """Step every optimizer."""
    for optimizer in optimizers:
        optimizer.step()


def void(_: object) -> None:
    """Drop a result."""
