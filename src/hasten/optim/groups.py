"""Parameter groups: no decay on norms and biases, and the record recipe's decoupled learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hasten.errors import SettingsError, UnsupportedError

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters owned by normalisation layers."""
    return {
        p
        for module in model.modules()
        if isinstance(module, _NORMS)
        for p in module.parameters(recurse=False)
    }


def decay_groups(
    model: nn.Module, weight_decay: float, *, all_parameters: bool = False
) -> list[dict[str, Any]]:
    """Return SGD groups of the trainable parameters: "decay", and "no_decay" for norms, biases and scalars.

    Each trainable parameter is in exactly one group, in the model's order; an empty group is left out. With
    ``all_parameters`` everything decays, as in the oldest recipes. Baseline B1 of training_recipes.md 3.7.
    """
    if weight_decay < 0:
        raise SettingsError(f"weight_decay (={weight_decay}) must be 0 or more")
    norms = norm_parameters(model)
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            spared = not all_parameters and (p in norms or p.ndim < 2)
            (plain if spared else decay).append(p)
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def filters_and_rest(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split groups into those of convolution filters, for Muon, and those of all else. Empty ones are left out.

    Raises UnsupportedError if there is no filter.
    """
    halves: list[list[dict[str, Any]]] = [[], []]
    for group in groups:
        for half, filters in zip(halves, (True, False), strict=True):
            kept = [p for p in group["params"] if (p.ndim >= 3) == filters]
            if kept:
                half.append({**group, "params": kept})
    if not halves[0]:
        raise UnsupportedError(
            "optimizer muon: the network has no trainable convolution filters, on which Muon acts; use adamw."
        )
    return halves[0], halves[1]


@dataclass(frozen=True)
class TorchRates:
    """lr and weight_decay as PyTorch's SGD wants them, for weights and for batch norm biases."""

    lr: float
    weight_decay: float
    bias_lr: float
    bias_weight_decay: float


def torch_rates(
    lr: float, weight_decay: float, *, batch_size: int, momentum: float = 0.85, bias_scale: float = 64.0
) -> TorchRates:
    """Translate decoupled rates (per 1024 examples, summed loss) into PyTorch's.

    With Nesterov momentum m a constant gradient moves a weight by 1 + 1/(1-m) of lr * gradient, so S = 1024 *
    (1 + 1/(1-m)), lr_torch = lr / S, and weight_decay_torch = weight_decay * batch_size / S / lr_torch of the
    group: each step shrinks a weight by the same absolute amount whatever its group's lr. Source:
    training_recipes.md 3.1.
    """
    if lr <= 0 or weight_decay < 0 or batch_size < 1 or not 0 <= momentum < 1 or bias_scale <= 0:
        raise SettingsError(
            f"decoupled rates: lr={lr} and bias_scale={bias_scale} must be > 0, "
            f"weight_decay={weight_decay} >= 0, batch_size={batch_size} >= 1, momentum={momentum} in [0, 1)"
        )
    scale = 1024 * (1 + 1 / (1 - momentum))
    shrink = weight_decay * batch_size / scale
    rate = lr / scale
    return TorchRates(rate, shrink / rate, rate * bias_scale, shrink / (rate * bias_scale))
