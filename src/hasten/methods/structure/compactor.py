"""Compactors: 1x1 convolutions behind the layers to prune. Where they can stand, and how they come in and merge.

A row of a compactor that is zero makes a channel that is zero, and one that is read as zero everywhere can go. Behind a
depthwise convolution it is read as a constant instead, which goes into the next batch norm's mean or the next bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from hasten.diagnose import look
from hasten.errors import UnsupportedSurgeryError
from hasten.products import supported
from hasten.surgery import Channels, RemoveChannels, Surgeon, replace_module
from hasten.surgery.labels import Array


class Compactor(nn.Conv2d):
    """A 1x1 convolution without bias, the identity at first; weight (channels kept, channels, 1, 1)."""

    def __init__(
        self, channels: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(channels, channels, 1, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Become the identity; nothing is drawn."""
        nn.init.dirac_(self.weight)


@dataclass(frozen=True, eq=False)
class Passage:
    """A depthwise convolution between a target and its only reader, a 1x1 convolution.

    Where the target gives zeros the reader reads a constant for each channel. ``norm`` is the batch norm behind the
    reader, which takes the sum of the constants; without one the reader's bias does.
    """

    depthwise: str
    reader: nn.Conv2d
    norm: nn.BatchNorm2d | None

    @torch.no_grad()
    def take(self, constant: Tensor) -> None:
        """Add ``constant`` (O,) to what the reader gives."""
        if self.norm is not None:
            cast(Tensor, self.norm.running_mean).sub_(constant)
        else:
            cast(Tensor, self.reader.bias).add_(constant)


@dataclass(frozen=True, eq=False)
class Target:
    """A convolution to prune: its name before the compactor comes in, its width, and the layers that read it.

    norm: the batch norm that alone reads it, or None. passage: a depthwise convolution on the way to the reader.
    """

    conv: str
    norm: str | None
    width: int
    readers: tuple[str, ...]
    passage: Passage | None = None

    @property
    def host(self) -> str:
        """Name of the module behind which the compactor stands."""
        return self.norm if self.norm is not None else self.conv

    @property
    def compactor(self) -> str:
        """Name of the compactor once it is in."""
        return f"{self.host}.1"


# -- in and out
def insert(model: nn.Module, target: Target) -> Compactor:
    """Put an identity compactor behind the host of ``target``: module X becomes a sequence of X.0 and X.1."""
    weight = cast(Tensor, model.get_submodule(target.conv).weight)
    compactor = Compactor(target.width, weight.device, weight.dtype)
    replace_module(model, target.host, nn.Sequential(model.get_submodule(target.host), compactor))
    return compactor


def merge(model: nn.Module, target: Target) -> None:
    """Make one convolution with bias of convolution, batch norm and compactor; the batch norm's place stays empty."""
    host, compactor = cast(nn.Sequential, model.get_submodule(target.host))
    conv = cast(nn.Conv2d, host if target.norm is None else model.get_submodule(target.conv))
    norm = None if target.norm is None else cast(nn.BatchNorm2d, host)
    replace_module(model, target.conv, merged(conv, norm, cast(Tensor, compactor.weight)))
    if target.norm is not None:
        replace_module(model, target.norm, nn.Identity())


@torch.no_grad()
def merged(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, rows: Tensor) -> nn.Conv2d:
    """Return the convolution that computes ``rows * norm(conv(x))``, norm in evaluation; rows (D', D, 1, 1).

    With s = gamma / sqrt(var + eps): weight' = rows * (s * weight), bias' = rows * (beta + s * (bias - mean)), all
    computed in float64.
    """
    weight, q = conv.weight.double(), rows.flatten(1).double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()
    if norm is not None:
        scale = (cast(Tensor, norm.running_var).double() + norm.eps).rsqrt()
        bias = bias - cast(Tensor, norm.running_mean).double()
        if norm.affine:
            scale = scale * norm.weight.double()
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale
        if norm.affine:
            bias = bias + norm.bias.double()
    result: nn.Conv2d = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d, conv.in_channels, len(q), cast(Any, conv.kernel_size), stride=cast(Any, conv.stride),
        padding=cast(Any, conv.padding), dilation=cast(Any, conv.dilation), padding_mode=conv.padding_mode,
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    result.weight.copy_((q @ weight.flatten(1)).view(-1, *weight.shape[1:]))
    cast(Tensor, result.bias).copy_(q @ bias)
    return result


# -- what is read
def silent_reads(
    model: nn.Module, x: Tensor, silent: Mapping[nn.Module, Tensor | None]
) -> dict[nn.Module, list[Tensor]]:
    """Return what each convolution and linear layer reads, by use, when channels of some modules are made zero.

    silent: the numbers of the channels by module, or None for all of them. x: a batch of inputs. In eval mode.
    """
    found: dict[nn.Module, list[Tensor]] = {}

    def see(name: str, given: tuple[Any, ...], _: Any) -> None:
        found.setdefault(model.get_submodule(name), []).append(given[0].clone())

    with ExitStack() as stack:
        for module, rows in silent.items():
            hook = module.register_forward_hook(lambda _, __, out, rows=rows: _silenced(out, rows))
            stack.callback(hook.remove)
        look(model, x, see, (nn.Conv2d, nn.Linear))
    return found


def _silenced(output: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return torch.zeros_like(output)
    return output.index_fill(1, rows.to(output.device), 0.0)


def constants(
    model: nn.Module, channels: Channels, x: Tensor, going: Mapping[Target, Tensor]
) -> list[tuple[Passage, Tensor]]:
    """Return what the reader behind each passage loses when rows ``going`` of compactors go: (O,) for each passage."""
    if all(target.passage is None for target in going):
        return []
    names = {module: name for name, module in model.named_modules()}
    reads = silent_reads(model, x, {model.get_submodule(t.compactor): rows for t, rows in going.items()})
    found = []
    for target, rows in going.items():
        if (passage := target.passage) is None:
            continue
        reader = passage.reader
        lost = channels.outputs(target.compactor)[rows.cpu().numpy()]
        at = _positions(channels, names[reader], lost).to(reader.weight.device)
        read = reads[reader][0][0, at, 0, 0]
        found.append((passage, reader.weight.detach()[:, at, 0, 0] @ read))
    return found


def _positions(channels: Channels, reader: str, classes: Array) -> Tensor:
    """Return the input channels of ``reader`` that are of these classes."""
    return torch.from_numpy(np.flatnonzero(np.isin(channels.inputs(reader), classes)))


# -- where they can stand
def find_targets(hand: Surgeon, x: Tensor, num_at_least: int) -> tuple[list[Target], dict[str, str]]:
    """Return the convolutions that a compactor can prune in the network of ``hand``, and why each other one stays whole.

    x: inputs to try the network with. Layers of ``num_at_least`` channels or fewer stay.
    """
    model, channels = hand.model, hand.channels
    finder = _Finder(model, channels)
    targets: list[Target] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found = finder.target(name, module, num_at_least)
            if isinstance(found, str):
                skipped[name] = found
            else:
                targets.append(found)
    if not targets:
        return [], skipped
    reads = silent_reads(model, x, {model.get_submodule(t.host): None for t in targets})
    for target in targets:
        if reason := _not_silent(model, channels, target, reads):
            skipped[target.conv] = reason
    targets = [t for t in targets if t.conv not in skipped]
    skipped |= _stuck(hand, targets)
    return [t for t in targets if t.conv not in skipped], skipped


def _stuck(hand: Surgeon, targets: Sequence[Target]) -> dict[str, str]:
    """Return why channels of a target cannot be removed, by its name: now, not at the end of a long run."""
    try:
        hand.plan([RemoveChannels(t.conv, (0,)) for t in targets])
    except UnsupportedSurgeryError as error:
        if len(targets) == 1:
            return {targets[0].conv: str(error)}
        return {name: reason for t in targets for name, reason in _stuck(hand, [t]).items()}
    return {}


def _not_silent(
    model: nn.Module, channels: Channels, target: Target, reads: Mapping[nn.Module, list[Tensor]]
) -> str | None:
    """Return why a channel of zeros of ``target`` is not read as one (or, past a passage, as a constant)."""
    for reader in target.readers:
        module = model.get_submodule(reader)
        at = _positions(channels, reader, channels.outputs(target.conv))
        for read in reads[module]:
            part = read.index_select(1 if isinstance(module, nn.Conv2d) else -1, at.to(read.device))
            if target.passage is None and (part != 0).any():
                value = float(part[part != 0].flatten()[0])
                return (
                    f"where it gives 0, {reader} reads {value:.3g}: an activation between them has f(0) != 0"
                )
            if target.passage is not None and not torch.allclose(part, part[:, :, :1, :1].expand_as(part)):
                return f"where it gives 0, {reader} reads what differs from pixel to pixel"
    return None


class _Finder:
    """Looks for targets in a traced network."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self.model, self.channels = model, channels
        self.held = {key: channels.classes[slot.labels] for key, slot in channels.slots.items()}
        self.calls: dict[str, list[fx.Node]] = {}
        for node in channels.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)

    def target(self, name: str, conv: nn.Conv2d, num_at_least: int) -> Target | str:
        """Return the target that ``conv`` is, or why it is none."""
        if conv.groups != 1:
            return f"its groups={conv.groups} tie channels together"
        if reason := supported(conv) or self.channels.why_not(name):
            return reason
        if len(self.calls[name]) > 1:
            return "it runs more than once in a pass"
        if self.calls[name][0].all_input_nodes[0].op == "placeholder":
            return "it reads the images, and the first layer stays whole"
        if conv.out_channels <= num_at_least:
            return f"it has {conv.out_channels} channels, of which num_at_least={num_at_least} stay"
        norm = self._norm_behind(name)
        if norm is not None and cast(nn.BatchNorm2d, self.model.get_submodule(norm)).running_mean is None:
            return f"batch norm {norm} keeps no running statistics, so it cannot be merged"
        return self._with_readers(name, norm, conv.out_channels)

    def _norm_behind(self, name: str) -> str | None:
        """Return the batch norm that alone reads the layer's output."""
        users = list(self.calls[name][0].users)
        if len(self.calls[name]) != 1 or len(users) != 1 or users[0].op != "call_module":
            return None
        norm = str(users[0].target)
        alone = type(self.model.get_submodule(norm)) is nn.BatchNorm2d and len(self.calls[norm]) == 1
        return norm if alone else None

    def _with_readers(self, name: str, norm: str | None, width: int) -> Target | str:
        mine = self.channels.outputs(name)
        if len(np.unique(mine)) != width:
            return "its own channels are tied to each other"
        for tie in self.channels.ties:
            if np.isin(self.channels.classes[tie.labels], mine).any():
                return f"{tie.name} holds its channels in {tie.parts} parts that must stay equal"
        readers, depthwise, norms = [], [], []
        for (holder, role), classes in self.held.items():
            if (holder, role) in ((name, "out"), (norm, "norm")) or not np.isin(classes, mine).any():
                continue
            module = self.model.get_submodule(holder) if role in ("in", "out", "norm") else None
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                depthwise += [holder] * (role == "in")
            elif role == "in" and isinstance(module, nn.Conv2d | nn.Linear):
                readers.append(holder)
            elif role == "norm" and not isinstance(module, nn.PReLU):
                norms.append(holder)
            elif not isinstance(module, nn.PReLU):
                return f"its channels are also those of {holder or 'the network'}, so they stay together"
        if not readers:
            return "no layer reads it"
        passage = self._passage(depthwise, norms, readers) if depthwise or norms else None
        return passage if isinstance(passage, str) else Target(name, norm, width, tuple(readers), passage)

    def _passage(self, depthwise: list[str], norms: list[str], readers: list[str]) -> Passage | str:
        """Return the depthwise convolution on the way to the only reader, or why a constant would get lost."""
        if not depthwise:
            return f"{norms[0]} makes a constant of a channel of zeros"
        if len(depthwise) > 1 or len(readers) > 1:
            return f"a channel of zeros becomes a constant in {depthwise[0]}, which more than one layer reads"
        if norms not in ([], [self._norm_behind(depthwise[0])]):
            return f"{norms[0]} makes a constant of a channel of zeros"
        reader = self.model.get_submodule(readers[0])
        if not (
            isinstance(reader, nn.Conv2d)
            and reader.kernel_size == (1, 1)
            and reader.padding in ((0, 0), "same", "valid")
        ):
            return f"{readers[0]} is no 1x1 convolution, so the constant of {depthwise[0]} would change at its borders"
        behind = self._norm_behind(readers[0])
        norm = None if behind is None else cast(nn.BatchNorm2d, self.model.get_submodule(behind))
        if (norm is None and reader.bias is None) or (norm is not None and norm.running_mean is None):
            return f"the constant of {depthwise[0]} has nowhere to go: {readers[0]} has no bias or running mean behind it"
        return Passage(depthwise[0], reader, norm)
