"""What adaptive deep reuse refuses: settings out of range, and layers it cannot compute."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hasten.kernels.reference.deep_reuse import HIGHEST_BITS
from hasten.methods.products.reuse_ladder import PRODUCTS, divisors

if TYPE_CHECKING:
    from hasten.methods.products.adaptive_deep_reuse import AdaptiveDeepReuse

CHOICES = {
    "strategy": ("S1", "S2", "S3"),
    "order": ("pixel", "patch"),
    "scope": ("image", "batch", "across_batch"),
    "scale": ("none", "norm"),
    "kernel": ("auto", "native", "dense"),
}


def _whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def problems(of: AdaptiveDeepReuse) -> list[str]:
    """Return every setting that is out of range, a sentence each."""
    found = [
        f"{name} is {getattr(of, name)!r}; allowed: {', '.join(map(repr, allowed))}."
        for name, allowed in CHOICES.items()
        if getattr(of, name) not in allowed
    ]
    if not _whole(of.bits, 1, HIGHEST_BITS):
        found.append(f"bits (H) must be a whole number from 1 to {HIGHEST_BITS}, not {of.bits!r}.")
    if not of.bit_counts or not all(_whole(h, 1, HIGHEST_BITS) for h in of.bit_counts):
        found.append(f"bit_counts must be whole numbers from 1 to {HIGHEST_BITS}, not {of.bit_counts!r}.")
    for name in ("length", "rungs", "patience_epochs", "cr_max_age"):
        if not _whole(getattr(of, name), 1):
            found.append(f"{name} must be a whole number from 1, not {getattr(of, name)!r}.")
    if not all(_whole(length, 1) for length in of.lengths):
        found.append(f"lengths must be whole numbers from 1, not {of.lengths!r}.")
    for name, low, high in (("a", 0.0, math.inf), ("max_rho", 0.0, math.inf), ("max_error", 0.0, math.inf)):
        if not low < getattr(of, name) <= high:
            found.append(f"{name} must be above {low:g}, not {getattr(of, name)}.")
    if not 0.0 <= of.overhead < math.inf:
        found.append(f"overhead must be 0 or more, not {of.overhead}.")
    for name in ("decay", "improvement", "dense_share"):
        if not 0.0 <= getattr(of, name) < 1.0:
            found.append(f"{name} must lie in [0, 1), not {getattr(of, name)}.")
    if "output" not in of.products or not set(of.products) <= set(PRODUCTS):
        found.append(
            f"products must be 'output' and any of 'grad_input', 'grad_weight', not {of.products!r}."
        )
    if of.strategy == "S3" and of.scope != "across_batch":
        found.append(f"S3 reuses rows across batches: give scope='across_batch', not {of.scope!r}.")
    if of.scope == "across_batch" and (of.center_hash or of.order == "patch"):
        found.append(
            "scope 'across_batch' needs hashes that mean the same in every batch and pixel pieces: not with "
            "center_hash=True or order='patch'."
        )
    return found


def impossible(name: str, module: nn.Module, of: AdaptiveDeepReuse) -> str | None:
    """Return why the layer cannot be reused whatever it costs, or None."""
    if isinstance(module, nn.ConvTranspose2d):
        return f"deep reuse supports Conv2d and Linear, layer {name} is a transposed convolution."
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"deep reuse supports groups=1 only, layer {name} has groups={module.groups}."
        if any(d != 1 for d in module.dilation):
            return f"deep reuse supports dilation=1 only, layer {name} has dilation={module.dilation}."
        if module.padding_mode != "zeros":
            return (
                f"deep reuse supports padding with zeros only, layer {name} pads by {module.padding_mode!r}."
            )
    elif of.scope == "image":
        return f"layer {name} is linear: an image has one row there, so scope='image' groups nothing."
    width = width_of(module, of.order)
    if of.strategy != "S2" and width % of.length and not of.pad_last_block:
        what = "C" if of.order == "pixel" else "K"
        return (
            f"layer {name}: L={of.length} does not divide {what}={width}; valid: "
            f"{','.join(map(str, divisors(width)))}, or pad_last_block=True."
        )
    return None


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a Conv2d or Linear."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def taps_of(module: nn.Module) -> int:
    """Return kh * kw; 1 for Linear."""
    return weight_of(module)[0, 0].numel()


def kernel_width(module: nn.Module) -> int:
    """Return kw."""
    return int(weight_of(module).shape[-1])


def width_of(module: nn.Module, order: str) -> int:
    """Return what L must divide: C for pixels' pieces, K for those of the unfolded input."""
    weight = weight_of(module)
    return int(weight.shape[1]) if order == "pixel" else weight[0].numel()
