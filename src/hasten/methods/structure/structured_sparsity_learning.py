"""SSL: a group lasso over the structures that a matrix product can do without (Wen et al. 2016).

E(W) = E_data(W) + ordinary decay + sum over kinds of coefficient * sum over layers and groups of ||group||

A trained network is regularised, then fine-tuned with its groups of zeros frozen; what is zero goes by surgery.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

from hasten.contract import Effect, Method, MethodSpec
from hasten.errors import SettingsError, UnsupportedError, unknown
from hasten.measure.macs import macs
from hasten.methods.structure.column_conv import ColumnConv
from hasten.methods.structure.dead_sides import settle
from hasten.methods.structure.depth_wise import Per, check_shortcuts, silent_blocks
from hasten.methods.structure.lasso import dead_channels, rates, removals
from hasten.methods.structure.shape_wise import bias_of, fastest_forms, narrow, plain_convs
from hasten.methods.structure.sparsity_groups import (
    KINDS,
    Form,
    Kind,
    Penalty,
    find,
    why_none,
)
from hasten.surgery import DropBlock, replace_module
from hasten.surgery.trace import empty, twin

if TYPE_CHECKING:
    from hasten.session import Session
    from hasten.surgery import Change

NAME = "structured_sparsity_learning"
WORDS: dict[Kind, str] = {
    "filter": "filters", "channel": "channels", "shape": "columns", "depth": "layer", "filter_2d": "2-D filters",
    "block": "blocks",
}  # fmt: skip


@dataclass(kw_only=True, eq=False)
class StructuredSparsityLearning(Method):
    """Drive groups of weights to zero, freeze those that are, fine-tune the rest, and take out what surgery can.

    Begin with a trained network (the paper). Convolutions only: the first one's input channels, channels of the
    network's output and of convolutions in groups, and depthwise convolutions are in no filter or channel group. Norms
    are plain, not squared; the gradient of a group of zeros is 0, and a later data gradient can revive it (the
    authors' code). LSTM units (ISS) are not covered.

    What goes: a channel that no weight reads, or whose filters are zero in every layer that makes it (what it then
    carries, a constant, see ``absorb``); a residual branch whose end is zero; the margin of a kernel where all columns
    are zero. 2-D filters, blocks and scattered columns are only zeros: they save nothing by themselves.

    filter, channel, shape, depth, filter_2d, block: the coefficients ln, lc, ls, ld and those of 2-D filters and blocks;
        0 leaves the kind out, and all 0 is plain training (the authors' AlexNet: filter and shape 0.001; ResNet-20: depth
        0.007; VGG-16: shape 8e-4. Filters and channels, the only zeros that are surely time, are our choice).
    tile: width and height of the groups of kind "block" in the matrix of filters x columns.
    depth_groups: "conv", one group for each convolution of a residual branch (the authors' code), or "branch". Both hold
        weight and bias of the branch's end, so that a group of zeros makes a branch of zeros.
    multipliers: of the coefficients, by layer (or block, for branches) and kind; 1 where none is given.
    size_weighting: "sqrt" multiplies a layer's groups by the root of their size over the smallest size among the layers
        that take part in the kind (our reading of the authors' AlexNet multipliers); "none".
    threshold: weights below it become exactly 0 after every update (from the authors' code: 1e-4).
    relative: zero whole groups instead, whose norm is below ``threshold`` times the median of the layer's groups of that
        kind that live (our choice: off); with batch norm the scale of weights is arbitrary.
    regularise: share of the run with the penalty; the rest fine-tunes with zeros frozen (from the authors' code's notes:
        half the original training, then a third).
    proximal: shrink the norms after the update by learning rate * coefficient instead (for SGD over 1 - momentum), to
        exactly 0. Optimizers other than SGD rescale gradients and need it (our choice: off).
    remove: "early" takes out what is zero when the penalty ends, and again at the end of the run; "end" only then, as
        the paper does; "never" leaves zeros.
    absorb: take out channels that carry a constant other than 0 too: it goes into the readers' biases or running means,
        exact but at borders padded with zeros, so only where fine-tuning follows (our choice: on).
    columns: "crop" makes kernels smaller; "gather" also puts other convolutions with dead columns into the fastest of
        several forms at the end of the run, where it beats the dense one on this machine (an experiment; exported
        networks have dense ones again); "dense" neither.
    round_to, min_channels: widths are kept at multiples, and at a least number, the rest of the channels staying as
        zeros (our choice: 8, what kernels like, and 8); min_channels=None raises OverPruneError where a layer would
        lose all.
    """

    filter: float = 1e-3
    channel: float = 1e-3
    shape: float = 0.0
    depth: float = 0.0
    filter_2d: float = 0.0
    block: float = 0.0
    tile: tuple[int, int] = (8, 8)
    depth_groups: Per = "conv"
    multipliers: Mapping[str, Mapping[str, float]] | None = None
    size_weighting: Literal["none", "sqrt"] = "none"
    threshold: float = 1e-4
    relative: bool = False
    regularise: float = 0.6
    proximal: bool = False
    remove: Literal["early", "end", "never"] = "early"
    absorb: bool = True
    columns: Literal["crop", "gather", "dense"] = "crop"
    round_to: int = 8
    min_channels: int | None = 8

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="SSL",
        paper="Wen, Wu, Wang, Chen, Li, Learning Structured Sparsity in Deep Neural Networks, NIPS 2016, arXiv 1608.03665",
        saves="inference",
        acts="pulls filters, channels, kernel columns and layers of a trained network to zero by a group lasso, freezes "
        "the zeros and takes them out",
        writes=frozenset({"gradients", "structure"}),
        excludes=frozenset({"structure"}),
        excludes_reason="penalties and removals of two methods on the same weights add up to neither.",
        layers=("Conv2d",),
        requires=frozenset({"progress"}),
        state=("phase_", "masks_", "counts_", "finished_"),
        slower_when="always while the penalty is on: what it saves is inference, and the fine-tuning after; columns that "
        "do not leave a smaller rectangle of the kernel save nothing in a convolution library",
    )

    @property
    def writes(self) -> frozenset[str]:
        """Nothing is removed with ``remove="never"``."""
        return self.spec.writes if self.remove != "never" else frozenset({"gradients"})

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        for name in (*KINDS, "threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"{name} is {getattr(self, name)}; allowed: from 0.")
        if self.relative and not self.threshold < 1:
            found.append(f"threshold is {self.threshold}; allowed: below 1 if relative.")
        if not 0 < self.regularise <= 1:
            found.append(f"regularise is {self.regularise}; allowed: above 0, up to 1.")
        choices = {
            "depth_groups": ("conv", "branch"), "size_weighting": ("none", "sqrt"), "remove": ("early", "end", "never"),
            "columns": ("crop", "gather", "dense"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                found.append(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}.")
        for name in ("relative", "proximal", "absorb"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} is {getattr(self, name)!r}; allowed: True or False.")
        if not (_whole(self.round_to) and (self.min_channels is None or _whole(self.min_channels))):
            found.append(
                f"round_to, min_channels are {self.round_to!r}, {self.min_channels!r}; allowed: whole numbers from 1 "
                f"(min_channels: or None)."
            )
        if not (len(self.tile) == 2 and all(map(_whole, self.tile))):
            found.append(f"tile is {self.tile!r}; allowed: two whole numbers from 1.")
        for layer, values in (self.multipliers or {}).items():
            wrong = [k for k, v in values.items() if k not in KINDS or not 0 <= v < math.inf]
            if wrong:
                found.append(
                    f"multipliers of {layer!r} hold {wrong}; allowed: numbers from 0 for {', '.join(KINDS)}."
                )
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Find the groups. Raises as ``_find`` does, and UnsupportedError for an optimizer that rescales gradients."""
        self._session = session
        self._penalty: Penalty | None = None
        self._frozen: list[tuple[nn.Parameter, Tensor]] | None = None
        self._macs = macs(twin(session.model), empty(session.sample[0][:1])).forward
        self.phase_: str = "regularise"
        self.masks_: dict[str, Tensor] = {}
        self.counts_ = dict.fromkeys(
            ("penalty_steps", "frozen_steps", "groups", "zero_groups", "channels_removed", "channels_absorbed",
             "blocks_removed", "layers_narrowed"), 0,
        )  # fmt: skip
        self.finished_ = False
        effect = Effect(saves="all products of what is removed, from then on")
        convs = session.layers(nn.Conv2d)
        if not self._kinds:
            effect.touched = {name: "every coefficient is 0: no penalty" for name, _ in convs}
            return effect
        found = self._find(session)
        names = {id(p): name for name, p in session.model.named_parameters()}
        for name, forms in found.items():
            effect.touched[name] = ", ".join(_words(kind, form) for kind, form in forms.items())
        for name, conv in convs:
            if name not in found:
                none = f"it has no groups of kind {', '.join(self._kinds)} that can go"
                effect.skipped[name] = why_none(conv) or none
        weights = Penalty(form for forms in found.values() for form in forms.values()).weights
        if not self.proximal:
            _check_optimizers(session, {id(w): names[id(w)] for w in weights})
        return effect

    @property
    def _kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if getattr(self, kind) > 0]

    def _find(self, session: Session) -> dict[str, dict[Kind, Form]]:
        """Return the groups by layer (or block) and kind, scaled by their coefficients.

        Raises UnsupportedSurgeryError for a network that cannot be followed, SettingsError for multipliers of layers
        that it has not, NoShortcutError if whole layers are to go and no residual branch holds them.
        """

        multipliers = self.multipliers or {}

        def coefficient(name: str, kind: Kind) -> float:
            return float(getattr(self, kind) * multipliers.get(name, {}).get(kind, 1.0))

        found = find(
            session.surgery.channels, session.model, coefficient, tile=self.tile, per=self.depth_groups,
            by_size=self.size_weighting == "sqrt",
        )  # fmt: skip
        if self.depth > 0:
            asked = {name for name, values in multipliers.items() if values.get("depth", 0) > 0}
            check_shortcuts({name for name, forms in found.items() if "depth" in forms}, asked)
        known = {*dict(session.model.named_modules()), *found}
        for name in multipliers:
            if name not in known:
                raise unknown("layer in multipliers", name, known, SettingsError)
        return found

    def reshaped(self, change: Change) -> None:
        """Let the masks follow, and find groups anew when they are next asked for."""
        self._penalty = self._frozen = None
        if self.masks_:
            parameters = self._session.model.named_parameters()
            current = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters}
            self._mask(change.follow(self.masks_, current))

    # -- in the step
    def gradients(self) -> None:
        """Add the penalty's gradient or, when groups are frozen, take theirs away."""
        if self.phase_ == "frozen":
            for parameter, free in self._held():
                if parameter.grad is not None:
                    parameter.grad.mul_(free)
        elif self._kinds and not self.proximal:
            self._groups().add_gradient()

    @torch.no_grad()
    def after_update(self) -> None:
        """Zero what is small; change from regularising to fine-tuning, and remove, when it is time."""
        if not self._kinds:
            return
        session = self._session
        if self.phase_ == "frozen":
            self.counts_["frozen_steps"] += 1
            for parameter, free in self._held():  # for optimizers that move weights without a gradient
                parameter.mul_(free)
        else:
            self._regularise()
        if session.progress >= 1 and not self.finished_:
            self.finished_ = True
            if self.remove != "never":
                self._remove()
                if self.columns == "gather":
                    with session.inference():
                        chosen = fastest_forms(session.model, session.sample[0])
                    self._narrow(chosen)

    def _regularise(self) -> None:
        penalty = self._groups()
        if self.proximal:
            penalty.shrink(rates(self._session.optimizers))
        if self.relative:
            penalty.cut_groups(self.threshold)
        else:
            penalty.cut(self.threshold)
        self.counts_["penalty_steps"] += 1
        if self._session.progress >= self.regularise:
            self._freeze(penalty)

    def _groups(self) -> Penalty:
        if self._penalty is None:
            found = self._find(self._session)
            self._penalty = Penalty(form for forms in found.values() for form in forms.values())
        return self._penalty

    # -- freezing
    def _freeze(self, penalty: Penalty) -> None:
        """End the penalty: from now on every group that is zero stays so."""
        self.phase_ = "frozen"
        zero, count = penalty.zero_groups()
        self.counts_["groups"], self.counts_["zero_groups"] = count, zero
        free = penalty.free()
        named = self._session.model.named_parameters()
        self._mask({name: free[id(p)] for name, p in named if id(p) in free})
        for parameter, mask in self._held():
            for optimizer in self._session.optimizers:
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value.mul_(mask)  # or momentum would move what has no gradient
        if self.remove == "early":
            self._remove()
        self._session.restart_averages()  # of weights that are now zero for good

    def _mask(self, masks: Mapping[str, Tensor]) -> None:
        """Keep ``masks``, True where a weight is free, but for those that hold nothing."""
        self.masks_ = {name: mask for name, mask in masks.items() if not bool(mask.all())}
        self._frozen = None

    def _held(self) -> list[tuple[nn.Parameter, Tensor]]:
        if self._frozen is None:
            parameters = dict(self._session.model.named_parameters())
            self._frozen = [(parameters[name], mask) for name, mask in self.masks_.items()]
        return self._frozen

    # -- removal
    def _remove(self) -> None:
        """Take out branches of zeros, then channels, then margins of kernels. Raises OverPruneError."""
        session, surgery, model = self._session, self._session.surgery, self._session.model
        while blocks := silent_blocks(surgery.channels, model):
            surgery.apply([DropBlock(block) for block in blocks])
            self.counts_["blocks_removed"] += len(blocks)
        if self.filter or self.channel or self.shape:
            absorb = self.absorb and session.progress < 1
            done = settle(surgery.channels, model, session.sample[0][:2], absorb=absorb)
            gone = dead_channels(
                surgery.channels, model, 0.0, round_to=self.round_to, min_channels=self.min_channels,
                advice=f"Lower {NAME}'s coefficients, or give min_channels to keep some.",
            )  # fmt: skip
            surgery.apply(removals(surgery.channels, gone))
            self.counts_["channels_removed"] += int(gone.sum())
            self.counts_["channels_absorbed"] += done.absorbed
        if self.shape and self.columns != "dense":
            self._narrow(dict.fromkeys(plain_convs(model), "crop"))

    def _narrow(self, chosen: Mapping[str, str]) -> None:
        """Put layers into the forms ``chosen``, and their masks with them."""
        session, before = self._session, self.masks_
        done = narrow(session.surgery, chosen, lambda name, _: chosen[name])
        for name, narrowed in done.items():
            session.effects[NAME].touched[name] = narrowed.note
            self.counts_["layers_narrowed"] += 1
            taken: dict[str, Tensor] = {}
            if (mask := before.get(f"{name}.weight")) is not None:
                taken = {f"{name}.{own}": part for own, part in narrowed.made.take(mask).items()}
            if (mask := before.get(f"{name}.bias")) is not None:
                taken[f"{name}.{bias_of(session.model.get_submodule(name))}"] = mask
            self._mask({**self.masks_, **taken})

    def export(self, model: nn.Module) -> None:
        """Make plain convolutions of those in another form."""
        for name, module in list(model.named_modules()):
            if isinstance(module, ColumnConv):
                replace_module(model, name, module.dense())

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return steps of both phases, groups and those that are zero, what was removed, and the share of MACs removed."""
        now = macs(twin(self._session.model), empty(self._session.sample[0][:1])).forward
        return {
            **{name: float(count) for name, count in self.counts_.items()},
            "macs_removed": 1 - now / self._macs,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the phase, the masks, and the counters."""
        return {"phase_": self.phase_, "masks_": dict(self.masks_), "counts_": dict(self.counts_),
                "finished_": self.finished_}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        parameters = dict(self._session.model.named_parameters())
        self.phase_, self.finished_ = str(state["phase_"]), bool(state["finished_"])
        self._mask({n: mask.to(parameters[n].device, copy=True) for n, mask in state["masks_"].items()})
        self.counts_ = {name: int(count) for name, count in state["counts_"].items()}


def _check_optimizers(session: Session, weights: Mapping[int, str]) -> None:
    """Raise UnsupportedError if an optimizer other than SGD trains one of ``weights``, names by id."""
    for optimizer in session.optimizers:
        held = [weights[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in weights]
        if held and not isinstance(optimizer, SGD):
            raise UnsupportedError(
                f"{NAME}: {type(optimizer).__name__}, which trains {held[0]}, rescales each weight's gradient, so "
                f"that the penalty would not shrink groups as a whole. Give proximal=True, which shrinks them after "
                f"the update, or train with torch.optim.SGD."
            )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _words(kind: Kind, form: Form) -> str:
    count = "whole" if kind == "depth" else str(getattr(form, "count", 1))
    return f"{count} {WORDS[kind]}"
