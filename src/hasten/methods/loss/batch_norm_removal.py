"""Take batch norm out of a network: its statistics and scale go into the layer before it, which gets a bias.

In evaluation the network computes what it did. In training it is a network without normalisation.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten.surgery import adopt, release, replace_module

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.LocalResponseNorm)


@dataclass
class Trace:
    """What a forward pass showed: layers as called, shapes of their outputs, norms behind them.

    ``norms`` are those that read a layer's output unchanged, ``pairs`` the (layer, batch norm) that can be taken
    out, ``kept`` the batch norms that cannot, with the reason.
    """

    calls: list[str] = field(default_factory=list)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


class ChannelAffine(nn.Module):
    """The scale and shift of a batch norm that is gone, each (C,), for x (N, C, ...)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * weight + bias`` by channel, in the dtype of ``x``."""
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return torch.addcmul(self.bias.to(x.dtype).view(shape), x, self.weight.to(x.dtype).view(shape))


def run_quietly(model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs for ``x`` in eval mode and without gradients; the modes come back as they were."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            output: Tensor = model(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return output


def trace(model: nn.Module, x: Tensor) -> Trace:
    """Run ``model`` on ``x`` and find its layers, and which batch norm reads which layer's output."""
    seen, outputs, inputs = Trace(), [], []

    def after(name: str, output: Any) -> None:
        seen.calls.append(name)
        if isinstance(output, Tensor):
            seen.shapes[name] = output.shape
            # the tensor is kept, so that no later one can have its identity
            outputs.append((name, output, output._version))

    def before(name: str, given: tuple[Any, ...]) -> None:
        sources = [n for n, t, version in outputs if t is given[0] and t._version == version]
        inputs.append((name, sources[-1] if sources else None))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, LAYERS):
                hook = module.register_forward_hook(lambda _, __, out, name=name: after(name, out))
                stack.callback(hook.remove)
            elif isinstance(module, BATCH_NORMS + OTHER_NORMS):
                stack.callback(
                    module.register_forward_pre_hook(lambda _, a, name=name: before(name, a)).remove
                )
        run_quietly(model, x)

    for norm, source in inputs:
        if source is not None:
            seen.norms.setdefault(source, []).append(norm)
    for norm, source in inputs:
        if not isinstance(model.get_submodule(norm), BATCH_NORMS):
            continue
        if source is None:
            seen.kept[norm] = "its input is not the unchanged output of a convolution or linear layer"
        elif [n for n, _ in inputs].count(norm) > 1 or seen.calls.count(source) > 1:
            seen.kept[norm] = f"it or {source} is used more than once in a pass"
        elif len(seen.norms[source]) > 1:
            seen.kept[norm] = f"{source} feeds {len(seen.norms[source])} normalisations"
        elif source == seen.calls[-1]:
            seen.kept[norm] = f"{source} is the classifier, whose outputs are not standardized"
        else:
            seen.pairs[source] = norm
    for layer in _with_other_readers(model, x, seen.pairs):
        seen.kept[seen.pairs.pop(layer)] = f"the output of {layer} is read elsewhere too"
    return seen


def _with_other_readers(model: nn.Module, x: Tensor, pairs: dict[str, str]) -> list[str]:
    """Return the layers of ``pairs`` whose output something else reads too, such as a shortcut.

    What a layer gives out is doubled and what its batch norm reads is halved: if nothing else reads it, the network
    computes the same.
    """

    def unchanged(layers: list[str]) -> bool:
        with ExitStack() as stack:
            for layer in layers:
                doubled = model.get_submodule(layer).register_forward_hook(lambda _, __, out: 2 * out)
                norm = model.get_submodule(pairs[layer])
                halved = norm.register_forward_pre_hook(lambda _, given: (given[0] / 2,))
                stack.callback(doubled.remove)
                stack.callback(halved.remove)
            got = run_quietly(model, x)
        return bool(
            torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), equal_nan=True)
        )

    expected = run_quietly(model, x)
    return [] if unchanged(list(pairs)) else [layer for layer in pairs if not unchanged([layer])]


def remove(
    model: nn.Module, layer: str, norm: str, *, affine: bool = False, optimizers: Iterable[Optimizer] = ()
) -> None:
    """Put batch norm ``norm`` into ``layer`` before it and an Identity in its place.

    ``affine`` keeps its scale and shift as a ChannelAffine. Parameters that come and go do so in the optimizers
    too; the bias joins the group of the batch norm's. A batch norm that has seen no batch has no statistics yet:
    then fresh scale and shift leave the layer's weights as they are, bit for bit.
    """
    before: Any = model.get_submodule(layer)
    bn: Any = model.get_submodule(norm)
    optimizers = tuple(optimizers)
    with torch.no_grad():
        mean, scale = (
            torch.zeros(len(before.weight), dtype=before.weight.dtype, device=before.weight.device),
            None,
        )
        if bn.running_mean is not None and int(bn.num_batches_tracked) > 0:
            mean, scale = bn.running_mean, (bn.running_var + bn.eps).rsqrt()
        shift = torch.zeros_like(mean)
        if bn.affine and not affine:
            shift = bn.bias
            if scale is not None or not bool((bn.weight == 1).all()):
                scale = bn.weight if scale is None else scale * bn.weight
        bias = (before.bias if before.bias is not None else torch.zeros_like(mean)) - mean
        if scale is not None:
            before.weight.mul_(scale.view(-1, *(1,) * (before.weight.dim() - 1)))
            bias = bias * scale
        bias = bias + shift
        if before.bias is not None:
            before.bias.copy_(bias)
        else:
            before.bias = nn.Parameter(
                bias.to(before.weight.dtype), requires_grad=before.weight.requires_grad
            )
            adopt(optimizers, before.bias, like=bn.bias if bn.affine else before.weight)
    if bn.affine and affine:
        replace_module(model, norm, ChannelAffine(bn.weight, bn.bias))
    else:
        release(optimizers, bn.parameters())
        replace_module(model, norm, nn.Identity())


def fold_affine(model: nn.Module, layer: str, affine: str) -> None:
    """Put the ChannelAffine called ``affine`` into ``layer`` before it, and an Identity in its place."""
    before: Any = model.get_submodule(layer)
    scale: Any = model.get_submodule(affine)
    with torch.no_grad():
        before.weight.mul_(scale.weight.view(-1, *(1,) * (before.weight.dim() - 1)))
        before.bias.mul_(scale.weight).add_(scale.bias)
    replace_module(model, affine, nn.Identity())


def remove_batch_norm(
    model: nn.Module, inputs: Tensor, optimizers: Iterable[Optimizer] = (), *, affine: bool = False
) -> Trace:
    """Take out of ``model`` every batch norm that reads the output of one layer alone; return what was found.

    inputs: a batch as training sees it, to find out. For use before a model is wrapped for distributed training,
    which must not lose parameters afterwards.
    """
    seen = trace(model, inputs)
    for layer, norm in seen.pairs.items():
        remove(model, layer, norm, affine=affine, optimizers=optimizers)
    return seen
