"""Net2Net: train a small network first, and grow it to the large one without changing what it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.measure.macs import macs
from hasten.methods.structure import deepening, growing
from hasten.methods.structure.deepening import FORMS, Form
from hasten.methods.structure.growing import Mapped, Side
from hasten.surgery import Edit, RemoveChannels, builders

if TYPE_CHECKING:
    from hasten.session import Session
    from hasten.surgery import Surgeon

COUNTS = ("channels_left_out", "growths", "channels_added", "layers_inserted", "slowed_updates")


class Path(NamedTuple):
    """The width a layer was given with, and its widths before the first growth and after each."""

    given: int
    widths: list[int]


@dataclass(kw_only=True, eq=False)
class Net2Net(Method):
    """Begin with fewer channels than the network has, and grow at set shares of the run (Chen et al. 2016).

    A grown network gives the same outputs as before, up to the noise, and trains on; a step costs what its present
    size costs. With the defaults the run ends with exactly the network it was given. Between two runs the functions of
    `hasten.methods.structure.growing` and `deepening` do the same to a trained network.

    at: shares of the run, ascending, at each of which it grows, by equal factors (our choice: half way; few, for each
        growth compiles anew). 1.0 is never.
    narrow: share of its channels a layer begins with, the first ones of the fresh weights (the paper narrows
        Inception's modules by sqrt(0.3), about 0.55). 1.0 begins with the network as given.
    widen: width at the end: a factor for all layers, or factors (float) and widths (int) by layer name or pattern, of
        which the last that fits counts; layers not named keep their width throughout (our choice: 1.0, as given).
    deepen: modules, by name, behind each of which a layer is inserted with the last growth; each an element of an
        nn.Sequential (our choice: none).
    form: what is inserted: "layer" with the activation before it, "linear" without one, "block" a residual block whose
        branch gives zero, "auto" a block behind a block and else a layer (the layer is the paper's).
    kernel: of inserted convolutions, odd (from the paper; its size is not given, ours is 3).
    mapping: g of new channels: "random", uniform over the old ones (from the paper), or "balanced", equally often
        (our choice; what a LayerNorm needs).
    noise: standard deviation of the noise on copies, relative to that of the weights it is added to (from the Keras
        example: 0.05). 0 keeps the function exactly, and copies then part only by dropout.
    noise_on: "outgoing" weights of copies (from the Keras example) or "incoming".
    lr_scale: after a growth no rate is above this share of the largest one scheduled so far (the paper's advice is a
        tenth of the teacher's initial rate; the lower of that and the schedule: our choice). 1.0 follows the schedule.
    calibration: images from which an inserted batch norm takes its statistics, the next ones of the stream (from the
        paper, without a number; ours is 512).
    round_to: widths that follow from shares and factors are rounded up to a multiple of this (our choice: 8).
    """

    at: tuple[float, ...] = (0.5,)
    narrow: float = 0.55
    widen: float | dict[str, float | int] = 1.0
    deepen: tuple[str, ...] = ()
    form: Form = "auto"
    kernel: int = 3
    mapping: Mapped = "random"
    noise: float = 0.05
    noise_on: Side = "outgoing"
    lr_scale: float = 0.1
    calibration: int = 512
    round_to: int = 8

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="net2net",
        title="Net2Net",
        paper="Chen, Goodfellow, Shlens, Net2Net: Accelerating Learning via Knowledge Transfer, ICLR 2016, "
        "arXiv 1511.05641",
        saves="time per step",
        acts="trains the network with fewer channels or layers first, and grows it without changing its function",
        writes=frozenset({"structure", "update"}),
        layers=("Conv2d", "Linear"),
        requires=frozenset({"progress"}),
        state=("begun_", "grown_", "counts_", "peaks_", "images_"),
        slower_when="the large network needs most of the run to catch up, or its layers are so small that fewer "
        "channels save no time",
    )

    @property
    def writes(self) -> frozenset[str]:
        """The rates are held only with ``lr_scale`` below 1."""
        return self.spec.writes if self.lr_scale < 1 else frozenset({"structure"})

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        found = []
        shares = self.at if isinstance(self.at, tuple | list) else ()
        inside = bool(shares) and all(_number(share) and 0 <= share <= 1 for share in shares)
        if not inside or any(a >= b for a, b in pairwise(shares)):
            found.append(f"at must be shares of the run, ascending, each in [0, 1], not {self.at!r}.")
        for name in ("narrow", "lr_scale"):
            value = getattr(self, name)
            if not (_number(value) and 0 < value <= 1):
                found.append(f"{name} must lie in (0, 1], not {value!r}.")
        targets = dict(self.widen) if isinstance(self.widen, dict) else {"": self.widen}
        if not targets or not all(_number(x) and x >= 1 for x in targets.values()):
            found.append(
                f"widen must be a factor from 1.0, or factors and widths by layer name, not {self.widen!r}."
            )
        if not isinstance(self.deepen, tuple | list) or not all(
            isinstance(name, str) for name in self.deepen
        ):
            found.append(f"deepen must be a tuple of module names, not {self.deepen!r}.")
        if not (_number(self.noise) and self.noise >= 0):
            found.append(f"noise must be 0 or more, not {self.noise!r}.")
        choices: dict[str, tuple[str, ...]] = {
            "form": FORMS,
            "mapping": ("random", "balanced"),
            "noise_on": ("outgoing", "incoming"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                found.append(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}.")
        if not (_whole(self.kernel, 1) and self.kernel % 2):
            found.append(
                f"kernel must be an odd whole number, not {self.kernel!r}: an even one has no centre."
            )
        for name, least in (("calibration", 2), ("round_to", 1)):
            if not _whole(getattr(self, name), least):
                found.append(f"{name} must be a whole number from {least}, not {getattr(self, name)!r}.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Plan every growth and rehearse all of them on a copy without data; nothing is changed yet.

        Raises UnsupportedSurgeryError for a network that cannot be traced or a layer that is named but cannot grow,
        SettingsError for a name that fits no layer or a width below the present one.
        """
        self._session = session
        self.begun_, self.grown_ = False, 0
        self.counts_ = dict.fromkeys(COUNTS, 0)
        self.peaks_: list[list[float]] = []
        self.images_: Tensor | None = None
        effect = Effect(saves="arithmetic of all products while the network is small")
        self._paths = self._planned(session.surgery, effect)
        self._places: list[deepening.Insertion] = []
        if self.deepen:
            self._places = deepening.insertions(
                session.surgery, self.deepen, form=self.form, kernel=self.kernel
            )
        self._calibrated = any(place.calibrated for place in self._places)
        for place in self._places:
            what = "a residual block" if place.kind == "residual_block" else "an identity layer"
            told = effect.touched.get(place.after)
            note = f"{what} behind it from {self.at[-1]:.0%} of the run"
            effect.touched[place.after] = f"{told}; {note}" if told else note
        edits = self._rehearsal()
        if edits:
            session.surgery.plan(edits)
            effect.work = self._work(session)
        return effect

    def _planned(self, surgeon: Surgeon, effect: Effect) -> dict[str, Path]:
        """Return the widths of every group of layers that will change, by the layer that it is changed by."""
        groups, effect.skipped = growing.width_groups(surgeon)
        final = growing.target_widths(surgeon, self.widen, self.round_to)
        paths = {}
        for group in groups:
            if group.layer not in final:
                effect.skipped |= dict.fromkeys(group.layers, "widen does not name it")
                continue
            start = min(group.width, growing.rounded(group.width * self.narrow, self.round_to))
            widths = growing.stages(start, final[group.layer], len(self.at), self.round_to)
            uneven = self.mapping != "balanced" or any(b % a for a, b in pairwise(widths))
            if widths[0] == widths[-1] == group.width:
                reason = f"all its {group.width} channels stay (round_to={self.round_to})"
            elif group.even and uneven:
                reason = (
                    f"its channels are normalised together, so that each needs equally many copies: take "
                    f"mapping='balanced' and shares by which widths are multiples ({widths} are planned)"
                )
            else:
                paths[group.layer] = Path(group.width, widths)
                effect.touched |= dict.fromkeys(group.layers, _note(widths, self.at))
                continue
            effect.skipped |= dict.fromkeys(group.layers, reason)
        return paths

    def _rehearsal(self) -> list[Edit]:
        """Return all edits of the run; insertions first, where the widths they are planned for still hold."""
        edits: list[Edit] = [place.rehearsed() for place in self._places]
        edits += [
            RemoveChannels(layer, tuple(range(path.widths[0], path.given)))
            for layer, path in self._paths.items()
            if path.widths[0] < path.given
        ]
        for number in range(1, len(self.at) + 1):
            sizes = self._sizes(number)
            edits += growing.widen_edits(sizes, self.mapping, seed=self._session.seed, number=number)
        return edits

    def _sizes(self, number: int) -> dict[str, tuple[int, int]]:
        """Return width before and after growth ``number`` (from 1), of the layers that it widens."""
        steps = {layer: (path.widths[number - 1], path.widths[number]) for layer, path in self._paths.items()}
        return {layer: step for layer, step in steps.items() if step[0] < step[1]}

    def _work(self, session: Session) -> float | None:
        """Return the share of the given network's training MACs that the run takes; None if it cannot be foreseen."""
        if self._places and any(path.widths[-1] > path.given for path in self._paths.values()):
            return None  # how wide inserted layers will be is known when they are
        channels = session.surgery.channels
        layers = macs(session.model, session.sample[0][:1]).layers
        given = sum(layer.training for layer in layers.values())
        scale: dict[int, float] = {}

        def part(name: str, role: str) -> float:
            slot = channels.slots.get((name, role))
            if slot is None:
                return 1.0
            return float(np.mean([scale.get(c, 1.0) for c in channels.classes[slot.labels].tolist()]))

        shares = []
        for stage in range(len(self.at) + 1):
            for layer, path in self._paths.items():
                scale |= dict.fromkeys(channels.outputs(layer).tolist(), path.widths[stage] / path.given)
            total = 0.0
            for name, count in layers.items():
                depthwise = getattr(session.model.get_submodule(name), "groups", 1) > 1
                total += count.training * part(name, "out") * (1.0 if depthwise else part(name, "in"))
            shares.append(total / given)
        for place in self._places:
            module = builders.build(place.kind, place.rehearsed().settings)
            shares[-1] += 3 * macs(module, torch.zeros(1, *place.shape[1:])).forward / given
        ends = (0.0, *self.at, 1.0)
        return sum(share * (b - a) for share, (a, b) in zip(shares, pairwise(ends), strict=True))

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Keep images for the statistics of inserted layers while a growth waits for them; the batch passes unchanged."""
        if self._calibrated and self.grown_ == len(self.at) - 1 and len(batch) and self._due:
            seen, kept = batch.inputs.detach(), self.images_
            if kept is not None and kept.shape[1:] == seen.shape[1:]:
                seen = torch.cat([kept, seen])
            self.images_ = seen[: self.calibration].clone()
        return batch

    def update(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Step the optimizers; once grown, at rates of at most ``lr_scale`` times the largest scheduled so far."""
        rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
        peaks = self.peaks_ or rates
        self.peaks_ = [
            [max(x, y) for x, y in zip(a, b, strict=True)] for a, b in zip(peaks, rates, strict=True)
        ]
        limits = self.peaks_
        if self.grown_:
            limits = [[self.lr_scale * peak for peak in row] for row in self.peaks_]
        with growing.rates_at_most(optimizers, limits) as held:
            for optimizer in optimizers:
                optimizer.step()
        self.counts_["slowed_updates"] += held > 0

    def start_epoch(self, epoch: int) -> None:
        """Leave out the channels that come later, before the first step."""
        self._begin()

    def after_update(self) -> None:
        """Grow where the run has come to the next share. A loop that starts no epochs begins narrow after one step."""
        self._begin()
        waits = self._calibrated and self.grown_ == len(self.at) - 1 and not self._enough
        if self._due and not waits:
            self._grow()

    @property
    def _due(self) -> bool:
        """Whether the run has come to the next growth; not at its very end, where no step would train what grew."""
        return self.grown_ < len(self.at) and self.at[self.grown_] <= self._session.progress < 1.0

    @property
    def _enough(self) -> bool:
        return self.images_ is not None and len(self.images_) >= self.calibration

    def _begin(self) -> None:
        if self.begun_:
            return
        self.begun_ = True
        cuts = {layer: path.widths[0] for layer, path in self._paths.items() if path.widths[0] < path.given}
        if cuts:
            growing.narrow(self._session.surgery, cuts)
            self._session.restart_averages()
            self.counts_["channels_left_out"] += sum(
                self._paths[layer].given - n for layer, n in cuts.items()
            )

    def _grow(self) -> None:
        number, surgeon, seed = self.grown_ + 1, self._session.surgery, self._session.seed
        sizes = self._sizes(number)
        growing.widen(
            surgeon,
            {layer: then for layer, (_, then) in sizes.items()},
            mapping=self.mapping,
            noise=self.noise,
            noise_on=self.noise_on,
            seed=seed,
            number=number,
        )
        if number == len(self.at) and self.deepen:
            deepening.deepen(
                surgeon,
                self.deepen,
                self.images_,
                form=self.form,
                kernel=self.kernel,
                seed=seed,
                number=number,
            )
            self.counts_["layers_inserted"] += len(self.deepen)
        self.grown_, self.images_ = number, None
        self.counts_["growths"] += 1
        self.counts_["channels_added"] += sum(then - now for now, then in sizes.values())

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return growths so far, channels left out at first and added since, layers inserted, and held updates."""
        return {name: float(count) for name, count in self.counts_.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return how far the growth is, the largest rates so far, and images kept for statistics."""
        return {
            "begun_": self.begun_,
            "grown_": self.grown_,
            "counts_": dict(self.counts_),
            "peaks_": [list(row) for row in self.peaks_],
            "images_": self.images_,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        images = state["images_"]
        self.begun_, self.grown_ = bool(state["begun_"]), int(state["grown_"])
        self.counts_ = {name: int(count) for name, count in state["counts_"].items()}
        self.peaks_ = [list(row) for row in state["peaks_"]]
        self.images_ = None if images is None else images.to(self._session.sample[0].device).clone()


def _note(widths: Sequence[int], at: Sequence[float]) -> str:
    """Return the widths of a layer over the run, in words."""
    later = [
        f", {width} from {share:.0%} of the run"
        for share, (before, width) in zip(at, pairwise(widths), strict=True)
        if width > before
    ]
    return f"{widths[0]} channels" + "".join(later)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
