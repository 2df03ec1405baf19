"""What autograd keeps of a forward pass, and which module keeps it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hasten.contract import Effect

SAMPLES = 2


@dataclass
class Survey:
    """Bytes that a pass on ``samples`` images keeps: all of them, each storage once, and which storages each module keeps.

    Code of a module itself, such as ``F.relu`` in its forward, counts for that module. Parameters do not count.
    """

    samples: int
    sizes: dict[int, int] = field(default_factory=dict)
    keepers: dict[str, set[int]] = field(default_factory=dict)

    def bytes(self, names: set[str] | None = None) -> float:
        """Return bytes for one sample: all, or those that the modules ``names`` keep."""
        found = self.sizes.keys() if names is None else set().union(*(self.keepers[n] for n in names))
        return sum(self.sizes[key] for key in found) / self.samples


def survey(model: nn.Module, x: Tensor) -> Survey:
    """Run ``model`` on a few samples of ``x`` as it would train, and see what is kept.

    In eval mode, so that neither buffers nor generators move; dropout keeps nothing there. Modes are put back.
    """
    x = x[:SAMPLES].detach().clone()
    found, inside = Survey(len(x)), [""]
    held: list[Tensor] = []  # so that no later tensor lies where an earlier one lay
    apart = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if storage.nbytes() and key not in apart:
            held.append(tensor.detach())
            found.sizes[key] = storage.nbytes()
            found.keepers.setdefault(inside[-1], set()).add(key)
        return tensor.detach()

    def leave() -> None:
        inside.pop()

    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            for hook in (
                module.register_forward_pre_hook(lambda _, __, name=name: inside.append(name)),
                module.register_forward_hook(lambda _, __, ___: leave(), always_call=True),
            ):
                stack.callback(hook.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        model.eval()
        try:
            with torch.enable_grad():
                model(x)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return found


def account(
    effect: Effect,
    model: nn.Module,
    found: Survey,
    shapes: dict[str, tuple[torch.Size, torch.Size]],
    widths: dict[str, float],
    batch: int,
) -> None:
    """Write into ``effect`` how much a pass of ``batch`` samples keeps now, how much it will, and who keeps the rest.

    widths: bits of each value of the inputs that are rounded, by module.
    """
    will = 0.0
    for name in effect.touched:
        module = model.get_submodule(name)
        given, output = (math.prod(s[1:]) for s in shapes[name])
        if name in widths:
            will += given * widths[name] / 8
        elif isinstance(module, nn.MaxPool2d):
            will += output
        elif isinstance(module, nn.Dropout):
            will += given / 8
        elif isinstance(module, nn.ReLU) and name in found.keepers:  # perhaps called often, with other shapes
            will += found.bytes({name}) / 32
    others = found.keepers.keys() - effect.touched.keys()
    for name in sorted(others, key=lambda n: -found.bytes({n})):
        size = batch * found.bytes({name}) / 1e6
        module = model.get_submodule(name)
        if size < 1e-3:
            continue
        if name and next(module.children(), None) is None:
            known = effect.skipped.get(name, "it has no smaller form here")
            effect.skipped[name] = f"as a {type(module).__name__} it keeps {size:.3g} MB a batch: {known}"
        else:
            effect.skipped[name or "the model"] = (
                f"its own code (functions, products) keeps {size:.3g} MB a batch; modules such as nn.ReLU would not"
            )
    now, then = batch * found.bytes() / 1e6, batch * (will + found.bytes(set(others))) / 1e6
    effect.saves = (
        f"memory: of {batch} samples, {then:.3g} MB are kept for the backward pass where {now:.3g} MB were"
        + (f" ({now / then:.1f}x less)" if then else "")
    )
