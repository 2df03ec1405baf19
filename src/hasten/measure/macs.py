"""Count multiply-accumulates: one convention for every number hasten prints (model_surgery.md 3.6).

One multiply-add is one MAC. Convolutions cost C_in * C_out * kh * kw * H_out * W_out / groups, linear layers
in * out; batch norm, bias, activation and pooling count zero. Numbers are per image. MACs are work, not time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import UnsupportedError

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class LayerMacs:
    """MACs per image of one layer's three products; zero where the backward pass does not need the
    product."""

    output: int
    grad_input: int
    grad_weight: int
    kind: str

    @property
    def training(self) -> int:
        """MACs of one training step."""
        return self.output + self.grad_input + self.grad_weight


@dataclass(frozen=True)
class MacCount:
    """MACs per image of a model, by layer name in order of first use.

    ``not_run`` names conv and linear layers that the forward pass did not call: their cost, if any, is not
    counted.
    """

    layers: dict[str, LayerMacs]
    not_run: tuple[str, ...] = ()

    @property
    def forward(self) -> int:
        """MACs of one forward pass."""
        return sum(layer.output for layer in self.layers.values())

    @property
    def training(self) -> int:
        """MACs of forward, grad_input and grad_weight: 3 x forward less what needs no gradient."""
        return sum(layer.training for layer in self.layers.values())

    @property
    def conv(self) -> int:
        """Forward MACs of the convolutions alone."""
        return sum(layer.output for layer in self.layers.values() if layer.kind == "conv")

    @property
    def linear(self) -> int:
        """Forward MACs of the linear layers alone."""
        return sum(layer.output for layer in self.layers.values() if layer.kind == "linear")


def _layer_macs(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    assert isinstance(module, _Conv | _Transposed)
    per_position = 1
    for size in module.kernel_size:
        per_position *= size
    if isinstance(module, _Transposed):
        return inputs.numel() * module.out_channels // module.groups * per_position
    # of the outputs, a gated layer computes only its own channels
    positions = output.numel() // output.shape[-1 - len(module.kernel_size)]
    return positions * module.out_channels * module.in_channels // module.groups * per_position


def macs(model: nn.Module, sample: Tensor) -> MacCount:
    """Count the MACs of ``model`` on ``sample`` (N, ...), a real or meta batch on the model's device.

    One forward pass in eval mode without gradients: no buffer and no gradient changes, each module gets back
    the mode it was in, and all hooks are gone afterwards. A layer called several times counts each time. In
    ``training`` a product counts only if backward needs it: no grad_weight for a frozen weight, no grad_input
    before the first trainable parameter, which for an ordinary network means the first layer.

    Raises UnsupportedError when no conv or linear layer ran, for instance on a scripted model.
    """
    batch = sample.shape[0]
    counted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _Conv | _Transposed)
    }
    names: dict[nn.Module, str] = {module: name for name, module in counted.items()}
    layers: dict[str, LayerMacs] = {}
    trainable_before = False

    def hook_of(module: nn.Module) -> Callable[..., None]:
        trains = any(p.requires_grad for p in module.parameters(recurse=False))

        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            nonlocal trainable_before
            name = names.get(module)
            if name is not None:
                work = _layer_macs(module, inputs[0] if inputs else named["input"], output) // batch
                weight = module.weight
                assert isinstance(weight, Tensor)
                old = layers.get(name, LayerMacs(0, 0, 0, ""))
                layers[name] = LayerMacs(
                    old.output + work,
                    old.grad_input + work * trainable_before,
                    old.grad_weight + work * weight.requires_grad,
                    "linear" if isinstance(module, nn.Linear) else "conv",
                )
            trainable_before = trainable_before or trains

        return hook

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(hook_of(module), with_kwargs=True) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if not layers:
        raise UnsupportedError(
            f"MACs of {type(model).__name__}: no conv or linear module ran; scripted models and nets "
            "that call functions only cannot be counted, give the plain nn.Module"
        )
    return MacCount(layers, tuple(name for name in counted if name not in layers))
