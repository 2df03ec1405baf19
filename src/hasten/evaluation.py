"""How well a network does on held-out images, and whether it can do the task at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import SettingsError, UnsupportedError


def measured(forward: Callable[[Tensor], Tensor], loader: Any) -> tuple[float, float]:
    """Return accuracy in [0, 1] and mean cross-entropy of ``forward`` over all batches of ``loader``.

    The sums stay on the device until the end, so that it is waited for once.
    """
    right = loss = torch.zeros(())
    count = 0
    for batch in loader.epoch(0):
        outputs = forward(batch.inputs).float()
        right = right.to(outputs.device) + (outputs.argmax(1) == batch.targets).sum()
        loss = loss.to(outputs.device, torch.float64 if outputs.device.type != "mps" else torch.float32)
        loss = loss + nn.functional.cross_entropy(outputs, batch.targets, reduction="sum")
        count += len(batch.targets)
    return float(right) / count, float(loss) / count


def check_network(net: nn.Module) -> None:
    """Raise UnsupportedError for a network that ``fit`` cannot train: frozen, scripted, on meta, or not in float32."""
    if isinstance(net, torch.jit.ScriptModule):
        raise UnsupportedError(
            "the model is a torch.jit script, whose layers nothing can change; give the module itself."
        )
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    if empty := [name for name, value in tensors.items() if value.device.type == "meta"]:
        raise UnsupportedError(
            f"the model lies on the meta device ({empty[0]} holds a shape and no numbers); build it on the CPU."
        )
    other = {name: p.dtype for name, p in net.named_parameters() if p.dtype != torch.float32}
    if other:
        name, dtype = next(iter(other.items()))
        advice = "give model.float(); the method mixed_precision computes in 16 bits"
        if torch.get_default_dtype() != torch.float32:
            advice = f"PyTorch's default type is {torch.get_default_dtype()}: torch.set_default_dtype(torch.float32)"
        raise UnsupportedError(f"the model's weights must be float32, but {name} is {dtype}; {advice}.")
    if not any(p.requires_grad for p in net.parameters()):
        raise UnsupportedError(
            "the model has no parameter that trains: every requires_grad is False. Set it to True for what is to learn, "
            "such as the last layer."
        )


def check_task(
    net: nn.Module, inputs: Tensor, targets: Tensor, classes: int, loss: Callable[..., Tensor]
) -> None:
    """Run ``net`` once in eval mode, and raise unless its outputs and ``loss`` fit the task of ``classes`` classes."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = net(inputs[:2])
    except RuntimeError as error:
        raise UnsupportedError(
            f"the network does not run on inputs of shape {tuple(inputs[:2].shape)}: {str(error).splitlines()[0]}."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        found = (
            f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        )
        raise UnsupportedError(
            f"in eval mode the network must return a tensor (batch, classes), and returns {found}; wrap it so that it does."
        )
    if outputs.shape[1] < classes:
        raise SettingsError(
            f"the network has {outputs.shape[1]} outputs, the data {classes} classes; give it {classes} outputs."
        )
    try:
        value = loss(outputs.float(), targets[:2])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        kind = f"soft labels of shape {tuple(targets[:2].shape)}" if targets.dim() == 2 else "class numbers"
        raise SettingsError(
            f"the loss cannot be computed from outputs of shape {tuple(outputs.shape)} and {kind}: "
            f"{str(error).splitlines()[0]}."
        ) from error
    if not isinstance(value, Tensor) or value.dim():
        raise SettingsError(
            f"the loss must return one number for the batch, and returns {tuple(value.shape) if isinstance(value, Tensor) else value!r}; "
            f'give it reduction="mean".'
        )
