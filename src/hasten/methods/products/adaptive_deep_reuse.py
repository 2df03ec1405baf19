"""Adaptive deep reuse: group similar pieces of a layer's input on the fly, and compute one product for each group.

output      = sum over pieces of z[group]          z = mean of the group * its rows of w
grad_weight = mean^T * (sum of grad_output over the group)
grad_input  = (sum of grad_output over the group) * w^T / size of the group

The groups are coarse early in training and fine, finally exact, late.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import SettingsError, UnsupportedError
from hasten.methods.products import reuse_settings as checks
from hasten.methods.products.reuse_ladder import DENSE, PRODUCTS, Rung, candidates, divisors, rho
from hasten.methods.products.reuse_layer import How, LayerReuse, ReuseGradInput, ReuseGradWeight, ReuseOutput
from hasten.methods.products.reuse_plateau import Plateau
from hasten.products import Plan, supported

if TYPE_CHECKING:
    from hasten.session import Session
from hasten.surgery import Change

NAME = "adaptive_deep_reuse"


@dataclass(kw_only=True, eq=False)
class AdaptiveDeepReuse(Method):
    """Compute the three products of convolutions from the means of similar pieces of their input. Evaluation is exact.

    strategy: "S1" one (L, H) for the whole run; "S2" a ladder from coarse to fine to dense, a rung finer whenever the
        loss has stopped falling (from the paper; the most saving); "S3" one (L, H), with rows of products of earlier
        batches reused (CR = 1) until the loss stops falling, then without.
    length, bits: L, the channels in a piece, and H, the bits of its hash, for S1 and S3 (from the paper: L 3 to 288, H
        up to 32; 32 and 16 are our choice).
    lengths, bit_counts: what S2 tries (our choice: the divisors of the channels that are multiples of 16, and 6, 8, 10,
        12, 14, 16, 18, 20, 24, 32: one hash serves all taps). In order "patch" the multiples of the kernel's width.
    order: "pixel" cuts the channels of each input pixel into pieces, which all taps of the kernel share (our choice: it
        needs no unfolding, kh * kw times fewer hashes, and is what the kernels compute); "patch" cuts the unfolded
        input in the order (c, kh, kw) as the paper does, by the reference: for study, it is slower than no method.
        In "patch" the sum of each output channel over the batch is exact; in "pixel" up to the image's borders.
    scope: pieces are grouped within an "image" or a "batch" (our choice), or "across_batch": a batch, with CR = 1.
    scale: "norm" groups unit vectors and gives each member its own length (our choice: it reaches the same error with a
        half to a fifth of the groups); with "none" a piece and ten times it share a group's mean, as in the paper.
    products: what is computed from groups; the rest is exact, or another method's. In the paper all three; without
        "grad_input" is our choice, for the mean gradient of a group has little to do with that of a member.
    center_hash: hash what remains of a piece when the mean piece of some of the batch's images is taken off; with "norm"
        both are unit vectors (our option).
    pad_last_block: append zero channels where L does not divide them; exact, at the cost of a copy (our option).
    a, overhead: cost of an add of the gather, and of moving the tensors for one output of one position, in multiply-adds,
        for the prediction of cost (our choice: 2.5 and 20, fitted to measured times; 1 and 0 count operations alone).
    max_rho: settings predicted or measured to cost this share of dense or more are not used (our choice: 0.9).
    max_error: largest relative error of a layer's output S2 begins with (our choice: 0.2).
    rungs: rungs of the ladder at most, without the dense one (our choice: 4). The first is chosen anew at the
        start of the next three epochs, for the activations of a new network have little in common with later ones.
    decay, improvement, patience_epochs: the loss has stopped falling when its moving average (0.98) has not improved by
        0.005 of itself in an epoch (our choice).
    dense_share: share of the run at its end that is exact (our choice: 0.1); batch norm's running statistics, whose
        variances are low under reuse, are those of the exact network then.
    cr_max_age: steps after which a stored row is too old (our choice: 20).
    layers: patterns of the layers to act on; empty means every Conv2d that it is made for. skip: layers left exact.
    linear: act on Linear as well, as 1x1 convolutions with N = batch (our choice: no; it is seldom of use).
    kernel: "auto" times reuse against the dense layer whenever a rung is chosen, and stays dense where that is faster;
        "native" and "dense" force one.

    The rung is chosen in the forward pass from the layer's own input, so it is not promised to compile.
    """

    strategy: Literal["S1", "S2", "S3"] = "S2"
    length: int = 32
    bits: int = 16
    lengths: tuple[int, ...] = ()
    bit_counts: tuple[int, ...] = (6, 8, 10, 12, 14, 16, 18, 20, 24, 32)
    order: Literal["pixel", "patch"] = "pixel"
    scope: Literal["image", "batch", "across_batch"] = "batch"
    scale: Literal["norm", "none"] = "norm"
    products: tuple[str, ...] = ("output", "grad_weight")
    center_hash: bool = False
    pad_last_block: bool = False
    a: float = 2.5
    overhead: float = 20.0
    max_rho: float = 0.9
    max_error: float = 0.2
    rungs: int = 4
    decay: float = 0.98
    improvement: float = 0.005
    patience_epochs: int = 1
    dense_share: float = 0.1
    cr_max_age: int = 20
    layers: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    linear: bool = False
    kernel: Literal["auto", "native", "dense"] = "auto"

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="Adaptive deep reuse",
        paper="Ning, Guan, Shen, Adaptive Deep Reuse: Accelerating CNN Training on the Fly, ICDE 2019, pp. 1538-1549; "
        "Ning, Shen, Deep Reuse, ICS 2019, pp. 438-448",
        saves="time per step",
        acts="groups similar pieces of a layer's input by a hash and computes one product for each group",
        writes=frozenset(PRODUCTS),
        layers=("Conv2d", "Linear"),
        state=("layers_", "plateau_", "counts_"),
        promises=frozenset({"autocast", "channels_last", "ddp"}),
        slower_when="layers have fewer than 128 outputs, or bfloat16 runs on matrix units (AMX), whose products cost less "
        "than gathering; the probe then keeps the layer dense",
    )

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        return checks.problems(self)

    @property
    def writes(self) -> frozenset[str]:
        """Return the products that are computed from groups."""
        return frozenset(self.products)

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Claim the three products of every layer that can gain.

        Raises SettingsError for a layer named in ``layers`` that cannot be reused, UnsupportedError if ``dense_share``
        needs the length of the run, ConflictError where another method has a product.
        """
        if self.dense_share and session.total_samples is None:
            raise UnsupportedError(
                f"{NAME} ends with {self.dense_share:.0%} of the run exact: give Session(..., total_samples=epochs * "
                f"samples), or set dense_share=0.0."
            )
        self._session = session
        self.plateau_ = Plateau(self.decay, self.improvement, self.patience_epochs)
        self.counts_ = {"steps": 0, "moves": 0, "epoch": 0}
        self.layers_: dict[str, LayerReuse] = {}
        return self._claim_layers()

    def reshaped(self, change: Change) -> None:
        """Claim the layers anew: a layer keeps its rung where its L still fits, else chooses among those no coarser."""
        before = self.layers_
        for name in before:
            self._plans[name].release(NAME)
        self.layers_ = {}
        self._session.effects[NAME] = self._claim_layers()
        for name, layer in self.layers_.items():
            old = before.get(name)
            if old is None:
                continue
            layer.limit, layer.reuse_rows, layer.moved, layer.tries = (
                old.limit,
                old.reuse_rows,
                old.moved,
                old.tries,
            )
            layer.calls, layer.gradients, layer.remaining = old.calls, old.gradients, old.remaining
            if old.rung == DENSE:
                layer.rung, layer.due, layer.reason = DENSE, "", old.reason
            elif old.rung in layer.options and not old.due:
                layer.rung, layer.due, layer.ladder = old.rung, "", old.ladder
        self._follow()

    def _claim_layers(self) -> Effect:
        session = self._session
        how = How(
            key=(session.seed, NAME), order=self.order, scope=self.scope, norm=self.scale == "norm",
            center=self.center_hash, products=tuple(self.products), a=self.a, overhead=self.overhead, max_rho=self.max_rho, max_error=self.max_error, rungs=self.rungs,
            max_age=self.cr_max_age, kernel=self.kernel,
        )  # fmt: skip
        effect = Effect(saves="arithmetic of the three products")
        shapes = session.shapes()
        self._plans: dict[str, Plan] = {}
        refused = []
        kinds = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d) if self.linear or self.layers else (nn.Conv2d,)
        for name, module in session.layers(*kinds):
            named = any(fnmatchcase(name, p) for p in self.layers)
            if (self.layers and not named) or any(fnmatchcase(name, p) for p in self.skip):
                effect.skipped[name] = "left out by the settings"
                continue
            impossible = checks.impossible(name, module, self)
            if impossible is not None and named:
                refused.append(impossible)
            options = [] if impossible is not None else self._options(module)
            reason = impossible or self._left_out(name, module, options, shapes)
            if reason is not None:
                effect.skipped[name] = reason
                continue
            layer = LayerReuse(name, how, options, outputs_of(module), checks.taps_of(module))
            layer.reuse_rows = self.scope == "across_batch"
            layer.step = lambda: session.counters["step"]
            plan = self._plans[name] = session.plan(name)
            weight = ReuseGradWeight(layer)
            plan.kernel("output", ReuseOutput(layer, weight), NAME)
            if "grad_input" in self.products:
                plan.kernel("grad_input", ReuseGradInput(layer), NAME)
            if "grad_weight" in self.products:
                plan.kernel("grad_weight", weight, NAME)
            if self.kernel == "dense":
                layer.rung, layer.due, layer.reason = DENSE, "", "kernel='dense'"
            self.layers_[name] = layer
            effect.touched[name] = (
                f"L={options[0].length}, H={options[0].bits}"
                if self.strategy != "S2"
                else f"{len(options)} settings to choose from"
            )
        if refused:
            raise SettingsError(f"{NAME}: " + " ".join(refused))
        self._follow()
        return effect

    def _options(self, module: nn.Module) -> list[Rung]:
        """Return the settings the layer may use."""
        if self.strategy != "S2":
            return [Rung(self.length, self.bits)] if self.bits < outputs_of(module) else []
        width = checks.width_of(module, self.order)
        multiple = (
            16 if self.order == "pixel" or isinstance(module, nn.Linear) else checks.kernel_width(module)
        )
        return candidates(width, multiple, self.lengths, self.bit_counts, outputs_of(module))

    def _left_out(
        self, name: str, module: nn.Module, options: list[Rung], shapes: dict[str, Any]
    ) -> str | None:
        """Return why the layer stays dense, or None."""
        if reason := supported(module):
            return reason
        if name not in shapes:
            return "the forward pass does not run it as a module"
        m = outputs_of(module)
        if self.strategy != "S2" and self.bits >= m:
            return f"H={self.bits} bits of hash for {m} outputs cost a dense pass"
        if not options:
            return (
                f"no L fits its width of {checks.width_of(module, self.order)} (divisors "
                f"{divisors(checks.width_of(module, self.order))}) with fewer bits than its {m} outputs"
            )
        taps = checks.taps_of(module) if self.order == "pixel" else 1
        least = min(rho(rung, m, 0.0, self.a, taps, self.overhead, self.products) for rung in options)
        if least >= self.max_rho and self.kernel != "native":
            return f"hashing and gathering alone cost {least:.2f} of a dense pass (max_rho={self.max_rho:g})"
        return None

    # -- in the step
    def context(self) -> AbstractContextManager[Any]:
        """Forget rows of earlier batches when the network is evaluated."""
        if not self._session.model.training:
            for layer in self.layers_.values():
                layer.memory.clear()
        return nullcontext()

    def select(self, batch: Batch) -> Batch:
        """Follow the schedule; the batch passes unchanged."""
        self._follow()
        return batch

    def _follow(self) -> None:
        """Turn each layer's claims on or off: off where it is dense, and for all in the last part of the run."""
        late = bool(self.dense_share) and self._session.progress >= 1 - self.dense_share
        for name, layer in self.layers_.items():
            self._plans[name].activate(NAME, not late and (layer.rung != DENSE or bool(layer.due)))

    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Follow the loss."""
        if self.strategy != "S1" and batch.loss is not None:
            self.plateau_.step(float(batch.loss))

    def start_epoch(self, epoch: int) -> None:
        """Move a rung finer, or stop reusing rows, if the loss has stopped falling."""
        if epoch <= self.counts_["epoch"]:
            return
        self.counts_["epoch"] = epoch
        for layer in self.layers_.values():
            layer.try_again()
        self._follow()
        if self.strategy == "S1" or not self.plateau_.epoch():
            return
        moved = False
        for layer in self.layers_.values():
            if self.strategy == "S3":
                moved = moved or layer.reuse_rows
                layer.reuse_rows = False
                layer.memory.clear()
            elif layer.rung != DENSE and not layer.due:
                layer.due, moved = "finer", True
        self.counts_["moves"] += moved
        self._follow()

    def after_update(self) -> None:
        """Count the steps in which a layer was reused; a layer found dense goes back to PyTorch's own op."""
        self.counts_["steps"] += any(
            layer.rung != DENSE and not self._plans[name].exact for name, layer in self.layers_.items()
        )
        self._follow()

    # -- evidence and state
    def report(self) -> dict[str, dict[str, Any]]:
        """Return, for each layer, its rung, why it is dense, its mean r_c, and the error and cost of its ladder's rungs."""
        return {
            name: {
                "rung": None if layer.rung == DENSE else tuple(layer.rung),
                "dense": layer.reason,
                "r_c": layer.remaining / layer.calls if layer.calls else None,
                "ladder": [
                    {"L": m.rung.length, "H": m.rung.bits, "r_c": m.remaining, "error": m.error, "rho": m.rho}
                    for m in layer.ladder
                ],
                "rows reused": layer.memory.found / layer.memory.asked if layer.memory.asked else 0.0,
            }
            for name, layer in self.layers_.items()
        }

    def witness(self) -> dict[str, float]:
        """Return steps with reuse, products computed from groups, the mean r_c, layers at work, moves and rows reused."""
        layers = self.layers_.values()
        calls = sum(layer.calls for layer in layers)
        return {
            "steps": float(self.counts_["steps"]),
            "outputs": float(calls),
            "gradients": float(sum(layer.gradients for layer in layers)),
            "mean r_c": sum(layer.remaining for layer in layers) / calls if calls else 0.0,
            "layers": float(sum(layer.rung != DENSE for layer in layers)),
            "moves": float(self.counts_["moves"]),
            "rows reused": float(sum(layer.memory.found for layer in layers)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the layers' rungs, ladders and stored rows, the plateau and the counters."""
        return {
            "layers_": {name: layer.state() for name, layer in self.layers_.items()},
            "plateau_": self.plateau_.state(),
            "counts_": dict(self.counts_),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for name, saved in state["layers_"].items():
            self.layers_[name].load(saved)
        self.plateau_.load(state["plateau_"])
        self.counts_ = dict(state["counts_"])
        self._follow()


def outputs_of(module: nn.Module) -> int:
    """Return M, the output channels of a layer."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]
