"""Look into a model by hooks, without changing it: shapes of its layers, and where a number first went wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

See = Callable[[str, tuple[Any, ...], Any], None]


def look(model: nn.Module, x: Tensor, see: See, kinds: tuple[type[nn.Module], ...] = (nn.Module,)) -> None:
    """Run ``model`` on ``x`` and call ``see(name, inputs, output)`` for every module of these kinds that runs.

    In eval mode and without gradients, so that neither buffers nor generators move; every module's mode is put back.
    """
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                hook = module.register_forward_hook(lambda _, given, out, name=name: see(name, given, out))
                stack.callback(hook.remove)
        model.eval()
        try:
            model(x)
        finally:
            for module, mode in modes.items():
                module.training = mode


def _is_leaf(model: nn.Module, name: str) -> bool:
    return next(model.get_submodule(name).children(), None) is None


def layer_shapes(model: nn.Module, inputs: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Return (input shape, output shape) of every leaf module, by name, for a forward pass on ``inputs``."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def see(name: str, given: tuple[Any, ...], output: Any) -> None:
        if _is_leaf(model, name) and given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            shapes[name] = (given[0].shape, output.shape)

    look(model, inputs, see)
    return shapes


def first_non_finite(model: nn.Module, inputs: Tensor) -> str:
    """Return, in words, the first place in a forward pass on ``inputs`` that holds a NaN or an infinity.

    The pass runs in eval mode, so that running statistics stay as they are.
    """
    if not inputs.isfinite().all():
        return "the input images"
    found: list[str] = []

    def see(name: str, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not found and _is_leaf(model, name) and not output.isfinite().all():
            found.append(f"layer {name or type(model).__name__} ({type(model.get_submodule(name)).__name__})")

    look(model, inputs, see)
    if found:
        return found[0]
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    return f"parameter {bad[0]}" if bad else "the loss itself (every layer's output is finite)"
