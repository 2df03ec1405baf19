"""Deeper by identities (Net2DeeperNet): a new layer that changes nothing yet, or a residual block that adds zero.

`Net2Net` calls these functions inside a run. Between two runs a program calls them itself::

    surgeon = Surgeon(model, [optimizer], images)
    deepen(surgeon, ["features.2"], images=some_hundred_training_images)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hasten import keyed
from hasten.diagnose import look
from hasten.errors import SettingsError, UnsupportedSurgeryError, unknown
from hasten.models.registry import seeded
from hasten.models.resnet import BasicBlock, Bottleneck
from hasten.models.wrn import PreActBlock
from hasten.surgery import Change, Insert, Surgeon, builders
from hasten.surgery.trace import twin

Form = Literal["auto", "layer", "linear", "block"]
FORMS: tuple[Form, ...] = ("auto", "layer", "linear", "block")
Moments = tuple[list[float], list[float]]

BLOCKS: dict[str, str] = {
    f"{BasicBlock.__module__}.BasicBlock": "basic",
    f"{Bottleneck.__module__}.Bottleneck": "bottleneck",
    f"{PreActBlock.__module__}.PreActBlock": "preact",
    "torchvision.models.resnet.BasicBlock": "basic",
    "torchvision.models.resnet.Bottleneck": "bottleneck",
}
"""Which residual block is inserted behind one of a known class. Those but "preact" end in a ReLU."""

_PASSING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Flatten, nn.Dropout,
            nn.Dropout2d)  # fmt: skip


class NonIdempotentActivationError(UnsupportedSurgeryError):
    """An activation changes what it has given already, so that a layer that ends in it is never the identity."""


# -- the modules that a log names
def identity_layer(
    channels: int,
    kernel: int = 3,
    flat: bool = False,
    activation: str = "none",
    limits: Sequence[float] | None = None,
    mean: Sequence[float] | None = None,
    var: Sequence[float] | None = None,
) -> nn.Module:
    """Return a convolution (or, if ``flat``, a linear layer) that is the identity, with what follows it.

    mean, var: of each channel that goes in, over images and pixels. With them a batch norm follows that undoes its own
    normalisation: weight sqrt(var + eps), bias mean, running statistics mean and var. activation: "none", "relu" or
    "hardtanh" with ``limits``. Raises SettingsError for an even kernel or an unknown activation.
    """
    if activation not in ("none", "relu", "hardtanh"):
        raise unknown(
            "activation of an inserted layer", activation, ("none", "relu", "hardtanh"), SettingsError
        )
    with seeded(
        0
    ):  # the initial weights are overwritten, but drawing them must not move the global generator
        if flat:
            made = builders.identity_linear(channels, activation=False)
        else:
            made = builders.identity_conv(channels, kernel, norm=mean is not None, activation=False)
    if mean is not None and var is not None and not flat:
        norm = made.get_submodule("bn")
        assert isinstance(norm, nn.BatchNorm2d)
        _calibrate(norm, torch.tensor(mean, dtype=torch.float64), torch.tensor(var, dtype=torch.float64))
    if activation == "relu":
        made.add_module("act", nn.ReLU())
    elif activation == "hardtanh":
        low, high = limits if limits is not None else (-1.0, 1.0)
        made.add_module("act", nn.Hardtanh(low, high))
    return made


@torch.no_grad()
def _calibrate(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    # from the rounded variance, so that the square roots cancel
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)


def residual_block(kind: str, channels: int, seed: int) -> nn.Module:
    """Return a residual block for ``channels`` in and out whose branch gives zero; other weights are drawn by ``seed``.

    kind: "basic" and "bottleneck" (last batch norm has weight and bias 0; the identity for what is not negative) or
    "preact" (last convolution is 0; the identity for everything). Raises SettingsError for another.
    """
    if kind not in BLOCKS.values():
        raise unknown("residual block", kind, set(BLOCKS.values()), SettingsError)
    with seeded(seed):
        if kind == "basic":
            return builders.basic_block(channels)
        if kind == "preact":
            return builders.preact_block(channels)
        if channels % Bottleneck.expansion:
            raise SettingsError(f"a bottleneck block needs a multiple of 4 channels, not {channels}.")
        block = Bottleneck(channels, channels // Bottleneck.expansion, 1, None)
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(block.bn3.weight)
        nn.init.zeros_(block.bn3.bias)
        return block


builders.register("identity_layer", identity_layer)
builders.register("residual_block", residual_block)


# -- what goes where
@dataclass(frozen=True)
class Insertion:
    """A module to come: behind which one, its kind and settings for the log, and whether it needs statistics."""

    after: str
    kind: str
    settings: Mapping[str, Any]
    shape: tuple[int, ...]
    calibrated: bool

    def edit(self, moments: Moments | None) -> Insert:
        """Return the edit; ``moments`` are mean and variance of each channel, for a layer that needs them."""
        more = {} if moments is None else {"mean": moments[0], "var": moments[1]}
        return Insert(self.after, self.kind, {**self.settings, **more})

    def rehearsed(self) -> Insert:
        """Return the edit with statistics that stand in for those not known yet."""
        n = self.shape[1]
        return self.edit(([0.0] * n, [1.0] * n) if self.calibrated else None)


def insertions(
    surgeon: Surgeon,
    places: Sequence[str],
    *,
    form: Form = "auto",
    kernel: int = 3,
    seed: int = 0,
    number: int = 0,
) -> list[Insertion]:
    """Return what `deepen` would insert behind the modules ``places``. Changes nothing; raises as `deepen` does."""
    model = surgeon.model
    known = dict(model.named_modules())
    if form not in FORMS:
        raise unknown("form of insertion", form, FORMS, SettingsError)
    if not (isinstance(kernel, int) and kernel > 0 and kernel % 2):
        raise SettingsError(
            f"kernel (={kernel!r}) must be odd: an even one has no centre, so it cannot be the identity."
        )
    for name in places:
        if name not in known:
            raise unknown("module to insert behind", name, known, UnsupportedSurgeryError)
        parent = known[name.rpartition(".")[0]]
        if not name or not isinstance(parent, nn.Sequential):
            raise UnsupportedSurgeryError(
                f"nothing can be inserted behind {name!r}: it is not an element of an nn.Sequential, so the order of "
                f"the layers is in code. Choose an element of one."
            )
    shapes = _output_shapes(surgeon)
    norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    found = []
    for name in places:
        if len(shapes.get(name, ())) not in (2, 4):
            raise UnsupportedSurgeryError(
                f"nothing can be inserted behind {name!r}: it gives {shapes.get(name, 'nothing in the forward pass')}, "
                f"where images (N, C, H, W) or features (N, C) are needed."
            )
        block = BLOCKS.get(_class_of(known[name]))
        if form == "block" or (form == "auto" and block is not None):
            found.append(
                _block(name, block, shapes[name], keyed.key64(seed, "net2net", number, "block", name))
            )
        else:
            found.append(_layer(model, name, shapes[name], form == "linear", kernel, norm))
    return found


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _output_shapes(surgeon: Surgeon) -> dict[str, tuple[int, ...]]:
    """Return the shape of what each module gives, found on a copy without data."""
    found: dict[str, tuple[int, ...]] = {}

    def see(name: str, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            found[name] = tuple(output.shape)

    look(twin(surgeon.model), surgeon.sample, see)
    return found


def _block(name: str, kind: str | None, shape: tuple[int, ...], seed: int) -> Insertion:
    if kind is None:
        raise UnsupportedSurgeryError(
            f"no residual block can be inserted behind {name!r}, which is none of a known class: "
            f"{', '.join(sorted(BLOCKS))}. Take form='layer' or 'linear'."
        )
    return Insertion(name, "residual_block", {"kind": kind, "channels": shape[1], "seed": seed}, shape, False)


def _layer(
    model: nn.Module, name: str, shape: tuple[int, ...], linear: bool, kernel: int, norm: bool
) -> Insertion:
    settings: dict[str, Any] = {"channels": shape[1]}
    flat = len(shape) == 2
    if flat:
        settings["flat"] = True
    else:
        settings["kernel"] = kernel
    if not linear:
        settings |= _same_again(activation_of(model, name), name)
    return Insertion(name, "identity_layer", settings, shape, norm and not flat)


def _same_again(activation: nn.Module | None, name: str) -> dict[str, Any]:
    """Return the settings of an activation that keeps what ``activation`` gave."""
    if activation is None:
        raise UnsupportedSurgeryError(
            f"what activates the output of {name!r} is not a module before it in its nn.Sequential, so it is not known "
            f"whether a layer that ends in an activation would keep it. Choose a place behind the activation, or take "
            f"form='linear', which inserts a layer without one."
        )
    if type(activation) is nn.ReLU:
        return {"activation": "relu"}
    if isinstance(activation, nn.Hardtanh):  # ReLU6 is one
        return {"activation": "hardtanh", "limits": [float(activation.min_val), float(activation.max_val)]}
    raise NonIdempotentActivationError(
        f"{type(activation).__name__} at {name!r} changes what it has given already, so a layer that ends in it cannot "
        f"be the identity; ReLU, ReLU6 and Hardtanh keep it. Take form='linear', which inserts a layer without an "
        f"activation."
    )


def activation_of(model: nn.Module, name: str) -> nn.Module | None:
    """Return the activation whose values the module ``name`` gives, or None if it gives others or it is not seen.

    Pooling and dropout after a ReLU are looked through: what they give is not negative.
    """
    module = model.get_submodule(name)
    while isinstance(module, nn.Sequential) and len(module):
        name = f"{name}.{list(module._modules)[-1]}"
        module = model.get_submodule(name)
    if type(module).__module__ == "torch.nn.modules.activation":
        return module
    if BLOCKS.get(_class_of(module), "preact") != "preact":
        return nn.ReLU()
    parent, _, key = name.rpartition(".")
    siblings = list(model.get_submodule(parent)._modules)
    place = siblings.index(key)
    if (
        not isinstance(module, _PASSING)
        or not isinstance(model.get_submodule(parent), nn.Sequential)
        or not place
    ):
        return None
    before = activation_of(model, f"{parent}.{siblings[place - 1]}" if parent else siblings[place - 1])
    return None if isinstance(before, nn.Hardtanh) else before


# -- statistics
def moments(model: nn.Module, names: Collection[str], images: Tensor, chunk: int = 128) -> dict[str, Moments]:
    """Return mean and variance of each channel that the modules ``names`` give for ``images`` (N, C, H, W).

    In eval mode, ``chunk`` images at a time, over all images and pixels and, in a distributed run, over all ranks.
    Neither the model nor its statistics change. Raises UnsupportedSurgeryError for fewer than 2 images.
    """
    if len(images) < 2:
        raise UnsupportedSurgeryError(
            f"batch norm cannot be calibrated on {len(images)} images; give some hundred."
        )
    like = next(model.parameters())
    sums: dict[str, Tensor] = {}

    def see(name: str, given: tuple[Any, ...], output: Any) -> None:
        if name in names:
            dims = [d for d in range(output.dim()) if d != 1]
            wide = output if output.dtype == torch.float64 else output.float()
            var, mean = (t.double().cpu() for t in torch.var_mean(wide, dims, correction=0))
            count = output.numel() / len(mean)
            part = torch.stack([torch.full_like(mean, count), count * mean, count * (var + mean.square())])
            sums[name] = sums[name] + part if name in sums else part

    for at in range(0, len(images), chunk):
        look(model, images[at : at + chunk].to(like.device), see)
    found = {}
    for name, own in sorted(sums.items()):
        total = own
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            total = own.to(like.device)
            dist.all_reduce(total)
            total = total.cpu()
        mean = total[1] / total[0]
        found[name] = (mean.tolist(), (total[2] / total[0] - mean.square()).clamp_min(0).tolist())
    return found


def deepen(
    surgeon: Surgeon,
    places: Sequence[str],
    images: Tensor | None = None,
    *,
    form: Form = "auto",
    kernel: int = 3,
    seed: int = 0,
    number: int = 0,
) -> Change | None:
    """Insert a layer that keeps the function behind each of the modules ``places``; return the change.

    form: "layer" ends in the activation before it, "linear" in none, "block" is a residual block like the one before
    it, "auto" a block behind a block and a layer elsewhere. kernel: of inserted convolutions, odd. images: training
    images (N, C, H, W), several hundred, for the statistics of inserted batch norms; only layers need them, and only in
    a network with batch norm. With them the function is kept exactly in eval mode, and in training up to how a batch's
    statistics differ from theirs; blocks keep it in both.

    Raises NonIdempotentActivationError for a layer behind an activation other than ReLU, ReLU6 or Hardtanh,
    UnsupportedSurgeryError for a place that takes none or if images are missing, SettingsError for an even kernel; the
    network is then as it was.
    """
    planned = insertions(surgeon, places, form=form, kernel=kernel, seed=seed, number=number)
    names = {insertion.after for insertion in planned if insertion.calibrated}
    if names and images is None:
        raise UnsupportedSurgeryError(
            f"the batch norm behind {', '.join(sorted(names))} needs statistics to undo itself: give images, several "
            f"hundred of those trained on, or take form='block' where a residual block fits."
        )
    known = moments(surgeon.model, names, images) if images is not None and names else {}
    return surgeon.apply([insertion.edit(known.get(insertion.after)) for insertion in planned])
