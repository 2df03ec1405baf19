"""The group penalties of structured sparsity learning: which groups a layer has, which of them are zero, and freezing.

In the matrix form of a convolution, (filters) x (C * kh * kw), a filter is a row and a filter shape is a column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.methods.structure.depth_wise import Joint, Per, depth_groups
from hasten.methods.structure.lasso import (
    Flags,
    GroupLasso,
    Groups,
    channel_groups,
    is_grouped,
    is_ordinary,
    removable,
    weight_of,
    wide,
)
from hasten.surgery import Channels

Kind = Literal["filter", "channel", "shape", "depth", "filter_2d", "block"]
KINDS: tuple[Kind, ...] = ("filter", "channel", "shape", "depth", "filter_2d", "block")
EPS = 1e-16
"""Under the root of each norm: the gradient of a group of zeros is 0, and that of any other is the published one."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """Groups that tile the matrix form of a weight: ``rows`` filters by ``columns`` columns, smaller at the far edges.

    The authors' general form. ``parts``: the groups of a convolution in groups, inside of which tiles lie; with all its
    filters as ``rows`` and one column they are its columns.
    """

    weight: nn.Parameter
    rows: int
    columns: int
    parts: int = 1
    scale: float = 1.0

    @property
    def _matrix(self) -> tuple[int, int]:
        """Filters of a part, and columns."""
        return len(self.weight) // self.parts, self.weight.numel() // len(self.weight)

    @property
    def count(self) -> int:
        """The number of groups."""
        height, width = self._matrix
        return self.parts * -(-height // self.rows) * -(-width // self.columns)

    def norms(self) -> Tensor:
        """Return the norms as (tiles down, 1, tiles across, 1), the parts below each other."""
        height, width = self._matrix
        matrix = wide(self.weight).reshape(self.parts, height, width)
        matrix = F.pad(matrix, (0, -width % self.columns, 0, -height % self.rows)).contiguous()
        tiles = matrix.view(-1, self.rows, matrix.shape[2] // self.columns, self.columns)
        return tiles.square().sum((1, 3), keepdim=True).sqrt()

    def spread(self, values: Tensor) -> Tensor:
        """Return ``values``, laid out as ``norms``, at every weight."""
        height, width = self._matrix
        whole = values.expand(-1, self.rows, -1, self.columns)
        whole = whole.reshape(self.parts, -1, values.shape[2] * self.columns)
        return whole[:, :height, :width].reshape(self.weight.shape)

    def add_gradient(self) -> None:
        """Add scale * w / norm to the gradient; nothing where the norm is 0."""
        if self.weight.grad is not None:
            norms = self.norms()
            factors = torch.where(norms > 0, self.scale / norms, torch.zeros_like(norms))
            self.weight.grad.add_((wide(self.weight) * self.spread(factors)).to(self.weight.grad.dtype))

    def shrink(self, rate: float) -> None:
        """Take the proximal step of length rate * scale."""
        norms = self.norms().clamp_min(torch.finfo(torch.float32).tiny)
        factors = (1 - rate * self.scale / norms).clamp_min(0)
        self.weight.mul_(self.spread(factors).to(self.weight.dtype))


Form = Groups | Tiles | Joint


def layer_forms(
    channels: Channels, name: str, conv: nn.Conv2d, free: Flags, kinds: Iterable[Kind], block: tuple[int, int]
) -> dict[Kind, Groups | Tiles]:
    """Return the groups of a convolution by kind, scale 1; kinds that it cannot have are left out.

    free: the classes of channels that surgery may take out; filters and channels outside of it are in no group. block:
    width and height of the tiles of kind "block".
    """
    weight, found = weight_of(conv), dict[Kind, Groups | Tiles]()
    for kind in kinds:
        if kind in ("filter", "channel") and is_ordinary(conv):
            role = "out" if kind == "filter" else "in"
            if (groups := channel_groups(channels, name, conv, free).get(role)) is not None:
                found[kind] = groups
        elif kind == "shape":
            each = len(weight) // conv.groups
            whole = conv.groups == 1
            found[kind] = Groups(weight, (1, 2, 3)) if whole else Tiles(weight, each, 1, conv.groups)
        elif kind == "filter_2d":
            found[kind] = Groups(weight, (0, 1))
        elif kind == "block":
            found[kind] = Tiles(weight, block[1], block[0], conv.groups)
    return found


def size_of(form: Form) -> int:
    """Return the number of weights of one (whole) group."""
    if isinstance(form, Joint):
        return form.size
    if isinstance(form, Tiles):
        return form.rows * form.columns
    return math.prod(form.weight.shape[d] for d in form.others)


def scaled(form: Form, by: float) -> Form:
    """Return ``form`` with its norms multiplied by ``by``."""
    if isinstance(form, Groups):
        return replace(form, scale=form.scale * by)
    return replace(form, scale=form.scale * by)


def weights_of(form: Form) -> tuple[nn.Parameter, ...]:
    """Return the parameters that the groups lie in."""
    return form.tensors if isinstance(form, Joint) else (form.weight,)


def why_none(conv: nn.Module) -> str | None:
    """Return why a convolution has no groups of any kind but whole layers, or None."""
    if not weight_of(conv).requires_grad:
        return "its weight is frozen"
    if not is_ordinary(conv) and not is_grouped(conv):
        return "it is depthwise: its channels follow those of its neighbours"
    return None


def find(
    channels: Channels,
    model: nn.Module,
    coefficient: Callable[[str, Kind], float],
    *,
    tile: tuple[int, int],
    per: Per,
    by_size: bool,
) -> dict[str, dict[Kind, Form]]:
    """Return the groups of a network by layer (or block) and kind, scaled by ``coefficient(name, kind)``.

    tile: width and height of blocks. per: what a group of kind "depth" is. by_size: scale by the root of the size of a
    group over the smallest of its kind as well. Kinds whose coefficient is 0, and layers without any, are left out.
    """
    free = removable(channels, model)
    found: dict[str, dict[Kind, Form]] = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and why_none(conv) is None:
            wanted: list[Kind] = [kind for kind in KINDS if coefficient(name, kind) > 0]
            found[name] = dict(layer_forms(channels, name, conv, free, wanted, tile))
    for name, joint in depth_groups(channels, model, per).items():
        if coefficient(name, "depth") > 0:
            found.setdefault(name, {})["depth"] = joint

    def factor(kind: Kind, form: Form) -> float:
        if not by_size:
            return 1.0
        return math.sqrt(size_of(form) / min(size_of(own[kind]) for own in found.values() if kind in own))

    return {
        name: {
            kind: scaled(form, coefficient(name, kind) * factor(kind, form)) for kind, form in forms.items()
        }
        for name, forms in found.items()
        if forms
    }


class Penalty:
    """The sum of coefficient * norm over all groups; each form's ``scale`` is its coefficient."""

    def __init__(self, forms: Iterable[Form]) -> None:
        self.forms = list(forms)
        groups = [form for form in self.forms if isinstance(form, Groups)]
        self.lasso = GroupLasso(groups, EPS)
        self.tiles = [form for form in self.forms if isinstance(form, Tiles)]
        self.joints = [form for form in self.forms if isinstance(form, Joint)]
        self.numbered: list[Groups | Tiles] = [*groups, *self.tiles]
        self.weights = list({id(w): w for form in self.forms for w in weights_of(form)}.values())

    @torch.no_grad()
    def value(self) -> float:
        """Return the penalty."""
        tiles = math.fsum(tile.scale * float(tile.norms().sum()) for tile in self.tiles)
        joints = math.fsum(joint.scale * float(joint.norm()) for joint in self.joints)
        return (self.lasso.penalty() if self.lasso.weights else 0.0) + tiles + joints

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to that of every weight that has one."""
        self.lasso.add_gradient(1.0)
        for tile in self.tiles:
            tile.add_gradient()
        for joint in self.joints:
            joint.add_gradient()

    @torch.no_grad()
    def shrink(self, rates: Mapping[int, float]) -> None:
        """Take the proximal step; ``rates``: how far a gradient of 1 moves each weight, by its id."""
        self.lasso.shrink([rates[id(weight)] for weight in self.lasso.weights])
        for tile in self.tiles:
            tile.shrink(rates[id(tile.weight)])
        for joint in self.joints:
            joint.shrink(rates)

    @torch.no_grad()
    def cut(self, threshold: float) -> None:
        """Set every weight below ``threshold`` in size to exactly 0."""
        sizes = torch._foreach_abs([weight.detach() for weight in self.weights])
        for weight, size in zip(self.weights, sizes, strict=True):
            weight.mul_(size >= threshold)

    @torch.no_grad()
    def cut_groups(self, share: float) -> None:
        """Set every group to 0 whose norm is below ``share`` of the median of its like in the layer that are not 0.

        Groups of whole layers are compared with each other.
        """
        for form in self.numbered:
            norms = norms_of(form)
            keep = norms >= share * _median(norms)
            form.weight.mul_(form.spread(keep) if isinstance(form, Tiles) else keep)
        if self.joints:
            norms = torch.stack([joint.norm() for joint in self.joints])
            for joint, low in zip(self.joints, (norms < share * _median(norms)).tolist(), strict=True):
                for tensor in joint.tensors if low else ():
                    tensor.zero_()

    @torch.no_grad()
    def free(self) -> dict[int, Tensor]:
        """Return, by the id of each weight that has groups of zeros, True for its entries that lie in none."""
        found: dict[int, Tensor] = {}
        for form in self.numbered:
            alive = norms_of(form) > 0
            at = form.spread(alive) if isinstance(form, Tiles) else alive.expand(form.weight.shape)
            _join(found, form.weight, at)
        for joint in self.joints:
            if not any(bool(tensor.any()) for tensor in joint.tensors):
                for tensor in joint.tensors:
                    _join(found, tensor, torch.zeros_like(tensor, dtype=torch.bool))
        return {key: mask for key, mask in found.items() if not bool(mask.all())}

    @torch.no_grad()
    def zero_groups(self) -> tuple[int, int]:
        """Return how many groups are zero, and how many there are."""
        zero = sum(int((norms_of(form) == 0).sum()) for form in self.numbered)
        zero += sum(int(float(joint.norm()) == 0) for joint in self.joints)
        return zero, sum(form.count for form in self.numbered) + len(self.joints)


def norms_of(form: Groups | Tiles) -> Tensor:
    """Return the norm of each group, with all dimensions kept; infinity for groups that are left out."""
    if isinstance(form, Tiles):
        return form.norms()
    square = wide(form.weight).square()
    norms = (square.sum(form.others, keepdim=True) if form.others else square).sqrt()
    if isinstance(form.scale, Tensor):
        norms = torch.where(form.scale > 0, norms, torch.full_like(norms, math.inf))
    return norms


def _median(norms: Tensor) -> Tensor:
    live = norms[(norms > 0) & norms.isfinite()]
    return live.median() if len(live) else norms.new_zeros(())


def _join(found: dict[int, Tensor], weight: Tensor, free: Tensor) -> None:
    found[id(weight)] = found[id(weight)] & free if id(weight) in found else free.clone()
