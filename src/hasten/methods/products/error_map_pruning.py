"""Error-map pruning: compute the backward products of a convolution from its most important output channels.

grad_input  = grad_output[:, K] * w[K]          K: the share `keep` of the output channels
grad_weight[K] = x * grad_output[:, K]          with the largest scores; the other rows are 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.measure.macs import macs
from hasten.methods.products.sampling import top
from hasten.methods.products.scores import channel_sums
from hasten.methods.products.window import check_window, follows_progress, inside, window_problems
from hasten.products import Selection, supported

if TYPE_CHECKING:
    from hasten.session import Session
from hasten.surgery import Change

NAME = "error_map_pruning"


@dataclass(kw_only=True, eq=False)
class ErrorMapPruning(Method):
    """Leave the output channels with the smallest gradients out of the backward pass of every convolution.

    The score of output channel j is ``m * gamma1 * ||w_j||_1 + gamma2 * ||grad_output_j||_1`` over a batch of m
    samples. The same channels serve all samples and both gradients. Nothing is rescaled, so the gradient is
    biased. The forward pass is exact.

    keep: alpha, the share of channels kept, rounded up (the paper calls it pruning ratio; its values are not
        given, ours is 0.5). 1.0 is exact.
    gamma1, gamma2: weights of the weight's and the gradient's norms (not in the paper; 0 and 1 are our choice).
    min_channels: layers with fewer output channels are left exact (our choice: 32, below which nothing is
        saved).
    min_macs: layers with fewer multiply-adds per element of grad_output, ``C_in * kh * kw``, are left exact, for
        the copy of the channels costs as much as it saves (our choice: 256, so a 3x3 convolution needs 29
        input channels and a 1x1 one 256).
    round_to: the number kept is rounded up to a multiple of this (our choice: 8; 1 keeps exactly ceil(keep * n)).
    block: channels are kept in aligned blocks of this many with the largest sums of scores, or fewer where the
        number kept or n is no multiple; blocks of 4 copy bfloat16 at memory speed in channels_last (our choice:
        4; 1 is the paper's).
    score_images: how many images, evenly spaced in the batch, the gradient's norm is taken from (our choice: 8;
        None takes all, as in the paper).
    start_at, stop_at: share of the run from which and up to which to act (our choice: all of it).
    """

    keep: float = 0.5
    gamma1: float = 0.0
    gamma2: float = 1.0
    min_channels: int = 32
    min_macs: int = 256
    round_to: int = 8
    block: int = 4
    score_images: int | None = 8
    start_at: float = 0.0
    stop_at: float = 1.0

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="Error-map pruning",
        paper="Wu, Wang, Shi, Hu, Enabling On-Device CNN Training by Self-Supervised Instance Filtering and Error "
        "Map Pruning, IEEE TCAD 39(11), 2020, arXiv 2007.03213",
        saves="time per step",
        acts="computes grad_input and grad_weight from the output channels with the largest gradients",
        writes=frozenset({"out_channels"}),
        layers=("Conv2d",),
        state=("counts_",),
        slower_when="layers have fewer than about 64 channels: choosing and copying then costs what the smaller "
        "products save",
    )

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        found = window_problems(self.start_at, self.stop_at)
        if not 0.0 < self.keep <= 1.0:
            found.append(f"keep must lie in (0, 1], not {self.keep}.")
        if not (self.gamma1 >= 0 and self.gamma2 >= 0 and 0 < self.gamma1 + self.gamma2 < math.inf):
            found.append(
                f"gamma1 and gamma2 must be 0 or more and not both 0, not {self.gamma1}, {self.gamma2}."
            )
        if not (isinstance(self.min_macs, int) and self.min_macs >= 0):
            found.append(f"min_macs must be a whole number from 0, not {self.min_macs!r}.")
        for name in ("min_channels", "round_to", "block"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                found.append(f"{name} must be a whole number from 1, not {value!r}.")
        if self.score_images is not None and not (
            isinstance(self.score_images, int) and self.score_images >= 1
        ):
            found.append(
                f"score_images must be a whole number from 1, or None for all, not {self.score_images!r}."
            )
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Claim the output channels in the backward pass of every Conv2d that is wide enough.

        Raises UnsupportedError if the schedule needs ``total_samples``, ConflictError where another method has
        the place.
        """
        check_window(NAME, session, self.start_at, self.stop_at)
        self._session = session
        self.counts_ = {"steps": 0, "products_shrunk": 0, "channels_dropped": 0}
        return self._claim_layers(session)

    def reshaped(self, change: Change) -> None:
        """Claim the layers anew, with the widths they have now."""
        self._collect()
        for plan in self._plans.values():
            plan.release(NAME)
        self._session.effects[NAME] = self._claim_layers(self._session)

    def _claim_layers(self, session: Session) -> Effect:
        """Claim every layer that is wide enough."""
        self._on = True
        self._plans: dict[str, Any] = {}
        self._pieces: list[_LargestErrors] = []
        effect = Effect(saves="arithmetic of grad_input and grad_weight")
        shapes = session.shapes()
        shares: dict[str, float] = {}
        for name, module in session.layers(nn.Conv2d):
            assert isinstance(module, nn.Conv2d)
            n = module.out_channels
            k = kept_channels(n, self.keep, self.round_to)
            reason = self._left_out(module, name in shapes)
            if reason is None and k == n and self.keep < 1.0:
                reason = f"all of its {n} channels would be kept (round_to={self.round_to})"
            if reason is not None:
                effect.skipped[name] = reason
                continue
            piece = _LargestErrors(
                n, k, math.gcd(n, k, self.block), self.gamma1, self.gamma2, self.score_images
            )
            plan = self._plans[name] = session.plan(name)
            plan.select("out_channels", piece, NAME)
            self._pieces.append(piece)
            shares[name] = k / n
            effect.touched[name] = f"backward from {k} of {n} output channels" + (": exact" if k == n else "")
        if effect.touched:
            count = macs(session.model, session.sample[0][:1]).layers
            saved = sum((1 - s) * (count[n].grad_input + count[n].grad_weight) for n, s in shares.items())
            share = saved / sum(layer.training for layer in count.values())
            effect.work = 1.0 - (self.stop_at - self.start_at) * share
        self._follow()
        return effect

    def _left_out(self, module: nn.Conv2d, used: bool) -> str | None:
        """Return why the layer stays exact, or None."""
        if reason := supported(module):
            return reason
        if not used:
            return "the forward pass does not run it as a module"
        if module.groups != 1:
            return f"its groups={module.groups} tie channels together"
        if module.out_channels < self.min_channels:
            return (
                f"it has {module.out_channels} output channels, fewer than min_channels={self.min_channels}"
            )
        per_element = module.in_channels * math.prod(module.kernel_size)
        if per_element < self.min_macs:
            return f"its {per_element} MACs per element of grad_output do not repay the copy (min_macs={self.min_macs})"
        return None

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Follow the schedule; the batch passes unchanged."""
        if follows_progress(self.start_at, self.stop_at):
            self._follow()
        return batch

    def _follow(self) -> None:
        on = inside(self._session, self.start_at, self.stop_at)
        if on != self._on:
            self._on = on
            for plan in self._plans.values():
                plan.activate(NAME, on)

    def after_update(self) -> None:
        """Count the steps in which the products were shrunk."""
        self.counts_["steps"] += self._on and self.keep < 1.0

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return the steps in which it acted, and (not under torch.compile) products shrunk and channels left out."""
        self._collect()
        return dict(self.counts_)

    def _collect(self) -> None:
        for piece in self._pieces:
            self.counts_["products_shrunk"] += 2 * piece.calls
            self.counts_["channels_dropped"] += piece.calls * (piece.n - piece.k)
            piece.calls = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters: scores are computed anew in every step."""
        self._collect()
        return {"counts_": dict(self.counts_)}


def kept_channels(n: int, keep: float, round_to: int) -> int:
    """Return how many of n channels are kept: ``ceil(keep * n)``, rounded up to a multiple, at most n."""
    # 0.1 * 30 is 3.0000000000000004, whose ceiling would keep one channel too many
    return min(-(-math.ceil(keep * n - 1e-9) // round_to) * round_to, n)


def error_scores(
    grad_output: Tensor, w: Tensor, gamma1: float, gamma2: float, images: int | None = None
) -> Tensor:
    """Return the scores (O,) of output channels: grad_output (N, O, H, W), w (O, C, kh, kw)."""
    if not gamma1:
        return gamma2 * channel_sums(grad_output, 1, 1, images)
    scores = grad_output.shape[0] * gamma1 * channel_sums(w, 0, 1)
    return scores + gamma2 * channel_sums(grad_output, 1, 1, images) if gamma2 else scores


class _LargestErrors:
    """Keeps k of n output channels, in aligned blocks, by their scores."""

    name = "largest error maps"
    static = True

    def __init__(self, n: int, k: int, block: int, gamma1: float, gamma2: float, images: int | None) -> None:
        self.n, self.k, self.block = n, k, block
        self.gamma1, self.gamma2, self.images = gamma1, gamma2, images
        self.calls = 0

    def __call__(self, first: Tensor, second: Tensor) -> Selection | None:
        """Return the channels of grad_output to compute with, or None if all are kept."""
        if self.k == self.n:
            return None
        if not torch.compiler.is_compiling():
            self.calls += 1
        scores = error_scores(first, second, self.gamma1, self.gamma2, self.images)
        block = self.block
        if block == 1:
            return Selection(top(scores, self.k))
        index = top(scores.view(-1, block).sum(1), self.k // block)
        index = (index[:, None] * block + torch.arange(block, device=index.device)).view(-1)
        return Selection(index, None, block)
