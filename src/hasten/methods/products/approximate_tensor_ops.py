"""Approximate tensor operations: sum a convolution over some of its input channels.

    output[n,o] = sum_c x[n,c] * w[o,c]        k of the C terms, those with the largest ||x[:,c]|| * ||w[:,c]||

What remains is an ordinary, smaller convolution, forward and backward.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hasten import keyed
from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import SettingsError
from hasten.measure.macs import LayerMacs, macs
from hasten.methods.products.sampling import SCHEMES, Chooser
from hasten.methods.products.selectors import BatchRows, Channels, SampledOutput
from hasten.methods.products.window import check_window, inside, window_problems
from hasten.products import supported

if TYPE_CHECKING:
    from hasten.session import Session
from hasten.surgery import Change

NAME = "approximate_tensor_ops"
WRITES = {
    "forward": frozenset({"in_channels"}),
    "backward": frozenset({"out_channels", "batch"}),
    "blackbox": frozenset({"output"}),
}
STEM_CHANNELS = 4  # a layer with so few inputs reads the image's colours


@dataclass(kw_only=True, eq=False)
class ApproximateTensorOps(Method):
    """Compute the products of Conv2d and Linear from a part of their terms. Evaluation is exact.

    ratio: share k / C of the terms that is computed (paper: 0.5; range about 0.1 to 0.9). 1.0 is exact.
    scheme: "topk" takes the k largest and scales nothing (the paper's choice: biased, least error), "crs" draws
        k with replacement and "bernoulli" each by its own probability, both scaled to be unbiased.
    mode: "forward" sums output over some input channels, and all three products shrink (the paper's default);
        "backward" keeps output exact, sums grad_input over some output channels and grad_weight over some
        samples (unbiased gradients with "crs" and "bernoulli"); "blackbox" samples output and takes the
        gradients of the full product (for analysis: it saves little).
    min_k: fewest terms (authors' code: 1; 10 in their MLPs).
    min_macs: layers with fewer multiply-adds per input element, ``kh * kw * C_out / stride**2``, stay exact, for
        the copy of the channels costs as much as it saves (our choice: 256, so a 1x1 convolution needs 256
        outputs and a 3x3 one 29).
    epsilon: share of the uniform distribution in the probabilities of the random schemes (authors' code: 0.1).
    align: k is rounded up to a multiple of this, for the blocked kernels of a CPU (our choice).
    block: channels are chosen in aligned blocks of this many, or fewer where k or C is no multiple (our choice:
        4, which copies bfloat16 at memory speed in channels_last; 1 chooses single channels).
    weights_only: score by ||w[:,c]|| alone, so that all workers choose the same channels and need exchange only
        those of grad_weight (from the paper).
    score_images: how many images, evenly spaced in the batch, the norms of x are taken from (our choice: 8;
        None takes all of all).
    explore: share of k that "topk" gives to random channels in the place of its smallest (our choice: 0.05).
        A channel that is never taken gets no gradient, and weight decay then shrinks it further.
    refresh: choose again every so many steps (our choice: 1; more only with "topk", in modes "forward" and
        "blackbox"). Under torch.compile every step chooses.
    start_at, stop_at: share of the run from which and up to which to act (our choice: 0.0 and 0.85). "topk"
        changes the statistics that batch norm learns; exact steps at the end bring them back.
    layers: patterns of the layers to act on, such as "layer3.*"; empty means every Conv2d and Linear that it is
        made for, that is not the stem, not the classifier, and has min_macs.
    skip: patterns of layers to leave exact.

    Random schemes choose a varying number of channels ("bernoulli") or repeat them ("crs"); they are for
    analysis, are not promised to compile, and save less time than "topk".
    """

    ratio: float = 0.5
    scheme: Literal["topk", "crs", "bernoulli"] = "topk"
    mode: Literal["forward", "backward", "blackbox"] = "forward"
    min_k: int = 1
    min_macs: int = 256
    epsilon: float = 0.1
    align: int = 16
    block: int = 4
    weights_only: bool = False
    score_images: int | None = 8
    explore: float = 0.05
    refresh: int = 1
    start_at: float = 0.0
    stop_at: float = 0.85
    layers: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="Approximate tensor operations",
        paper="Adelman, Levy, Hakimi, Silberstein, Faster Neural Network Training with Approximate Tensor "
        "Operations, NeurIPS 2021, arXiv 1805.08079",
        saves="time per step",
        acts="sums each product over the input channels with the largest norms only",
        writes=frozenset({"in_channels"}),
        layers=("Conv2d", "Linear"),
        state=("counts_", "chosen_"),
        slower_when="layers have fewer than 64 channels, or are 1x1: choosing and copying channels then costs what "
        "the smaller product saves",
    )

    @property
    def writes(self) -> frozenset[str]:
        """The places that the mode writes."""
        return WRITES[self.mode]

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        found = window_problems(self.start_at, self.stop_at)
        if not 0.0 < self.ratio <= 1.0:
            found.append(f"ratio must lie in (0, 1], not {self.ratio}.")
        if self.scheme not in SCHEMES:
            found.append(f"scheme must be one of {', '.join(SCHEMES)}, not {self.scheme!r}.")
        if self.mode not in WRITES:
            found.append(f"mode must be one of {', '.join(WRITES)}, not {self.mode!r}.")
        if not (isinstance(self.min_macs, int) and self.min_macs >= 0):
            found.append(f"min_macs must be a whole number from 0, not {self.min_macs!r}.")
        for name in ("min_k", "align", "block", "refresh"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                found.append(f"{name} must be a whole number from 1, not {value!r}.")
        if self.score_images is not None and not (
            isinstance(self.score_images, int) and self.score_images >= 1
        ):
            found.append(
                f"score_images must be a whole number from 1, or None for all, not {self.score_images!r}."
            )
        for name in ("epsilon", "explore"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                found.append(f"{name} must lie in [0, 1), not {value}.")
        if self.refresh != 1 and (self.scheme != "topk" or self.mode == "backward"):
            found.append(
                f"refresh={self.refresh} keeps a choice over several steps, which only scheme='topk' in mode 'forward' "
                f"or 'blackbox' can do; set refresh=1."
            )
        for name in ("layers", "skip"):
            value = getattr(self, name)
            if not (isinstance(value, tuple) and all(isinstance(v, str) for v in value)):
                found.append(f"{name} must be a tuple of patterns such as ('layer3.*',), not {value!r}.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Claim a part of the products of every layer it is made for.

        Raises SettingsError for a pattern that matches no layer, UnsupportedError if the schedule needs
        ``total_samples``, ConflictError where another method has the place.
        """
        check_window(NAME, session, self.start_at, self.stop_at)
        self._check_patterns([name for name, _ in session.layers(nn.Conv2d, nn.Linear)])
        self._session = session
        self.counts_ = {"steps": 0, "products_shrunk": 0, "terms_dropped": 0}
        effect = self._claim_layers(session)
        self._prepare()
        return effect

    def reshaped(self, change: Change) -> None:
        """Claim the layers anew, with the widths they have now."""
        self._collect()
        for plan in self._plans.values():
            plan.release(NAME)
        self._session.effects[NAME] = self._claim_layers(self._session)
        self._follow_window()

    def _claim_layers(self, session: Session) -> Effect:
        """Claim every layer that is worth it."""
        found = session.layers(nn.Conv2d, nn.Linear)
        self._on = True
        self._plans: dict[str, Any] = {}
        self._channels: dict[str, Channels] = {}
        self._rows: dict[str, BatchRows] = {}
        effect = Effect(saves="arithmetic of the products, and the saved copy of the channels left out")
        shapes = session.shapes()
        classifier = next((name for name, m in reversed(found) if isinstance(m, nn.Linear)), None)
        shares: dict[str, tuple[float, float, float]] = {}
        for name, module in found:
            reason = self._left_out(name, module, name == classifier, name in shapes)
            width, k = self._terms(module)
            if reason is None and k == width and self.ratio < 1.0:
                reason = (
                    f"all of its {width} channels would be taken (min_k={self.min_k}, align={self.align})"
                )
            if reason is not None:
                effect.skipped[name] = reason
                continue
            self._warn(name, module, width, k)
            shares[name] = self._claim(session, name, module, width, k)
            effect.touched[name] = self._note(width, k)
        if effect.touched:
            effect.work = self._work(macs(session.model, session.sample[0][:1]).layers, shares)
        numbers = sum(c.chooser.numbers for c in self._channels.values())
        self._noise = torch.rand(0, device=session.sample[0].device)
        if numbers:
            self._noise = torch.empty(numbers, device=session.sample[0].device)
        at = 0
        for channels in self._channels.values():
            channels.noise = self._noise[at : at + channels.chooser.numbers]
            at += channels.chooser.numbers
        return effect

    def _check_patterns(self, names: list[str]) -> None:
        lost = [p for p in (*self.layers, *self.skip) if not any(fnmatchcase(n, p) for n in names)]
        if lost:
            raise SettingsError(
                f"{NAME}: the patterns {', '.join(map(repr, lost))} match no Conv2d or Linear of the model; its layers "
                f"are {', '.join(names) or 'none'}."
            )

    def _left_out(self, name: str, module: nn.Module, classifier: bool, used: bool) -> str | None:
        """Return why the layer stays exact, or None."""
        if any(fnmatchcase(name, p) for p in self.skip):
            return "its name is in `skip`"
        asked = any(fnmatchcase(name, p) for p in self.layers)
        if self.layers and not asked:
            return "its name is not in `layers`"
        if reason := supported(module):
            return reason
        if not used:
            return "the forward pass does not run it as a module"
        if isinstance(module, nn.Linear):
            if classifier and not asked:
                return "it is the classifier"
            per_element = module.out_features
        else:
            assert isinstance(module, nn.Conv2d)
            if module.groups != 1:
                return f"its groups={module.groups} tie channels together"
            if module.in_channels <= STEM_CHANNELS and not asked:
                return f"its {module.in_channels} input channels are the image's own (the stem)"
            per_element = module.out_channels * math.prod(module.kernel_size) // math.prod(module.stride)
        if per_element < self.min_macs and not asked:
            return (
                f"its {per_element} MACs per input element do not repay the copy (min_macs={self.min_macs})"
            )
        return None

    def _warn(self, name: str, module: nn.Module, width: int, k: int) -> None:
        if isinstance(module, nn.Conv2d) and k < width <= STEM_CHANNELS:
            warnings.warn(
                f"{NAME}: layer {name!r} reads {width} channels, and min_k={self.min_k} lets it drop colours; set "
                f"min_k={width} or leave it out of `layers`.",
                stacklevel=2,
            )

    def _terms(self, module: nn.Module) -> tuple[int, int]:
        """Return (C, k) for the channels this mode chooses among."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        width = weight.shape[0 if self.mode == "backward" else 1]
        return width, terms(width, self.ratio, self.min_k, self.align)

    def _claim(
        self, session: Session, name: str, module: nn.Module, width: int, k: int
    ) -> tuple[float, float, float]:
        """Put the selection into the layer's plan; return the share of each product that remains."""
        chooser = Chooser(width, k, self.scheme, math.gcd(width, k, self.block), self.epsilon, self.explore)
        channels = Channels(self, chooser, dim_of_w=0 if self.mode == "backward" else 1)
        self._channels[name] = channels
        plan = self._plans[name] = session.plan(name)
        share = k / width
        if self.mode == "forward":
            plan.select("in_channels", channels, NAME)
            return share, share, share
        if self.mode == "blackbox":
            plan.kernel("output", SampledOutput(channels), NAME)
            return share, 1.0, 1.0
        rows = self._rows[name] = BatchRows(self, name)
        plan.select("out_channels", channels, NAME, ("grad_input",))
        plan.select("batch", rows, NAME)
        n = len(session.sample[0])
        return 1.0, share, terms(n, self.ratio, self.min_k, 1) / n

    def _note(self, width: int, k: int) -> str:
        if k == width:
            return f"takes all {width} channels: exact"
        if self.mode == "backward":
            return f"grad_input from {k} of {width} output channels, grad_weight from {self.ratio:.0%} of the samples"
        products = "output" if self.mode == "blackbox" else "all three products"
        return f"{products} from {k} of {width} input channels"

    def _work(self, count: dict[str, LayerMacs], shares: dict[str, tuple[float, float, float]]) -> float:
        total = sum(layer.training for layer in count.values())
        saved = 0.0
        for name, (output, grad_input, grad_weight) in shares.items():
            layer = count[name]
            saved += (1 - output) * layer.output + (1 - grad_input) * layer.grad_input
            saved += (1 - grad_weight) * layer.grad_weight
        return 1.0 - (self.stop_at - self.start_at) * saved / total

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Follow the schedule and draw this step's random numbers; the batch passes unchanged."""
        self._prepare()
        return batch

    def _prepare(self) -> None:
        session = self._session
        if (
            self._follow_window()
            and self.mode != "backward"
            and self.ratio < 1.0
            and session.counters["step"]
        ):
            session.restart_averages()  # outputs, and so running statistics, have another scale from here on
        self.step = session.counters["step"]
        if self._on and self._noise.numel():
            self._noise.uniform_(
                generator=keyed.generator(session.seed, NAME, self.step, device=self._noise.device)
            )

    def _follow_window(self) -> bool:
        """Turn the claims on or off as the schedule says; return whether that was a change."""
        on = inside(self._session, self.start_at, self.stop_at)
        if on == self._on:
            return False
        self._on = on
        for plan in self._plans.values():
            plan.activate(NAME, on)
        return True

    @property
    def seed(self) -> int:
        """The session's seed, for selectors that draw by themselves."""
        return self._session.seed

    def after_update(self) -> None:
        """Count the steps in which the products were shrunk."""
        shrinks = any(c.chooser.k < c.chooser.n for c in self._channels.values())
        self.counts_["steps"] += self._on and shrinks

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return the steps in which it acted, and (not under torch.compile) products shrunk and terms left out."""
        self._collect()
        return dict(self.counts_)

    def _collect(self) -> None:
        shrunk = {"forward": 3, "backward": 1, "blackbox": 1}[self.mode]
        pieces: list[Channels | BatchRows] = [*self._channels.values(), *self._rows.values()]
        for piece in pieces:
            self.counts_["products_shrunk"] += shrunk * piece.calls
            self.counts_["terms_dropped"] += piece.dropped
            piece.calls = piece.dropped = 0

    @property
    def chosen_(self) -> dict[str, Tensor]:
        """The channels each layer keeps until the next refresh."""
        return {name: c.kept for name, c in self._channels.items() if c.kept is not None}

    @chosen_.setter
    def chosen_(self, chosen: dict[str, Tensor]) -> None:
        for name, channels in self._channels.items():
            channels.kept = chosen.get(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and, where choices last several steps, the choices."""
        self._collect()
        return {"counts_": dict(self.counts_), "chosen_": self.chosen_}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        super().load_state_dict(state)
        self._follow_window()  # where the run already was, which is no change of what averages saw


def terms(width: int, ratio: float, min_k: int, align: int) -> int:
    """Return k: ``int(width * ratio)``, at least min_k, rounded up to a multiple of align, at most width."""
    k = max(int(width * ratio), min_k)
    return min(-(-k // align) * align, width)
