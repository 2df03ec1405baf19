"""Where stochastic gradient pruning acts: which layers batch norm follows, and which ReLU.

Conv-BN-ReLU   batch norm makes grad_output dense: grad_output is pruned, for both products
Conv-ReLU      grad_output inherits the zeros of ReLU: grad_input is pruned, which the layer before then inherits
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RELU: set[Any] = {
    functional.relu,
    functional.relu_,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
    functional.relu6,
}
_NORM: set[Any] = {functional.batch_norm, torch.batch_norm}


@dataclass
class Site:
    """What follows a layer ("bn", "relu" or nothing), how often a pass runs it, and the shapes it saw.

    input_needs_gradient: whether its x has a gradient, which the first layer's has not.
    """

    after: Literal["bn", "relu", ""] = ""
    calls: int = 0
    x: torch.Size = field(default_factory=torch.Size)
    output: torch.Size = field(default_factory=torch.Size)
    input_needs_gradient: bool = False


class _Watch(TorchFunctionMode):
    """Sees every function of torch that is called, by modules or not, and what its first argument was made by."""

    def __init__(self, sites: dict[str, Site]) -> None:
        super().__init__()
        self.sites = sites
        self.made: dict[
            int, tuple[str, Tensor, int]
        ] = {}  # by id; the tensor is kept, so that its id stays its own

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, Tensor) and (func in _RELU or func in _NORM):
            name, _, version = self.made.get(id(first), ("", None, -1))
            # a ReLU after batch norm never gets here: what it reads is batch norm's output
            if name and first._version == version and not self.sites[name].after:
                self.sites[name].after = "bn" if func in _NORM else "relu"
        return func(*args, **kwargs)


def find_sites(model: nn.Module, x: Tensor) -> dict[str, Site]:
    """Run ``model`` on ``x`` in eval mode and return what follows each Conv2d and Linear, in the order of their calls.

    Buffers, modes, gradients and generators stay as they were.
    """
    sites: dict[str, Site] = {}
    watch = _Watch(sites)

    def after(name: str, given: tuple[Any, ...], output: Any) -> None:
        site = sites.setdefault(name, Site())
        site.calls += 1
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            site.x, site.output = given[0].shape, output.shape
            site.input_needs_gradient |= given[0].requires_grad
            watch.made[id(output)] = (name, output, output._version)

    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                hook = module.register_forward_hook(lambda _, given, out, name=name: after(name, given, out))
                stack.callback(hook.remove)
        model.eval()
        try:
            # with a graph, though it is thrown away: it tells which inputs have gradients
            with torch.enable_grad(), watch:
                model(x)
        finally:
            for module, training in modes:
                module.training = training
    return sites
