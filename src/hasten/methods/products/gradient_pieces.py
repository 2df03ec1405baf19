"""What activation gradient pruning puts into a layer's plan: the pruning, and products that skip zeros."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten import keyed
from hasten.kernels import zero_skip
from hasten.kernels.native import dense, line
from hasten.kernels.probe import choose
from hasten.kernels.prune_gradient import prune_gradient
from hasten.kernels.reference.noise import noise16
from hasten.methods.products.gradient_threshold import norm_level, predicted, pushed, quantile, threshold
from hasten.products import Geometry, Saved, arithmetic

if TYPE_CHECKING:
    from hasten.methods.products.activation_gradient_pruning import ActivationGradientPruning

FEWEST = 1024
"""Tensors with fewer elements are not pruned: too few to tell a distribution from (our choice)."""
STRIP = 16
EDGES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
"""A probe's answer holds for densities between two of these (our choice)."""
EVERY = 32
"""Updates between two looks at the density that decides which kernel runs (our choice)."""


def blocks_of(g: Tensor, unit: str) -> Tensor:
    """Return g, (N, C, H, W) or (..., C), as a view or copy (blocks, m), a row for each block.

    "strip": 16 neighbouring channels of one pixel, all channels where their number is no multiple of 16; "map": a sample's
    channel (of a Linear: a sample).
    """
    if g.dim() != 4:
        return g.reshape(-1, g.shape[-1] if unit == "map" or g.shape[-1] % STRIP else STRIP)
    if unit == "map":
        return g.reshape(g.shape[0] * g.shape[1], -1)
    return g.permute(0, 2, 3, 1).reshape(-1, g.shape[1] if g.shape[1] % STRIP else STRIP)


def unblocked(rows: Tensor, like: Tensor, unit: str) -> Tensor:
    """Return the rows of `blocks_of` in the shape of ``like``."""
    if like.dim() != 4 or unit == "map":
        return rows.reshape(like.shape)
    n, c, h, w = like.shape
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)


def prune_blocks(rows: Tensor, tau: float, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``rows`` (blocks, m) pruned as wholes, their norms (blocks,) before, and which were kept.

    A row of norm q * tau, q < 1, is kept with probability q and then scaled by 1 / q, so that its mean stays and its norm is
    0 or tau; longer rows stay (our choice, not the paper's).
    """
    norms = torch.linalg.vector_norm(rows.float(), dim=1)
    q = norms / tau
    bar = (noise16(key, len(rows), rows.device).float() + 0.5) / 65536
    kept = ~(q <= bar) & (norms > 0) | norms.isnan()
    scale = torch.where(kept, q.clamp(max=1.0).reciprocal(), torch.zeros_like(q))
    scaled = (rows.float() * scale[:, None]).to(rows.dtype)
    # not a number times 0 would be none, and rows that stay must stay bit for bit
    return (
        torch.where((q >= 1)[:, None], rows, torch.where(kept[:, None], scaled, torch.zeros_like(rows))),
        norms,
        kept,
    )


class Pruner:
    """Prunes one layer's gradient, remembers its thresholds in ``method.fifo_[layer]`` and counts in ``method.counts_``."""

    name = "stochastic pruning"

    def __init__(self, method: ActivationGradientPruning, layer: str) -> None:
        self.method, self.layer = method, layer
        self.level = 0.0
        self._at = (-1, 0)  # update and call within it
        self._last: tuple[Tensor, int, Tensor] | None = None
        self._tau: float | None = None

    def forget(self) -> None:
        """Let go of the last tensors."""
        self._last = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` pruned; asked again for the same tensor or layer in one step, return the same."""
        m = self.method
        if m.p == 0.0 or tensor.numel() < FEWEST:
            return tensor
        if self._last is not None and self._last[0] is tensor and self._last[1] == tensor._version:
            return self._last[2]
        update = m.updates()
        again = self._at[0] == update and not m.shared
        if not again:
            self._at = (update, self._at[1] + 1 if self._at[0] == update else 0)
        key = ("noise", self.layer, *self._at, m.rank)
        result = self._pruned(tensor, key, again)
        self._last = (tensor, tensor._version, result)
        return result

    def _pruned(self, g: Tensor, key: tuple[keyed.Key, ...], again: bool) -> Tensor:
        m = self.method
        past = m.fifo_.setdefault(self.layer, [])
        rows = blocks_of(g, m.unit) if m.unit != "element" else None
        fresh: float | None = None
        if not again:
            self._tau = predicted(past, m.n_f) if m.n_f else None
            if self._tau is None:  # no prediction yet, or none wanted: a pass of its own
                fresh = self._fresh(g, rows, None, key)
                if m.n_f == 0:
                    self._tau = fresh
        tau = self._tau
        if tau is None or not 0.0 < tau < math.inf or not 0.0 < self._held(g, tau) < math.inf:
            if not again:
                self._remember(past, fresh if fresh is not None else self._fresh(g, rows, None, key))
            return g
        if rows is None:
            result: Tensor
            result, totals = prune_gradient(g, tau, m.key(*key))
            found, zeros, pruned, raised = totals.tolist()
            mean = found / g.numel()
        else:
            pruned_rows, norms, kept = prune_blocks(rows, tau, m.key(*key))
            result = unblocked(pruned_rows, g, m.unit)
            mean = float(norms.double().mean())
            zeros = float((g == 0).sum())
            pruned = float((result == 0).sum()) - zeros
            raised = float((kept & (norms < tau)).sum()) * rows.shape[1]
        if not again:
            self._remember(past, fresh if fresh is not None else self._fresh(g, rows, mean, key))
            counts = m.counts_.setdefault(self.layer, [0.0] * 5)
            for i, value in enumerate((1.0, float(g.numel()), zeros, pruned, raised)):
                counts[i] += value
        return result

    @staticmethod
    def _held(g: Tensor, tau: float) -> float:
        """Return tau in the dtype of g, in which it may be 0 or infinite."""
        return tau if g.dtype == torch.float32 else torch.tensor(tau, dtype=g.dtype).item()

    def _remember(self, past: list[float], tau: float) -> None:
        self.method.fifo_[self.layer] = pushed(past, tau, self.method.n_f) if self.method.n_f else []

    def _fresh(self, g: Tensor, rows: Tensor | None, mean: float | None, key: tuple[keyed.Key, ...]) -> float:
        """Return the threshold of this very batch from the gradient before pruning."""
        m = self.method
        if m.dist == "empirical":
            sizes = torch.linalg.vector_norm(rows.float(), dim=1) if rows is not None else line(dense(g))
            return quantile(sizes, m.p, m.seed(), "sample", *key)
        if mean is None:
            sizes = (
                torch.linalg.vector_norm(rows.float(), dim=1) if rows is not None else line(dense(g)).abs()
            )
            mean = (
                float(sizes.double().mean())
                if rows is not None
                else float(sizes.sum(dtype=torch.float64)) / g.numel()
            )
        if rows is None:
            return threshold(m.p, mean)
        if not self.level:
            self.level = norm_level(m.p, rows.shape[1])
        return self.level * mean


class Gauge:
    """The density of one layer's grad_output, looked at now and then, and which kernel that means for a product."""

    def __init__(self, method: ActivationGradientPruning, layer: str) -> None:
        self.method, self.layer = method, layer
        self.taken: dict[str, int] = {"grad_input": 0, "grad_weight": 0}

    def choice(
        self, product: str, g: Tensor, describe: str, native: Callable[[], Any], dense: Callable[[], Any]
    ) -> str:
        """Return "native" or "dense"."""
        m = self.method
        if m.kernel != "auto":
            return m.kernel
        update = m.updates()
        seen = m.density_.get(self.layer)
        if seen is None or (seen[1] != update and (update % EVERY == 0 or update <= m.n_f + 1)):
            seen = m.density_[self.layer] = [float(torch.count_nonzero(g)) / max(1, g.numel()), float(update)]
        edge = next(e for e in EDGES if seen[0] <= e)
        name = f"{self.layer}|{product}|{edge}"
        if name not in m.choices_:
            key = f"zero_skip {product} {describe} density {edge}"
            m.choices_[name] = choose(key, {"dense": dense, "native": native}, rounds=3)
        return m.choices_[name]


def _images(t: Tensor) -> Tensor:
    """Return rows of features (..., C) as images of one pixel (N, C, 1, 1)."""
    return t.reshape(-1, t.shape[-1])[:, :, None, None]


def _numbers(geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    if not geometry.conv:
        return [1, 1], [0, 0], [1, 1]
    return list(geometry.stride), list(geometry.padding), list(geometry.dilation)


def _described(*tensors: Tensor, geometry: Geometry) -> str:
    def one(t: Tensor) -> str:
        last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
        return f"{'x'.join(map(str, t.shape))}{' channels_last' if last else ''}"

    stride, padding, dilation = _numbers(geometry)
    return f"{tensors[0].dtype} {', '.join(map(one, tensors))} stride {stride} padding {padding} dilation {dilation}"


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """Return ``result`` in the memory format of ``like``."""
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return result
    return result.contiguous()


class SkipInput:
    """grad_input from the non-zeros of grad_output."""

    name = "zero-skipping grad_input"
    selectable = True

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge

    def __call__(self, grad_output: Tensor, w: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_input, like ``saved.x_like``."""

        def native() -> Tensor:
            like = saved.x_like
            if geometry.conv:
                return _laid_out(
                    zero_skip.grad_input(grad_output, w, list(like.shape), *_numbers(geometry)), like
                )
            g = _images(grad_output)
            size = [len(g), w.shape[1], 1, 1]
            result: Tensor = zero_skip.grad_input(g, w[:, :, None, None], size, *_numbers(geometry))
            return result.reshape(like.shape)

        def dense() -> Tensor:
            return arithmetic.grad_input(grad_output, w, geometry, saved)

        described = _described(grad_output, w, geometry=geometry)
        if self.gauge.choice("grad_input", grad_output, described, native, dense) == "dense":
            return dense()
        self.gauge.taken["grad_input"] += 1
        return native()


class SkipWeight:
    """grad_weight from the non-zeros of grad_output."""

    name = "zero-skipping grad_weight"
    selectable = True
    needs_x = True

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge

    def __call__(self, grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_weight, like ``saved.w_like``."""

        def native() -> Tensor:
            like = saved.w_like
            if geometry.conv:
                kernel = list(like.shape[2:])
                return _laid_out(zero_skip.grad_weight(grad_output, x, kernel, *_numbers(geometry)), like)
            result: Tensor = zero_skip.grad_weight(
                _images(grad_output), _images(x), [1, 1], *_numbers(geometry)
            )
            return result.reshape(like.shape)

        def dense() -> Tensor:
            return arithmetic.grad_weight(grad_output, x, geometry, saved)

        described = _described(grad_output, x, saved.w_like, geometry=geometry)
        if self.gauge.choice("grad_weight", grad_output, described, native, dense) == "dense":
            return dense()
        self.gauge.taken["grad_weight"] += 1
        return native()
