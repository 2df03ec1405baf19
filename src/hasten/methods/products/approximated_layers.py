"""Which convolutions take an approximate weight gradient, why others do not, and where it is the faster of the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hasten import keyed
from hasten.contract import overrides
from hasten.errors import SettingsError
from hasten.kernels.one_patch import one_patch
from hasten.kernels.probe import choose
from hasten.products import supported

if TYPE_CHECKING:
    from hasten.session import Session

MIN_PLACES = 16  # of a map: with fewer, one patch is a large share of all patches
PROBED_IMAGES = 32


@dataclass(frozen=True)
class Candidate:
    """A convolution that can take an approximate gradient, with its input's and output's shapes in the sample batch."""

    name: str
    module: nn.Conv2d
    x: torch.Size
    y: torch.Size


def candidates(
    session: Session, layers: str | Sequence[str], owner: str
) -> tuple[list[Candidate], dict[str, str]]:
    """Return the layers chosen and, by name, why the others were not.

    layers: "alternate" takes every second convolution with a kernel of 2x2 or larger, in the order of the forward pass,
    from the second one (from the paper: every second; our choice: which). Patterns take what they match; the first convolution stays exact.
    Raises SettingsError for a pattern that matches nothing, and for the exact name of a layer for which no
    approximation is defined.
    """
    found = dict(session.layers(nn.Conv2d, nn.Linear))
    if not isinstance(layers, str):
        _check_patterns(list(found), layers, owner)
    shapes = session.shapes()
    order = [name for name in shapes if isinstance(found.get(name), nn.Conv2d)]
    first = order[0] if order else None
    large = [name for name in order if _kernel(found[name]) > 1]
    chosen, skipped = [], {}
    for name, module in found.items():
        asked = layers != "alternate" and any(fnmatchcase(name, p) for p in layers)
        undefined = _undefined(module)
        if undefined and name in layers and not isinstance(layers, str):
            raise SettingsError(
                f"{owner}: layer {name!r} is in `layers`, but {undefined}; allowed: Conv2d with groups=1 and dilation=1. "
                f"Take it out of `layers`."
            )
        reason = undefined or supported(module)
        if reason is None and name not in shapes:
            reason = "the forward pass does not run it as a module"
        if reason is None and layers != "alternate" and not asked:
            reason = "its name is not in `layers`"
        if reason is None:
            assert isinstance(module, nn.Conv2d)
            reason = _left_out(module, shapes[name][1], name == first)
        if reason is None and layers == "alternate" and large.index(name) % 2 == 0:
            reason = f"it is number {large.index(name)} of the layers in question, and those with odd numbers are chosen"
        if reason is not None:
            skipped[name] = reason
            continue
        assert isinstance(module, nn.Conv2d)
        chosen.append(Candidate(name, module, *shapes[name]))
    return chosen, skipped


def _check_patterns(names: list[str], patterns: Sequence[str], owner: str) -> None:
    lost = [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]
    if lost:
        raise SettingsError(
            f"{owner}: the patterns {', '.join(map(repr, lost))} match no Conv2d or Linear of the model; its layers are "
            f"{', '.join(names) or 'none'}."
        )


def _kernel(module: nn.Module) -> int:
    assert isinstance(module, nn.Conv2d)
    return min(module.kernel_size)


def _undefined(module: nn.Module) -> str | None:
    """Return why no approximation is defined for ``module`` at all."""
    if isinstance(module, nn.Linear):
        return "it is a Linear, whose x has no patches"
    assert isinstance(module, nn.Conv2d)
    if module.groups != 1:
        return f"the patch approximation is undefined across groups in this release (groups={module.groups})"
    if any(d != 1 for d in module.dilation):
        return f"the patch approximation is undefined for dilation={module.dilation}"
    return None


def _left_out(module: nn.Conv2d, y: torch.Size, first: bool) -> str | None:
    if first:
        return "it is the first convolution"
    if _kernel(module) < 2:
        return f"its kernel is {'x'.join(map(str, module.kernel_size))}: 2x2 or larger pays"
    places = math.prod(y[2:])
    if places < MIN_PLACES:
        exact = ", so that one patch is exact already" if places == 1 else ""
        return f"its maps have {places} places, fewer than {MIN_PLACES}{exact}"
    if not module.weight.requires_grad:
        return "its weight is frozen"
    return None


def operand_dtype(session: Session, weight: Tensor) -> torch.dtype:
    """Return the dtype in which the methods attached so far have a layer compute."""
    with ExitStack() as stack:
        for method in session.methods:
            if method.spec.name in session.effects and overrides(method, "context"):
                stack.enter_context(method.context())
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def patch_is_faster(
    candidate: Candidate, dtype: torch.dtype, layout: torch.memory_format, position: str, weight: str
) -> bool:
    """Return whether the one-patch gradient of this layer takes clearly less time than the exact one, by a timed probe."""
    m, device = candidate.module, candidate.module.weight.device
    n = min(PROBED_IMAGES, candidate.x[0])
    sizes = (n, *candidate.x[1:]), (n, *candidate.y[1:])
    assert not isinstance(m.padding, str) or m.padding in ("same", "valid")
    padding = (0, 0) if m.padding == "valid" else m.padding
    if isinstance(padding, str):
        padding = tuple((k - 1) // 2 for k in m.kernel_size)
    if [(x + 2 * p - k) // s + 1 for x, p, k, s in zip(sizes[0][2:], padding, m.kernel_size, m.stride, strict=True)] != list(sizes[1][2:]):  # fmt: skip
        return True  # padded outside of the op; like its neighbours
    generator = keyed.generator("one_patch probe", device=device)
    x, g = (
        torch.randn(size, generator=generator, device=device).to(dtype).contiguous(memory_format=layout)
        for size in sizes
    )
    w = torch.zeros(m.weight.shape, dtype=dtype, device=device).contiguous(memory_format=layout)
    key = f"one_patch {position} {weight} x{tuple(x.shape)} w{tuple(w.shape)} s{m.stride} p{padding} {dtype} {layout} {device.type}"
    backward = torch.ops.aten.convolution_backward
    ways = {
        "exact": lambda: backward(g, x, w, [w.shape[0]], m.stride, padding, (1, 1), False, (0, 0), 1, (False, True, False)),
        "patch": lambda: one_patch(g, x, m.kernel_size, m.stride, padding, position, weight),
    }  # fmt: skip
    return choose(key, ways, rounds=5) == "patch"
