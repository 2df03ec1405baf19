"""Stores one layer's input in a few bits a value between forward and backward: the products' codec, for batch norm too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten import keyed
from hasten.errors import NonFiniteError, UnsupportedError
from hasten.kernels.group_quantize import group_dequantize, group_quantize, group_spread, sample_dense
from hasten.methods.products.compressed_allocation import allocate, norm_sensitivity, product_sensitivity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CompressedActivationError(UnsupportedError):
    """A gradient of a gradient was asked for through activations of which only a lossy copy was kept."""


def first_order_only() -> None:
    """Raise CompressedActivationError in a backward pass with ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise CompressedActivationError(
            "ActNN stores a lossy copy; higher-order gradients are not supported. Leave the method out, or give "
            "level='L0', for a step that asks for create_graph=True."
        )


@dataclass
class Run:
    """What all layers of one session share.

    key: (seed, name, rank). forward: counts the samples that went forward, so that noise never repeats. group: G.
    smallest: tensors of fewer bytes stay exact. per_sample: bits differ between the samples of a batch. index:
    numbers of the samples in the training set, where their gradients are remembered.
    """

    key: tuple[int | str, ...]
    forward: Callable[[], int]
    group: int
    smallest: int
    stochastic: bool = True
    exact: bool = False
    per_sample: bool = False
    swap: bool = False
    debug: bool = False
    measuring: bool = False
    index: Tensor | None = None
    counts: dict[str, int] = field(default_factory=dict)


class Kept(NamedTuple):
    """What `GroupCodec.decode` must know besides the tensors."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bits: int | None  # of every sample, or None where they are among the tensors


class GroupCodec:
    """Rounds a layer's input stochastically by groups and packs it.

    layer: its name. kernel, groups: positions of the kernel and groups of the convolution; kernel 0 says batch norm.
    channel_dim: of the input. bits: of this layer, a fraction only with ``per_sample``. gradient: mean squared norm of the samples' output gradients when last seen; 0
    before. remembered: the same for each sample of the training set, NaN where unseen, or None.
    """

    name = "stochastic group quantisation"

    def __init__(
        self, run: Run, layer: str, bits: float, *, kernel: int = 0, groups: int = 1, channel_dim: int = 1
    ) -> None:
        self.run, self.layer, self.bits = run, layer, bits
        self.kernel, self.groups, self.channel_dim = kernel, groups, channel_dim
        self.gradient = 0.0
        self.remembered: Tensor | None = None
        self.calls = 0
        self._norms: Tensor | None = None
        self.sensitivity: Tensor | None = None  # C of each sample of the last batch measured
        self.values = 0  # D of it

    # -- forward
    def why_exact(self, x: Tensor) -> str | None:
        """Return why ``x`` is not worth rounding or cannot be, or None."""
        if x.dtype not in DTYPES:
            return f"{x.dtype} is not float32, bfloat16 or float16"
        if x.dim() < 3:
            return f"its input has {x.dim()} dimensions, as classifiers have: small, and kept exact"
        if x.numel() * x.element_size() < self.run.smallest:
            return f"its input has {x.numel() * x.element_size()} bytes, fewer than min_bytes={self.run.smallest}"
        if x.numel() < self.run.group * len(x):
            return f"a sample has {x.numel() // len(x)} values, fewer than one group of {self.run.group}"
        return None

    def encode(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return the tensors to keep of ``x`` (N, ...) and what `decode` needs besides.

        scale, shift: (C,); ``x * scale + shift`` is rounded, and decoded, in the place of ``x``. Not where that is
        kept exact: there `decode` needs None.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "actnn cannot be traced by torch.compile, which would fix its noise; run the model eagerly, or give "
                "torch.compile an activation_memory_budget in the place of actnn."
            )
        if self.run.exact or self.why_exact(x) is not None:
            self._count(exact=1)
            return (x,), None
        if self.run.debug and not bool(x.isfinite().all()):
            raise NonFiniteError(f"the input of {self.layer} holds a NaN or an infinity.")
        whole = x.numel() * x.element_size()
        x = sample_dense(x)
        # samples share bits by the ranges of what is kept, so that it must exist before it is packed
        if self.run.per_sample and scale is not None and shift is not None:
            channels = (-1, *(1,) * (x.dim() - 2))
            x = torch.addcmul(shift.view(channels).to(x.dtype), x, scale.view(channels).to(x.dtype))
            scale = shift = None
        bits, each = self._bits(x)
        total = int(self.bits * len(x) + 1e-6) if each is None else each * len(x)
        key = keyed.key64(*self.run.key, self.layer, self.run.forward(), self.calls)
        self.calls += 1
        codes, meta = group_quantize(x, bits, total, self.run.group, key, self.run.stochastic, scale, shift)
        kept: tuple[Tensor, ...] = (codes, meta) if each is not None else (codes, meta, bits)
        self._count(tensors=1, bytes=whole, stored=sum(t.numel() * t.element_size() for t in kept))
        if self.run.swap:
            kept = tuple(_pinned(t) for t in kept)
        return kept, Kept(x.shape, x.stride(), x.dtype, x.device, each)

    def _bits(self, x: Tensor) -> tuple[Tensor, int | None]:
        """Return the bits of each sample, (N,), and the number all share, or None."""
        if not self.run.per_sample:
            each = int(self.bits)
            return torch.full((len(x),), each, dtype=torch.int32, device=x.device), each
        c = self._sensitivity(group_spread(x, self.run.group), x.shape, self._expected(x))
        return allocate(c, None, int(self.bits * len(x) + 1e-6)), None

    def _sensitivity(self, spread: Tensor, shape: torch.Size, gradient: Tensor | float) -> Tensor:
        group, positions = self.run.group, math.prod(shape[1:]) // shape[self.channel_dim]
        if not self.kernel:
            return norm_sensitivity(spread, group=group, positions=positions)
        gradient = torch.as_tensor(gradient, device=spread.device)
        return product_sensitivity(
            spread, gradient, group=group, positions=positions, kernel=self.kernel, groups=self.groups
        )

    def _expected(self, x: Tensor) -> Tensor | float:
        """Return the squared gradient norms that the samples of ``x`` are expected to meet."""
        index = self.run.index
        if self.remembered is None or index is None or len(index) != len(x):
            return self.gradient
        known = self.remembered[index.to(self.remembered.device)]
        return known.nan_to_num(float(known.nanmean().nan_to_num(self.gradient))).to(x.device)

    # -- backward
    def observe(self, grad_output: Tensor) -> None:
        """See the gradient that will meet the input: its squared norm in each sample, where that is wanted."""
        self._norms = None
        index = self.run.index
        remember = self.remembered is not None and index is not None and len(index) == len(grad_output)
        if not (self.run.measuring or remember):
            return
        self._norms = grad_output.float().flatten(1).square().sum(1)
        if remember:
            assert self.remembered is not None
            assert index is not None
            at, new = index.to(self.remembered.device), self._norms.to(self.remembered.device)
            old = self.remembered[at]
            self.remembered[at] = torch.where(old.isnan(), new, 0.5 * old + 0.5 * new)

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        """Return the input again, rounded, with its shape, dtype and strides."""
        if meta is None:
            return tensors[0]
        kept: Kept = meta
        if self.run.swap:
            tensors = tuple(t.to(kept.device, non_blocking=True) for t in tensors)
        bits = (
            torch.full((kept.shape[0],), kept.bits, dtype=torch.int32, device=kept.device)
            if kept.bits is not None
            else tensors[2]
        )
        if self.run.measuring and self._norms is not None:
            self._measure(tensors[1], bits, kept)
        x: Tensor = group_dequantize(
            tensors[0], tensors[1], bits, self.run.group, kept.shape, kept.stride, kept.dtype
        )
        return x

    def _measure(self, meta: Tensor, bits: Tensor, kept: Kept) -> None:
        """Note C of each sample from the steps that were stored, which are the ranges over 2^b - 1, rounded up."""
        assert self._norms is not None
        ranges = meta[..., 1].float() * (2.0**bits - 1)[:, None]
        spread = ranges.nan_to_num(0.0).square().sum(1)
        self.gradient = float(self._norms.mean())
        self.values = math.prod(kept.shape[1:])
        gradient = self._norms if self.remembered is not None else self.gradient
        self.sensitivity = self._sensitivity(spread, kept.shape, gradient)

    def _count(self, **more: int) -> None:
        for name, value in more.items():
            self.run.counts[name] = self.run.counts.get(name, 0) + value


def _pinned(tensor: Tensor) -> Tensor:
    """Return a copy of a GPU's tensor in pinned memory of the host; the copy is ordered with the GPU's work."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
