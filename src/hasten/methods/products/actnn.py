"""ActNN: keep activations for the backward pass in about 2 bits a value.

It saves memory, not arithmetic: every step gets slower by packing and unpacking. Time is saved only where the memory
pays for something: a larger batch or image, or no recomputation of activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import UnsupportedError
from hasten.kernels.group_quantize import group_problem
from hasten.methods.products.compressed_allocation import MOST, allocate
from hasten.methods.products.compressed_codec import GroupCodec, Run
from hasten.methods.products.compressed_layers import BATCH_NORMS, EXACT, compress, restore, why_plain
from hasten.methods.products.compressed_survey import account, survey
from hasten.products import planned, supported

if TYPE_CHECKING:
    from hasten.session import Session
    from hasten.surgery import Change

NAME = "actnn"
LEVELS = ("L0", "L1", "L2", "L3", "L4")
FIXED = (1, 2, 4, 8)
_EXACT_NOTES = {
    nn.ReLU: "one bit for each element, exact",
    nn.Dropout: "one bit for each element, exact",
    nn.MaxPool2d: "one byte for each output, exact",
    nn.AvgPool2d: "its shape only, exact",
}


@dataclass(kw_only=True, eq=False)
class ActNN(Method):
    """Round what is kept for the backward pass stochastically to few bits; the forward pass stays exact.

    The inputs of convolutions, linear layers and batch norms are cut into groups of values of one sample, each kept as
    codes with its lowest value and step. ReLU and dropout keep one bit for each element, max pooling one byte for each
    output, average pooling nothing; these are exact. Gradients of weights get noise and no bias.

    level: from the authors' code. "L0" keeps everything (to check the wrapping); "L1" rounds the inputs of
        convolutions and linear layers to 4 bits; "L2" those of batch norms too; "L3" to 2 bits on average, by
        sensitivity; "L4" is L3 with the codes in pinned memory of the host, for GPUs.
    bits: of each value; on average in L3 and L4. None takes the level's (from the paper: 4, and 2 for L3).
        1, 2, 4 or 8 where they are fixed; from 1 to 8, fractions too, where they are an average.
    allocation: in L3 and L4, who shares the budget: "layers" by their measured sensitivities (our choice: it costs
        nothing between measurements), "samples" also the samples of a batch, in every pass, which reads each tensor
        once more (from the paper), or "fixed" nobody.
    every: steps between measurements of sensitivity (our choice: 100; the authors' code measures in each step).
    initial_bits: bits before the first measurement, in L3 and L4; None takes ``bits`` (our choice, for the first
        step's memory would decide what fits; from the authors' code: 8).
    use_gradient: remember the size of the gradient of each sample of the training set, averaged with factor 0.5, and
        give bits by it (from the authors' code, off); needs ``num_samples`` and sample numbers in the loop.
    num_samples: samples of the training set.
    group_size: G, values that share a lowest value and a step (from the paper: 256; multiples of 32).
    rounding: "stochastic", or "nearest", which is biased and there for comparison.
    min_bytes: smaller tensors stay exact (our choice: 16384).
    debug: look for NaN and infinities in what is kept and raise NonFiniteError; else they come back as NaN.
    """

    level: str = "L3"
    bits: float | None = None
    allocation: str = "layers"
    every: int = 100
    initial_bits: int | None = None
    use_gradient: bool = False
    num_samples: int | None = None
    group_size: int = 256
    rounding: str = "stochastic"
    min_bytes: int = 16384
    debug: bool = False

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="ActNN: 2-bit activations for the backward pass",
        paper="Chen et al., ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training, ICML "
        "2021, arXiv 2104.14129",
        saves="memory",
        acts="keeps what the backward pass needs as stochastically rounded codes, masks and places",
        writes=frozenset({"saved"}),
        excludes=frozenset({"graph"}),
        excludes_reason="its noise differs in every step, which a compiled graph would fix.",
        layers=("Conv2d", "Linear", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "ReLU", "Dropout", "MaxPool2d",
                "AvgPool2d"),
        state=("layers_", "counts_"),
        promises=frozenset({"autocast", "channels_last", "ddp"}),
        slower_when="always, by packing and unpacking; it pays where memory does",
    )  # fmt: skip

    @property
    def reads(self) -> frozenset[str]:
        """The samples that train, where their gradients are remembered."""
        return frozenset({"samples"}) if self.use_gradient else frozenset()

    # -- settings
    @property
    def _adaptive(self) -> bool:
        return self.level in ("L3", "L4") and self.allocation != "fixed"

    @property
    def _average(self) -> float:
        return self.bits if self.bits is not None else (2 if self.level in ("L3", "L4") else 4)

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        if self.level == "L5":
            found.append(
                "level 'L5' swaps and defragments the allocator, which needed a forked PyTorch; it is not offered. "
                "Allowed: 'L0' to 'L4'."
            )
        elif self.level not in LEVELS:
            found.append(f"level is {self.level!r}; allowed: {', '.join(map(repr, LEVELS))}.")
        if self.allocation not in ("layers", "samples", "fixed"):
            found.append(f"allocation is {self.allocation!r}; allowed: 'layers', 'samples', 'fixed'.")
        if self.rounding not in ("stochastic", "nearest"):
            found.append(f"rounding is {self.rounding!r}; allowed: 'stochastic', 'nearest'.")
        if self.bits is not None:
            found += self._bit_problems("bits", self.bits)
        if self.initial_bits is not None:
            found += (
                []
                if self.initial_bits in range(1, MOST + 1)
                else [f"initial_bits is {self.initial_bits!r}; allowed: whole numbers from 1 to 8."]
            )
        if reason := group_problem(self.group_size):
            found.append(f"group_size is {reason}.")
        for name, least in (("every", 1), ("min_bytes", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, int) and value >= least):
                found.append(f"{name} is {value!r}; allowed: whole numbers from {least}.")
        for name in ("use_gradient", "debug"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} is {getattr(self, name)!r}; allowed: True or False.")
        if self.use_gradient and not (isinstance(self.num_samples, int) and self.num_samples > 0):
            found.append(
                f"use_gradient needs num_samples, the size of the training set; given: {self.num_samples!r}."
            )
        return found

    def _bit_problems(self, name: str, value: float) -> list[str]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self._adaptive:
            good, allowed = number and 1 <= value <= MOST, "from 1 to 8"
        else:
            good, allowed = number and value in FIXED, "1, 2, 4 or 8 where bits are fixed"
        return [] if good else [f"{name} is {value!r}; allowed: {allowed}."]

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Claim the codec of every convolution and linear layer that is large enough, and plan for the other layers.

        Raises UnsupportedError for level "L4" without a GPU, ConflictError where another method has a layer's codec.
        """
        device = session.sample[0].device
        if self.level == "L4" and device.type != "cuda":
            raise UnsupportedError(
                f"actnn: level 'L4' moves codes to pinned memory of the host, which frees memory of a GPU only; the "
                f"sample is on {device.type}. Give level='L3'."
            )
        self._session = session
        self.layers_: dict[str, dict[str, Any]] = {}
        self.counts_: dict[str, int] = {"tensors": 0, "exact": 0, "bytes": 0, "stored": 0, "allocations": 0}
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._run = Run(
            (session.seed, NAME, rank),
            lambda: session.counters["forward"],
            self.group_size,
            self.min_bytes,
            stochastic=self.rounding == "stochastic",
            exact=self.level == "L0",
            per_sample=self._adaptive and self.allocation == "samples",
            swap=self.level == "L4",
            debug=self.debug,
            counts=self.counts_,
        )
        effect = self._claim(session)
        # twice deferred: it has to see the modules that the edits of the other methods bring in
        session.edit(lambda: session.edit(lambda: self._change_modules(effect)))
        return effect

    def _claim(self, session: Session) -> Effect:
        """Claim the codec of every layer, and return the effect so far."""
        self._codecs: dict[str, GroupCodec] = {}
        self._norms: dict[str, GroupCodec] = {}
        effect = Effect()
        shapes = session.shapes()
        batch = len(session.sample[0])
        for name, module in session.layers(nn.modules.conv._ConvNd, nn.Linear):
            if reason := self._left_out(name, module, shapes, batch):
                effect.skipped[name] = reason
                continue
            codec = self._codec_of(name, module)
            session.plan(name).codec(codec, NAME)
            self._codecs[name] = codec
            frozen = not module.get_parameter("weight").requires_grad
            effect.touched[name] = (
                "its weight is frozen, so nothing is kept" if frozen else f"its input in {self._in_words()}"
            )
        return effect

    def _codec_of(self, name: str, module: nn.Module) -> GroupCodec:
        if isinstance(module, nn.Conv2d):
            kernel, groups, dim = math.prod(module.kernel_size), module.groups, 1
        else:
            kernel, groups, dim = 1, 1, -1
        codec = GroupCodec(self._run, name, self._first_bits(), kernel=kernel, groups=groups, channel_dim=dim)
        if self.use_gradient:
            device = self._session.sample[0].device
            codec.remembered = torch.full((self.num_samples or 0,), torch.nan, device=device)
        return codec

    def _all(self) -> dict[str, GroupCodec]:
        return self._codecs | self._norms

    def _first_bits(self) -> float:
        first = self.initial_bits if self._adaptive and self.initial_bits is not None else self._average
        return first if self._run.per_sample else int(first)

    def _in_words(self) -> str:
        if self.level == "L0":
            return "full (a check of the wrapping)"
        average = " on average" if self._adaptive else ""
        return f"{self._average:g} bits{average}"

    def _left_out(
        self, name: str, module: nn.Module, shapes: dict[str, tuple[torch.Size, torch.Size]], batch: int
    ) -> str | None:
        if reason := supported(module):
            return reason
        if name not in shapes:
            return "the forward pass does not run it as a module"
        given = shapes[name][0]
        trial = torch.empty((batch, *given[1:]), device="meta")
        return GroupCodec(self._run, name, 1).why_exact(trial)

    def _change_modules(self, effect: Effect) -> None:
        """Have norms, activations and pools keep less, and say what is saved."""
        session = self._session
        model, shapes, last = session.model, session.shapes(), self._first_bits()
        found = survey(model, session.sample[0])
        before: float = MOST  # of the convolution or linear layer before a norm, 8 without one
        for name, module in model.named_modules():
            if name in self._codecs:
                before = last
            if type(module) in BATCH_NORMS and self.level in ("L0", "L2", "L3", "L4") and name in shapes:
                codec = GroupCodec(self._run, name, before)
                trial = torch.empty(shapes[name][0], device="meta")
                if reason := why_plain(module) or codec.why_exact(trial):
                    effect.skipped[name] = reason
                    continue
                self._norms[name] = codec
                compress(module, codec)
                effect.touched[name] = f"its input in {self._in_words()}, its statistics exactly"
            elif type(module) in EXACT and name in shapes:
                if reason := why_plain(module):
                    effect.skipped[name] = reason
                    continue
                compress(module)
                effect.touched[name] = _EXACT_NOTES[type(module)]
        for name, plan in ((n, session.plan(n)) for n in self._codecs):
            if others := [owner for owner in plan.owners if owner != NAME]:
                effect.touched[name] += f"; {', '.join(others)} also changes its products: both noises add up"
        widths = {
            n: 32.0 if self.level == "L0" else self._average + 32 / self.group_size for n in self._all()
        }
        account(effect, model, found, shapes, widths, len(session.sample[0]))

    def reshaped(self, change: Change) -> None:
        """Claim the layers anew, with the bits they had; batch norms and pools too."""
        held = self.state_dict()["layers_"]
        for plan in planned(self._session.model).values():
            plan.release(NAME)
        for module in self._session.model.modules():
            restore(module)
        effect = self._claim(self._session)
        self._change_modules(effect)
        self._session.effects[NAME] = effect
        self._take_bits(held)

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Note which samples train, where their gradients are remembered."""
        if self.use_gradient:
            if batch.index is None:
                raise UnsupportedError(
                    "actnn: use_gradient=True remembers each sample's gradient: give step(inputs, targets, index) with "
                    "the numbers of the samples in the training set."
                )
            self._run.index = batch.index
        return batch

    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Decide, between forward and backward, whether this step measures."""
        self._run.measuring = self._adaptive and self._session.counters["step"] % self.every == 0
        if self.use_gradient:
            self._run.index = batch.index

    def after_update(self) -> None:
        """Share the budget anew where this step has measured."""
        for codec in self._all().values():
            codec.calls = 0
        self._run.index = None
        if self._run.measuring:
            self._run.measuring = False
            self._allocate()

    def _allocate(self) -> None:
        seen = [c for c in self._codecs.values() if c.sensitivity is not None]
        if not seen:
            return
        each: list[Tensor] = [c.sensitivity for c in seen if c.sensitivity is not None]
        if self._run.per_sample:
            weight = torch.cat([torch.full_like(s, c.values) for s, c in zip(each, seen, strict=True)])
            bits = allocate(torch.cat(each), weight, self._average * float(weight.double().sum()))
            for codec, own in zip(seen, torch.split(bits, [len(s) for s in each]), strict=True):
                codec.bits = float(own.double().mean())
        else:
            weight = torch.tensor([float(c.values) for c in seen])
            total = torch.stack([s.double().sum() for s in each]).cpu()
            for codec, own in zip(
                seen, allocate(total, weight, self._average * float(weight.double().sum())), strict=True
            ):
                codec.bits = int(own)
        for codec in seen:
            codec.sensitivity = None
        self.counts_["allocations"] += 1
        self._follow_norms()

    def _follow_norms(self) -> None:
        """Give each norm the bits of the convolution or linear layer before it."""
        before: float | None = None
        for name, _ in self._session.model.named_modules():
            if name in self._codecs:
                before = self._codecs[name].bits
            elif name in self._norms and before is not None:
                self._norms[name].bits = before

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return tensors rounded and left exact, their bytes before and after, and how often bits were shared anew."""
        return dict(self.counts_)

    def bits_by_layer(self) -> dict[str, float]:
        """Return the bits that each rounded tensor has now, by layer."""
        return {name: codec.bits for name, codec in self._all().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return each layer's bits and gradient sizes, and the counters; the noise is keyed and needs no state."""
        layers: dict[str, dict[str, Any]] = {}
        for name, codec in self._all().items():
            layers[name] = {"bits": codec.bits, "gradient": codec.gradient}
            if codec.remembered is not None:
                layers[name]["remembered"] = codec.remembered.clone()
        return {"layers_": layers, "counts_": dict(self.counts_)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; layers without bits in it begin anew."""
        self._take_bits(state.get("layers_", {}))
        self.counts_.update(state.get("counts_", {}))

    def _take_bits(self, held: dict[str, dict[str, Any]]) -> None:
        for name, codec in self._all().items():
            if name in held:
                codec.bits, codec.gradient = held[name]["bits"], held[name]["gradient"]
                codec.remembered = held[name].get("remembered", codec.remembered)

    def export(self, model: nn.Module) -> None:
        """Give the modules of the copy their own forwards again."""
        for module in model.modules():
            restore(module)
