"""Stochastic pruning of activation gradients: small ones become 0 or +-tau at random, and the products skip the zeros."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch.distributed
from torch import nn

from hasten import keyed
from hasten.contract import Effect, Method, MethodSpec
from hasten.errors import SettingsError, UnsupportedError
from hasten.kernels.native import extension
from hasten.methods.products.gradient_pieces import FEWEST, Gauge, Pruner, SkipInput, SkipWeight
from hasten.methods.products.gradient_sites import Site, find_sites
from hasten.methods.products.gradient_threshold import expected_density
from hasten.products import supported

if TYPE_CHECKING:
    from hasten.session import Session
from hasten.surgery import Change

NAME = "activation_gradient_pruning"


@dataclass(kw_only=True, eq=False)
class ActivationGradientPruning(Method):
    """Prune the gradients of activations at random, unbiased, and multiply only what is left.

    An element g with |g| < tau becomes sign(g) * tau with probability |g| / tau, else 0. Where batch norm follows a layer,
    its grad_output is pruned, for both products; where ReLU follows, its grad_input. Skip paths and the classifier are
    left alone. The forward pass is exact.

    p: target share of elements with |g| < tau; not the sparsity, which is less (from the paper: 0.7 to 0.99; our default
        0.9: 46% non-zeros on normal data). 0 prunes nothing, so that only the zeros ReLU leaves are skipped, exactly.
    n_f: N_F, the thresholds whose mean predicts the next one (the paper's value is not known to us; our choice: 4). The
        first n_f batches are not pruned. 0 computes the batch's own in a pass of its own.
    dist: "normal" takes tau from the mean magnitude of normal gradients (from the paper), "empirical" from the p-quantile
        of 4096 of them (our choice), which holds for heavy tails too.
    unit: "element" is the paper's. "strip" (16 neighbouring channels of a pixel) and "map" (a channel of a sample) are the
        block variant, not the paper's: blocks become 0 or are scaled to norm tau as wholes (our choice).
    kernel: "auto" takes, for each layer, product and density, the faster of the zero-skipping and the dense product, by a
        timed probe; "native" and "dense" force one. On a GPU all products are dense: nothing is saved there.
    shared: allow layers that one pass runs more than once; each run then counts as a batch of its own.
    layers: patterns of the layers to act on, such as "features.*"; empty means all. skip: patterns of layers to leave.
    """

    p: float = 0.9
    n_f: int = 4
    dist: Literal["normal", "empirical"] = "normal"
    unit: Literal["element", "strip", "map"] = "element"
    kernel: Literal["auto", "native", "dense"] = "auto"
    shared: bool = False
    layers: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="Stochastic pruning of activation gradients",
        paper="Ye, Dai, Luo, Guo, Qi, Yang, Chen, Accelerating CNN Training by Pruning Activation Gradients, ECCV 2020, "
        "arXiv 1908.00173; zero-skipping products after Gong et al., SparseTrain, arXiv 1911.10175",
        saves="time per step",
        acts="sets small activation gradients to 0 or +-tau at random and skips the zeros in grad_input and grad_weight",
        writes=frozenset({"grad_output", "grad_input", "grad_weight"}),
        excludes=frozenset({"graph"}),
        excludes_reason="it follows each batch's threshold in Python, which a compiled graph cannot.",
        layers=("Conv2d", "Linear"),
        state=("fifo_", "counts_", "choices_", "density_", "taken_"),
        promises=frozenset({"autocast", "channels_last", "ddp"}),
        slower_when="the products are dense (kernel='dense', a GPU, no compiler), or bfloat16 products meet gradients with "
        "more than about a tenth non-zeros, as batch norm leaves them",
    )

    @property
    def writes(self) -> frozenset[str]:
        """Only what these settings change."""
        return self.spec.writes if self.kernel != "dense" else frozenset({"grad_output"})

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        found = []
        if not (isinstance(self.p, int | float) and 0.0 <= self.p < 1.0):
            found.append(f"p must lie in [0, 1), not {self.p!r}: p=1 would need an infinite threshold.")
        if not (isinstance(self.n_f, int) and not isinstance(self.n_f, bool) and self.n_f >= 0):
            found.append(f"n_f must be a whole number from 0, not {self.n_f!r}.")
        for name, allowed in (
            ("dist", ("normal", "empirical")), ("unit", ("element", "strip", "map")), ("kernel", ("auto", "native", "dense")),
            ("shared", (False, True)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                found.append(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}.")
        for name in ("layers", "skip"):
            value = getattr(self, name)
            if not (isinstance(value, tuple) and all(isinstance(v, str) for v in value)):
                found.append(f"{name} must be a tuple of patterns such as ('layer3.*',), not {value!r}.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Claim gradients and products of every layer that batch norm or ReLU follows.

        Raises UnsupportedError for kernel="native" where it cannot run, SettingsError for a layer that one pass runs more
        than once without ``shared``, ConflictError where another method has a product's kernel.
        """
        self._session = session
        device = session.sample[0].device.type
        native = device == "cpu" and extension() is not None
        if self.kernel == "native" and not native:
            why = "they are not built" if device == "cpu" else f"there are none for {device!r}"
            raise UnsupportedError(
                f"{NAME}: kernel='native' asks for hasten's native products, but {why}; allowed here: 'auto' or 'dense'."
            )
        self._native = native and self.kernel != "dense"
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if distributed else 0
        self.fifo_: dict[str, list[float]] = {}
        self.counts_: dict[str, list[float]] = {}
        self.choices_: dict[str, str] = {}
        self.density_: dict[str, list[float]] = {}
        self.taken_ = {"grad_input": 0, "grad_weight": 0}
        if any("normalization" in m.writes for m in session.methods):
            # twice deferred: another method may take batch norm out once all have agreed, which changes what follows a layer
            session.edit(lambda: session.edit(self._claim_anew))
        return self._claim(session)

    def _claim_anew(self) -> None:
        """Claim the layers of the network as it is now, in the effect that was reported."""
        self._collect()
        for plan in self._plans.values():
            plan.release(NAME)
        self._session.effects[NAME] = self._claim(self._session)

    def reshaped(self, change: Change) -> None:
        """Claim the layers anew; thresholds go on where a layer still is."""
        self._claim_anew()
        self.fifo_ = {layer: past for layer, past in self.fifo_.items() if layer in self._plans}
        self.density_ = {}

    def _claim(self, session: Session) -> Effect:
        self._plans: dict[str, Any] = {}
        self._pruners: list[Pruner] = []
        self._gauges: list[Gauge] = []
        effect = Effect(
            saves="arithmetic of grad_input and grad_weight"
            if self._native
            else "nothing: products are dense"
        )
        sites = find_sites(session.model, session.sample[0])
        for name, module in session.layers(nn.Conv2d, nn.Linear):
            site = sites.get(name)
            reason = self._left_out(name, module, site)
            if reason is not None or site is None:
                effect.skipped[name] = reason or ""
                continue
            notes = self._claim_layer(session, name, module, site)
            if notes:
                effect.touched[name] = ", ".join(notes)
            else:
                effect.skipped[name] = "its input has no gradient to prune, and its products are dense"
        return effect

    def _left_out(self, name: str, module: nn.Module, site: Site | None) -> str | None:
        """Return why a layer stays as it is, or None. Raises SettingsError for one that runs twice without ``shared``."""
        if self.layers and not any(fnmatchcase(name, pattern) for pattern in self.layers):
            return "it is not among the layers given"
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return "it is among those to skip"
        if why := supported(module):
            return why
        if site is None:
            return "the forward pass does not run it as a module"
        if not site.after:
            return "neither batch norm nor ReLU follows it"
        if not any(p.requires_grad for p in module.parameters()) and not site.input_needs_gradient:
            return "it needs no gradient"
        if site.calls > 1 and not self.shared:
            raise SettingsError(
                f"{NAME}: a forward pass runs layer {name!r} {site.calls} times, whose gradients would share one threshold; "
                f"give shared=True to allow that, or skip=({name!r},) to leave it out."
            )
        pruned = site.output if site.after == "bn" else site.x
        if pruned.numel() < FEWEST:
            return f"its gradient has {pruned.numel()} elements, fewer than {FEWEST}"
        return None

    def _claim_layer(self, session: Session, name: str, module: nn.Module, site: Site) -> list[str]:
        """Put the pieces into a layer's plan; return what they do."""
        notes = []
        plan = self._plans[name] = session.plan(name)
        pruner = Pruner(self, name)
        if site.after == "bn" or site.input_needs_gradient:
            tensor = "grad_output" if site.after == "bn" else "grad_input"
            plan.transform(tensor, pruner, NAME)
            self._pruners.append(pruner)
            leaves = (
                f"{expected_density(self.p):.0%} of a normal one stays"
                if self.p > 0
                else "p=0: it passes unchanged"
            )
            notes.append(f"prunes {tensor} ({leaves})")
        grouped = getattr(module, "groups", 1) != 1
        # with nothing pruned, what batch norm makes dense stays dense
        if self._native and not grouped and (self.p > 0 or site.after == "relu" or self.kernel == "native"):
            gauge = Gauge(self, name)
            self._gauges.append(gauge)
            if site.input_needs_gradient:
                plan.kernel("grad_input", SkipInput(gauge), NAME)
            if module.weight.requires_grad:
                plan.kernel("grad_weight", SkipWeight(gauge), NAME)
            notes.append("skips zeros" if self.kernel == "native" else "skips zeros where that is faster")
        elif not notes:
            plan.release(NAME)
            del self._plans[name]
        return notes

    # -- what the pieces ask
    def updates(self) -> int:
        """Return how many updates there have been: the clock of this method."""
        return self._session.counters["updates"]

    def seed(self) -> int:
        """Return the session's seed."""
        return self._session.seed

    def key(self, *parts: keyed.Key) -> int:
        """Return the key of some noise."""
        return keyed.key64(self._session.seed, NAME, *parts)

    # -- in the step
    def after_update(self) -> None:
        """Let go of the gradients of the step."""
        for pruner in self._pruners:
            pruner.forget()

    # -- evidence and state
    def densities(self) -> dict[str, dict[str, float]]:
        """Return, by pruned layer, shares of the elements seen: zero before, set to 0, raised to +-tau, and not zero after.

        For layers whose products choose their kernel, "grad_output" is the share of non-zeros that the products last met.
        """
        found: dict[str, dict[str, float]] = {}
        for layer, (_, n, zeros, pruned, raised) in self.counts_.items():
            found[layer] = {
                "natural_zeros": zeros / n, "pruned_zeros": pruned / n, "raised": raised / n,
                "density": 1 - (zeros + pruned) / n,
            }  # fmt: skip
        for layer, (share, _) in self.density_.items():
            found.setdefault(layer, {})["grad_output"] = share
        return found

    def witness(self) -> dict[str, float]:
        """Return gradients pruned, elements that were zero, set to zero and raised, and products that skipped zeros."""
        self._collect()
        sums = [sum(counts[i] for counts in self.counts_.values()) for i in range(5)]
        names = ("gradients pruned", "elements", "natural zeros", "pruned zeros", "raised")
        taken = {f"{product} skipping zeros": float(n) for product, n in self.taken_.items()}
        return dict(zip(names, sums, strict=True)) | taken

    def _collect(self) -> None:
        for gauge in self._gauges:
            for product, n in gauge.taken.items():
                self.taken_[product] += n
                gauge.taken[product] = 0

    def state_dict(self) -> dict[str, Any]:
        """Return thresholds, counters, the kernels chosen and the densities they were chosen for."""
        self._collect()
        return {
            "fifo_": {layer: list(past) for layer, past in self.fifo_.items()},
            "counts_": {layer: list(counts) for layer, counts in self.counts_.items()},
            "choices_": dict(self.choices_),
            "density_": {layer: list(seen) for layer, seen in self.density_.items()},
            "taken_": dict(self.taken_),
        }
