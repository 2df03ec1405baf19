"""Gates: numbers from 0 up that multiply channels and residual branches, driven to exactly 0 by a proximal step.

z = S(a - eta * grad, eta * g)    v <- z - a + mu * v    a <- max(0, z + mu * v)    S(u, t) = sign(u) * max(|u| - t, 0)

A gate multiplies what a norm or a layer puts out, which is to multiply its weight and bias. So the network computes with
scaled tensors and no gate costs a pass over a map; the optimizer moves the latent ones, by their own gradients:

d latent = gate * d scaled    d gate = sum of latent * d scaled    (y = gate * (gamma * x + beta), and alike for layers)

Modules, parameters and their names stay as they are, and so does all that averages or exports them. The same gate may
stand behind several modules: whatever holds a channel that is added to others is closed by one gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.methods.structure.lasso import LAYERS, axis_of
from hasten.surgery import Change
from hasten.surgery.labels import Array

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)
"""The norms behind which a gate can stand; batch norms' gammas can be gates themselves."""

Flags = NDArray[np.bool_]


# -- the mathematics
def soft_threshold(u: Tensor, t: Tensor) -> Tensor:
    """Return ``sign(u) * max(|u| - t, 0)``."""
    return u.sign() * (u.abs() - t).clamp_min(0)


def proximal_step(
    value: Tensor, grad: Tensor, velocity: Tensor, rate: Tensor, pull: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return gates and velocities after one accelerated proximal step, all (n,).

    rate: eta; pull: g of each gate; momentum: mu. A gate below 0, as a batch norm's gamma can be, is treated as its
    mirror image: it comes to rest at 0 and does not change its sign on the way.
    """
    sign = torch.where(value < 0, -1.0, 1.0).to(value.dtype)
    a, v = value * sign, velocity * sign
    z = soft_threshold(a - rate * sign * grad, rate * pull)
    v = z - a + momentum * v
    return sign * (z + momentum * v).clamp_min(0), sign * v


class Gates:
    """All gates of a network in one vector (n,), those of ``channels`` channels before those of blocks.

    ``velocity`` is their momentum, ``still`` counts the whole epochs that each has been 0 by now, and ``awake`` tells
    which have been open since the epoch began. In float32, or in float64 if ``like`` is.
    """

    def __init__(self, channels: int, blocks: int, like: Tensor) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.channels = channels
        self.values = torch.ones(channels + blocks, dtype=dtype, device=like.device)
        self.velocity = torch.zeros_like(self.values)
        self.still = torch.zeros(len(self.values), dtype=torch.int64, device=like.device)
        self.awake = torch.ones(len(self.values), dtype=torch.bool, device=like.device)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def closed(self) -> Flags:
        """Which gates are exactly 0."""
        return cast(Flags, (self.values == 0).cpu().numpy())

    def quiet(self, patience: int) -> Flags:
        """Return which gates are 0 and were for the last ``patience`` whole epochs."""
        return cast(Flags, self.closed & (self.still >= patience).cpu().numpy())

    def put(self, values: Tensor, velocity: Tensor) -> None:
        """Take new values."""
        self.values, self.velocity = values, velocity
        self.awake |= values != 0

    def turn(self) -> None:
        """Count an epoch that has ended."""
        self.still = torch.where(self.awake, 0, self.still + 1)
        self.awake = self.values != 0

    def take(self, kept: Array, channels: int) -> None:
        """Keep the gates ``kept``, of which the first ``channels`` are those of channels."""
        at = torch.from_numpy(kept).to(self.values.device)
        self.channels = channels
        self.values, self.velocity = self.values[at], self.velocity[at]
        self.still, self.awake = self.still[at], self.awake[at]

    def state(self) -> dict[str, Tensor]:
        """Return copies of all four vectors."""
        return {
            "values": self.values.clone(), "velocity": self.velocity.clone(),
            "still": self.still.clone(), "awake": self.awake.clone(),
        }  # fmt: skip

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        here = self.values.device
        self.values, self.velocity, self.still, self.awake = (
            state[name].to(here, copy=True) for name in ("values", "velocity", "still", "awake")
        )


# -- behind a module
class Site:
    """The gates behind one module: gate ``channel[i]`` for channel i (-1: none), and gate ``block`` for all of them.

    role: which slot of the module's channels this is, "norm" or "out". With ``scales`` False the channels' gates are the
    module's gammas themselves. ``latent`` holds the weight and bias of the module without its gates.
    """

    def __init__(
        self, name: str, module: nn.Module, role: str, channel: Array | None, *, scales: bool = True
    ) -> None:
        self.name, self.module, self.role, self.channel, self.scales = name, module, role, channel, scales
        self.block: int | None = None
        self.axis = -1 if isinstance(module, nn.Linear | nn.LayerNorm) else 1
        self.latent: dict[str, Tensor] = {}

    @property
    def weight(self) -> nn.Parameter:
        """The module's weight, or gamma."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def acts(self) -> bool:
        """Whether any gate scales the module's weight and bias."""
        return self.block is not None or (self.channel is not None and self.scales)

    def members(self) -> tuple[Array, Array]:
        """Return the positions of the channels that have gates, and the numbers of these."""
        if self.channel is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        at = np.flatnonzero(self.channel >= 0)
        return at, self.channel[at]

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return the module's weight and bias, as far as it has them."""
        return {name: p for name in ("weight", "bias") if (p := getattr(self.module, name)) is not None}

    def scale(self, values: Tensor) -> Tensor:
        """Return what the gates ``values`` (n,) multiply each channel by: (C,), or () for all alike."""
        branch = values.new_ones(()) if self.block is None else values[self.block]
        if self.channel is None or not self.scales:
            return branch
        each = torch.cat([values, values.new_ones(1)])  # -1 is the last
        return each[torch.from_numpy(self.channel).to(values.device)] * branch

    # -- the optimizer moves the latent tensors, the network computes with the scaled ones
    @torch.no_grad()
    def begin(self) -> None:
        """Take the module's tensors as they are for the latent ones, all gates being 1."""
        if self.acts:
            self.latent = {name: p.detach().clone() for name, p in self.tensors().items()}

    @torch.no_grad()
    def expose(self, values: Tensor, grad: Tensor) -> None:
        """Add the gradients of the gates to ``grad`` (n,), and put the latent tensors and theirs into the module."""
        if not self.acts:
            return
        scale, each = self.scale(values), values.new_zeros(())
        for name, p in self.tensors().items():
            factor, latent = self._along(name, scale, p), self.latent[name]
            # what other hands did to the tensors since, such as lookahead, they did to the latent ones
            drift = p - latent * factor
            latent = latent + torch.where(factor != 0, drift / factor, torch.zeros_like(drift))
            if p.grad is not None:
                axis = self._axis(name)
                others = [d for d in range(p.dim()) if d != axis]
                product = (latent * p.grad).to(values.dtype)
                each = each + (product.sum(others) if others else product)
                p.grad.mul_(factor)
            p.copy_(latent)
        if not each.dim():
            return
        whole = values.new_ones(len(each))
        if self.channel is not None and self.scales:
            where, number = (torch.from_numpy(index).to(values.device) for index in self.members())
            branch = values.new_ones(()) if self.block is None else values[self.block]
            grad.index_add_(0, number, each[where] * branch)
            whole[where] = values[number]
        if self.block is not None:
            grad[self.block] += (whole * each).sum()

    @torch.no_grad()
    def cover(self, values: Tensor) -> None:
        """Take the module's tensors for the latent ones, and put the scaled ones into it."""
        if self.acts:
            scale = self.scale(values)
            for name, p in self.tensors().items():
                self.latent[name] = p.detach().clone()
                p.copy_(self.latent[name] * self._along(name, scale, p))

    def _axis(self, name: str) -> int:
        return axis_of(self.module, "out") if isinstance(self.module, LAYERS) and name == "weight" else 0

    def _along(self, name: str, scale: Tensor, p: Tensor) -> Tensor:
        """Return ``scale`` in the shape in which it multiplies the tensor called ``name``."""
        shape = [1] * p.dim()
        shape[self._axis(name)] = -1
        return scale.view(shape).to(p.dtype) if scale.dim() else scale.to(p.dtype)

    # -- gammas that are gates
    def gather(self, source: Tensor, into: Tensor) -> None:
        """Put what ``source`` (C,) holds for gammas that are gates into ``into`` (n,), by gate."""
        if self.channel is not None and not self.scales:
            at, number = (torch.from_numpy(index).to(into.device) for index in self.members())
            into[number] = source[at].to(into.dtype)

    def scatter(self, source: Tensor, into: Tensor) -> None:
        """Put what ``source`` (n,) holds for gammas that are gates into ``into`` (C,)."""
        if self.channel is not None and not self.scales:
            at, number = (torch.from_numpy(index).to(into.device) for index in self.members())
            into[at] = source[number].to(into.dtype)


def latents(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return the latent tensors by the names of the model's."""
    return {f"{site.name}.{name}": tensor for site in sites for name, tensor in site.latent.items()}


def put_latents(sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> None:
    """Take back what ``latents`` gave, as copies."""
    for site in sites:
        for name, p in site.tensors().items() if site.acts else ():
            site.latent[name] = tensors[f"{site.name}.{name}"].to(p.device, copy=True)


def follow(sites: Sequence[Site], gates: Gates, change: Change, model: nn.Module) -> list[Site]:
    """Bring sites and gates in step with a change of ``model``, and return the sites that are left."""
    names = {id(module): name for name, module in model.named_modules()}
    left, before = [], latents(sites)
    for site in sites:
        if id(site.module) not in names:
            continue
        if site.channel is not None:
            at = change.positions(site.name, site.role, len(site.channel))
            assert at is not None  # its module is there
            site.channel = site.channel[at]
        site.name = names[id(site.module)]
        left.append(site)
    used = np.unique(np.concatenate([np.zeros(0, np.int64), *(site.members()[1] for site in left)]))
    doors = np.array(sorted(site.block for site in left if site.block is not None), np.int64)
    kept = np.concatenate([used, doors])
    number = np.full(len(gates) + 1, -1, np.int64)  # the last for channels without a gate
    number[kept] = np.arange(len(kept))
    gates.take(kept, len(used))
    for site in left:
        if site.channel is not None:
            site.channel = number[site.channel]
        if site.block is not None:
            site.block = int(number[site.block])
    now = {f"{site.name}.{name}": p.detach() for site in left for name, p in site.tensors().items()}
    put_latents(left, change.follow(before, now))
    return left
