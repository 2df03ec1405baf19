"""Carry a change out on a model and its optimizers, and take it back if anything fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten.errors import UnsupportedSurgeryError
from hasten.surgery import gates
from hasten.surgery.parameters import adopt, release, replace_module
from hasten.surgery.reshape import Reshape, moved

STATE_POWERS = {
    "momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "exp_inf": 1, "sum": 2, "square_avg": 2,
    "grad_avg": 1, "acc_delta": 2, "row_var": 2, "col_var": 2, "variance": 2, "prev": 1, "ax": 0, "mu": 0, "eta": 0,
}  # fmt: skip
"""By which power of the number of copies an optimizer's slot is divided when a channel that is made is copied."""


def reshape(model: nn.Module, optimizers: Sequence[Optimizer], change: Reshape) -> None:
    """Give every tensor of ``model`` its new shape, with its gradient and its state in ``optimizers``.

    Parameters stay the same objects. All new tensors are computed before the first one is put in.

    Raises UnsupportedSurgeryError for optimizer state that fits no axis of its parameter.
    """
    put: list[Callable[[], None]] = []
    for name, moves in change.moves.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if attribute in owner._buffers:
            put.append(_buffer(owner, attribute, moved(owner._buffers[attribute], moves)))  # type: ignore[arg-type]
            continue
        parameter = owner._parameters[attribute]
        assert parameter is not None
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            put += [
                _entry(state, key, moved(value, moves, state_power=_power(optimizer, key, moves)))
                for key, value in state.items()
                if _follows(optimizer, name, parameter, key, value)
            ]
        grad = None if parameter.grad is None else moved(parameter.grad, moves, state_power=1)
        put.append(_parameter(parameter, moved(parameter, moves), grad))
    for act in put:
        act()
    for name, sizes in change.sizes.items():
        for attribute, size in sizes.items():
            setattr(model.get_submodule(name), attribute, size)
    for (name, role), index in change.slots.items():
        cut = (
            getattr(model.get_submodule(name), "cut_channels", None) if not role.startswith("axis") else None
        )
        if cut is not None:
            cut(role, index)
    for gate in change.gates:
        gates.put(model, gate)


def _parameter(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> Callable[[], None]:
    def put() -> None:
        parameter.grad = None
        # who holds autograd's accumulator of this parameter (DistributedDataParallel does) would keep its old shape;
        # PyTorch lets go of it when the dtype changes
        other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=parameter.device)
        parameter.data = data
        parameter.grad = grad

    return put


def _buffer(owner: nn.Module, attribute: str, value: Tensor) -> Callable[[], None]:
    return lambda: owner._buffers.__setitem__(attribute, value)


def _entry(state: dict[str, Any], key: str, value: Tensor) -> Callable[[], None]:
    return lambda: state.__setitem__(key, value)


def _follows(optimizer: Optimizer, name: str, parameter: Tensor, key: str, value: Any) -> bool:
    """Return whether a slot of state has channels. Raises UnsupportedSurgeryError if nobody can know."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return False
    fits = value.dim() == parameter.dim() and all(
        s in (1, p) for s, p in zip(value.shape, parameter.shape, strict=True)
    )
    if not fits:
        raise UnsupportedSurgeryError(
            f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name} of shape "
            f"{tuple(parameter.shape)}, and which channel each number belongs to is not known. Use an optimizer whose "
            f"state has its parameter's shape (SGD, Adam, AdamW, Adafactor, ...)."
        )
    return True


def _power(optimizer: Optimizer, key: str, moves: Sequence[Any]) -> int:
    if key in STATE_POWERS or all(move.copies is None for move in moves):
        return STATE_POWERS.get(key, 1)
    raise UnsupportedSurgeryError(
        f"{type(optimizer).__name__} keeps {key!r}, and how it changes when a channel is copied is not known. Use SGD, "
        f"Adam or AdamW, or start with a fresh optimizer."
    )


def swap(model: nn.Module, optimizers: Sequence[Optimizer], new: dict[str, nn.Module]) -> None:
    """Put modules in the place of others, by name; parameters that go leave the optimizers, new ones join them.

    A new parameter joins the group of the nearest one before it of the same kind (matrix or vector).
    """
    before = {id(p): p for p in model.parameters()}
    for name, module in new.items():
        replace_module(model, name, module)
    settle(model, optimizers, before)


def insert(model: nn.Module, optimizers: Sequence[Optimizer], after: str, module: nn.Module) -> str:
    """Put ``module`` behind the element ``after`` of an ``nn.Sequential`` and return its name."""
    path, _, key = after.rpartition(".")
    parent = model.get_submodule(path)
    if not isinstance(parent, nn.Sequential) or key not in parent._modules:
        raise UnsupportedSurgeryError(
            f"nothing can be inserted after {after!r}: it is not an element of an nn.Sequential, so the order of the "
            f"layers is in code. Replace the module instead."
        )
    before = {id(p): p for p in model.parameters()}
    number = 1
    while f"{key}_{number}" in parent._modules:
        number += 1
    made = f"{key}_{number}"
    module.train(model.training)
    old = list(parent._modules.items())
    parent._modules.clear()
    for name, child in old:
        parent._modules[name] = child
        if name == key:
            parent._modules[made] = module
    settle(model, optimizers, before)
    return f"{path}.{made}" if path else made


def settle(model: nn.Module, optimizers: Sequence[Optimizer], before: dict[int, nn.Parameter]) -> None:
    """Bring the optimizers in step with the parameters that ``model`` has now."""
    now = {id(p) for p in model.parameters()}
    last: dict[bool, nn.Parameter] = {}
    waiting: list[nn.Parameter] = []
    for parameter in model.parameters():
        if id(parameter) in before:
            last[parameter.dim() > 1] = parameter
            for new in [w for w in waiting if (w.dim() > 1) == (parameter.dim() > 1)]:
                adopt(optimizers, new, parameter)
            waiting = [w for w in waiting if (w.dim() > 1) != (parameter.dim() > 1)]
        elif (like := last.get(parameter.dim() > 1)) is not None:
            adopt(optimizers, parameter, like)
        else:
            waiting.append(parameter)
    for new in waiting:
        adopt(optimizers, new, next(p for p in before.values() if id(p) in now))
    release(optimizers, [p for key, p in before.items() if key not in now])


class Snapshot:
    """All references that a change can touch, so that a failure can put back every one of them. Copies no data."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._modules = [(m, type(m), dict(vars(m))) for m in model.modules()]
        self._inner = [(m, {k: dict(vars(m)[k]) for k in ("_parameters", "_buffers", "_modules")})
                       for m, _, _ in self._modules]  # fmt: skip
        self._parameters = [(p, p.data, p.grad) for p in model.parameters()]
        self._groups = [(g, list(g["params"])) for o in optimizers for g in o.param_groups]
        self._states = [(o, {p: dict(s) for p, s in o.state.items()}) for o in optimizers]

    def restore(self) -> None:
        """Put everything back."""
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        for module, inner in self._inner:
            for key, entries in inner.items():
                own = vars(module)[key]
                own.clear()
                own.update(entries)
        for parameter, data, grad in self._parameters:
            parameter.grad = None
            parameter.data = data
            parameter.grad = grad
        for group, params in self._groups:
            group["params"] = params
        for optimizer, state in self._states:
            optimizer.state.clear()
            optimizer.state.update(state)
