"""Whether a convolution's fixed-point products run on 16-bit numbers or on float32, found by a timed probe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hasten import keyed
from hasten.kernels.fixed_conv import fixed_conv, fixed_conv_input, fixed_conv_weight
from hasten.kernels.native import extension
from hasten.kernels.probe import choose
from hasten.methods.forward.fixed_format import Format, convert
from hasten.methods.forward.precision_schedule import Policy
from hasten.products import Geometry, arithmetic

WORD = 16
ACTIVATIONS, WEIGHTS, ERRORS = Format(6, 10), Format(2, 14), Format(1, 15)


def unsuitable(module: nn.Module, policies: Sequence[Policy]) -> str | None:
    """Return why a layer cannot have 16-bit products, or None."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return "only convolutions without groups have them"
    if any(max(p.f_w.wl, p.f_act.wl, p.f_err.wl) > WORD for p in policies if p.emulated):
        return f"a word is longer than {WORD} bits"
    return None


def faster_products(
    wish: str, module: nn.Module, shapes: tuple[torch.Size, torch.Size], policies: Sequence[Policy]
) -> str:
    """Return "native" or "dense" for one layer; wish: "native" wherever possible, "auto" by a probe.

    shapes: of the layer's input (N, C, H, W) and output. The probe runs the three products forward and backward.
    """
    if unsuitable(module, policies) is not None or len(shapes[0]) != 4:
        return "dense"
    if wish == "native":
        return wish
    if extension() is None:
        return "dense"
    assert isinstance(module, nn.Conv2d)
    g = keyed.generator("faster_products")
    layout = torch.channels_last
    x = torch.randn(shapes[0], generator=g).contiguous(memory_format=layout)
    w = 0.1 * torch.randn(module.weight.shape, generator=g).contiguous(memory_format=layout)
    e = 0.01 * torch.randn(shapes[1], generator=g).contiguous(memory_format=layout)
    x, w, e = (convert(t, f, 1)[0] for t, f in ((x, ACTIVATIONS), (w, WEIGHTS), (e, ERRORS)))
    padding = (0, 0) if isinstance(module.padding, str) else module.padding
    geometry = Geometry(True, module.stride, padding, module.dilation)
    how = (geometry.stride, geometry.padding, geometry.dilation)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return "dense"

    def dense() -> None:
        arithmetic.output(x, w, None, geometry)
        arithmetic.gradients(e, x, w, geometry, (True, True, False))

    def native() -> None:
        fixed_conv(x, w, ACTIVATIONS.fl, WEIGHTS.fl, *how)
        fixed_conv_input(e, w, x.shape[2:], ERRORS.fl, WEIGHTS.fl, *how)
        fixed_conv_weight(e, x, w.shape[2:], ERRORS.fl, ACTIVATIONS.fl, *how)

    key = f"fixed_conv {tuple(shapes[0])} {tuple(module.weight.shape)} {how}"
    return choose(key, {"dense": dense, "native": native})
