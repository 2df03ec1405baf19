"""Put a plan into a plain Conv2d or Linear, and take it out again.

`install` changes the class of the module and nothing else: parameters, their names, the state_dict, hooks and
``isinstance(module, nn.Conv2d)`` stay. `uninstall` changes it back.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten import errors
from hasten.products.arithmetic import Geometry
from hasten.products.function import three_products
from hasten.products.plan import Plan

_LINEAR = Geometry(False)


class PlannedConv2d(nn.Conv2d):
    """A Conv2d whose three products follow ``plan``. Made by `install`, never by its constructor."""

    plan: Plan

    def forward(self, input: Tensor) -> Tensor:
        """Return the output (N, O, H', W') of ``input`` (N, C, H, W), or the same without N."""
        plan = self.plan
        if not _runs(self, plan):
            return super().forward(input)
        x, geometry = _padded(self, input)
        batched = x.dim() == 4
        y = _run(self, x if batched else x.unsqueeze(0), geometry)
        return y if batched else y.squeeze(0)


class PlannedLinear(nn.Linear):
    """A Linear whose three products follow ``plan``. Made by `install`, never by its constructor."""

    plan: Plan

    def forward(self, input: Tensor) -> Tensor:
        """Return the output (..., O) of ``input`` (..., C)."""
        plan = self.plan
        if not _runs(self, plan):
            return super().forward(input)
        if input.dim() == 1:
            return _run(self, input.unsqueeze(0), _LINEAR).squeeze(0)
        return _run(self, input, _LINEAR)


Planned = PlannedConv2d | PlannedLinear


def supported(module: nn.Module) -> str | None:
    """Return why ``module`` cannot carry a plan, or None if it can."""
    if isinstance(module, Planned):
        return None
    kind = type(module)
    if kind not in {nn.Conv2d, nn.Linear}:
        if isinstance(module, nn.Conv2d | nn.Linear):
            return f"its class {kind.__name__} changes what {kind.__mro__[1].__name__} does"
        return f"a {kind.__name__} is neither Conv2d nor Linear"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    weight = cast(Tensor, module.weight)
    if not weight.is_floating_point():
        return f"its weight has dtype {weight.dtype}; allowed: real floating point"
    return None


def install(module: nn.Module, layer: str = "layer") -> Plan:
    """Return the plan of ``module``, putting an empty one in if it has none. ``layer`` names it in messages.

    Raises `UnsupportedError` with the reason of `supported`.
    """
    if isinstance(module, Planned):
        return module.plan
    reason = supported(module)
    if reason is not None:
        raise errors.UnsupportedError(
            f"layer {layer!r} cannot carry a plan: {reason}. Allowed: plain nn.Conv2d and nn.Linear. "
            "Leave it out."
        )
    if isinstance(module, nn.Conv2d):
        module.plan = Plan(layer, module.groups)  # type: ignore[assignment]
        module.__class__ = PlannedConv2d
    else:
        module.plan = Plan(layer)  # type: ignore[assignment]
        module.__class__ = PlannedLinear
    return cast(Plan, module.plan)


def uninstall(module: nn.Module) -> None:
    """Make ``module`` the plain layer it was; do nothing if it carries no plan."""
    if isinstance(module, Planned):
        module.__class__ = nn.Conv2d if isinstance(module, PlannedConv2d) else nn.Linear  # type: ignore[assignment]
        del module.plan


def planned(model: nn.Module) -> dict[str, Plan]:
    """Return the plans inside ``model`` by layer name."""
    return {name: module.plan for name, module in model.named_modules() if isinstance(module, Planned)}


def _runs(module: Planned, plan: Plan) -> bool:
    """Whether the plan changes anything in this call; otherwise PyTorch's own op runs."""
    if not module.training or not plan.active or plan.recipe.exact:
        return False
    return torch.is_grad_enabled() or not plan.recipe.plain_output


def _run(module: Planned, x: Tensor, geometry: Geometry) -> Tensor:
    w, bias, device = module.weight, module.bias, x.device.type
    if not torch.is_autocast_enabled(device):
        return three_products(x, w, bias, module.plan.recipe, geometry)
    # PyTorch would cast inside the op. Casting here lets the plan see the operands that the op would use.
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        cast_bias = None if bias is None else _cast(bias, dtype)
        return three_products(_cast(x, dtype), _cast(w, dtype), cast_bias, module.plan.recipe, geometry)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does: float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _padded(module: PlannedConv2d, x: Tensor) -> tuple[Tensor, Geometry]:
    """Return the input with any padding that convolution itself cannot do, and the geometry that is left."""
    stride, dilation, groups = module.stride, module.dilation, module.groups
    around = module._reversed_padding_repeated_twice  # (left, right, top, bottom)
    if module.padding_mode != "zeros":
        x = functional.pad(x, around, mode=module.padding_mode)
        return x, Geometry(True, stride, (0, 0), dilation, groups)
    if not isinstance(module.padding, str):
        return x, Geometry(True, stride, module.padding, dilation, groups)
    left, right, top, bottom = around
    if left != right or top != bottom:
        x = functional.pad(x, around)
        left = top = 0
    return x, Geometry(True, stride, (top, left), dilation, groups)
