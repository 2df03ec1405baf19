"""Groups that are whole layers: a convolution of a residual branch with what can make the branch give zero.

A branch that gives zero can be dropped: y = x + F(x) becomes y = x. A convolution of zeros is not enough for that where
a batch norm follows, for its bias is still added. So the weight and bias of the branch's end lie in the group too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hasten.errors import UnsupportedSurgeryError
from hasten.methods.structure.lasso import weight_of, wide
from hasten.surgery import Channels
from hasten.surgery.blocks import Branch, branches, shortcut_of

Per = Literal["conv", "branch"]


class NoShortcutError(UnsupportedSurgeryError):
    """A whole layer was to be driven to zero where no shortcut leads past it, so that the network would be cut."""


@dataclass(frozen=True, eq=False)
class Joint:
    """One group over several tensors, which are zero together. ``scale`` multiplies its norm."""

    name: str
    tensors: tuple[nn.Parameter, ...]
    scale: float = 1.0

    @property
    def size(self) -> int:
        """The number of weights in the group."""
        return sum(tensor.numel() for tensor in self.tensors)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return sqrt(sum of w^2) over all tensors, a scalar."""
        squares = [wide(tensor).square().sum() for tensor in self.tensors]
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add scale * w / norm to the gradients; nothing where the norm is 0."""
        norm = self.norm()
        factor = torch.where(norm > 0, self.scale / norm, torch.zeros_like(norm))
        for tensor in self.tensors:
            if tensor.grad is not None:
                tensor.grad.add_((wide(tensor) * factor).to(tensor.grad.dtype))

    @torch.no_grad()
    def shrink(self, rates: Mapping[int, float]) -> None:
        """Take the proximal step of length rate * scale on each tensor, ``rates`` by its id."""
        norm = self.norm().clamp_min(torch.finfo(torch.float32).tiny)
        for tensor in self.tensors:
            tensor.mul_((1 - rates[id(tensor)] * self.scale / norm).clamp_min(0).to(tensor.dtype))


def silencers(end: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return the parameters of a branch's last module that, all zero, make it give zero; none if it has no such."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.Conv2d, nn.Linear)
    if not isinstance(end, kinds) or end.weight is None:
        return ()
    return tuple(p for p in (end.weight, end.bias) if isinstance(p, nn.Parameter))


def droppable(channels: Channels, model: nn.Module) -> dict[str, Branch]:
    """Return the residual branches, by the block around each, that surgery can drop and that can give zero."""
    return {
        block: branch
        for block, branch in branches(channels.graph, model).items()
        if (branch.identity or shortcut_of(model.get_submodule(block)) is not None)
        and silencers(model.get_submodule(branch.end))
    }


def depth_groups(channels: Channels, model: nn.Module, per: Per) -> dict[str, Joint]:
    """Return the groups by the name of their convolution ("conv") or of the block ("branch").

    "conv": one for each convolution of a branch, with the silencers of the branch's end (in the authors' code the
    weight alone). "branch": one of all convolutions of the branch and the silencers. Frozen parameters are left out.
    """
    found: dict[str, Joint] = {}
    known = sorted(droppable(channels, model).items(), key=lambda item: len(item[1].modules))
    for block, branch in known:  # the innermost branch of a convolution counts
        own = silencers(model.get_submodule(branch.end))
        convs = {n: m for n in branch.modules if isinstance(m := model.get_submodule(n), nn.Conv2d)}
        if per == "branch":
            found[block] = _joint(block, [*map(weight_of, convs.values()), *own])
        else:
            found |= {n: _joint(n, [weight_of(m), *own]) for n, m in convs.items() if n not in found}
    return {name: joint for name, joint in found.items() if all(t.requires_grad for t in joint.tensors)}


def _joint(name: str, tensors: list[nn.Parameter]) -> Joint:
    return Joint(name, tuple({id(tensor): tensor for tensor in tensors}.values()))


def silent_blocks(channels: Channels, model: nn.Module) -> list[str]:
    """Return the blocks whose branch gives exactly zero, outermost only: they can go without a trace."""
    found = [
        block
        for block, branch in droppable(channels, model).items()
        if all(not tensor.any() for tensor in silencers(model.get_submodule(branch.end)))
    ]
    return [block for block in found if not any(block.startswith(f"{other}.") for other in found)]


def check_shortcuts(held: Collection[str], asked: Collection[str]) -> None:
    """Raise NoShortcutError if no layer (or block) is ``held`` in a branch that can go, or some of ``asked`` are not."""
    wrong = sorted(set(asked) - set(held))
    if not held or wrong:
        what = f"{', '.join(wrong)} does not lie" if wrong else "no convolution of this network lies"
        raise NoShortcutError(
            f"depth is above 0, but {what} in a residual branch that can be dropped; a layer of zeros would cut the "
            f"network. What can go: {', '.join(held) or 'none'}. Give depth=0, or leave it out."
        )
