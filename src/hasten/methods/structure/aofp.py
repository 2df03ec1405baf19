"""AOFP: find which filters of a trained network matter least by ablating random halves of them (Ding et al. 2019).

t = ||O - O'||^2 / ||O||^2      O: output of the next layer, O': the same without a random half of the search space

All layers are searched at once while training goes on: damage is judged at the next layer, so that no ablation reaches
the loss. Sets that turn out to matter little are masked; at the target they are removed, and the rest fine-tunes.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import SettingsError, UnsupportedError, UnsupportedSurgeryError
from hasten.measure.macs import MacCount, macs
from hasten.methods.structure.aofp_scoring import Reader, Switch, find_pairs
from hasten.methods.structure.aofp_search import Search
from hasten.methods.structure.compactor import Target
from hasten.methods.structure.compactor_choice import Work
from hasten.surgery import Change, RemoveChannels
from hasten.surgery.labels import Array
from hasten.surgery.trace import empty, twin

if TYPE_CHECKING:
    from hasten.session import Session

NAME = "aofp"
TRIED = 512
"""Training images by whose accuracy an untrained network is told (our choice)."""


@dataclass(kw_only=True, eq=False)
class AOFP(Method):
    """Prune the filters of a trained network to a share of its MACs while it trains on.

    A search in a layer of n filters begins with S = all of them. For h steps random halves of S are zeroed, in a second
    evaluation only, and each filter's average t is taken over the draws it was in. If the g = floor(|S| / 2) filters of
    least t all stay below theta, they are masked for good and the search begins anew; else they become S, down to g = 1.
    The target is checked after every move (after every epoch in the authors' code). Then masked filters are removed, and
    what remains of the run fine-tunes, for which the authors take most of theirs: lr 1e-3 while pruning, 0.01 falling to
    0 after it. Begin with a trained network: this saves the cost of inference and of ablating filters one by one.
    ``torch.compile`` makes two graphs, for steps with a score and without, and both anew after each surgery; masks change
    neither.

    target: share of the forward MACs below which to stop (the authors' code: 0.35 for VGG-16, 0.5 for ResNet-56).
    theta: largest t of what is masked (the authors' code: 0.01, for LeNet-5 0.05). Short runs need a larger one.
    h: steps of a half (the authors' code: 1000 in PyTorch, 20,000 in TensorFlow).
    warmup: steps before the first layer starts; the others follow within h steps (the authors' code: 500).
    every: score each n-th step only (our choice: 1, as the paper). A filter is scored in about h / (2 every) draws.
    share: of the images of a batch that are scored (our choice: 1.0, as the paper).
    bn_mode: statistics of the batch norm behind the scoring layer: "base", those of the batch without ablation (our
        choice); or "own", those of the ablated outputs (the authors' code, which also adds them to the running ones).
    several: what to do with filters that several layers read: "skip" them (the paper has none), or "sum" up t.
    surgery_every: remove masked filters when that saves this share of the original MACs (our choice: 0.1; from 1 on only
        at the end, as the authors). What the network computes stays the same.
    round_to: widths are rounded up to a multiple of this, for the sake of kernels, and MACs are counted with that (our
        choice: 8; 1 for the exact widths). Of the masked filters those of least damage stay, masked until the search
        ends, and then come back.
    patience: R; when every layer has searched this often in a row without a move, the target counts as out of reach for
        theta and the search ends (our choice: 3).
    """

    target: float = 0.5
    theta: float = 0.01
    h: int = 1000
    warmup: int = 500
    every: int = 1
    share: float = 1.0
    bn_mode: Literal["base", "own"] = "base"
    several: Literal["skip", "sum"] = "skip"
    surgery_every: float = 0.1
    round_to: int = 8
    patience: int = 3

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="Approximated Oracle Filter Pruning",
        paper="Ding, Ding, Guo, Han, Yan, Approximated Oracle Filter Pruning for Destructive CNN Width Optimization, "
        "ICML 2019, arXiv 1905.04748",
        saves="inference",
        acts="ablates random halves of each layer's filters to find sets that can be masked, then removes those",
        writes=frozenset({"structure"}),
        layers=("Conv2d",),
        state=("searches_", "kept_", "iteration_", "finished_", "counts_", "trial_", "log_"),
        slower_when="while it searches, by the scoring (every and share bound it): the gain comes after surgery, in "
        "fine-tuning and inference",
    )

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        if not 0 < self.target < 1:
            found.append(f"target is {self.target}; allowed: between 0 and 1.")
        if not 0 <= self.theta < math.inf:
            found.append(f"theta is {self.theta}; allowed: from 0 (which masks nothing).")
        for name in ("share", "surgery_every"):
            if not 0 < getattr(self, name) <= 1:
                found.append(f"{name} is {getattr(self, name)}; allowed: above 0, up to 1.")
        for name in ("h", "every", "round_to", "patience", "warmup"):
            value, least = getattr(self, name), int(name != "warmup")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                found.append(f"{name} is {value!r}; allowed: whole numbers from {least}.")
        if not found and self.every > self.h:
            found.append(
                f"every is {self.every}, so that a half of h={self.h} steps could go without a score."
            )
        for name, allowed in (("bn_mode", ("base", "own")), ("several", ("skip", "sum"))):
            if getattr(self, name) not in allowed:
                found.append(f"{name} is {getattr(self, name)!r}; allowed: {allowed[0]!r}, {allowed[1]!r}.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Find the layers to search; hooks come in once all methods have agreed.

        Raises UnsupportedSurgeryError for a network that cannot be followed, SettingsError (a ValueError) for a target
        that the rounded widths cannot reach, UnsupportedError for a run that ends before the first half does.
        """
        self._session, self._readers = session, dict[str, Reader]()
        self._switch = Switch(False, self.share)
        self._counted: MacCount | None = None
        self.searches_: dict[str, Search] = {}
        self.kept_: dict[str, Tensor] = {}
        self.iteration_, self.finished_ = 0, ""
        self.counts_ = {"scores": 0, "moves": 0, "halvings": 0, "restarts": 0, "surgeries": 0, "filters_moved_back": 0,
                        "extra_macs": 0}  # fmt: skip
        self.trial_ = [0, 0]
        self.log_: list[list[int]] = []
        self._pairs, skipped = find_pairs(session.surgery, self.several, self.round_to)
        if not self._pairs:
            return Effect(skipped=skipped)
        self._widths = np.array([pair.width for pair in self._pairs], np.int64)
        targets = [Target(pair.producer, None, pair.width, pair.readers) for pair in self._pairs]
        x = empty(session.sample[0][:1])
        self._work = Work.of(twin(session.model), session.surgery.channels, targets, x)
        self._whole = self._count().training
        self._check_run(session)
        for pair in self._pairs:
            self.searches_[pair.producer] = Search(pair.width, self.round_to)
            self.kept_[pair.producer] = torch.arange(pair.width)
        # twice deferred: it has to see the modules that the edits of other methods bring in
        session.edit(lambda: session.edit(self._install))
        return self._effect(skipped)

    def _check_run(self, session: Session) -> None:
        """Raise if the target cannot be reached, or no half can end in this run."""
        least = self._share_left(np.minimum(self._widths, self.round_to))
        if self.target <= least:
            raise SettingsError(
                f"{NAME}: target={self.target:g} is out of reach: with {self.round_to} of the filters left in each of "
                f"{len(self._pairs)} layers, {least:.3f} of the MACs remain. Give a larger target or a smaller round_to."
            )
        trains = any(group["lr"] > 0 for optimizer in session.optimizers for group in optimizer.param_groups)
        steps = (session.total_samples or math.inf) / len(session.sample[0])
        if trains and steps < self.warmup + self.h:
            raise UnsupportedError(
                f"{NAME}: the run has {steps:.0f} steps, and the first half ends after {self.warmup + self.h}, warmup={self.warmup} "
                f"and h={self.h}. Train longer, or lower them."
            )

    def _effect(self, skipped: dict[str, str]) -> Effect:
        count = self._count()
        scored = sum(count.layers[reader].output for pair in self._pairs for reader in pair.readers)
        more = 0.5 * scored * self.share / self.every / count.training
        return Effect(
            touched={p.producer: f"{p.width} filters, scored by {', '.join(p.readers)}" for p in self._pairs},
            skipped=skipped,
            saves=f"inference: less than {self.target:.1%} of the MACs are to remain; scoring adds up to {more:.1%} to those "
            f"of training",
        )

    def _install(self) -> None:
        session = self._session
        session.surgery.forget()
        for pair in self._pairs:
            for name in pair.readers:
                if name not in self._readers:
                    graph = session.surgery.channels.graph
                    self._readers[name] = Reader(session.model, graph, name, self._switch)
        session.surgery.plan([RemoveChannels(pair.producer, (0,)) for pair in self._pairs])
        # before the session tells the methods: some of them run the network then, which takes masks that fit
        session.surgery.followers.append(self._follow)
        self._settle()
        self._arm()

    def _settle(self) -> None:
        """Find which inputs of its readers each filter is, and lay the masks on them."""
        channels = self._session.surgery.channels
        self._owners: dict[tuple[str, str], Array] = {}
        for pair in self._pairs:
            number = {one: i for i, one in enumerate(channels.outputs(pair.producer).tolist())}
            for name in pair.readers:
                inputs = channels.inputs(name).tolist()
                self._owners[pair.producer, name] = np.array(
                    [number.get(one, -1) for one in inputs], np.int64
                )
        self._mask()

    def _mask(self) -> None:
        for name, reader in self._readers.items():
            alive: Any = True
            for pair in self._pairs:
                if name in pair.readers:
                    owner = self._owners[pair.producer, name]
                    alive = alive & ((owner < 0) | self.searches_[pair.producer].alive[owner])
            reader.set_mask(alive)

    # -- in the step
    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Score a random half of every search space, and see at first whether the network is trained."""
        self._count_work(len(batch))
        if not self._pairs or self.finished_:
            return
        self._try(outputs, batch.targets)
        if not self._switch.on:
            return
        draws = {
            name: search.draw(self._session.seed, NAME, name, self.iteration_)
            for name, search in self.searches_.items()
            if search.searching
        }
        with torch.autocast(outputs.device.type, enabled=False):
            found = self._scores(draws, len(batch))
        if found:
            values = _over_ranks(torch.stack(list(found.values())))
            for name, t in zip(found, values, strict=True):
                self.searches_[name].add(draws[name], t)
            self.counts_["scores"] += len(found)

    def _scores(self, draws: dict[str, Array], images: int) -> dict[str, Tensor]:
        """Return t for each layer of ``draws``, added up over its readers; a reader that did not run gives none."""
        found: dict[str, Tensor] = {}
        for name, reader in self._readers.items():
            asked = [p.producer for p in self._pairs if name in p.readers and p.producer in draws]
            sets = [
                np.flatnonzero(np.isin(self._owners[producer, name], draws[producer])) for producer in asked
            ]
            own = self.searches_.get(name)
            values = reader.scores(sets, self.bn_mode, None if own is None else own.alive)
            for producer, at, t in zip(asked, sets, values, strict=False):
                found[producer] = found[producer] + t if producer in found else t
                self._count_scored(name, len(at), images)
            reader.forget()
        return found

    def after_update(self) -> None:
        """Count the step in every search, and mask, remove or stop when it is time."""
        if not self._pairs or self.finished_:
            return
        self.iteration_ += 1
        outcomes = [search.step(self.h, self.theta) for search in self.searches_.values()]
        for outcome, name in (("move", "moves"), ("halve", "halvings"), ("restart", "restarts")):
            self.counts_[name] += outcomes.count(outcome)  # type: ignore[arg-type]
        if "move" in outcomes:
            self._moved()
        elif all(s.over or (s.started and s.restarts >= self.patience) for s in self.searches_.values()):
            self._finish("given up")
        session = self._session
        if not self.finished_ and session.total_samples is not None and session.progress >= 1:
            self._cut()
            self.finished_ = "the run ended first"
            self._tell()
        self._arm()

    def _moved(self) -> None:
        self._mask()
        self.log_.append([self.iteration_, *(int(s.alive.sum()) for s in self.searches_.values())])
        left = self._share_left(np.array([s.kept for s in self.searches_.values()]))
        if left < self.target:
            self._finish("reached")
        elif self._share_left(self._present()) - left >= self.surgery_every:
            self._cut()

    def _arm(self) -> None:
        """Start the layers whose turn it is, and have the next pass noted if it is to be scored."""
        if self.finished_ or not self._pairs:
            self._switch.on = False
            return
        for j, search in enumerate(self.searches_.values()):
            if not search.started and self.iteration_ >= self.warmup + j * self.h // len(self._pairs):
                search.start()
        due = self.iteration_ % self.every == 0
        self._switch.on = due and any(search.searching for search in self.searches_.values())

    # -- surgery
    def _cut(self) -> None:
        """Remove masked filters as far as rounding lets them go; what the network computes stays the same."""
        going = [RemoveChannels(name, tuple(s.to_go().tolist())) for name, s in self.searches_.items()]
        if self._session.surgery.apply(going) is not None:
            self.counts_["surgeries"] += 1

    def _finish(self, how: str) -> None:
        """End the search: remove masked filters, and move back those that rounding keeps."""
        self._cut()
        for search in self.searches_.values():
            self.counts_["filters_moved_back"] += search.put_back()
        self._mask()
        self.finished_, self._switch.on = how, False
        self._tell()
        if how != "reached":
            left = self._share_left(self._present())
            warnings.warn(
                f"{NAME}: {self.patience} searches in a row found nothing to mask in any layer, so that {left:.3f} of the "
                f"MACs remain where target={self.target:g} was wanted. Raise theta (now {self.theta:g}), or train on.",
                stacklevel=2,
            )

    def _tell(self) -> None:
        """Write into the effect what has become of the layers."""
        effect, left = self._session.effects[NAME], self._share_left(self._present())
        for pair, now in zip(self._pairs, self._present(), strict=True):
            effect.touched[pair.producer] = (
                f"{now} of {pair.width} filters left, scored by {', '.join(pair.readers)}"
            )
        effect.saves = f"inference: {left:.1%} of the MACs remain, target {self.target:.1%}: {self.finished_ or 'searching'}"

    def _follow(self, change: Change) -> None:
        """Follow a surgery: masks, search spaces and sums are those of the filters that are left."""
        for pair in self._pairs:
            search = self.searches_[pair.producer]
            at = change.positions(pair.producer, "out", len(search.alive))
            if at is None:
                raise UnsupportedSurgeryError(f"{NAME}: layer {pair.producer} was taken out by another hand.")
            search.keep(at)
            self.kept_[pair.producer] = self.kept_[pair.producer][torch.from_numpy(at)]
        self._counted = None
        self._settle()
        self._tell()

    def export(self, model: nn.Module) -> None:
        """Take the hooks off, and put zeros where weights read what is masked."""
        for reader in self._readers.values():
            reader.uninstall(model)

    # -- work
    def _present(self) -> Array:
        return np.array([len(search.alive) for search in self.searches_.values()], np.int64)

    def _share_left(self, widths: Array) -> float:
        """Return the share of the forward MACs that remains with these widths."""
        return self._work(self._widths - widths) / self._work.whole

    def _count(self) -> MacCount:
        if self._counted is None:
            self._counted = macs(twin(self._session.model), empty(self._session.sample[0][:1]))
        return self._counted

    def _count_work(self, images: int) -> None:
        """Note the training MACs that surgery has saved on a batch."""
        if self.counts_["surgeries"]:
            self.counts_["extra_macs"] -= images * (self._whole - self._count().training)

    def _count_scored(self, name: str, inputs: int, images: int) -> None:
        """Note the MACs of scoring: the part of a layer that reads the ablated inputs."""
        reader, layer = self._readers[name], self._count().layers[name]
        scored = math.ceil(self.share * images)
        self.counts_["extra_macs"] += scored * layer.output * inputs // reader.mask.numel()

    # -- an untrained network
    def _try(self, outputs: Tensor, targets: Tensor) -> None:
        """Warn if the accuracy on the first images is that of chance."""
        right, seen = self.trial_
        if seen >= TRIED or outputs.dim() != 2 or targets.dim() != 1 or targets.dtype.is_floating_point:
            return
        right, seen = right + int((outputs.argmax(1) == targets).sum()), seen + len(targets)
        self.trial_ = [right, seen]
        chance = 1 / outputs.shape[1]
        if seen >= TRIED and right / seen <= chance + 3 * math.sqrt(chance * (1 - chance) / seen):
            warnings.warn(
                f"{NAME}: {right} of the first {seen} images are classified rightly, which is chance: the network seems "
                f"untrained, and damage to untrained features says nothing. Train it first.",
                stacklevel=2,
            )

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return scores, outcomes of halves, surgeries, filters masked, removed and moved back, and MACs saved."""
        if not self._pairs:
            return dict(self.counts_)
        masked = sum(int((~search.alive).sum()) for search in self.searches_.values())
        removed = int((self._widths - self._present()).sum())
        return {**self.counts_, "filters_masked": masked, "filters_removed": removed,
                "macs_removed": 1 - self._share_left(self._present())}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return every search with its sums, the original numbers of the filters, the counters and the widths so far."""
        state = {name: copy.deepcopy(getattr(self, name)) for name in self.spec.state if name != "searches_"}
        return {**state, "searches_": {name: search.state_dict() for name, search in self.searches_.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for name in self.spec.state:
            if name != "searches_":
                setattr(self, name, copy.deepcopy(state[name]))
        for name, search in self.searches_.items():
            search.load_state_dict(state["searches_"][name])
        if self._pairs:
            self._mask()
            self._tell()
        self._arm()


def _over_ranks(values: Tensor) -> list[float]:
    """Return the means of ``values`` over the ranks of a distributed run, so that all decide alike."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    found: list[float] = values.tolist()
    return found
