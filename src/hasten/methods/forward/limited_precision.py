"""Limited numerical precision: fixed point with stochastic rounding, bfloat16 weights without a copy, and schedules.

Y = Convert(conv(X, W) + b, F_act)      grad_input = Convert(dY * W, F_err)      every sum is exact and rounded once
grad_weight = Convert(X * dY, F_grad)   W <- Convert(W + dW, F_w)                with stochastic rounding
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten import keyed
from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import UnsupportedError
from hasten.methods.forward import fixed_layers as fixed
from hasten.methods.forward import precision_bfloat16 as low
from hasten.methods.forward.fixed_choice import faster_products
from hasten.methods.forward.fixed_format import convert
from hasten.methods.forward.precision_schedule import FORMATS, SMALL, Policy, Watch, phase_at, policy
from hasten.methods.forward.precision_settings import settings_problems
from hasten.products import supported

if TYPE_CHECKING:
    from hasten.session import Session
    from hasten.surgery import Change

NAME = "limited_precision"


@dataclass(kw_only=True, eq=False)
class LimitedPrecision(Method):
    """Train in fewer bits: fixed point, emulated on float32, or weights in bfloat16 alone.

    policy: "fixed", "bfloat16" (weights and biases of convolutions and linear layers exist in bfloat16 only, rounded
        stochastically after an update in float32; the network runs under autocast) or "float32".
    until: share of the run after which the rest is in float32 (0.75, recommended by the specification).
    schedule: ((0, policy), (epoch, policy), ...) in the place of policy and until; a policy is one of the above or a dict
        of the settings below that differ, such as {"f_w": (2, 18)}.
    patience: in the place of until, switch to float32 once the loss has not improved for this many epochs (the
        specification recommends 3): the validation loss told by `validated`, else the training loss's mean.
    f_w, f_act, f_err, f_grad: formats (IL, FL) of weights, activations, errors and gradients. 16 bits are the paper's;
        which of them lie behind the point is quoted from memory in the specification. Errors count as those of the loss
        summed over a batch. Biases follow F_w; their gradients, sums, batch norm and the loss stay float32.
    rounding: of weights, errors and gradients ("stochastic", from the paper; "nearest" loses small updates).
    rounding_activations: "nearest" (recommended by the specification).
    scale: "fixed", or "running": errors and gradients get a power-of-two scale from a running maximum of each tensor, so
        that FL follows it and WL stays (our choice: off, as in the paper).
    decay: of the running maximum, a step (our choice).
    master: keep float32 weights and round them for the products only (our choice: off).
    kernel: "dense": products in float32. "native": words up to 16 bits on the CPU's 16-bit dot products, with exact sums.
        "auto": by a timed probe of each layer (our choice: "dense", which leaves the products to other methods).

    Fixed point is emulated: accuracy is that of the format, time and memory are worse than float32's, and no gain may be
    reported. Words of 8 bits or fewer leave the first and the last layer in float32. Evaluation computes in float32
    on the weights as they are, which is what the exported network does (our choice).
    """

    policy: str = "fixed"
    until: float = 0.75
    schedule: Any = None
    patience: int | None = None
    f_w: Any = (2, 14)
    f_act: Any = (6, 10)
    f_err: Any = (6, 10)
    f_grad: Any = (2, 14)
    rounding: str = "stochastic"
    rounding_activations: str = "nearest"
    scale: Literal["fixed", "running"] = "fixed"
    decay: float = 0.99
    master: bool = False
    kernel: Literal["dense", "native", "auto"] = "dense"

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="Limited precision and stochastic rounding",
        paper="Gupta, Agrawal, Gopalakrishnan, Narayanan, Deep Learning with Limited Numerical Precision, ICML 2015, "
        "arXiv 1502.02551",
        saves="memory",
        acts="rounds weights, activations and gradients to fixed point, or keeps weights in bfloat16 alone",
        writes=frozenset(
            {"precision", "x", "w", "grad_output", "output", "grad_input", "grad_weight", "update"}
        ),
        layers=("Conv2d", "Linear"),
        state=("phase_", "watch_", "maxima_", "counts_", "kernels_"),
        promises=frozenset({"channels_last", "ddp"}),
        slower_when="always in fixed point, which is emulated; in bfloat16 where the machine has no units for it, or the "
        "update is a large part of a step",
    )

    @property
    def writes(self) -> frozenset[str]:
        """Only the places that these settings decide."""
        places = {"precision"}
        kinds = {p.kind for p in self._policies()}
        if "fixed" in kinds:
            places |= {"x", "grad_output"} | ({"w"} if self.master else set())
            places |= set() if self.kernel == "dense" else {"output", "grad_input", "grad_weight"}
        if "bfloat16" in kinds and not self.master:
            places.add("update")
        return frozenset(places)

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        return settings_problems(self.settings(), self._policies)

    def _policies(self) -> list[Policy]:
        """Return the policies of the run's phases in order."""
        base = {name: getattr(self, name) for name in (*FORMATS, "rounding", "rounding_activations")}
        if self.schedule is not None:
            return [policy(given, base) for _, given in self.schedule]
        return [policy(self.policy, base), Policy("float32")]

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Claim the layers; have the weights rounded once every method has agreed.

        Raises UnsupportedError if ``until`` needs the length of the run and the session does not know it. Warns if
        bfloat16 would be emulated.
        """
        if self.schedule is None and self.patience is None and 0.0 < self.until < 1.0 and session.total_samples is None:  # fmt: skip
            raise UnsupportedError(
                f"{NAME} changes to float32 after {self.until:.0%} of the run: give Session(..., total_samples=epochs * "
                f"samples), or until=1.0, patience=3 or a schedule of epochs."
            )
        self._session = session
        self._phases = self._policies()
        self.phase_, self.watch_ = 0, Watch()
        self.phase_ = self._target()
        self.maxima_: dict[str, dict[str, float]] = {}
        self.kernels_: dict[str, str] = {}
        self.counts_: dict[str, int] = {"converted": 0, "updates": 0, "switches": 0, "forward_bfloat16": 0}
        self._modules: dict[str, nn.Module] = {}
        self._layers: dict[str, fixed.Layer] = {}
        if "bfloat16" in {p.kind for p in self._phases[self.phase_ :]}:
            low.warn_without_hardware(session.sample[0].device)
        self._holds = "bfloat16" in {p.kind for p in self._phases} and not self.master
        effect = self._claim(session)
        session.edit(self._begin)
        return effect

    def _claim(self, session: Session) -> Effect:
        effect = Effect(
            emulated=any(p.emulated for p in self._phases), saves="half the weights' memory" if self._holds else ""
        )  # fmt: skip
        order = [name for name in session.shapes() if isinstance(session.model.get_submodule(name), nn.Conv2d | nn.Linear)]  # fmt: skip
        self._ends = {*order[:1], *order[-1:]}
        told = "; then ".join(map(str, self._phases[self.phase_ :]))
        for name, module in session.layers(nn.Conv2d, nn.Linear):
            reason = supported(module)
            weight = cast(Tensor, module.weight)
            if reason is None and name not in order:
                reason = "the forward pass does not run it as a module"
            if reason is None and weight.dtype not in (torch.float32, low.LOW):
                reason = f"its weight is {weight.dtype}; allowed: torch.float32"
            if reason is not None:
                effect.skipped[name] = reason
                continue
            self._modules[name] = module
            note = told
            if any(p.emulated for p in self._phases):
                note += self._round_layer(session, name, module)
            effect.touched[name] = note
        return effect

    def _round_layer(self, session: Session, name: str, module: nn.Module) -> str:
        """Put a Convert at the layer's tensors, and narrow products where asked; return what to note."""
        layer = self._layers[name] = fixed.Layer(
            name, self._phases[self.phase_], self._key, lambda: session.counters["updates"], self.scale == "running",
            self.decay, maxima=self.maxima_.setdefault(name, {}),
        )  # fmt: skip
        plan = session.plan(name)
        for role in fixed.ROLES:
            if role != "w" or self.master:
                plan.transform(role, fixed.Rounding(layer, role), NAME)
        note = f" (first or last: float32 at {SMALL} bits or fewer)" if name in self._ends else ""
        if self.kernel != "dense":
            if name not in self.kernels_:
                shapes = session.shapes()[name]
                self.kernels_[name] = faster_products(self.kernel, module, shapes, self._phases)
            if self.kernels_[name] == "native":
                layer.native = True
                plan.kernel("output", fixed.NarrowOutput(layer), NAME)
                plan.kernel("grad_input", fixed.NarrowInput(layer), NAME)
                plan.kernel("grad_weight", fixed.NarrowWeight(layer), NAME)
            note += ", 16-bit products" if layer.native else ", products in float32"
        return note

    def _begin(self) -> None:
        """Bring the weights into the first phase's format."""
        if self._holds:
            for optimizer in self._session.optimizers:
                low.keep_state_dtype(optimizer)
        if "bfloat16" in {p.kind for p in self._phases}:
            self._session.wrap(low.with_float32_outputs)
        self._enter()

    def reshaped(self, change: Change) -> None:
        """Claim the layers there are now, and round what is new in them."""
        self._collect()
        present = dict(self._session.model.named_modules())
        for name in self._layers.keys() & present.keys():
            self._session.plan(name).release(NAME)
        self.maxima_ = {name: kept for name, kept in self.maxima_.items() if name in present}
        self._modules, self._layers = {}, {}
        self._session.effects[NAME] = self._claim(self._session)
        self._enter()

    # -- phases
    def _target(self) -> int:
        """Return the phase that the run should be in."""
        session = self._session
        if self.schedule is not None:
            return phase_at([epoch for epoch, _ in self.schedule], session.counters["epoch"])
        if self.patience is not None:
            return max(self.phase_, int(self.watch_.stale >= self.patience))
        if self.until in (0.0, 1.0):
            return int(self.until == 0.0)
        return int(session.progress >= self.until)

    def _follow(self) -> None:
        if (target := self._target()) != self.phase_:
            self.phase_ = target
            self.counts_["switches"] += 1
            self._enter()

    def _enter(self) -> None:
        """Bring layers and weights into the present phase. Going up changes no value, going down rounds stochastically."""
        self._activate()
        if self._holds:
            down = self._phases[self.phase_].kind == "bfloat16"
            low.change(self._session.model, set(self._modules.values()), down,
                       lambda name: self._key(name, "weight", -1 - self.phase_))  # fmt: skip
        self._round_weights("stochastic", -1 - self.phase_)

    def _activate(self) -> None:
        now = self._phases[self.phase_]
        for name, layer in self._layers.items():
            layer.policy = now
            self._session.plan(name).activate(NAME, self._rounds(name, now))

    def _rounds(self, name: str, now: Policy) -> bool:
        return now.emulated and not (now.shortest <= SMALL and name in self._ends)

    @torch.no_grad()
    def _round_weights(self, rounding: str, call: int) -> None:
        """Put weights and biases on the grid of F_w, where the phase has one."""
        now = self._phases[self.phase_]
        if not now.emulated or self.master:
            return
        for name in self._layers:
            if not self._rounds(name, now):
                continue
            for role, p in self._modules[name].named_parameters(recurse=False):
                y, saturated, largest = convert(p, now.f_w, self._key(name, role, call), rounding)
                p.copy_(y)
                self._layers[name].see("w", p.numel(), saturated, largest)

    def _key(self, layer: str, role: str, call: int) -> int:
        return keyed.key64(self._session.seed, NAME, layer, role, self._session.counters["updates"], call)

    # -- in the step
    def start_epoch(self, epoch: int) -> None:
        """Look at the loss of the epoch before, if patience decides, and follow the schedule."""
        if self.patience is not None:
            self.watch_.end_epoch()
        self._follow()

    def validated(self, loss: float) -> None:
        """Be told the validation loss of this epoch, which `patience` then watches."""
        self.watch_.told = float(loss)

    def select(self, batch: Batch) -> Batch:
        """Follow the schedule; the batch passes unchanged."""
        self._follow()
        return batch

    def context(self) -> AbstractContextManager[Any]:
        """Return autocast in a phase of bfloat16."""
        if self._phases[self.phase_].kind != "bfloat16":
            return nullcontext()
        self.counts_["forward_bfloat16"] += 1
        return torch.autocast(self._session.sample[0].device.type, low.LOW)

    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Take the loss into the epoch's mean, if patience decides."""
        if self.patience is not None and batch.loss is not None:
            self.watch_.see(float(batch.loss))

    def update(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Step the optimizers; weights in bfloat16 get a stochastically rounded update in float32."""
        if self._phases[self.phase_].kind != "bfloat16":
            for optimizer in optimizers:
                optimizer.step()
            return
        names = {p: name for name, p in self._session.model.named_parameters() if p.dtype == low.LOW}
        self.counts_["converted"] += low.step_in_float32(
            optimizers, names, lambda name: self._key(name, "weight", 0)
        )

    def after_update(self) -> None:
        """Round the weights to their grid."""
        now = self._phases[self.phase_]
        self.counts_["updates"] += now.kind != "float32"
        self._round_weights(now.rounding, 0)

    def export(self, model: nn.Module) -> None:
        """Give the exported copy plain layers with float32 weights, of the same values."""
        for module in model.modules():
            low.let_go(module)

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return numbers converted, updates in low precision, switches, and numbers that saturated, by kind."""
        self._collect()
        return dict(self.counts_)

    def _collect(self) -> None:
        for layer in self._layers.values():
            self.counts_["converted"] += layer.converted
            for kind, count in layer.counts.items():
                key = f"{kind} saturated"
                self.counts_[key] = self.counts_.get(key, 0) + int(count)
            layer.converted, layer.counts = 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule, what patience has seen, running maxima, counters and chosen kernels."""
        self._collect()
        return {
            "phase_": self.phase_, "watch_": dict(vars(self.watch_)), "counts_": dict(self.counts_),
            "maxima_": {name: dict(kept) for name, kept in self.maxima_.items()}, "kernels_": dict(self.kernels_),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave. The weights came with the model, in the dtype they had."""
        for layer in self._layers.values():
            layer.converted, layer.counts = 0, {}
        self.phase_, self.watch_ = int(state["phase_"]), Watch(**state["watch_"])
        self.counts_ = dict(state["counts_"])
        self.maxima_ = {name: dict(kept) for name, kept in state["maxima_"].items()}
        if dict(state["kernels_"]) != self.kernels_:
            self.kernels_ = dict(state["kernels_"])
            for name in self._layers:
                self._session.plan(name).release(NAME)
                self._round_layer(self._session, name, self._modules[name])
        for name, layer in self._layers.items():
            layer.maxima = self.maxima_.setdefault(name, {})
        self._activate()
