"""Dead columns of convolutions: which form computes the same with less work, and whether it takes less time.

- "crop": the positions that live lie in a smaller rectangle. A smaller kernel with other padding; plain PyTorch.
- "select", "split", "taps", "unfold": any columns, by a `ColumnConv`. Convolution libraries have no kernel for these, so
  copies and small products can cost more than the columns saved: `fastest` times each form against the dense one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hasten.diagnose import look
from hasten.methods.structure.column_conv import ColumnConv, Frame, Rect, area, cut, pads_of, rectangle
from hasten.surgery import Replace, Surgeon, builders

Race = Callable[[Mapping[str, Callable[[], Any]]], dict[str, float]]
FORMS = ("select", "split", "taps", "unfold")
MARGIN = 0.95
"""A form must take less than this share of the dense convolution's time (our choice)."""


# -- which forms a convolution has
def live_columns(weight: Tensor) -> Tensor:
    """Return which columns (c, m, k) of a weight (O, C, kh, kw) have a weight that is not zero."""
    return (weight.detach() != 0).any(0)


@dataclass(frozen=True, eq=False)
class Form:
    """A module that can take the place of a convolution: its kind and settings for the log, and its weights.

    ``take`` returns the entries of its weights, by their names in it, of a tensor in the form of the dense weight.
    """

    kind: str
    settings: Mapping[str, Any]
    take: Callable[[Tensor], dict[str, Tensor]]

    def edit(self, name: str) -> Replace:
        """Return the edit that puts it in the place of ``name``."""
        return Replace(name, self.kind, self.settings)

    @torch.no_grad()
    def built(self, conv: nn.Conv2d) -> nn.Module:
        """Return the module with the weights of ``conv``, laid out as they are."""
        made = builders.build(self.kind, self.settings).to(conv.weight.device, conv.weight.dtype)
        if not conv.weight.is_contiguous():
            made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fill(made, self, conv.weight, conv.bias)
        return made.train(conv.training)


def fill(made: nn.Module, form: Form, weight: Tensor, bias: Tensor | None) -> None:
    """Copy the dense ``weight`` and ``bias`` into the module of a form."""
    own = dict(made.named_parameters())
    for name, value in form.take(weight.detach()).items():
        own[name].copy_(value)
    if bias is not None:
        own[bias_of(made)].copy_(bias)


def bias_of(made: nn.Module) -> str:
    """Return the name of the only bias of a form's module."""
    return next(name for name, _ in made.named_parameters() if name.endswith("bias"))


def why_dense(conv: nn.Module) -> str | None:
    """Return why a module cannot be put into another form, or None."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__} is no plain Conv2d"
    if conv.padding_mode != "zeros" and any(pads_of(conv)):
        return f"it pads with {conv.padding_mode}, not with zeros"
    return None


def cropped(conv: nn.Conv2d) -> Form | None:
    """Return the form with the smallest kernel that holds every weight that is not zero; None if it is no smaller."""
    frame, found = Frame.of(conv), rectangle(live_columns(conv.weight).any(0))
    if found is None or area(found) == frame.kernel[0] * frame.kernel[1]:
        return None
    rect, smaller = found, frame.inside(found)

    def take(dense: Tensor) -> dict[str, Tensor]:
        return {f"{smaller.prefix}weight": cut(dense, rect)}

    return Form("cropped_conv", {"frame": smaller.settings()}, take)


def column_forms(conv: nn.Conv2d, names: Iterable[str] = FORMS) -> dict[str, Form]:
    """Return the forms of ``conv`` from its surviving columns, by name; none for a convolution in groups or of zeros.

    "select": the channels that have a column, in the rectangle of their positions. "split": the same in two parts of
    channels, one in a smaller rectangle. "taps": 1x1 convolutions of the channels that live at each position. "unfold":
    one product of all surviving columns. Forms that would do the work of the dense one are left out.
    """
    live = live_columns(conv.weight).cpu()
    if conv.groups != 1 or not live.any() or bool(live.all()):
        return {}
    frame = Frame.of(conv)
    at = live.flatten(1).any(1).nonzero().flatten().tolist()
    box = rectangle(live.any(0))
    assert box is not None
    found: dict[str, list[tuple[list[int], Rect]]] = {}
    if len(at) * area(box) < live.numel():
        found["select"] = [(at, box)]
    if (parts := _split(live, at, box)) is not None:
        found["split"] = parts
    taps = [(y, x) for y in range(live.shape[1]) for x in range(live.shape[2]) if live[:, y, x].any()]
    found["taps"] = [(live[:, y, x].nonzero().flatten().tolist(), (y, y + 1, x, x + 1)) for y, x in taps]
    settings = frame.settings()
    forms = {
        name: _form("parts_conv", {"frame": settings, "parts": [[at, list(rect)] for at, rect in parts]})
        for name, parts in found.items()
        if name in names
    }
    if "unfold" in names:
        columns = live.flatten().nonzero().flatten().tolist()
        forms["unfold"] = _form("unfold_conv", {"frame": settings, "columns": columns})
    return forms


def _form(kind: str, settings: Mapping[str, Any]) -> Form:
    return Form(kind, settings, cast(ColumnConv, builders.build(kind, settings)).take)


def _split(live: Tensor, at: list[int], box: Rect) -> list[tuple[list[int], Rect]] | None:
    """Return two parts with the least work: channels that fit a smaller rectangle, and the others; None if one does."""
    boxes = {c: cast(Rect, rectangle(live[c])) for c in at}
    rows = [(a, b) for a in range(box[0], box[1]) for b in range(a + 1, box[1] + 1)]
    columns = [(a, b) for a in range(box[2], box[3]) for b in range(a + 1, box[3] + 1)]
    table = torch.tensor(list(boxes.values()))
    best, least = None, len(at) * area(box)
    for r in rows:
        for k in columns:
            fits = (
                (table[:, 0] >= r[0]) & (table[:, 1] <= r[1]) & (table[:, 2] >= k[0]) & (table[:, 3] <= k[1])
            )
            count = int(fits.sum())
            work = count * area((*r, *k)) + (len(at) - count) * area(box)
            if 0 < count < len(at) and work < least:
                best, least = (fits.tolist(), (*r, *k)), work
    if best is None:
        return None
    small = [c for c, fits in zip(at, best[0], strict=True) if fits]
    others = [c for c in at if c not in set(small)]
    outer = rectangle(live[others].any(0))
    assert outer is not None
    return [(others, outer), (small, best[1])]


# -- putting them in
def race(runs: Mapping[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
    """Return the median seconds of each run, all run in turn ``rounds`` times after two that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[2:]) for name, times in taken.items()}


@torch.no_grad()
def fastest(
    conv: nn.Conv2d, x: Tensor, names: Iterable[str] = FORMS, *, timer: Race = race
) -> tuple[str, dict[str, float]]:
    """Return the fastest form of ``conv`` in evaluation on inputs x (N, C, H, W), or "dense"; and all seconds.

    A form has to take less than `MARGIN` of the dense convolution's time; the cropped one runs as "crop".
    """
    dense = copy.deepcopy(conv).eval()
    modules: dict[str, nn.Module] = {"dense": dense}
    if (smaller := cropped(conv)) is not None:
        modules["crop"] = smaller.built(conv).eval()
    modules |= {name: form.built(conv).eval() for name, form in column_forms(conv, names).items()}
    seconds = timer({name: partial(module, x) for name, module in modules.items()})
    best = min(seconds, key=seconds.__getitem__)
    return (best if seconds[best] < MARGIN * seconds["dense"] else "dense"), seconds


def fastest_forms(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Return the fastest form, as `fastest` does, of each convolution of ``model`` on what it reads for inputs x.

    In a distributed run the seconds of all ranks count together, so that all choose alike.
    """
    given: dict[str, Tensor] = {}

    def see(name: str, inputs: tuple[Any, ...], _: Any) -> None:
        given[name] = inputs[0].detach()

    look(model, x, see, (nn.Conv2d,))
    return {
        name: fastest(cast(nn.Conv2d, model.get_submodule(name)), given[name], timer=_together)[0]
        for name in plain_convs(model)
        if name in given
    }


def plain_convs(model: nn.Module) -> list[str]:
    """Return the convolutions that can be put into another form, by name; not those inside one already."""
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, ColumnConv)]
    return [
        name
        for name, module in model.named_modules()
        if why_dense(module) is None and not name.startswith(tuple(inside))
    ]


def _together(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    seconds = race(runs)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = torch.tensor(list(seconds.values()), dtype=torch.float64)
        dist.all_reduce(total)
        seconds = dict(zip(seconds, total.tolist(), strict=True))
    return seconds


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What `narrow` did to a layer: the form's name, the form, and what is to be said of it."""

    form: str
    made: Form
    note: str


def narrow(
    surgeon: Surgeon, layers: Iterable[str], choose: Callable[[str, nn.Conv2d], str] | None = None
) -> dict[str, Narrowed]:
    """Put the convolutions ``layers`` into another form, where there is one; return what was done by layer.

    choose: returns the form for a layer, "crop", "dense" or one of `FORMS`; by default always "crop". Weights and the
    optimizer's state go along. One transaction; raises as `Surgeon.apply` does, with the network as it was.
    """
    chosen: dict[str, tuple[nn.Conv2d, Narrowed]] = {}
    for name in layers:
        conv = surgeon.model.get_submodule(name)
        if why_dense(conv) is not None or not isinstance(conv, nn.Conv2d):
            continue
        wanted = "crop" if choose is None else choose(name, conv)
        if wanted == "dense":
            continue
        form = cropped(conv) if wanted == "crop" else column_forms(conv, (wanted,)).get(wanted)
        if form is not None:
            live = live_columns(conv.weight)
            note = f"{wanted}: {int(live.sum())} of {live.numel()} columns"
            chosen[name] = conv, Narrowed(wanted, form, note)
    states = {
        name: [(o, part, dict(o.state[p])) for o in surgeon.optimizers
               for part, p in (("weight", conv.weight), ("bias", conv.bias)) if p is not None and p in o.state]
        for name, (conv, _) in chosen.items()
    }  # fmt: skip
    surgeon.apply([narrowed.made.edit(name) for name, (_, narrowed) in chosen.items()])
    for name, (conv, narrowed) in chosen.items():
        _carry(surgeon.model.get_submodule(name), conv, narrowed.made, states[name])
    return {name: narrowed for name, (_, narrowed) in chosen.items()}


@torch.no_grad()
def _carry(
    made: nn.Module, conv: nn.Conv2d, form: Form, states: Iterable[tuple[Any, str, dict[str, Any]]]
) -> None:
    """Give the module ``made`` the weights of ``conv`` and the optimizer's state of them."""
    fill(made, form, conv.weight, conv.bias)
    own = dict(made.named_parameters())
    for name, parameter in own.items():
        old = conv.bias if name.endswith("bias") else conv.weight
        parameter.requires_grad_(old is not None and old.requires_grad)
    for optimizer, part, state in states:
        dense = conv.weight if part == "weight" else conv.bias
        names = list(form.take(conv.weight)) if part == "weight" else [bias_of(made)]
        for key, value in state.items():
            alike = isinstance(value, Tensor) and dense is not None and value.shape == dense.shape
            taken = form.take(value) if alike and part == "weight" else dict.fromkeys(names, value)
            for name in names:
                kept = taken[name]
                new = kept.clone() if isinstance(kept, Tensor) else kept
                optimizer.state[own[name]][key] = torch.empty_like(own[name]).copy_(new) if alike else new
