"""What a plan is made of: the interfaces a method implements to act inside a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from hasten.products.arithmetic import Geometry, Saved


@runtime_checkable
class Transform(Protocol):
    """Replaces a tensor by another of the same shape: rounding, pruning.

    On "x", "w" and "output" its gradient is passed through unchanged, unless it has a true
    ``differentiable``: then autograd runs through it. It must not change its argument in place.
    """

    name: str

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor to use instead."""
        ...


@dataclass(frozen=True)
class Selection:
    """Some indices of one dimension.

    index: int64, sorted. scale: one factor for each, or None for ones; it multiplies x (in_channels, batch)
    or grad_output (out_channels). block: the index consists of whole aligned blocks of this many
    (`gather.take`). repeats: an index may occur more than once (sampling with replacement).
    """

    index: Tensor
    scale: Tensor | None = None
    block: int = 1
    repeats: bool = False


@runtime_checkable
class Selector(Protocol):
    """Chooses which terms of a product, or which rows of its result, are computed. None means all of them.

    in_channels: called in forward with (x, w). out_channels: in backward with (grad_output, w). batch: in
    backward with (x, grad_output). ``static`` says that the size of the selection never changes, so that
    torch.compile can trace it without graph breaks.
    """

    name: str
    static: bool

    def __call__(self, first: Tensor, second: Tensor) -> Selection | None:
        """Return the selection, or None for an exact product."""
        ...


@runtime_checkable
class OutputKernel(Protocol):
    """Computes the output, and may keep tensors for the backward kernels of the same owner.

    ``selectable`` (all kernels): whether it may work on operands that another method has shrunk.
    """

    name: str
    selectable: bool

    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (output, extras)."""
        ...


@runtime_checkable
class GradInputKernel(Protocol):
    """Computes grad_input; the same signature as `arithmetic.grad_input`."""

    name: str
    selectable: bool

    def __call__(self, grad_output: Tensor, w: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_input, like ``saved.x_like``."""
        ...


@runtime_checkable
class GradWeightKernel(Protocol):
    """Computes grad_weight; the same signature as `arithmetic.grad_weight`.

    Where ``needs_x`` is false, x is not kept for the backward pass and the values of the one passed are
    undefined.
    """

    name: str
    selectable: bool
    needs_x: bool

    def __call__(self, grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_weight, like ``saved.w_like``."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Stores x between forward and backward in fewer bits."""

    name: str

    def encode(self, x: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Return the tensors to keep and anything else `decode` needs."""
        ...

    def decode(self, tensors: tuple[Tensor, ...], meta: Any) -> Tensor:
        """Return x again, with its shape, dtype and memory format."""
        ...

    def observe(self, grad_output: Tensor) -> None:
        """See the gradient that will meet the decoded x, before `decode` is called."""
        ...


Kernel = OutputKernel | GradInputKernel | GradWeightKernel
