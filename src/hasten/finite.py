"""Whether losses and gradients are finite: asked at once on a CPU, and a step late on a device that runs behind Python.

Reading a number back waits until a device has done all that was queued before it. So there the verdict on a step stays
on the device, where it also decides whether the step's update is applied at all; Python reads it before the next update,
when the device has passed that point long ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from hasten.contract import Batch


def gradients_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return every gradient that the optimizers are about to use."""
    return [p.grad for o in optimizers for g in o.param_groups for p in g["params"] if p.grad is not None]


def all_finite(gradients: list[Tensor]) -> Tensor:
    """Return, on their device, whether no element of ``gradients`` is NaN or infinite: a boolean scalar."""
    if not gradients:
        return torch.ones((), dtype=torch.bool)
    # the largest magnitude cannot overflow, as a sum of squares could, and NaN passes through it
    return torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all()


@dataclass
class Verdict:
    """Whether a step was finite, on its way from the device. step, batch: for the message where it was not."""

    held: Tensor
    arrived: torch.Event | None
    step: int
    batch: Batch

    @staticmethod
    def of(ok: Tensor, loss_ok: Tensor, step: int, batch: Batch) -> Verdict:
        """Send ``ok`` and ``loss_ok``, boolean scalars, towards Python without waiting for them."""
        both = torch.stack([ok, loss_ok])
        if both.device.type != "cuda":
            return Verdict(both, None, step, batch)
        held = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(both, non_blocking=True)
        arrived = torch.Event(both.device)
        arrived.record()
        return Verdict(held, arrived, step, batch)

    def good(self) -> bool:
        """Wait until the device has passed that point, and say whether the step was finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.held[0])

    @property
    def what(self) -> str:
        """What was not finite first, once ``good`` has said no: "loss" or "gradient"."""
        return "gradient" if bool(self.held[1]) else "loss"


def apply_if(
    ok: Tensor,
    update: Callable[[tuple[Optimizer, ...]], None],
    optimizers: tuple[Optimizer, ...],
    *,
    own: bool,
) -> None:
    """Run ``update(optimizers)`` so that no weight changes where ``ok`` (a boolean scalar on the device) is False.

    Fused optimizers skip the step themselves, as they do for ``torch.amp.GradScaler``; for others, and where ``update``
    is a method's (``own`` is False), the weights from before are put back on the device. Their slots are not.
    """
    if own and all(
        getattr(o, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in o.param_groups)
        for o in optimizers
    ):
        found_inf = (~ok).to(torch.float32)
        for o in optimizers:
            o.found_inf = found_inf  # type: ignore[attr-defined]
        try:
            update(optimizers)
        finally:
            for o in optimizers:
                del o.found_inf  # type: ignore[attr-defined]
        return
    weights = [p for o in optimizers for g in o.param_groups for p in g["params"] if p.grad is not None]
    before = [p.detach().clone() for p in weights]
    update(optimizers)
    with torch.no_grad():
        for p, old in zip(weights, before, strict=True):
            p.copy_(torch.where(ok, p, old))
