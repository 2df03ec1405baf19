"""What AOFP sees of the network: pairs of layers, masks on what the second reads, and its output without some filters.

t = ||O - O'||^2 / ||O||^2      O: output of the reading layer, its batch norm and activation, O': without some filters

A layer is linear in its input, so O' needs no second run of it on all filters: what the ablated ones contribute to its
output is computed alone and subtracted before batch norm. Nothing of this has a gradient, calls a hook or writes a
buffer, so that training is what it is without.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hasten.errors import UnsupportedSurgeryError
from hasten.methods.structure.aofp_search import Flags
from hasten.products import supported
from hasten.surgery import Channels, RemoveChannels, Surgeon
from hasten.surgery.labels import Array
from hasten.surgery.rules import op_name

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
               nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus)  # fmt: skip
FUNCTIONS = frozenset({"relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
                       "hardtanh", "hardsigmoid", "sigmoid", "tanh", "softplus"})  # fmt: skip

Activation = Callable[[Tensor], Tensor]
Mode = Literal["base", "own"]


# -- the mathematics
def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is if wider."""
    return x if x.dtype == torch.float64 else x.float()


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Return t = ||before - after||^2 / ||before||^2 over all elements; 0 if both are zero."""
    whole = before.square().sum().clamp_min(torch.finfo(before.dtype).tiny)
    t: Tensor = (before - after).square().sum() / whole
    return t


def contribution(layer: nn.Conv2d | nn.Linear, x: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the inputs ``at`` (k,) of ``layer`` add to its output, in ``dtype``; x (N, C, H, W) or (..., C)."""
    weight = layer.weight.detach().index_select(1, at).to(dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x.index_select(-1, at).to(dtype), weight)
    if x.is_contiguous(memory_format=torch.channels_last):
        part = x.permute(0, 2, 3, 1).index_select(3, at).permute(0, 3, 1, 2)  # stays in that format
    else:
        part = x.index_select(1, at)
    return cast(Tensor, layer._conv_forward(part.to(dtype), weight, None))


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (divided by the count) of each channel of ``y`` (N, C, ...), of more than one value each."""
    count, dtype = y.numel() // y.shape[1], wide(y[:0]).dtype
    mean, var = torch.zeros(2, y.shape[1], dtype=dtype, device=y.device)
    # batch norm's own kernel, which reads any layout and 16 bit at speed, leaves them in its running statistics
    F.batch_norm(y, mean, var, training=True, momentum=1.0)
    return mean, var * ((count - 1) / count)


@dataclass(frozen=True, eq=False)
class Affine:
    """Batch norm with given statistics: y -> y * scale + shift, both (C,)."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: _BatchNorm, y: Tensor) -> Affine:
        """Return what ``norm`` does to ``y`` (N, C, ...) in the mode it is in; its buffers stay as they are."""
        if norm.training or norm.running_mean is None:
            mean, var = moments(y)
        else:
            mean, var = wide(norm.running_mean), wide(cast(Tensor, norm.running_var))
        scale = (var + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * wide(norm.weight.detach())
        shift = -mean * scale
        return cls(scale, shift + wide(norm.bias.detach()) if norm.affine else shift)

    def __call__(self, y: Tensor) -> Tensor:
        """Return the normalised ``y``."""
        return torch.addcmul(_spread(self.shift, y), y, _spread(self.scale, y))

    def without(self, z: Tensor, lost: Tensor) -> Tensor:
        """Return the normalised ``y - lost`` where ``z`` is the normalised ``y``: the statistics stay those of ``y``."""
        return torch.addcmul(z, lost, _spread(self.scale, z), value=-1)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` (C,) in the shape in which they go along axis 1 of ``like``."""
    return values.view(-1, *[1] * (like.dim() - 2))


# -- pairs
@dataclass(frozen=True)
class Pair:
    """A convolution whose filters can go, its width, and the layers that read it: one, unless damages are added up."""

    producer: str
    width: int
    readers: tuple[str, ...]


def find_pairs(
    hand: Surgeon, several: Literal["skip", "sum"], round_to: int
) -> tuple[list[Pair], dict[str, str]]:
    """Return the convolutions of the network of ``hand`` that can be searched, and why each other one stays whole."""
    finder = _Finder(hand.model, hand.channels, several, round_to)
    pairs: list[Pair] = []
    skipped: dict[str, str] = {}
    for name, module in hand.model.named_modules():
        if isinstance(module, nn.Conv2d):
            found = finder.pair(name, module)
            if isinstance(found, str):
                skipped[name] = found
            else:
                pairs.append(found)
    stuck = _stuck(hand, pairs)
    return [pair for pair in pairs if pair.producer not in stuck], skipped | stuck


def _stuck(hand: Surgeon, pairs: Sequence[Pair]) -> dict[str, str]:
    """Return why filters cannot be removed, by layer: now, not after a long search."""
    if not pairs:
        return {}
    try:
        hand.plan([RemoveChannels(pair.producer, (0,)) for pair in pairs])
    except UnsupportedSurgeryError as error:
        if len(pairs) == 1:
            return {pairs[0].producer: str(error)}
        return {name: reason for pair in pairs for name, reason in _stuck(hand, [pair]).items()}
    return {}


class _Finder:
    """Looks for pairs in a traced network."""

    def __init__(self, model: nn.Module, channels: Channels, several: str, round_to: int) -> None:
        self.model, self.channels, self.several, self.round_to = model, channels, several, round_to
        self.held = {key: channels.classes[slot.labels] for key, slot in channels.slots.items()}
        self.calls = Counter(str(n.target) for n in channels.graph.nodes if n.op == "call_module")

    def pair(self, name: str, conv: nn.Conv2d) -> Pair | str:
        """Return the pair that ``conv`` begins, or why there is none."""
        if conv.groups != 1:
            return f"its groups={conv.groups} tie channels together"
        if reason := self.channels.why_not(name):
            return reason
        if self.calls[name] > 1:
            return "it runs more than once in a pass"
        if conv.out_channels <= max(1, self.round_to):
            return f"it has {conv.out_channels} filters, of which round_to={self.round_to} keeps all"
        mine = self.channels.outputs(name)
        if len(np.unique(mine)) != conv.out_channels:
            return "its own filters are tied to each other"
        for tie in self.channels.ties:
            if np.isin(self.channels.classes[tie.labels], mine).any():
                return f"{tie.name} holds its channels in {tie.parts} parts that must stay equal"
        readers = []
        for (holder, role), classes in self.held.items():
            if (holder, role) == (name, "out") or not np.isin(classes, mine).any():
                continue
            if reason := self._foreign(holder, role):
                return reason
            if role == "in":
                readers.append(holder)
        if not readers:
            return "no layer reads it"
        if len(readers) > 1 and self.several == "skip":
            return f"{len(readers)} layers read it ({', '.join(readers[:4])}); several='sum' adds up what each loses"
        return Pair(name, conv.out_channels, tuple(readers))

    def _foreign(self, holder: str, role: str) -> str | None:
        """Return why filters cannot go that are also those of ``holder``, or None."""
        if role.startswith("axis"):
            return None
        module = self.model.get_submodule(holder)
        if role in ("in", "out") and getattr(module, "groups", 1) > 1:
            return f"{holder} reads it in groups={getattr(module, 'groups', 1)}"
        if role == "out":
            return f"it is added to what {holder} makes, so they would have to lose the same filters"
        if role == "norm":
            return self.channels.warnings.get(holder)
        if role != "in":
            return f"its channels are also those of {holder}, so they stay together"
        if reason := supported(module):
            return f"{holder} reads it, and {reason}"
        return f"{holder} reads it and runs more than once in a pass" if self.calls[holder] > 1 else None


# -- what stands behind a reader
@dataclass(frozen=True, eq=False)
class Behind:
    """The batch norm that alone reads a layer, and the activation that alone reads that, as a function; or None."""

    norm: str | None
    activation: Activation | None


def behind(model: nn.Module, graph: fx.Graph, name: str) -> Behind:
    """Return what stands directly behind the layer ``name``."""
    user = _only_user(model, next(n for n in graph.nodes if n.op == "call_module" and n.target == name))
    norm = None
    if user is not None and isinstance(_module_of(model, user), BATCH_NORMS):
        norm, user = str(user.target), _only_user(model, user)
    return Behind(norm, None if user is None else _activation(model, user))


def _module_of(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return what alone reads ``node``, identities passed over."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return (
        _only_user(model, user) if user is not None and type(_module_of(model, user)) is nn.Identity else user
    )


def _activation(model: nn.Module, node: fx.Node) -> Activation | None:
    """Return the function that ``node`` applies to its input, without hooks, if it is an elementwise activation."""
    if (module := _module_of(model, node)) is not None:
        return module.forward if isinstance(module, ACTIVATIONS) else None
    if op_name(node) not in FUNCTIONS or len(node.all_input_nodes) != 1 or not node.args:
        return None
    target, rest, named = node.target, node.args[1:], dict(node.kwargs)
    if node.op == "call_method":
        return lambda z: cast(Tensor, getattr(z, str(target))(*rest, **named))
    return lambda z: cast(Tensor, cast(Any, target)(z, *rest, **named))


# -- hooks
@dataclass
class Switch:
    """Whether readers note what they read and give in the next pass, and of which share of its images."""

    on: bool
    share: float


class Reader:
    """A layer that reads searched filters: the masks on its input, and what it saw in the last training pass.

    Two forward hooks do both. Passes without gradients (evaluation, other methods' looks) are masked and not noted.
    Compiled, the mask is always multiplied by, so that no mask recompiles.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, name: str, switch: Switch) -> None:
        self.name, self.switch = name, switch
        self.module = cast(nn.Conv2d | nn.Linear, model.get_submodule(name))
        found = behind(model, graph, name)
        self.activation = found.activation
        self.norm = None if found.norm is None else cast(_BatchNorm, model.get_submodule(found.norm))
        self.copied = found.norm is None  # what follows may overwrite its output
        self.seen: tuple[Tensor, Tensor] | None = None
        self.mask, self.masked = torch.ones(0), False
        self.hooks = (
            self.module.register_forward_pre_hook(self._masked), self.module.register_forward_hook(self._note)
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        """Return what masks a copy of the network as this one is masked now, and notes nothing."""
        made = copy.copy(self)
        made.mask, made.switch, made.seen = self.mask.clone(), Switch(False, self.switch.share), None
        return made

    def _masked(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if torch.compiler.is_compiling() or self.masked:
            return (given[0] * self.mask.to(given[0].dtype), *given[1:])
        return None

    def _note(self, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if self.switch.on and torch.is_grad_enabled():
            x, y = given[0].detach(), output.detach()
            if self.copied:
                y = y[: self.count(y)].clone()
            self.seen = (x, y)

    def set_mask(self, alive: Flags) -> None:
        """Let the inputs pass where ``alive`` (C,) is True."""
        weight = self.module.weight
        mask = torch.from_numpy(alive).to(weight.device, weight.dtype)
        mask = mask.view(-1, 1, 1) if isinstance(self.module, nn.Conv2d) else mask
        self.masked = not bool(alive.all())
        if self.mask.shape == mask.shape and self.mask.device == mask.device:
            self.mask.copy_(mask)
        else:
            self.mask = mask

    def forget(self) -> None:
        """Let go of what was noted."""
        self.seen = None

    @torch.no_grad()
    def scores(self, ablated: Sequence[Array], mode: Mode, alive: Flags | None) -> list[Tensor]:
        """Return t for each set of input positions, as scalars; nothing if no pass was noted.

        alive: the base mask of this layer's own filters, which is laid on both outputs, or None.
        """
        if self.seen is None or not ablated:
            return []
        x, y = self.seen
        n = self.count(x)
        x, part = x[:n], wide(y[:n])
        affine = None if self.norm is None else Affine.of(self.norm, y)
        z = part if affine is None else affine(part)
        base = self._activated(z.clone(), alive)
        found = []
        for at in ablated:
            lost = wide(contribution(self.module, x, torch.from_numpy(at).to(x.device), y.dtype))
            if self.norm is None or affine is None:
                after = part - lost
            elif mode == "base":
                after = affine.without(z, lost)
            else:
                after = part - lost
                after = Affine.of(self.norm, after)(after)
            found.append(relative_change(base, self._activated(after, alive)))
        return found

    def _activated(self, z: Tensor, alive: Flags | None) -> Tensor:
        if self.activation is not None:
            z = self.activation(z)  # which may work in place
        if alive is None or alive.all():
            return z
        return z * _spread(torch.from_numpy(alive).to(z.device, z.dtype), z)

    def count(self, x: Tensor) -> int:
        """Return how many images of ``x`` are scored, two at least where there are as many."""
        return min(len(x), max(2, math.ceil(self.switch.share * len(x))))

    def uninstall(self, model: nn.Module) -> None:
        """Take the hooks off a copy of the network, and put zeros where its weights read masked filters."""
        module = model.get_submodule(self.name)
        module._forward_pre_hooks.pop(self.hooks[0].id, None)
        module._forward_hooks.pop(self.hooks[1].id, None)
        if self.masked:
            with torch.no_grad():
                cast(Tensor, module.weight)[:, self.mask.flatten() == 0] = 0
