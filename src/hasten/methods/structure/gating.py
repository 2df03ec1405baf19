"""Channel gating: each residual branch keeps the channels that are alive in itself, of those its stage keeps.

Where all layers around an addition keep the union of their channels, most have some that are dead for them alone. A
gate leaves these out of a branch: its first convolution selects what it reads, its last one puts zeros between what it
makes (PruneTrain, section 4). Fewer MACs for the price of an index on each side.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hasten.methods.structure.lasso import LAYERS, largest
from hasten.surgery import Channels, Gate
from hasten.surgery.blocks import branches
from hasten.surgery.gates import end_of, is_open


def gates(channels: Channels, model: nn.Module, tau: float, *, round_to: int, least: int) -> list[Gate]:
    """Return the gates that leave out of each branch what is dead for it: no weight above ``tau`` on that side.

    The strongest of the dead stay until their number is a multiple of ``round_to`` and at least ``least``. Branches
    begin and end with a plain convolution (a batch norm may follow the last); others are left as they are.
    """
    edits = []
    for branch in branches(channels.graph, model).values():
        layers = [name for name in branch.modules if isinstance(model.get_submodule(name), LAYERS)]
        if not layers or not all(is_open(model.get_submodule(layers[at])) for at in (0, -1)):
            continue
        sides = [("in", layers[0])]
        if end_of(channels.graph, model, layers[-1]) == branch.end:
            sides.append(("out", layers[-1]))
        for role, layer in sides:
            if (layer, role) not in channels.slots:
                continue
            kept = alive(model.get_submodule(layer), role, tau, round_to=round_to, least=least)
            if len(kept) < len(channels.slots[layer, role].labels):
                edits.append(Gate(layer, role, kept))
    return edits


def alive(layer: nn.Module, role: str, tau: float, *, round_to: int, least: int) -> tuple[int, ...]:
    """Return the channels of one side of ``layer`` that have a weight above ``tau``, rounded up by the strongest dead."""
    strength = largest(layer).amax(1 if role == "out" else 0)
    count = max(int((strength > tau).sum()), least, 1)
    count = min(-(-count // round_to) * round_to, len(strength))
    order = torch.argsort(strength, descending=True, stable=True)[:count]
    return tuple(int(i) for i in np.sort(order.cpu().numpy()))
