"""Where gates can stand: which channels and branches of a network they close, and what a gamma of 0 leaves behind.

A gate stands behind every norm that holds its channel, or behind the layers that make it. Whether that closes the
channel is not argued but tried: with it at 0 and all layers giving random numbers, every reader must read 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hasten import keyed
from hasten.diagnose import layer_shapes, look
from hasten.methods.structure.gates import NORMS, Flags, Site
from hasten.methods.structure.lasso import LAYERS, is_ordinary, removable
from hasten.surgery import Change, Channels, Surgeon
from hasten.surgery.blocks import branches


def find_channels(surgeon: Surgeon, x: Tensor, *, gammas: bool) -> tuple[list[Site], dict[str, str]]:
    """Return the sites that close every channel that can go, and why the channels of each other layer stay.

    A gate stands behind every norm that holds its channel; without a norm, or where the channel is also read past it,
    behind the layers that make it. It is tried with random layers whether then nobody reads anything but 0. x: images
    for that. gammas: the gates are those of the one norm that holds the channel.
    """
    search = _Search(surgeon.model, surgeon.channels, gammas=gammas)
    if gammas:
        search.leave_out(search.norms_held != 1, "not exactly one norm holds its channels: with channel_gate='gate' one "
                         "gate closes them all")  # fmt: skip
    loud = leaks(surgeon.model, surgeon.channels, x, search.sites())
    if loud and not gammas:
        search.also_makers(list(loud))
        loud = leaks(surgeon.model, surgeon.channels, x, search.sites())
    for one, reason in loud.items():
        search.drop(one, reason)
    return search.sites(), search.skipped()


class _Search:
    """Which channels of a traced network get gates, and behind which modules."""

    def __init__(self, model: nn.Module, channels: Channels, *, gammas: bool) -> None:
        self.model, self.channels, self._gammas = model, channels, gammas
        self.gated = removable(channels, model)
        self.why: dict[int, str] = {}
        held = {key: channels.classes[slot.labels] for key, slot in channels.slots.items()}
        self.places = {
            (name, role): classes
            for (name, role), classes in held.items()
            if (role == "norm" and isinstance(model.get_submodule(name), NORMS))
            or (role == "out" and isinstance(model.get_submodule(name), LAYERS))
        }
        self.norms_held = np.zeros(len(channels.classes), np.int64)
        for (_, role), classes in self.places.items():
            if role == "norm":
                np.add.at(self.norms_held, classes, 1)
        self.at_maker = self.norms_held == 0
        self._refuse_bad_sites()

    def drop(self, one: int, reason: str) -> None:
        """Leave one class of channels out."""
        if self.gated[one]:
            self.gated[one], self.why[one] = False, reason

    def leave_out(self, flags: Flags, reason: str) -> None:
        """Leave classes of channels out."""
        for one in np.flatnonzero(flags & self.gated).tolist():
            self.drop(one, reason)

    def also_makers(self, classes: Sequence[int]) -> None:
        """Put gates for these classes behind the layers that make them, too."""
        self.at_maker[list(classes)] = True
        self._refuse_bad_sites()

    def _refuse_bad_sites(self) -> None:
        for (name, role), classes in self.places.items():
            weight = self.model.get_submodule(name).weight
            reason = (
                f"{name} has no weight that could take its gate" if weight is None
                else "" if weight.requires_grad else f"the weight of {name} is frozen"
            )  # fmt: skip
            if reason:
                mine = np.zeros(len(self.gated), bool)
                mine[classes] = True
                self.leave_out(mine & (self.at_maker | (role == "norm")), reason)

    def sites(self) -> list[Site]:
        """Return the sites as chosen by now, gates numbered in the order of the network."""
        number, count = np.full(len(self.gated), -1, np.int64), 0
        found = []
        for (name, role), classes in self.places.items():
            mine = self.gated[classes] & (self.at_maker[classes] | (role == "norm"))
            for one in classes[mine].tolist():
                if number[one] < 0:
                    number[one], count = count, count + 1
            if mine.any():
                channel = np.where(mine, number[classes], -1)
                module = self.model.get_submodule(name)
                found.append(Site(name, module, role, channel, scales=not self._gammas))
        return found

    def skipped(self) -> dict[str, str]:
        """Return why each layer has no gate for any of its channels."""
        found = {}
        for (name, role), classes in self.places.items():
            if role == "out" and not self.gated[classes].any():
                first = int(classes[0])
                found[name] = (
                    self.why.get(first)
                    or self.channels.protected.get(first)
                    or "a grouped convolution holds its channels in parts"
                )
        return found


def leaks(model: nn.Module, channels: Channels, x: Tensor, sites: Sequence[Site]) -> dict[int, str]:
    """Return the classes of channels that are read as anything but 0 while their gates are 0, with what reads them.

    All layers give random numbers meanwhile, so that nothing is 0 by chance or because something else is closed.
    """
    shut = np.zeros(len(channels.classes), bool)
    found: dict[int, str] = {}

    def see(name: str, given: tuple[Any, ...], _: Any) -> None:
        slot = channels.slots.get((name, "in"))
        module = model.get_submodule(name)
        if slot is None or not given or not is_ordinary(module):
            return
        axis = -1 if isinstance(module, nn.Linear) else 1
        read = (given[0] != 0).movedim(axis, 0).flatten(1).any(1).cpu().numpy()
        classes = channels.classes[slot.labels]
        for one in classes[read & shut[classes]].tolist():
            found.setdefault(one, f"where its gate is 0, {name} still reads something else")

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, LAYERS):
                hook = module.register_forward_hook(lambda _, __, out, name=name: _noise(out, name))
                stack.callback(hook.remove)
        for site in sites:
            at, _ = site.members()
            shut[channels.classes[channels.slots[site.name, site.role].labels][at]] = True
            where, axis = torch.from_numpy(at).to(x.device), site.axis
            hook = site.module.register_forward_hook(
                lambda _, __, out, axis=axis, where=where: out.index_fill(axis, where, 0.0)
            )
            stack.callback(hook.remove)
        look(model, x[:2], see, LAYERS)
    return found


def _noise(output: Tensor, name: str) -> Tensor:
    drawn = torch.randn(tuple(output.shape), generator=keyed.generator("gates", name))
    return drawn.to(output.device, output.dtype)


def find_blocks(surgeon: Surgeon, x: Tensor) -> tuple[dict[str, str], dict[str, str]]:
    """Return the residual blocks whose branch can get a gate, by the module that ends it, and why others cannot."""
    model, graph = surgeon.model, surgeon.channels.graph
    shapes = layer_shapes(model, x[:2])
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    found: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, branch in branches(graph, model).items():
        end = model.get_submodule(branch.end)
        begun, ended = shapes.get(branch.modules[0]), shapes.get(branch.end)
        weight = getattr(end, "weight", None)
        if not branch.identity or begun is None or ended is None or begun[0] != ended[1]:
            reason = "its shortcut changes the shape"
        elif not isinstance(end, (*NORMS, *LAYERS)) or weight is None:
            reason = f"its branch ends in {branch.end}, a {type(end).__name__} that no gate folds into"
        elif not weight.requires_grad:
            reason = f"the weight of {branch.end} is frozen"
        elif calls.count(branch.end) > 1:
            reason = f"{branch.end} runs more than once in a pass"
        else:
            found[branch.end] = name
            continue
        skipped[name] = reason
    return found, skipped


# -- what a gamma of 0 leaves
@dataclass(frozen=True, eq=False)
class Constant:
    """What ``reader`` reads of channels that are constant, as it comes out of it: ``given`` (O,).

    Where the layer has no bias the batch norm ``norm`` behind it takes the constant into its running mean; in training
    it does without.
    """

    reader: str
    norm: str | None
    given: Tensor

    @torch.no_grad()
    def take(self, model: nn.Module, change: Change) -> None:
        """Add the constant to the reader, after ``change`` has taken the channels out."""
        layer = model.get_submodule(self.reader)
        at = change.positions(self.reader, "out", len(self.given))
        given = self.given if at is None else self.given[torch.from_numpy(at).to(self.given.device)]
        if layer.bias is not None:
            cast(Tensor, layer.bias).add_(given)
        elif self.norm is not None:
            cast(Tensor, model.get_submodule(self.norm).running_mean).sub_(given)


def constants(model: nn.Module, channels: Channels, x: Tensor, gone: Flags) -> list[Constant]:
    """Return what the readers of channels lose that are constant because their gamma is 0; gone: by class.

    Exact for linear layers and 1x1 convolutions; one that pads with zeros reads less than the constant at the border.
    A reader is left out, and what it reads lost, if it has neither bias nor a batch norm of its own behind it.
    """
    found: list[Constant] = []
    seen: dict[str, int] = {}

    def see(name: str, given: tuple[Any, ...], _: Any) -> None:
        seen[name] = seen.get(name, 0) + 1
        slot, layer = channels.slots.get((name, "in")), model.get_submodule(name)
        if slot is None or not given or not is_ordinary(layer) or isinstance(layer, nn.ConvTranspose2d):
            return
        at = np.flatnonzero(gone[channels.classes[slot.labels]])
        norm = _norm_behind(channels, model, name)
        if not len(at) or (layer.bias is None and norm is None):
            return
        where = torch.from_numpy(at).to(given[0].device)
        axis = -1 if isinstance(layer, nn.Linear) else 1
        read = given[0].index_select(axis, where).movedim(axis, 0).flatten(1)
        if torch.allclose(read, read[:, :1].expand_as(read)):
            weight = cast(Tensor, layer.weight).detach().index_select(1, where)
            weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            found.append(Constant(name, norm, weight @ read[:, 0]))

    look(model, x[:1], see, LAYERS)
    return [constant for constant in found if seen[constant.reader] == 1]


def _norm_behind(channels: Channels, model: nn.Module, name: str) -> str | None:
    """Return the batch norm with running statistics that alone reads the layer's output."""
    calls = [node for node in channels.graph.nodes if node.op == "call_module"]
    users = [user for node in calls if node.target == name for user in node.users]
    if len(users) != 1 or users[0].op != "call_module":
        return None
    norm = str(users[0].target)
    module = model.get_submodule(norm)
    kept = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    return norm if kept and sum(node.target == norm for node in calls) == 1 else None
