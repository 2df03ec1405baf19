"""How the choice of terms enters the products of one layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hasten import keyed
from hasten.methods.products.sampling import Chooser, Scheme
from hasten.methods.products.scores import channel_sums, sample_norms
from hasten.products import Geometry, Selection, arithmetic, take


class Owner(Protocol):
    """What the pieces read of the method: its settings and the number of the present step."""

    ratio: float
    scheme: Scheme
    min_k: int
    epsilon: float
    weights_only: bool
    score_images: int | None
    refresh: int
    step: int

    @property
    def seed(self) -> int: ...


class Channels:
    """Chooses channels by the norms of tensor and weight: of x and w[:,c], or of grad_output and w[o]."""

    name = "largest channels"
    static: bool
    noise: Tensor

    def __init__(self, owner: Owner, chooser: Chooser, dim_of_w: int) -> None:
        self.owner, self.chooser, self.dim_of_w = owner, chooser, dim_of_w
        self.static = chooser.scheme != "bernoulli"
        self.kept: Tensor | None = None
        self.calls = self.dropped = 0

    def __call__(self, first: Tensor, second: Tensor) -> Selection | None:
        """Return the channels to compute with; None (exact) if all are taken or nothing differs from 0."""
        owner, chooser = self.owner, self.chooser
        if chooser.k == chooser.n:
            return None
        compiling = torch.compiler.is_compiling()
        if owner.refresh > 1 and not compiling:
            if self.kept is None or owner.step % owner.refresh == 0:
                found = self._choose(first, second)
                if found is None:
                    return None
                self.kept = found.index
            selection = Selection(self.kept, None, chooser.block)
        else:
            found = self._choose(first, second)
            if found is None:
                return None
            selection = found
        if not compiling:
            self.calls += 1
            self.dropped += chooser.n - chooser.k
        return selection

    def _choose(self, tensor: Tensor, w: Tensor) -> Selection | None:
        scores = channel_sums(w, self.dim_of_w, 2)
        if not self.owner.weights_only:
            dim = 1 if tensor.dim() == 4 and w.dim() == 4 else -1
            scores = scores * channel_sums(tensor, dim, 2, self.owner.score_images)
        if scores.device.type == "cpu" and not torch.compiler.is_compiling() and not scores.any():
            return None
        return self.chooser.choose(scores.sqrt(), self.noise)


class BatchRows:
    """Chooses the samples that grad_weight sums over, by the norms of x[n] and grad_output[n]."""

    name = "largest samples"

    def __init__(self, owner: Owner, layer: str) -> None:
        self.owner, self.layer = owner, layer
        self.static = owner.scheme != "bernoulli"
        self.calls = self.dropped = 0

    def __call__(self, first: Tensor, second: Tensor) -> Selection | None:
        """Return the samples to sum over, or None for all."""
        owner, n = self.owner, first.shape[0]
        k = min(max(int(n * owner.ratio), owner.min_k), n)
        if k == n:
            return None
        scores = sample_norms(first) * sample_norms(second)
        chooser = Chooser(n, k, owner.scheme, epsilon=owner.epsilon)
        u = torch.empty(chooser.numbers, device=scores.device)
        if chooser.numbers:
            u.uniform_(generator=keyed.generator(owner.seed, owner.step, self.layer, device=u.device))
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.dropped += n - k
        return chooser.choose(scores, u)


class SampledOutput:
    """Computes output from some input channels, and leaves the gradients those of the full product."""

    name = "sampled output"
    selectable = False

    def __init__(self, channels: Channels) -> None:
        self.channels = channels

    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (output, nothing to keep)."""
        chosen = self.channels(x, w)
        if chosen is not None:
            dim = geometry.channel_dim
            x = take(x, dim, chosen.index, chosen.block)
            w = take(w, 1, chosen.index, chosen.block)
            if chosen.scale is not None:  # on w, which is the smaller of the two
                shape = (1, -1, 1, 1) if geometry.conv else (1, -1)
                w = w * chosen.scale.to(w.dtype).view(shape)
        return arithmetic.output(x, w, bias, geometry), ()
