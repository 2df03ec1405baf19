"""Weights that exist in bfloat16 only: the layers that hold them, and an update that computes in float32.

The optimizer steps on float32 copies that live for that moment, keeps its own state in float32, and the results are rounded
stochastically: without that, an update smaller than half a step of bfloat16 would be lost for ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten.kernels.round_bfloat16 import round_bfloat16

LOW = torch.bfloat16
PART = 1 << 20
"""How many parameters are updated at a time, where the optimizer lets them be separated (our choice)."""


def hardware_bfloat16(device: torch.device) -> bool:
    """Return whether this machine multiplies bfloat16 by itself: AVX512-BF16 or AMX, or a GPU's matrix units."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class EmulatedWarning(UserWarning):
    """Told when a format is asked for that this machine computes by emulation, so slower."""


def warn_without_hardware(device: torch.device) -> None:
    """Warn if this machine has no bfloat16 units."""
    if not hardware_bfloat16(device):
        warnings.warn(
            f"limited_precision: this {device.type} has no bfloat16 units (AVX512-BF16, AMX, or a GPU of generation 8.0), so "
            f"bfloat16 will be emulated and slower than float32. Memory is saved all the same. Give policy='float32' for "
            f"speed.",
            EmulatedWarning,
            stacklevel=3,
        )


# -- hooks of a layer; plain functions, so that a copy of the model shares nothing with the run
def _cast_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Outside autocast give a layer the dtype of its weight."""
    x, dtype = args[0], next(module.parameters(recurse=False)).dtype
    if x.dtype == dtype or torch.is_autocast_enabled(x.device.type):
        return None
    return (x.to(dtype), *args[1:])


def _take_dtype(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded take the dtypes it has, so that no bit is lost."""
    for name, p in module.named_parameters(recurse=False):
        saved = state.get(f"{prefix}{name}")
        if isinstance(saved, Tensor) and saved.dtype != p.dtype:
            store(p, p.detach().to(saved.dtype))


def hold(module: nn.Module) -> None:
    """Prepare a layer to hold its parameters in either dtype."""
    if not any(hook is _cast_input for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_cast_input)
        module.register_load_state_dict_pre_hook(_take_dtype)  # type: ignore[no-untyped-call]


def let_go(module: nn.Module) -> None:
    """Make a layer plain again, its parameters in float32."""
    if not any(hook is _cast_input for hook in module._forward_pre_hooks.values()):
        return
    tables: tuple[dict[int, Any], ...] = (module._forward_pre_hooks, module._load_state_dict_pre_hooks)
    for table in tables:
        for key in [
            k for k, hook in table.items() if getattr(hook, "hook", hook) in (_cast_input, _take_dtype)
        ]:
            del table[key]
    for p in module.parameters(recurse=False):
        if p.dtype == LOW:
            store(p, p.detach().float())


def store(p: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another value and dtype; its gradient is dropped."""
    p.grad = None
    p.data = value


def to_bfloat16(p: Tensor, key: int) -> Tensor:
    """Return a float32 parameter rounded stochastically, in the same memory format."""
    return p.detach() if p.dtype == LOW else round_bfloat16(p.detach(), key)


def change(model: nn.Module, layers: set[nn.Module], down: bool, key: Callable[[str], int]) -> None:
    """Bring the parameters of ``layers`` to bfloat16 (``down``, rounded under key(name)), or all of them back to float32.

    Modules that others have made in the likeness of such a layer, with parameters in bfloat16, are treated as one.
    """
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if module not in layers and not any(p.dtype == LOW for p in own.values()):
            continue
        hold(module)
        for name, p in own.items():
            if down and module in layers:
                store(p, to_bfloat16(p, key(f"{prefix}.{name}")))
            elif not down and p.dtype == LOW:
                store(p, p.detach().float())


def step_in_float32(
    optimizers: Iterable[Optimizer], low: dict[nn.Parameter, str], key: Callable[[str], int]
) -> int:
    """Step the optimizers with float32 copies in the place of the parameters ``low`` (with their names).

    The copies and those of the gradients live for a part of the parameters at a time, or the peak of memory would lie
    here. New values are rounded stochastically under key(name). Returns how many numbers were rounded.
    """
    rounded = 0
    for optimizer in optimizers:
        kept = [list(group["params"]) for group in optimizer.param_groups]
        narrow = [p for params in kept for p in params if p in low and p.dtype == LOW and p.grad is not None]
        waiting = set(narrow)
        try:
            for turn, part in enumerate(_parts(narrow, optimizer)):
                wide = {p: _in_float32(p) for p in part}
                for group, params in zip(optimizer.param_groups, kept, strict=True):
                    # what is in float32 anyway is stepped in the first turn
                    group["params"] = [
                        wide.get(p, p) for p in params if p in wide or (turn == 0 and p not in waiting)
                    ]
                _hand_over(optimizer, [(p, copy) for p, copy in wide.items()])
                try:
                    optimizer.step()
                finally:
                    _hand_over(optimizer, [(copy, p) for p, copy in wide.items()])
                for p, copy in wide.items():
                    p.data.copy_(round_bfloat16(copy.detach(), key(low[p])))
                    rounded += p.numel()
        finally:
            for group, params in zip(optimizer.param_groups, kept, strict=True):
                group["params"] = params
    return rounded


def _in_float32(p: nn.Parameter) -> nn.Parameter:
    wide = nn.Parameter(p.detach().float())
    assert p.grad is not None
    wide.grad = p.grad.float()
    return wide


def _parts(narrow: list[nn.Parameter], optimizer: Optimizer) -> list[list[nn.Parameter]]:
    """Return the parameters in parts of about PART numbers; all in one for an optimizer that may join them.

    PyTorch's own, but for LBFGS, and ours treat every parameter by itself.
    """
    kind = type(optimizer)
    separate = kind.__module__.startswith(("torch.optim.", "hasten.optim.")) and kind is not torch.optim.LBFGS
    parts: list[list[nn.Parameter]] = [[]]
    size = 0
    for p in narrow:
        if separate and parts[-1] and size + p.numel() > PART:
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += p.numel()
    return parts


def _hand_over(optimizer: Optimizer, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Move the state of the first of each pair to the second."""
    for old, new in pairs:
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


def keep_state_dtype(optimizer: Optimizer) -> None:
    """Have ``load_state_dict`` keep the dtypes of the saved state, which PyTorch casts to those of the parameters."""
    saved: dict[str, Any] = {}

    def remember(_: Optimizer, state: dict[str, Any]) -> None:
        saved.update(state)

    def put_back(loaded: Optimizer) -> None:
        flat = [p for group in loaded.param_groups for p in group["params"]]
        numbers = [n for group in saved["param_groups"] for n in group["params"]]
        for number, p in zip(numbers, flat, strict=True):
            for slot, value in saved["state"].get(number, {}).items():
                if isinstance(value, Tensor) and loaded.state[p][slot].dtype != value.dtype:
                    loaded.state[p][slot] = value.detach().clone().to(p.device)
        saved.clear()

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(put_back)


def with_float32_outputs(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``forward`` with its result in float32, in which losses are computed."""

    def run(x: Tensor) -> Tensor:
        return forward(x).float()

    return run
