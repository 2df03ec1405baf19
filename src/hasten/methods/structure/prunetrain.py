"""PruneTrain: a group lasso drives channels to zero while the network trains, and every few epochs the dead ones go.

What remains is a smaller dense network, so that all later steps cost less (Lym et al. 2019).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import UnsupportedError
from hasten.measure.macs import macs
from hasten.methods.structure.batch_growth import grown_batch, saved_bytes
from hasten.methods.structure.gating import gates
from hasten.methods.structure.lasso import (
    LAYERS,
    GroupLasso,
    Groups,
    channel_groups,
    dead_branches,
    dead_channels,
    rates,
    removable,
    removals,
    why_no_groups,
)
from hasten.surgery import DropBlock
from hasten.surgery.trace import empty, twin

if TYPE_CHECKING:
    from hasten.session import Session
    from hasten.surgery import Change

NAME = "prunetrain"
SAVES = "all three products, activations and updates of the channels and branches that die, from then on"
TRAINED = 0.5
"""A first cross-entropy below this share of log(classes) is that of a network trained before (our choice)."""


@dataclass(kw_only=True, eq=False)
class PruneTrain(Method):
    """Add lambda * G to the objective and remove what it drove to zero.

    G is the sum of sqrt(sum w^2 + eps) over one group for each output and each input channel of every convolution
    (each input feature of a linear layer). Not in a group: the network's inputs and outputs, depthwise and grouped
    convolutions, norms, biases (from the authors' code), and channels that surgery cannot take out (our choice).
    A channel goes when all weights that make it and all that read it are at most tau, in every layer that is added to
    it (the paper's channel union). A residual branch goes when one of its layers has no weight above tau; what its
    last bias added goes with it. Ordinary weight decay stays on; recipes that spare norms from it keep their gammas
    larger than the authors', who do not.

    r: penalty ratio, the share of lambda * G in the first loss; 0 is plain training (from the authors' code: 0.2).
    interval: T, epochs between reconfigurations (from the authors' code: 10 for CIFAR, 5 for ImageNet). The network
        is also reconfigured when the penalty ends, if the session knows the length of the run (our choice).
    tau: largest absolute weight of a dead channel (from the authors' code: 1e-4). Dead weights do not rest at 0, they
        hover in proportion to learning rate * lambda: where that is larger than the authors' 4e-5, tau must be too.
    lam: lambda itself; None sets it once as r * L0 / ((1 - r) * G0) (from the authors' code).
    l0: L0, the loss that sets lambda; None takes the first batch's, that of a teacher included, without the penalty
        and without terms that other methods add. A network trained before has a small loss, so that there lam or l0 must be given.
    calibrate: batches that L0 is the mean of; without a penalty before the last of them (the authors' code: 1).
    eps: under the root of each norm (from the authors' code: 1e-8).
    size_weighted: multiply each norm by the root of its number of weights (in the authors' code, off).
    every: apply the penalty in each n-th step, n times as strong (our choice: 1).
    proximal: shrink the norms after the update instead, by learning rate * lambda, for SGD over (1 - momentum) as
        the gradient's would add up to; dead weights are then exactly 0 (our choice, off).
    round_to: channels that lie in the same layers are kept in multiples of this, the strongest of the dead staying
        (our choice: 8, what kernels like).
    min_channels: least channels of a layer, the strongest of the dead staying; None raises OverPruneError where a
        layer would lose all (our choice).
    gating: also let each residual branch leave out the channels that are dead for it alone; what the last batch norm
        of the branch added to them goes. Fewer MACs, but an index before and zeros after each such branch (the paper's
        alternative to the union; off, as in all of the authors' settings).
    grow_batch: after each reconfiguration, raise the batch size to what fits into the memory of the start, at most to
        twice what it was, in multiples of 8, and the learning rate by the same factor; epochs stay the unit of the
        schedule. ``fit`` does so, other loops must ask ``session.batch_size`` (from the paper, whose memory model and
        rule were not at hand: the rule is our form, the memory is measured; off).
    max_batch: the largest batch wanted; None for no limit but the memory (our choice).
    stop_at: share of the run after which there is no penalty and no removal, so that the rest fine-tunes (our choice:
        1.0; the authors fine-tune after the run).
    """

    r: float = 0.2
    interval: int = 10
    tau: float = 1e-4
    lam: float | None = None
    l0: float | None = None
    calibrate: int = 1
    eps: float = 1e-8
    size_weighted: bool = False
    every: int = 1
    proximal: bool = False
    round_to: int = 8
    min_channels: int | None = None
    gating: bool = False
    grow_batch: bool = False
    max_batch: int | None = None
    stop_at: float = 1.0

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="PruneTrain",
        paper="Lym, Choukse, Zangeneh, Wen, Sanghavi, Erez, PruneTrain: Fast Neural Network Training by Dynamic "
        "Sparse Model Reconfiguration, SC 2019, arXiv 1901.09290",
        saves="time per step",
        acts="pulls whole channels to zero by a group lasso and takes the dead ones out every few epochs",
        writes=frozenset({"batch.size", "gradients", "structure"}),
        layers=("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"),
        state=(
            "lam_",
            "l0_",
            "g0_",
            "losses_",
            "counts_",
            "history_",
            "reconfigured_",
            "finished_",
            "bytes_",
        ),
        slower_when="the run is short: channels need time to die, and what dies late saves little; or a step's time "
        "is not that of its arithmetic, as in small networks on a GPU",
    )

    @property
    def writes(self) -> frozenset[str]:
        """With ``proximal`` the gradients stay as they are; without ``grow_batch`` the batch size does."""
        left = {"gradients"} if self.proximal else set()
        return self.spec.writes - left - (set() if self.grow_batch else {"batch.size"})

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        if not 0 <= self.r < 1:
            found.append(f"r is {self.r}; allowed: from 0 (plain training) to below 1.")
        for name in ("interval", "calibrate", "every", "round_to", "min_channels", "max_batch"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (value is None and name in ("min_channels", "max_batch")):
                found.append(f"{name} is {value!r}; allowed: whole numbers from 1.")
        if not 0 <= self.tau < math.inf:
            found.append(f"tau is {self.tau}; allowed: from 0.")
        if self.lam is not None and not 0 <= self.lam < math.inf:
            found.append(f"lam is {self.lam}; allowed: from 0, or None.")
        if self.l0 is not None and not 0 < self.l0 < math.inf:
            found.append(f"l0 is {self.l0}; allowed: above 0, or None.")
        if self.lam is not None and self.l0 is not None:
            found.append("lam and l0 are both given; l0 only serves to set lam, give one of them.")
        if not 0 < self.eps < math.inf:
            found.append(f"eps is {self.eps}; allowed: above 0.")
        if not 0 < self.stop_at <= 1:
            found.append(f"stop_at is {self.stop_at}; allowed: above 0, up to 1.")
        for name in ("size_weighted", "proximal", "gating", "grow_batch"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} is {getattr(self, name)!r}; allowed: True or False.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Follow the network's channels and find the groups.

        Raises UnsupportedSurgeryError for a network that cannot be followed, UnsupportedError if ``stop_at`` needs
        ``total_samples``.
        """
        if self.stop_at < 1 and session.total_samples is None:
            raise UnsupportedError(
                f"{NAME} stops at {self.stop_at:.0%} of the run: give Session(..., total_samples=epochs * samples), or "
                f"stop_at=1.0."
            )
        self._session = session
        self._lasso: GroupLasso | None = None
        self._macs: tuple[int, int] | None = None
        self.lam_ = 0.0 if self.lam is None and self.r == 0 else self.lam
        self.l0_: float | None = self.l0
        self.g0_: float | None = None
        self.losses_: list[float] = []
        self.counts_ = {
            "penalty_steps": 0,
            "reconfigurations": 0,
            "channels_removed": 0,
            "blocks_removed": 0,
            "channels_gated": 0,
        }
        self.history_: list[dict[str, int]] = []
        self.reconfigured_, self.finished_ = 0, False
        self.bytes_ = 0  # what autograd kept for a sample at the start
        return self._effect(session)

    def _effect(self, session: Session) -> Effect:
        channels, effect = session.surgery.channels, Effect(saves=SAVES)
        free = removable(channels, session.model)
        for name, layer in session.layers(*LAYERS):
            if reason := why_no_groups(channels, name, layer, free):
                effect.skipped[name] = reason
                continue
            groups = channel_groups(channels, name, layer, free)
            sides = {"out": "output", "in": "input"}
            counts = [f"{group.count} {sides[role]}" for role, group in groups.items()]
            effect.touched[name] = f"{' and '.join(counts)} groups" + (
                ": no penalty" if self.lam_ == 0 else ""
            )
        if effect.touched:
            modules = dict(session.model.named_modules())
            shared = [t.name for t in channels.ties if isinstance(modules.get(t.name), nn.GroupNorm)]
            effect.touched |= dict.fromkeys(shared, "a GroupNorm changes its statistics when channels go")
            effect.touched |= channels.warnings
        return effect

    def reshaped(self, change: Change) -> None:
        """Find groups and MACs anew when they are next asked for."""
        self._lasso = self._macs = None

    # -- in the step
    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Note the size of the batch and, until lambda is set, its loss. Raises UnsupportedError for a trained network."""
        self._samples = len(batch)
        if self.lam_ is not None or self.l0 is not None:
            return
        if not self.losses_:
            _refuse_trained(outputs, batch.targets)
        assert batch.loss is not None
        loss = _over_ranks(float(batch.loss), outputs.device)
        if math.isfinite(loss):  # if not, the session is about to say so
            self.losses_.append(loss)

    def gradients(self) -> None:
        """Count the work of the step, set lambda if it is time, and add the gradient of the penalty."""
        self._count(self._samples)
        if self.lam_ is None:
            self._calibrate()
        if not self.proximal and (strength := self._strength()):
            self._groups().add_gradient(strength)

    def after_update(self) -> None:
        """Shrink the groups if ``proximal``; reconfigure once when the penalty ends."""
        session = self._session
        if self.proximal and (strength := self._strength()):
            lasso = self._groups()
            rate = rates(session.optimizers)
            lasso.shrink([strength * rate[id(weight)] for weight in lasso.weights])
        if not self.finished_ and session.total_samples is not None and session.progress >= self.stop_at:
            self.finished_ = True
            self._reconfigure()

    def start_epoch(self, epoch: int) -> None:
        """Reconfigure after every ``interval`` epochs."""
        self._say_if_short(epoch)
        if epoch % self.interval == 0 and epoch > self.reconfigured_ and not self.finished_:
            self.reconfigured_ = epoch
            self._reconfigure()

    def _strength(self) -> float:
        """Return what to multiply the penalty by in this step, which is counted; 0 for none."""
        if not self.lam_ or self.finished_:
            return 0.0
        at = self.counts_["penalty_steps"]
        self.counts_["penalty_steps"] += 1
        return 0.0 if at % self.every else self.every * self.lam_

    def _groups(self) -> GroupLasso:
        if self._lasso is None:
            session = self._session
            channels = session.surgery.channels
            found: list[Groups] = []
            free = removable(channels, session.model)
            for name, layer in session.layers(*LAYERS):
                if why_no_groups(channels, name, layer, free) is None:
                    weighted = self.size_weighted
                    found += channel_groups(channels, name, layer, free, size_weighted=weighted).values()
            self._lasso = GroupLasso(found, self.eps)
        return self._lasso

    # -- lambda
    def _calibrate(self) -> None:
        """Set lambda from the weights of now, which are those of the start, and the losses seen, if they are enough."""
        if self.g0_ is None:
            self.g0_ = self._groups().penalty()
        if self.l0_ is None and len(self.losses_) >= self.calibrate:
            self.l0_ = math.fsum(self.losses_) / len(self.losses_)
        if self.l0_ is not None:
            self.lam_ = self.r * self.l0_ / ((1 - self.r) * self.g0_)

    # -- between steps
    def _reconfigure(self) -> None:
        """Take out dead branches, then dead channels. Raises OverPruneError."""
        if not self.lam_:
            return
        surgery, model = self._session.surgery, self._session.model
        if self.grow_batch and not self.bytes_:
            self.bytes_ = saved_bytes(self._session)
        while blocks := dead_branches(surgery.channels, model, self.tau):
            surgery.apply([DropBlock(block) for block in blocks])
            self.counts_["blocks_removed"] += len(blocks)
        gone = dead_channels(
            surgery.channels, model, self.tau, round_to=self.round_to, min_channels=self.min_channels,
            advice=f"Lower {NAME}'s r (now {self.r}) or lam, or give min_channels to keep the strongest ones.",
        )  # fmt: skip
        surgery.apply(removals(surgery.channels, gone))
        self.counts_["channels_removed"] += int(gone.sum())
        if self.gating:
            self._gate()
        self.counts_["reconfigurations"] += 1
        if self.grow_batch:
            self._grow()

    def _grow(self) -> None:
        """Ask for the batch that fills the memory of the start."""
        session = self._session
        start = len(session.sample[0])
        batch = session.batch_size or start
        session.batch_size = grown_batch(
            batch, self.bytes_ * start, saved_bytes(session) * batch, limit=self.max_batch
        )

    def _gate(self) -> None:
        """Let branches leave out what is dead for them alone."""
        surgery = self._session.surgery
        found = gates(
            surgery.channels,
            self._session.model,
            self.tau,
            round_to=self.round_to,
            least=self.min_channels or 1,
        )
        self.counts_["channels_gated"] += sum(
            len(surgery.channels.slots[gate.layer, gate.role].labels) - len(gate.channels) for gate in found
        )
        surgery.apply(found)

    def _say_if_short(self, epoch: int) -> None:
        """Add to the effect that the run leaves channels little time to die, once the length of an epoch is known."""
        session = self._session
        streamed = session.counters["streamed"]
        if session.total_samples is None or not epoch or not streamed or not self.lam_:
            return
        epochs = session.total_samples * epoch / streamed
        if epochs < 3 * self.interval:
            session.effects[NAME].saves = (
                f"{SAVES}; but the run's {epochs:.3g} epochs are fewer than 3 intervals of {self.interval}: channels "
                f"need time to die, and the penalty alone costs accuracy for no saving"
            )

    # -- evidence and state
    def _count(self, samples: int) -> None:
        """Note samples trained, by epoch and MACs of the network."""
        if self._macs is None:
            counted = macs(twin(self._session.model), empty(self._session.sample[0][:1]))
            self._macs = counted.forward, counted.training
        row = {"epoch": self._session.counters["epoch"], "forward": self._macs[0], "training": self._macs[1]}
        if not self.history_ or any(self.history_[-1][key] != value for key, value in row.items()):
            self.history_.append({**row, "samples": 0})
        self.history_[-1]["samples"] += samples

    def training_macs(self) -> int:
        """Return the MACs of training so far: 3 * forward MACs * samples, summed over epochs."""
        return sum(3 * row["forward"] * row["samples"] for row in self.history_)

    def dense_macs(self) -> int:
        """Return what ``training_macs`` would be had nothing been removed."""
        return sum(3 * self.history_[0]["forward"] * row["samples"] for row in self.history_)

    def witness(self) -> dict[str, float]:
        """Return steps with the penalty, reconfigurations, what they removed, lambda and the training MACs saved.

        ``macs_saved`` is a share of the dense network's; ``extra_macs`` the same as a number that a report adds up.
        """
        dense = self.dense_macs()
        extra = sum(
            (row["training"] - self.history_[0]["training"]) * row["samples"] for row in self.history_
        )
        return {
            **{name: float(count) for name, count in self.counts_.items()},
            "lambda": self.lam_ or 0.0,
            "batch_size": float(self._session.batch_size or 0),
            "macs_saved": 1 - self.training_macs() / dense if dense else 0.0,
            "extra_macs": float(extra),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return lambda with what set it, the counters, and the MACs of each epoch."""
        return copy.deepcopy(super().state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        super().load_state_dict(copy.deepcopy(state))


def _refuse_trained(outputs: Tensor, targets: Tensor) -> None:
    """Raise UnsupportedError if these first outputs (N, K) are those of a trained classifier."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return
    loss = float(F.cross_entropy(outputs.float(), targets))
    if loss < TRAINED * math.log(outputs.shape[1]):
        raise UnsupportedError(
            f"{NAME}: the network seems to be trained already: its first cross-entropy is {loss:.3g}, a fresh one has "
            f"about {math.log(outputs.shape[1]):.3g}. Lambda would be too small to do anything; give lam=..., or "
            f"l0={math.log(outputs.shape[1]):.3g} for the lambda of a fresh network."
        )


def _over_ranks(loss: float, device: torch.device) -> float:
    """Return the mean of ``loss`` over the ranks of a distributed run, so that all set the same lambda."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return loss
    total = torch.tensor(loss, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
