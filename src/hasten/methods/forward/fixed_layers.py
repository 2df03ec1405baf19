"""What limited precision puts into a layer's plan: a Convert at each tensor, and products on 16-bit numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.errors import UnsupportedError
from hasten.kernels.fixed_conv import fixed_conv, fixed_conv_input, fixed_conv_weight
from hasten.methods.forward.fixed_format import Format, StraightThrough, convert
from hasten.methods.forward.precision_schedule import Policy
from hasten.products import Geometry, Saved

ROLES = ("x", "w", "output", "grad_output", "grad_input", "grad_weight")
FORMAT = {
    "x": "f_act", "w": "f_w", "output": "f_act", "grad_output": "f_err", "grad_input": "f_err", "grad_weight": "f_grad",
}  # fmt: skip
WORDS = {"f_w": "weights", "f_act": "activations", "f_err": "errors", "f_grad": "gradients"}
HEADROOM = 1
"""Bits above the running maximum, which is that of the steps before (our choice)."""


@dataclass
class Layer:
    """One layer's rounding: its policy now, what it counted, and the running maxima of its tensors.

    key(layer, role, call) gives the random bits' key, a function of the update the run is in. scales: running maximum by
    role, where the power-of-two scale follows it.
    """

    name: str
    policy: Policy
    key: Callable[[str, str, int], int]
    update: Callable[[], int]
    running: bool
    decay: float
    native: bool = False
    maxima: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    converted: int = 0
    fractions: dict[str, int] = field(default_factory=dict)
    _at: int = -1
    _calls: dict[str, int] = field(default_factory=dict)

    def next_key(self, role: str) -> int:
        """Return the key of the next Convert of this tensor; every call of an update has its own."""
        now = self.update()
        if now != self._at:
            self._at, self._calls = now, {}
        call = self._calls[role] = self._calls.get(role, -1) + 1
        return self.key(self.name, role, call)

    def form(self, role: str, tensor: Tensor) -> Format:
        """Return the format of ``tensor``: the policy's, on the scale that its role has now.

        Errors of a batch of B are B times as small as those of a sum over samples, which the formats speak of: the paper
        divides by B in the weight gradient. So they take round(log2(B)) bits more behind the point (our choice).
        """
        kind = FORMAT[role]
        form: Format = getattr(self.policy, kind)
        if kind == "f_err" and not self.running:
            form = form.moved(round(math.log2(max(1, len(tensor)))))
        elif self.running and kind in ("f_err", "f_grad"):
            if role not in self.maxima:
                self.maxima[role] = float(tensor.abs().max()) if tensor.numel() else 0.0
            largest = self.maxima[role]
            if 0.0 < largest < math.inf:
                above = math.frexp(largest)[1] + HEADROOM  # largest < 2**(above - HEADROOM)
                bits = form.wl - 1 - above
                form = form.moved(min(100, max(-100, bits)) - form.fl)
        self.fractions[role] = form.fl
        return form

    def see(self, role: str, n: int, saturated: Tensor, largest: Tensor) -> None:
        """Count what a Convert met, and let the running maximum follow."""
        self.converted += n
        kind = WORDS[FORMAT[role]]
        self.counts[kind] = self.counts[kind] + saturated if kind in self.counts else saturated
        if role in self.maxima:
            size = float(largest)
            if math.isfinite(size):
                self.maxima[role] = max(self.decay * self.maxima[role], size)

    def rounding(self, role: str) -> str:
        """Return how this tensor is rounded."""
        return self.policy.rounding_activations if FORMAT[role] == "f_act" else self.policy.rounding


class Rounding:
    """Convert at one tensor of a layer."""

    def __init__(self, layer: Layer, role: str) -> None:
        self.layer, self.role = layer, role
        self.name = f"fixed point, {WORDS[FORMAT[role]]}"
        self.differentiable = role in ("x", "w", "output")
        self._pending: tuple[Tensor, Tensor] | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor on its grid. Raises UnsupportedError for another dtype than float32."""
        if tensor.dtype != torch.float32:
            raise UnsupportedError(
                f"limited_precision: layer {self.layer.name!r} meets {tensor.dtype} (autocast?), but fixed point is emulated "
                f"on torch.float32. Turn autocast off, or give policy='bfloat16'."
            )
        if self._pending is not None and self._pending[0] is tensor:
            # the two gradients ask one after the other, and both must see the same errors
            result, self._pending = self._pending[1], None
            return result
        layer, role = self.layer, self.role
        form, key, rounding = layer.form(role, tensor), layer.next_key(role), layer.rounding(role)
        if self.differentiable:
            y: Tensor = StraightThrough.apply(  # type: ignore[no-untyped-call]
                tensor, form, key, rounding, lambda *met: layer.see(role, *met)
            )
            return y
        y, saturated, largest = convert(tensor, form, key, rounding)
        layer.see(role, tensor.numel(), saturated, largest)
        if role == "grad_output" and layer.native:
            self._pending = (tensor, y)
        return y


class NarrowOutput:
    """output on 16-bit products with exact sums; the bias is added to the result."""

    name = "16-bit products"
    selectable = False

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (output, nothing)."""
        y = fixed_conv(
            x, w, self.layer.fractions["x"], self.layer.policy.f_w.fl, geometry.stride, geometry.padding,
            geometry.dilation,
        )  # fmt: skip
        return (y if bias is None else y + bias[:, None, None]), ()


class NarrowInput:
    """grad_input on 16-bit products with exact sums."""

    name = "16-bit products"
    selectable = False

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, grad_output: Tensor, w: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_input, like ``saved.x_like``."""
        result: Tensor = fixed_conv_input(
            grad_output, w, saved.x_like.shape[2:], self.layer.fractions["grad_output"], self.layer.policy.f_w.fl,
            geometry.stride, geometry.padding, geometry.dilation,
        )  # fmt: skip
        return result


class NarrowWeight:
    """grad_weight on 16-bit products with exact sums."""

    name = "16-bit products"
    selectable = False
    needs_x = True

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_weight, like ``saved.w_like``."""
        fractions = self.layer.fractions
        result: Tensor = fixed_conv_weight(
            grad_output, x, saved.w_like.shape[2:], fractions["grad_output"], fractions["x"], geometry.stride,
            geometry.padding, geometry.dilation,
        )  # fmt: skip
        return result
