"""Gradient approximation: the weight gradients of some convolutions replaced by something cheap, on some steps.

grad_weight[o] = sum_n t[n,o] * patch(x[n], q[n,o])     t: sum of the map grad_output[n,o]
                                                        q: place of its largest magnitude
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hasten import keyed
from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import UnsupportedError
from hasten.kernels.one_patch import POSITIONS, WEIGHTS
from hasten.measure.macs import macs
from hasten.methods.products.approximated_layers import (
    Candidate,
    candidates,
    operand_dtype,
    patch_is_faster,
)
from hasten.methods.products.approximated_weight import NoWeightGradient, PatchGradient
from hasten.products import Plan

if TYPE_CHECKING:
    from hasten.session import Session
from hasten.surgery import Change

NAME = "gradient_approximation"
SLOWER = "a timed probe finds its one-patch gradient no faster than the exact one here"
ADAPTIVE = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam", "RMSprop", "Adagrad", "Adadelta")
ALARM, ALARM_AFTER = 0.05, 50  # of the mean cosine, over so many measured steps
Phase = Literal["exact", "approximate", "measure"]


@dataclass(kw_only=True, eq=False)
class GradientApproximation(Method):
    """Replace the weight gradient of some convolutions on some steps. Output and grad_input stay exact bit for bit.

    The bias gradient is the exact sum, to the order of its terms. Use it with SGD: the noisy gradients spoil the second moments
    that Adam and its kin keep, which is warned of.

    method: "patch" multiplies, for each image n and output channel o, one patch of x by the sum of the map
        grad_output[n,o] (the paper's approximated gradient; its formula is reconstructed, so the variants are settings);
        "zero" leaves the gradient 0, "random" draws it from N(0, sigma**2) with sigma the running root mean square of
        the layer's exact gradient (the paper's two others; our choice: the scale of the noise).
    layers: "alternate" takes every second convolution of 2x2 or larger, in the order of the forward pass (from the
        paper; our choice: those with odd numbers, in a basic block one of its two), or patterns such as
        ("layer3.*",). The first convolution, 1x1 kernels and maps of fewer than 16 places stay exact (our choice).
    period: approximate in the last of every so many updates: 2 alternates, 1 approximates always (our choice: 2).
    exact_epochs: epochs at the start that stay exact (our choice: 1), as ``session.start_epoch`` counts them.
    stop_fraction: share of the run after which every step is exact (our choice: 0.8; 1.0 needs no ``total_samples``).
    position: place of the patch: "argmax_abs", "argmax", or "fixed", place (1, 1), which trains badly (our choice: the
        first).
    weight: what the patch is multiplied by: the "sum" of the map or its "max_value" (our choice: the sum).
    rescale: multiply the patch gradient by the running ratio of both norms, exact over patch (our choice: off, as in the
        paper; recommended on with period 2).
    decay: of the running ratio and the running mean square (our choice: 0.9).
    measure_every: updates between two exact steps that also measure: the cosine of both gradients and the ratio
        ("patch"), or the mean square ("random"). Our choice: 50; with period 1 such a step is exact for it. 0: never.
    freeze_on_zero: with "zero", leave these weights out of the update; otherwise momentum and weight decay still move
        them (our choice: off).
    kernel: "auto" leaves a layer exact where its patch gradient is no faster, by a timed probe; "native" does not ask.
    """

    method: Literal["zero", "random", "patch"] = "patch"
    layers: str | tuple[str, ...] = "alternate"
    period: int = 2
    exact_epochs: int = 1
    stop_fraction: float = 0.8
    position: Literal["argmax_abs", "argmax", "fixed"] = "argmax_abs"
    weight: Literal["sum", "max_value"] = "sum"
    rescale: bool = False
    decay: float = 0.9
    measure_every: int = 50
    freeze_on_zero: bool = False
    kernel: Literal["auto", "native"] = "auto"

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="Gradient approximation",
        paper="Wang, Nelaturu, Amarasinghe, Accelerated CNN Training Through Gradient Approximation, EMC2 2019, "
        "arXiv 1908.05460",
        saves="time per step",
        acts="replaces the weight gradient of every second convolution by one patch of its input for each map",
        writes=frozenset({"grad_weight"}),
        layers=("Conv2d",),
        state=("counts_", "mean_square_", "ratio_", "cosines_", "measured_at_", "exact_"),
        slower_when="the native kernels are not built and kernel='native' forces it: in plain torch the patches of a narrow "
        "layer take several times as long as its exact gradient",
    )

    @property
    def writes(self) -> frozenset[str]:
        """The products, and the gradients where noise is put into them or they are withheld."""
        return self.spec.writes | ({"gradients"} if self._changes_gradients else set())

    @property
    def reads(self) -> frozenset[str]:
        """Gradients that are withheld are withheld last, after whoever else needs them."""
        return frozenset({"gradients"} if self.method == "zero" and self.freeze_on_zero else ())

    @property
    def _changes_gradients(self) -> bool:
        return self.method == "random" or (self.method == "zero" and self.freeze_on_zero)

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        found = []
        allowed = {"method": ("zero", "random", "patch"), "position": POSITIONS, "weight": WEIGHTS,
                   "kernel": ("auto", "native")}  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                found.append(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}.")
        if self.layers != "alternate" and not (
            isinstance(self.layers, tuple) and self.layers and all(isinstance(p, str) for p in self.layers)
        ):
            found.append(
                f"layers must be 'alternate' or a tuple of patterns such as ('layer3.*',), not {self.layers!r}."
            )
        for name, low in (("period", 1), ("exact_epochs", 0), ("measure_every", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, int) and value >= low):
                found.append(f"{name} must be a whole number from {low}, not {value!r}.")
        if not 0.0 < self.stop_fraction <= 1.0:
            found.append(f"stop_fraction must lie in (0, 1], not {self.stop_fraction}.")
        if not 0.0 <= self.decay < 1.0:
            found.append(f"decay must lie in [0, 1), not {self.decay}.")
        if self.rescale and self.method != "patch":
            found.append(
                f"rescale=True belongs to method='patch', not {self.method!r}, which has a scale of its own."
            )
        if self.freeze_on_zero and self.method != "zero":
            found.append(f"freeze_on_zero=True belongs to method='zero', not {self.method!r}.")
        if self.measure_every == 0 and (self.rescale or self.method == "random"):
            found.append("measure_every=0 leaves rescale and method='random' without a scale; set it to 50.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Claim the weight gradient of the chosen layers.

        Raises SettingsError for a layer named in ``layers`` for which no approximation is defined, UnsupportedError if
        the schedule needs ``total_samples``, ConflictError where another method has the place.
        """
        if self.stop_fraction < 1.0 and session.total_samples is None:
            raise UnsupportedError(
                f"{NAME} acts up to {self.stop_fraction:.0%} of the run: give Session(..., total_samples=epochs * samples), "
                f"or set stop_fraction=1.0."
            )
        bad = sorted({type(o).__name__ for o in session.optimizers} & {*ADAPTIVE})
        if bad:
            warnings.warn(
                f"{NAME} feeds {', '.join(bad)} gradients that are noisy and biased, which spoil its running squares; use SGD.",
                stacklevel=2,
            )
        self._session = session
        self.counts_ = {"steps": 0, "products_approximated": 0, "measured": 0}
        self.mean_square_: dict[str, float] = {}
        self.ratio_: dict[str, float] = {}
        self.cosines_: list[float] = []
        self.measured_at_: int | None = None
        self.exact_: list[str] = []  # layers that a probe has left exact
        self._plans: dict[str, Plan] = {}
        self._pieces: dict[str, NoWeightGradient | PatchGradient] = {}
        dtype = operand_dtype(session, next(session.model.parameters()))
        last = any("layout" in m.writes for m in session.methods)
        layout = torch.channels_last if last else torch.contiguous_format
        self._faster: Callable[[Candidate], bool] = lambda c: patch_is_faster(
            c, dtype, layout, self.position, self.weight
        )
        return self._claim_layers(probe=self.kernel == "auto" and self.method == "patch")

    def reshaped(self, change: Change) -> None:
        """Claim the layers anew, with the shapes they have now; what was measured stays, by name."""
        self._session.effects[NAME] = self._claim_layers(
            probe=self.kernel == "auto" and self.method == "patch"
        )

    def _claim_layers(self, *, probe: bool) -> Effect:
        """Claim the chosen layers but those in ``exact_``, which a ``probe`` finds anew."""
        session = self._session
        if self._plans:
            self._collect()
        for plan in self._plans.values():
            plan.release(NAME)
        self._plans, self._pieces = {}, {}
        chosen, skipped = candidates(session, self.layers, NAME)
        if probe:
            self.exact_ = [c.name for c in chosen if not self._faster(c)]
        effect = Effect(saves="arithmetic of grad_weight", skipped=skipped)
        effect.skipped |= {c.name: SLOWER for c in chosen if c.name in self.exact_}
        chosen = [c for c in chosen if c.name not in self.exact_]
        device = session.sample[0].device
        self._sums = torch.zeros(len(chosen), 3, device=device)
        self._scales = torch.ones(len(chosen), device=device)
        for row, candidate in enumerate(chosen):
            name = candidate.name
            scale = self._scales[row] if self.rescale else None
            self._pieces[name] = (
                PatchGradient(self.position, self.weight, self._sums[row], scale)
                if self.method == "patch"
                else NoWeightGradient()
            )
            self._plans[name] = session.plan(name)
            self._plans[name].kernel("grad_weight", self._pieces[name], NAME)
            effect.touched[name] = f"{self.method} gradient in one of {self.period} steps"
        if chosen:
            count = macs(session.model, session.sample[0][:1]).layers
            saved = sum(count[c.name].grad_weight * self._saved(c) for c in chosen)
            total = sum(layer.training for layer in count.values())
            effect.work = 1.0 - self.stop_fraction / self.period * saved / total
        self._turn(self._due())
        return effect

    def _saved(self, candidate: Candidate) -> float:
        return 1.0 - 1.0 / math.prod(candidate.y[2:]) if self.method == "patch" else 1.0

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Turn the approximation on or off for this step, as the schedule says; the batch passes unchanged."""
        self._turn(self._due())
        return batch

    def _due(self) -> Phase:
        """Return what this step does. Updates are counted, not steps, for a batch may be left out before it trains."""
        counters, update = self._session.counters, self._session.counters["updates"]
        if self.stop_fraction < 1.0 and self._session.progress > self.stop_fraction:
            return "exact"
        acts = counters["epoch"] >= self.exact_epochs and update % self.period == self.period - 1
        measures = self.method != "zero" and self.measure_every > 0
        due = measures and (self.measured_at_ is None or update - self.measured_at_ >= self.measure_every)
        if measures and ((acts and self._lacks_scale()) or (due and (not acts or self.period == 1))):
            return "measure"
        return "approximate" if acts else "exact"

    def _lacks_scale(self) -> bool:
        known = self.mean_square_ if self.method == "random" else self.ratio_ if self.rescale else None
        return known is not None and any(name not in known for name in self._plans)

    def _turn(self, phase: Phase) -> None:
        self._phase = phase
        on = phase == "approximate" or (phase == "measure" and self.method == "patch")
        for name, plan in self._plans.items():
            plan.activate(NAME, on)
            piece = self._pieces[name]
            if isinstance(piece, PatchGradient):
                piece.measuring = phase == "measure"
        if phase == "measure":
            self._sums.zero_()
        elif self.rescale:
            self._scales.copy_(torch.tensor([self.ratio_.get(name, 1.0) for name in self._plans]))

    def gradients(self) -> None:
        """Count the step; take what a measured one tells; put noise into gradients, or withhold them."""
        self.counts_["steps"] += self._phase == "approximate"
        if self._phase == "measure":
            self._measure()
        elif self._phase == "approximate" and self._changes_gradients:
            for name in self._plans:
                weight = self._weight(name)
                if weight.grad is None:
                    continue
                if self.method == "zero":
                    weight.grad = None
                else:
                    weight.grad.add_(self._noise(name, weight))

    def _noise(self, name: str, weight: Tensor) -> Tensor:
        update, sigma = self._session.counters["updates"], math.sqrt(self.mean_square_[name])
        generator = keyed.generator(self._session.seed, NAME, name, update, device=weight.device)
        noise = torch.empty_like(weight, requires_grad=False)
        # in the order of memory, for PyTorch draws 18 times slower into channels_last
        noise.as_strided((noise.numel(),), (1,)).normal_(0.0, sigma, generator=generator)
        return noise

    def _weight(self, name: str) -> Tensor:
        weight = self._session.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def _measure(self) -> None:
        self.measured_at_ = self._session.counters["updates"]
        self.counts_["measured"] += 1
        if self.method == "random":
            for name in self._plans:
                grad = self._weight(name).grad
                self._follow(self.mean_square_, name, 0.0 if grad is None else float(grad.square().mean()))
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)  # so that all ranks keep the same scales
        cosines = []
        for name, (dot, exact, patch) in zip(self._plans, self._sums.tolist(), strict=True):
            if exact > 0 and patch > 0 and math.isfinite(exact + patch):
                cosines.append(dot / math.sqrt(exact * patch))
                self._follow(self.ratio_, name, math.sqrt(exact / patch))
            else:
                self.ratio_.setdefault(name, 1.0)
        if cosines:
            self.cosines_ = [*self.cosines_, sum(cosines) / len(cosines)][-ALARM_AFTER:]
            self._alarm()

    def _follow(self, running: dict[str, float], name: str, value: float) -> None:
        running[name] = self.decay * running.get(name, value) + (1 - self.decay) * value

    def _alarm(self) -> None:
        mean = sum(self.cosines_) / len(self.cosines_)
        if len(self.cosines_) == ALARM_AFTER and mean < ALARM:
            warnings.warn(
                f"{NAME}: over {ALARM_AFTER} measured steps the patch gradients had a mean cosine of {mean:.3f} with the "
                f"exact ones, below {ALARM}: they hardly point down. Use fewer layers, a longer period, or leave it out.",
                stacklevel=2,
            )

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return the steps and (not under torch.compile) products approximated, steps measured, and the last cosine's mean over layers."""
        self._collect()
        return {**self.counts_, **({"cosine": self.cosines_[-1]} if self.cosines_ else {})}

    def _collect(self) -> None:
        for piece in self._pieces.values():
            self.counts_["products_approximated"] += piece.calls
            piece.calls = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, what was measured, and the layers left exact."""
        self._collect()
        return {name: getattr(self, name) for name in self.spec.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; the layers that the run left exact stay so, whatever a probe finds today."""
        super().load_state_dict(state)
        self._session.effects[NAME] = self._claim_layers(probe=False)
