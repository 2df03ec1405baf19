"""Look into a model by hooks, without changing it: shapes of its layers, and where a number first went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


@contextmanager
def _watched(model: nn.Module, see: Callable[[str, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Call ``see(name, inputs, output)`` for every leaf module that runs; eval mode and no gradients meanwhile."""
    training = {m: m.training for m in model.modules()}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                handle = module.register_forward_hook(lambda _, i, o, name=name: see(name, i, o))
                stack.callback(handle.remove)
        stack.callback(_set_modes, training)
        model.eval()
        with torch.no_grad():
            yield


def layer_shapes(model: nn.Module, inputs: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Return (input shape, output shape) of every leaf module, by name, for a forward pass on ``inputs``."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def see(name: str, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            shapes[name] = (given[0].shape, output.shape)

    with _watched(model, see):
        model(inputs)
    return shapes


def first_non_finite(model: nn.Module, inputs: Tensor) -> str:
    """Return, in words, the first place in a forward pass on ``inputs`` that holds a NaN or an infinity.

    The pass runs in eval mode, so that running statistics stay as they are.
    """
    if not inputs.isfinite().all():
        return "the input images"
    found: list[str] = []

    def see(name: str, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not found and not output.isfinite().all():
            found.append(f"layer {name or type(model).__name__} ({type(model.get_submodule(name)).__name__})")

    with _watched(model, see):
        model(inputs)
    if found:
        return found[0]
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    return f"parameter {bad[0]}" if bad else "the loss itself (every layer's output is finite)"
