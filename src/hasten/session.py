"""One training run: a plain model, plain optimizers and a list of methods, driven by the caller's own loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hasten import loss as losses
from hasten.contract import Batch, Effect, Method, overrides
from hasten.diagnose import first_non_finite, layer_shapes
from hasten.errors import CheckpointError, HastenError, NoEffectError, NonFiniteError, UnsupportedError
from hasten.measure.clock import Clock
from hasten.optim.named import load_named_state, named_state
from hasten.places import ordered
from hasten.products import Plan, install, planned, uninstall
from hasten.surgery import Change, Surgeon, check_training_state, replace_module
from hasten.surgery.gates import dissolve


class Session:
    """Applies ``methods`` to the training of ``model`` by ``optimizer``.

    model: an ``nn.Module``, or one wrapped in DistributedDataParallel. optimizer: one optimizer or several that
    together hold every trainable parameter once. sample: one batch ``(inputs, targets)`` as training will see it, for
    shapes only. loss: ``loss(outputs, targets)`` -> scalar; methods that weigh or choose samples need it to take
    ``reduction="none"`` as PyTorch's do. total_samples: samples the whole run will stream, which methods with a
    schedule need. seed: key of all randomness of the methods.

    ``batch_size`` is what a method wants from the next epoch on: load batches of that size, at the scheduled learning
    rate times their growth; None while no method has asked. ``fit`` does so.

    Raises ConflictError if two methods claim one place, NoEffectError if a method would change nothing (unless
    ``allow_no_effect``), UnsupportedError if one cannot work here. Nothing is changed before all have agreed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        methods: Sequence[Method] = (),
        *,
        sample: tuple[Tensor, Tensor],
        loss: losses.Loss | None = None,
        seed: int = 0,
        total_samples: int | None = None,
        allow_no_effect: bool = False,
        check_gradients: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.wrapper = model
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.forward: Callable[[Tensor], Tensor] = model
        self.optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        self.sample, self.seed, self.total_samples = sample, seed, total_samples
        self.loss = loss if loss is not None else losses.cross_entropy()
        self.check_gradients = check_gradients
        self.clock = clock if clock is not None else Clock(enabled=False)
        self.counters = {"step": 0, "epoch": 0, "streamed": 0, "forward": 0, "backward": 0, "updates": 0}
        self.effects: dict[str, Effect] = {}
        self.methods = [copy.copy(m) for m in ordered(methods)]
        self._edits: list[Callable[[], None]] = []
        self._wraps: list[Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = []
        self.on_restart: list[Callable[[], None]] = []

        check_training_state(self.model, self.optimizers)
        self.batch_size: int | None = None
        self.surgery = Surgeon(self.model, self.optimizers, sample[0])
        self._attach(allow_no_effect)
        self._collect_hooks()
        self.surgery.followers.append(self._reshaped)
        self.model.train()

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
        self.forward = around(self.forward)

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
        if self._select:
            with clock.span("method"):
                for method in self._select:
                    batch = method.select(batch)
        loss = self._train_on(batch)
        self.counters["step"] += 1
        return loss

    def _train_on(self, batch: Batch) -> Tensor:
        clock, counters = self.clock, self.counters
        if not len(batch.inputs):
            return batch.loss if batch.loss is not None else torch.zeros(())
        counters["forward"] += len(batch.inputs)
        with clock.span("forward"):
            if self._contexts:
                with self._inside():
                    loss = self._forward_loss(batch)
            else:
                loss = self._forward_loss(batch)
            if not math.isfinite(loss.item()):
                self._report_non_finite(batch, "loss")
        with clock.span("backward"):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self._backward(loss)
        counters["backward"] += len(batch.inputs)
        if self.check_gradients:
            self._check_gradients(batch)
        if self._gradients:
            with clock.span("method"):
                for method in self._gradients:
                    method.gradients()
        with clock.span("optimizer"):
            self._update(self.optimizers)
        counters["updates"] += 1
        if self._after_update:
            with clock.span("method"):
                for method in self._after_update:
                    method.after_update()
        return loss.detach()

    def _forward_loss(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)
        each = None
        if batch.weights is not None:
            each = self.loss(outputs, batch.targets, reduction="none")
            loss = losses.weighted_mean(each, batch.weights)
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
        for method in self._terms:
            loss = loss + method.loss_terms()
        if self._observe:
            seen = None if each is None else each.detach()
            with self.clock.span("method"):
                for method in self._observe:
                    method.observe(batch, outputs.detach(), seen)
        return loss

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
                yield self.forward
        finally:
            for module, training in modes:  # not model.train(): a module frozen in eval mode stays so
                module.training = training

    def witness(self) -> dict[str, dict[str, float]]:
        """Return, for each method, the counters that show that it acted."""
        return {m.spec.name: m.witness() for m in self.methods}

    # -- state
    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, under the names of the plain model's parameters."""
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
    def _attach(self, allow_no_effect: bool) -> None:
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

    def _agreed(self, method: Method, allow_no_effect: bool) -> Effect:
        with self.clock.span("method"):
            effect = method.attach(self)
        if not effect.touched and not allow_no_effect:
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
            self.forward = self.wrapper
            for around in self._wraps:
                self.forward = around(self.forward)

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

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with ExitStack() as stack:
            for method in self._contexts:
                stack.enter_context(method.context())
            yield

    # -- guards
    def _check_gradients(self, batch: Batch) -> None:
        grads = [
            p.grad for o in self.optimizers for g in o.param_groups for p in g["params"] if p.grad is not None
        ]
        total = torch.stack(torch._foreach_norm(grads)).sum() if grads else torch.zeros(())
        # a norm can overflow though every gradient is finite, so the gradients themselves decide
        if not math.isfinite(total.item()) and not all(g.isfinite().all() for g in grads):
            self._report_non_finite(batch, "gradient")

    def _report_non_finite(self, batch: Batch, what: str) -> None:
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
            f"the {what} became NaN or infinite at step {self.counters['step']} (0-based), first seen in {where}. "
            f"No weight was changed (running statistics may have seen this batch). Lower the "
            f"learning rate, check the data, or resume from the last checkpoint."
        )


def step_all(optimizers: tuple[Optimizer, ...]) -> None:
    """Step every optimizer."""
    for optimizer in optimizers:
        optimizer.step()


def void(_: object) -> None:
    """Drop a result."""
