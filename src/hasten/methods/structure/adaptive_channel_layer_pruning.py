"""Adaptive channel and layer pruning: trainable gates on channels and residual branches, driven to exactly zero.

How many channels and how many blocks go is an outcome of training, steered by a size. The abstract that asks for this
names neither authors nor title, and its paper is not identified; the mechanism is that of Sparse Structure Selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import OverPruneError, UnsupportedError
from hasten.measure.macs import macs
from hasten.methods.structure.gate_controller import Frame, Rules, Unit, adjusted, refused, wanted
from hasten.methods.structure.gate_sites import constants, find_blocks, find_channels
from hasten.methods.structure.gates import (
    NORMS,
    Flags,
    Gates,
    Site,
    follow,
    latents,
    proximal_step,
    put_latents,
)
from hasten.methods.structure.lasso import removals
from hasten.surgery import DropBlock
from hasten.surgery.trace import empty, twin

if TYPE_CHECKING:
    from hasten.session import Session
    from hasten.surgery import Change

NAME = "adaptive_channel_layer_pruning"


@dataclass(kw_only=True, eq=False)
class AdaptiveGatePruning(Method):
    """SSS-style gates; inspired by an unidentified abstract.

    Every channel that can go has a gate alpha, behind the norm and before the activation (behind the layer itself where
    there is no norm); what is added to each other shares its gates. Every residual block with a plain shortcut has a
    gate beta on its branch: y = x + beta * F(x). All are 1 at first, without weight decay, and feel a pull g:

        loss + g_c * sum of |alpha| + g_b * sum of |beta|,  g times the share of parameters that the structure owns

    The method itself moves them, by the accelerated proximal step of the SSS code, at the learning rate of the parameter
    group of the norm or layer that the gate stands behind (the first, where it is shared), whatever optimizer trains
    that (our choice: the step assumes plain scaling, so no optimizer ever holds a gate). At the start of an epoch
    channels and branches go whose gates were 0 for ``patience`` epochs, which changes nothing that the network computes.
    A branch whose inner layer is closed whole goes too; what the bias of its last batch norm added goes with it. When
    the pull ends, all that is closed goes (our choice).

    A gate multiplies the weight and bias of what it stands behind, not the map: it costs no pass over a map, averages of
    the weights are right, and the network is at every moment what folding the gates would give (our choice).

    The pull on open gates rests while the size is at the target, and a death that would miss it by more than it is missed
    without is undone (our choice), so that a strong pull does not overshoot. It still grinds all gates down on its way,
    the useful ones with the others: begin with a weak one that the controller raises.

    g_c: pull on channels (1e-4 in the code of network slimming for VGG, 1e-5 for ResNet-164); 0: no gates on channels.
    g_b: pull on branches (0.01 in the code of SSS for ResNet-50); 0: no gates on branches. An open gate without any
        gradient falls by lr * g / (1 - momentum) a step: raise both for short runs.
    channel_gate: "gate": numbers of their own; "bn": the gammas themselves, as in network slimming, for channels that lie
        in one norm alone. The shift of a batch norm outlives its gamma: what it adds goes into the bias or running mean
        behind the next layer, exact but for zero padding, and is lost where there is none. None: channels stay.
    block_gate: whether branches have gates.
    target: share of the size to come down to (0.5: half of the parameters, as the abstract says); None: g stays as given.
    k: strength of the controller: every epoch g <- g * exp(k * (size - wanted size)), sizes as shares (our choice: 1).
    cost: what size and pull count, "params" or forward "macs".
    until: share of the run in which the wanted size falls from 1 to the target; then g is frozen (our choice: 0.6).
    release_at: share of the run after which there is no pull (our choice: 0.9).
    momentum: mu of the proximal step (from the authors' code: 0.9).
    patience: whole epochs that a gate must have been 0 (our choice: 1).
    min_channels: least channels of a layer, whose last gates are held open (our choice: 8); layers
        inside a branch with a gate may also be closed whole. None: OverPruneError where a layer would lose all.
    round_to: channels that lie in the same layers are kept in multiples of this (our choice: 8, what kernels like).
    allow_empty_stage: let the last block of a stage go, its shortcut staying; else its gate is held open, and
        OverPruneError says where all were 0 all the same.
    """

    g_c: float = 1e-4
    g_b: float = 1e-2
    channel_gate: Literal["gate", "bn"] | None = "gate"
    block_gate: bool = True
    target: float | None = 0.5
    k: float = 1.0
    cost: Unit = "params"
    until: float = 0.6
    release_at: float = 0.9
    momentum: float = 0.9
    patience: int = 1
    min_channels: int | None = 8
    round_to: int = 8
    allow_empty_stage: bool = False

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="Adaptive channel and layer pruning",
        paper="the abstract's paper is not identified; mechanism: Huang, Wang, Data-Driven Sparse Structure Selection for "
        "Deep Neural Networks, ECCV 2018, arXiv 1707.01213; Liu et al., Learning Efficient Convolutional Networks through "
        "Network Slimming, ICCV 2017, arXiv 1708.06519",
        saves="time per step",
        acts="multiplies channels and residual branches by gates, drives these to zero and takes out what they close",
        writes=frozenset({"gradients", "structure"}),
        excludes=frozenset({"normalization"}),
        excludes_reason="gates stand behind the norms.",
        layers=("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm2d", "GroupNorm", "LayerNorm", "Conv1d",
                "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"),
        requires=frozenset({"progress"}),
        state=("gates_", "latent_", "g_c_", "g_b_", "epoch_", "released_", "counts_"),
        slower_when="the run is short: gates need time to close, and what closes late saves little; from a trained network "
        "only inference is saved",
    )  # fmt: skip

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        for name in ("g_c", "g_b", "k"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"{name} is {getattr(self, name)}; allowed: from 0.")
        if self.channel_gate not in ("gate", "bn", None):
            found.append(f"channel_gate is {self.channel_gate!r}; allowed: 'gate', 'bn', None.")
        if self.target is not None and not 0 < self.target < 1:
            found.append(f"target is {self.target}; allowed: above 0, below 1, or None.")
        if self.cost not in ("params", "macs"):
            found.append(f"cost is {self.cost!r}; allowed: 'params', 'macs'.")
        if not 0 < self.until <= self.release_at <= 1:
            found.append(
                f"until is {self.until} and release_at {self.release_at}; allowed: 0 < until <= release_at <= 1."
            )
        if not 0 <= self.momentum < 1:
            found.append(f"momentum is {self.momentum}; allowed: from 0, below 1.")
        for name, low in (("patience", 0), ("min_channels", 1), ("round_to", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
            if not whole and not (value is None and name == "min_channels"):
                found.append(f"{name} is {value!r}; allowed: whole numbers from {low}.")
        for name in ("block_gate", "allow_empty_stage"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} is {getattr(self, name)!r}; allowed: True or False.")
        if self.channel_gate is None and self.block_gate is False:
            found.append("channel_gate is None and block_gate is False; allowed: at least one kind of gate.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Find what can have gates; they come in once all methods have agreed.

        Raises UnsupportedSurgeryError for a network that cannot be followed or cut, UnsupportedError if the target is out
        of reach.
        """
        self._session, self._sites = session, list[Site]()
        self._gates: Gates | None = None
        self._grad: Tensor | None = None
        self._known: Frame | None = None
        self._left: int | None = None
        self.g_c_, self.g_b_ = self.g_c, self.g_b
        self.epoch_, self.released_ = 0, False
        self.counts_ = {"steps": 0, "held": 0, "surgeries": 0, "channels_removed": 0, "blocks_removed": 0,
                        "extra_macs": 0}  # fmt: skip
        effect = self._find(session)
        if self._sites:
            self._whole = self._frame().size()
            self._first = self._work = self._training_macs()
            effect.saves = f"all of a step of what is closed, and inference; {self._check_reach(session)}"
            # twice deferred: it has to see the modules that the edits of other methods bring in
            session.edit(lambda: session.edit(self._install))
        return effect

    def _find(self, session: Session) -> Effect:
        """Find the sites of gates, and make these."""
        effect, surgery, x = Effect(), session.surgery, session.sample[0]
        if self.channel_gate is not None:
            found, effect.skipped = find_channels(surgery, x, gammas=self.channel_gate == "bn")
            self._sites = found if self.g_c else []
            for site in found:
                effect.touched[site.name] = (
                    f"gates on {len(site.members()[0])} channels{_idle(self.g_c, 'g_c')}"
                )
        count = 1 + max((int(site.members()[1].max()) for site in self._sites), default=-1)
        doors = 0
        if self.block_gate:
            ends, skipped = find_blocks(surgery, x)
            effect.skipped |= skipped
            here = {site.name: site for site in self._sites}
            for end, block in ends.items():
                note = f"a gate on its branch, behind {end}{_idle(self.g_b, 'g_b')}"
                effect.touched[block or "the network"] = note
                if self.g_b:
                    if end not in here:
                        module = session.model.get_submodule(end)
                        role = "norm" if isinstance(module, NORMS) else "out"
                        here[end] = Site(end, module, role, None)
                        self._sites.append(here[end])
                    here[end].block, doors = count + doors, doors + 1
        if self._sites:
            self._gates = Gates(count, doors, next(session.model.parameters()))
            modules = dict(session.model.named_modules())
            shared = {
                tie.name for tie in surgery.channels.ties if isinstance(modules.get(tie.name), nn.GroupNorm)
            }
            for name in (shared | surgery.channels.warnings.keys()) & effect.touched.keys():
                effect.touched[name] += "; its statistics change when channels go"
        return effect

    def _check_reach(self, session: Session) -> str:
        """Return in words what can go at most, having tried it. Raises UnsupportedSurgeryError, UnsupportedError."""
        assert self._gates is not None
        frame, surgery = self._frame(), session.surgery
        rules = Rules(frame.channels, self.round_to, self.min_channels or 1)
        all_of_them = np.ones(len(self._gates), bool)
        gone = rules.spare(frame.gone(all_of_them), np.zeros(len(frame.channels.classes)))
        blocks = frame.dead_blocks(all_of_them)
        while stage := frame.empty_stage(blocks):
            blocks = [name for name in blocks if name != stage[0]]
        if gone.any():
            surgery.plan(removals(frame.channels, gone))
        if blocks:
            surgery.plan([DropBlock(name) for name in blocks])
        without = {
            name for one in frame.branches if one is not None and one.block in blocks for name in one.modules
        }
        least = frame.size(gone, without) / self._whole
        if self.target is not None and least > self.target:
            raise UnsupportedError(
                f"{NAME}: target={self.target:g} is out of reach: with all that can go gone, {least:.3f} of the "
                f"{self.cost} remain (min_channels={self.min_channels}, round_to={self.round_to}, "
                f"channel_gate={self.channel_gate!r}). Give a larger target, or smaller min_channels and round_to."
            )
        return f"at least {least:.1%} of the {self.cost} remain"

    def _install(self) -> None:
        assert self._gates is not None
        for site in self._sites:
            site.module = self._session.model.get_submodule(site.name)
            site.begin()
            site.gather(site.weight.detach(), self._gates.values)
        self._known = None  # other methods may have changed modules since

    def _frame(self) -> Frame:
        """Return what gates mean in the present structure."""
        if self._known is None:
            assert self._gates is not None
            surgery = self._session.surgery
            rules = Rules(surgery.channels, self.round_to, self.min_channels or 0)
            self._known = Frame(
                surgery, self._sites, self._gates, self.cost, rules, keep_stages=not self.allow_empty_stage
            )
        return self._known

    def reshaped(self, change: Change) -> None:
        """Keep the gates of what is left."""
        if self._gates is None:
            return
        self._sites = follow(self._sites, self._gates, change, self._session.model)
        self._known = self._left = None
        self._work = self._training_macs()

    # -- in the step
    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Count the work that the step saves."""
        if self._gates is not None:
            self.counts_["extra_macs"] += (self._work - self._first) * len(batch)

    def gradients(self) -> None:
        """Turn the gradients into those of the gates and of the tensors without them, which the optimizer then moves."""
        if self._gates is None:
            return
        self._grad = torch.zeros_like(self._gates.values)
        for site in self._sites:
            site.expose(self._gates.values, self._grad)
            site.gather(site.weight.detach(), self._gates.values)

    def after_update(self) -> None:
        """Move the gates by one proximal step; let all that is closed go when the pull ends."""
        gates, grad, session = self._gates, self._grad, self._session
        if gates is None or grad is None:
            return
        for site in self._sites:
            if site.weight.grad is not None:
                site.gather(site.weight.grad, grad)
        old, pull = gates.values, self._pull()
        new, velocity = proximal_step(
            old, grad, gates.velocity, self._frame().rates(old), pull, self.momentum
        )
        if bool(((new == 0) != (old == 0)).any()):
            back = torch.from_numpy(self._refused(old, new)).to(old.device)
            self.counts_["held"] += int(back.sum())
            new, velocity = torch.where(back, old, new), torch.where(back, 0.0, velocity)
            self._left = None
        gates.put(new, velocity)
        for site in self._sites:
            site.scatter(new, site.weight.detach())
            site.cover(new)
        self._grad = None
        self.counts_["steps"] += 1
        if not self.released_ and session.progress >= self.release_at:
            self.released_ = True
            self._remove(0)

    def _pull(self) -> Tensor:
        """Return g of each gate (n,): by its cost, and 0 for open ones while the size is at the target."""
        assert self._gates is not None
        frame, gates = self._frame(), self._gates
        if self.released_:
            return torch.zeros_like(frame.weights)
        pull = frame.weights.clone()
        pull[: gates.channels] *= self.g_c_
        pull[gates.channels :] *= self.g_b_
        if self.target is not None and self._size() <= self.target * self._whole:
            pull *= gates.values == 0  # what is closed stays closed
        return pull

    def _refused(self, old: Tensor, new: Tensor) -> Flags:
        """Return which gates must not close in this step."""
        assert self._gates is not None
        frame, gates, excess = self._frame(), self._gates, None
        if (target := self.target) is not None:

            def excess(closed: Flags) -> float:
                return frame.left(closed, gates) - target * self._whole

        shut, before = (new == 0).cpu().numpy(), old.cpu().double().numpy()
        return refused(before, shut & (before != 0), ~shut, excess, frame.floors)

    def _size(self) -> int:
        """Return the size without all that is closed now."""
        assert self._gates is not None
        if self._left is None:
            self._left = self._frame().left(self._gates.closed, self._gates)
        return self._left

    # -- between steps
    def start_epoch(self, epoch: int) -> None:
        """Take out what has been closed for long enough, and adjust the pull.

        Raises OverPruneError if a stage would be left without a block, or a layer without channels.
        """
        if self._gates is None or epoch <= self.epoch_:
            return
        self.epoch_ = epoch
        self._gates.turn()
        if self.released_:
            return
        self._remove(self.patience)
        progress = self._session.progress
        if self.target is not None and progress < self.until:
            aim, share = wanted(progress, self.target, self.until), self._size() / self._whole
            self.g_c_, self.g_b_ = (adjusted(g, self.k, share, aim) for g in (self.g_c_, self.g_b_))

    def _remove(self, patience: int) -> None:
        """Take out blocks, then channels, whose gates are closed and have been for ``patience`` epochs."""
        assert self._gates is not None
        surgery, model, gates = self._session.surgery, self._session.model, self._gates
        if blocks := self._frame().dead_blocks(gates.quiet(patience)):
            if stage := self._frame().empty_stage(blocks):
                raise OverPruneError(
                    f"{NAME}: the stage of {', '.join(stage)} would be left without a block: the gates of all its branches "
                    f"are 0. Lower g_b (now {self.g_b_:.3g}) or raise target, or give allow_empty_stage=True."
                )
            surgery.apply([DropBlock(name) for name in blocks])
            self.counts_["blocks_removed"] += len(blocks)
            self.counts_["surgeries"] += 1
        frame = self._frame()
        gone = frame.going(gates.quiet(patience), gates)
        if not gone.any():
            return
        if bare := frame.rules.emptied(gone):
            raise OverPruneError(
                f"{NAME}: {bare} would lose all its channels: all their gates are 0. Lower g_c (now {self.g_c_:.3g}) or "
                f"raise target, or give min_channels to hold the last ones open."
            )
        x = self._session.sample[0]
        left = constants(model, frame.channels, x, gone) if self.channel_gate == "bn" else []
        change = surgery.apply(removals(frame.channels, gone))
        assert change is not None
        for constant in left:
            constant.take(model, change)
        if left:  # averages would otherwise hold means of batch norms without it
            self._session.restart_averages()
        self.counts_["channels_removed"] += int(gone.sum())
        self.counts_["surgeries"] += 1

    # -- evidence and state
    def _training_macs(self) -> int:
        return macs(twin(self._session.model), empty(self._session.sample[0][:1])).training

    def witness(self) -> dict[str, float]:
        """Return proximal steps, deaths undone, surgeries and what they removed, gates closed now, g, and the size.

        ``share`` is that of the size that the network has; ``extra_macs`` the training MACs spent beyond those of the
        whole network, which are negative.
        """
        found = {name: float(count) for name, count in self.counts_.items()}
        if self._gates is None:
            return found
        closed = float(self._gates.closed.sum())
        return {**found, "closed": closed, "g_c": self.g_c_, "g_b": self.g_b_,
                "share": self._frame().size() / self._whole}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the gates with their momentum and streaks, the tensors without them, g, and the counters."""
        gates = {} if self._gates is None else self._gates.state()
        kept = {name: tensor.clone() for name, tensor in latents(self._sites).items()}
        return {"gates_": gates, "latent_": kept, "g_c_": self.g_c_, "g_b_": self.g_b_, "epoch_": self.epoch_, "released_": self.released_,
                "counts_": dict(self.counts_)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        if self._gates is not None:
            self._gates.load(state["gates_"])
            put_latents(self._sites, state["latent_"])
        self._left = None
        self.g_c_, self.g_b_ = float(state["g_c_"]), float(state["g_b_"])
        self.epoch_, self.released_ = int(state["epoch_"]), bool(state["released_"])
        self.counts_ = {name: int(count) for name, count in state["counts_"].items()}


def _idle(g: float, name: str) -> str:
    return "" if g else f": none, {name} is 0"
