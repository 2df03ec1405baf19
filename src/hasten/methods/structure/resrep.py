"""ResRep: prune a trained network by 1x1 compactors, whose rows a penalty drives to zero (Ding et al. 2021).

grad(Q[p]) = m_p * grad_loss(Q[p]) + lambda * Q[p] / ||Q[p]||       Q: a compactor, p: a row of it, m_p = 0: chosen to go

Only compactors feel the penalty; the rest of the network learns on as before. A row that reaches zero goes with its
channel, and what remains of convolution, batch norm and compactor is one narrower convolution: nothing is fine-tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hasten.contract import Effect, Method, MethodSpec
from hasten.errors import UnsupportedError, UnsupportedSurgeryError
from hasten.measure.macs import macs
from hasten.methods.structure.compactor import Compactor, Target, constants, find_targets, insert, merge
from hasten.methods.structure.compactor_choice import Work, choose, fewest_rows
from hasten.surgery import Change, RemoveChannels
from hasten.surgery.labels import Array

if TYPE_CHECKING:
    from hasten.session import Session

NAME = "resrep"


# -- the mathematics
@torch.no_grad()
def penalise(weight: Tensor, kept: Tensor, lam: float) -> None:
    """Set the gradient of a compactor to ``kept * gradient + lam * row / ||row||``; a row of zeros is not pulled.

    weight (D', D, 1, 1); kept (D',) bool, False where the gradient of the loss is switched off.
    """
    rows = _rows(weight)
    # not row * norm ** -1, which is NaN for a row of zeros
    pull = lam * rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.mul_(kept.view(-1, 1, 1, 1)).add_(pull.view_as(weight))


def row_norms(weight: Tensor) -> Tensor:
    """Return the L2 norm of each row of a compactor (D', D, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(_rows(weight), dim=1)
    return norms


def _rows(weight: Tensor) -> Tensor:
    rows = weight.detach().flatten(1)
    return rows if rows.dtype == torch.float64 else rows.float()


# -- the method
@dataclass(kw_only=True, eq=False)
class ResRep(Method):
    """Prune the channels of a trained network to a share of its MACs, without fine-tuning.

    Every convolution whose output is read only as channels of its own gets a compactor behind its batch norm (or
    behind itself) and before the activation; layers that are added to each other stay whole, as in the paper, and so
    does the first. In the session ``X`` then is a sequence of ``X.0``, the batch norm, and ``X.1``, the compactor.
    ``Session.export`` gives plain convolutions with bias. Begin with a trained network: this saves no training time.

    target: share of the forward MACs to keep (the authors' code: 0.455 for ResNet-50, 0.471 for ResNet-56); from 1 on
        nothing is done.
    lam (lambda): strength of the penalty (paper: 1e-4). A masked row shrinks by lr * lam / (1 - momentum) a step, so
        from 1 to 0 in (1 - momentum) / (lr * lam) steps: raise it for short runs. 0 trains compactors and masks nothing.
    momentum: of the compactors, which are not decayed and follow the learning rate of the convolutions (paper: 0.99).
    every: steps between two choices of rows (the authors' code: 200).
    granularity: rows that one choice may add (the authors' code: 4).
    warmup: share of the run before the first choice (paper: 5 of 180 epochs).
    num_at_least: channels that every layer keeps (our choice: 8; 1 in the authors' code, but layers so narrow are slow).
    threshold: norm below which a row goes (the authors' code: 1e-5, which a learning rate that falls to 0 reaches).
    relative: take the threshold as a share of the layer's largest norm, for rates that do not fall to 0, and let only
        masked rows go (our choice: off). ``witness`` then has to show a wide gap: the least ratio of the norm of a row
        that is meant to stay to that of one that went.
    round_to: widths are rounded up to a multiple of this when rows go, the largest of them staying (our choice: 8; 1 for
        the exact widths). The choice counts every masked row, so the MACs exceed the target by what rounding keeps.
    early_shrink: let rows below the threshold go during the run, whenever a choice has changed nothing (our choice: on);
        else only at the end. It saves time, and the function stays the same up to the threshold.
    """

    target: float = 0.455
    lam: float = 1e-4
    momentum: float = 0.99
    every: int = 200
    granularity: int = 4
    warmup: float = 5 / 180
    num_at_least: int = 8
    threshold: float = 1e-5
    relative: bool = False
    round_to: int = 8
    early_shrink: bool = True

    spec: ClassVar[MethodSpec] = MethodSpec(
        name=NAME,
        title="ResRep",
        paper="Ding et al., ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting, ICCV 2021, arXiv "
        "2007.03260",
        saves="inference",
        acts="puts 1x1 compactors behind convolutions, shrinks the rows that matter least to zero and merges the rest",
        writes=frozenset({"gradients", "structure"}),
        layers=("Conv2d",),
        requires=frozenset({"progress"}),
        state=("masks_", "kept_", "counts_", "log_", "gap_"),
        promises=frozenset({"autocast", "channels_last", "compile"}),
        slower_when="always in training, by 13% of the MACs of ResNet-50: what it saves is the cost of inference, and "
        "the fine-tuning that other pruning needs",
    )

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        for name in ("target", "threshold"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"{name} must be above 0, not {getattr(self, name)}.")
        if self.relative and not self.threshold < 1:
            found.append(f"threshold must lie in (0, 1) if relative, not {self.threshold}.")
        if not 0 <= self.lam < math.inf:
            found.append(f"lam must be 0 or more, not {self.lam}.")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} must lie in [0, 1), not {getattr(self, name)}.")
        for name in ("every", "granularity", "num_at_least", "round_to"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                found.append(f"{name} must be a whole number from 1, not {value!r}.")
        for name in ("relative", "early_shrink"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} must be True or False, not {getattr(self, name)!r}.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Find the layers to prune; compactors come in once all methods have agreed.

        Raises UnsupportedError without a plain SGD, for a network that has compactors, and if the target cannot be reached, or not in a run of this length (which is not checked where the learning
        rate is 0: such a session does not train).
        """
        self._session, self._targets = session, list[Target]()
        self._compactors: list[Compactor] = []
        self.masks_: dict[str, Tensor] = {}
        self.kept_: dict[str, Tensor] = {}
        self.counts_ = {"mask_updates": 0, "surgeries": 0}
        self.log_: list[list[int]] = []
        self.gap_ = 0.0
        self._optimizer = _sgd_of(session)
        _check_model(session)
        if self.target >= 1:
            return Effect(skipped={"the network": f"target={self.target:g} keeps every channel"})
        model, x = session.model, session.sample[0][:1]
        self._targets, skipped = find_targets(session.surgery, x, self.num_at_least)
        if not self._targets:
            return Effect(skipped=skipped)
        self._leader = _group_of(self._optimizer, model.get_submodule(self._targets[0].conv).weight)
        self._work = Work.of(model, session.surgery.channels, self._targets, x)
        self._check_run(session)
        shapes, training = session.shapes(), macs(model, x).training
        more = 3 * sum(t.width**2 * math.prod(shapes[t.host][1][2:]) for t in self._targets) / training
        session.edit(self._insert)
        # twice deferred: it has to see the modules that the edits of other methods bring in
        session.edit(lambda: session.edit(self._rehearse))
        return Effect(
            touched={t.conv: f"{t.width} channels, compactor behind {t.host}" for t in self._targets},
            skipped=skipped,
            saves=f"inference: {self.target:.1%} of the MACs are to remain; training costs {more:.1%} more",
            work=1 + more,
        )

    def _check_run(self, session: Session) -> None:
        """Raise UnsupportedError if the target cannot be reached, or not in this run."""
        widths = np.array([t.width for t in self._targets])
        rows = fewest_rows(self._work, widths, self.target * self._work.whole, self.num_at_least)
        if rows is None:
            least = self._work(widths - np.minimum(widths, self.num_at_least)) / self._work.whole
            raise UnsupportedError(
                f"{NAME}: target={self.target:g} is out of reach: with num_at_least={self.num_at_least} channels in "
                f"each of {len(widths)} layers, {least:.3f} of the MACs remain. Give a larger target or a smaller "
                f"num_at_least."
            )
        speed = self._optimizer.param_groups[self._leader]["lr"] * self.lam / (1 - self.momentum)
        if speed == 0:
            return
        assert session.total_samples is not None
        steps = int(session.total_samples // len(session.sample[0]) * (1 - self.warmup))
        shrinking = math.ceil(
            max(0.0, 1 - self.threshold) / speed * (1 - 1e-9)
        )  # not one more for a rounding error
        choosing = (math.ceil(rows / self.granularity) - 1) * self.every
        if steps < shrinking + choosing:
            raise UnsupportedError(
                f"{NAME}: the run has {steps} steps after its warm-up and needs at least {shrinking + choosing}: "
                f"{shrinking} for a row to shrink to the threshold, (1 - momentum) / (lr * lam), after {choosing} until "
                f"the last of {rows} or more rows is chosen, {self.granularity} every {self.every} steps. Train longer, "
                f"or raise lam, the learning rate or granularity, or lower every."
            )

    def _insert(self) -> None:
        model = self._session.model
        for target in self._targets:
            compactor = insert(model, target)
            device = compactor.weight.device
            self._compactors.append(compactor)
            self.masks_[target.compactor] = torch.ones(target.width, dtype=torch.bool, device=device)
            self.kept_[target.compactor] = torch.arange(target.width, device=device)
        groups = self._optimizer.param_groups
        weights = {
            f"{t.compactor}.weight": c.weight for t, c in zip(self._targets, self._compactors, strict=True)
        }
        self._group = len(groups)
        leader = groups[
            self._leader
        ]  # what a schedule keeps in it, such as initial_lr, holds for this one too
        self._optimizer.add_param_group(
            {
                **{key: value for key, value in leader.items() if key not in ("params", "param_names")},
                "name": "compactors", "momentum": self.momentum, "weight_decay": 0.0, "nesterov": False,
                "dampening": 0.0, "params": list(weights.items()) if "param_names" in groups[0] else list(weights.values()),
            }
        )  # fmt: skip

    def _rehearse(self) -> None:
        self._session.surgery.forget()
        self._session.surgery.plan([RemoveChannels(t.compactor, (0,)) for t in self._targets])

    # -- in the step
    def gradients(self) -> None:
        """Switch the loss's gradient off for masked rows and add the penalty's."""
        if not self._targets:
            return
        groups = self._optimizer.param_groups
        groups[self._group]["lr"] = groups[self._leader]["lr"]
        for target, compactor in zip(self._targets, self._compactors, strict=True):
            penalise(compactor.weight, self.masks_[target.compactor], self.lam)

    def after_update(self) -> None:
        """Choose anew which rows to mask, and let rows go that have reached zero, when it is time."""
        session = self._session
        if not self._targets or self.lam == 0:
            return
        due = session.counters["updates"] % self.every == 0 and session.progress >= self.warmup
        changed = self._choose() if due else False
        if session.progress >= 1 or (self.early_shrink and due and not changed):
            self._shrink()

    def _choose(self) -> bool:
        """Choose which rows to mask; return whether that changed anything."""
        norms = [row_norms(c.weight).cpu().numpy() for c in self._compactors]
        masked = [(~self.masks_[t.compactor]).cpu().numpy() for t in self._targets]
        chosen = choose(norms, masked, self._lost(), self._work, self.target * self._work.whole, self.granularity,
                        self.num_at_least)  # fmt: skip
        self.counts_["mask_updates"] += 1
        if all((old == new).all() for old, new in zip(masked, chosen, strict=True)):
            return False
        for target, rows in zip(self._targets, chosen, strict=True):
            mask = self.masks_[target.compactor]
            self.masks_[target.compactor] = torch.from_numpy(~rows).to(mask.device)
        self.log_.append([self._session.counters["updates"], *(int((~rows).sum()) for rows in chosen)])
        return True

    def _lost(self) -> Array:
        """Return how many rows of each compactor were removed."""
        return np.array([t.width - len(self.kept_[t.compactor]) for t in self._targets], np.int64)

    # -- surgery
    def _shrink(self) -> None:
        """Remove the rows that have reached zero, with the channels they make."""
        going: dict[Target, Tensor] = {}
        for target, compactor in zip(self._targets, self._compactors, strict=True):
            rows = self._dead(target, compactor)
            if len(rows):
                going[target] = rows
        if not going:
            return
        session = self._session
        constant = constants(session.model, session.surgery.channels, session.sample[0][:1], going)
        session.surgery.apply(
            [RemoveChannels(t.compactor, tuple(rows.tolist())) for t, rows in going.items()]
        )
        for passage, lost in constant:
            passage.take(lost)
        if constant:  # averages would otherwise hold means of batch norms without it
            session.restart_averages()
        self.counts_["surgeries"] += 1

    def _dead(self, target: Target, compactor: Compactor) -> Tensor:
        """Return the rows to remove, ascending: below the threshold, the smallest first, as far as the rules allow."""
        norms = row_norms(compactor.weight)
        dead = norms < self.threshold * (norms.max() if self.relative else 1.0)
        if self.relative:
            dead &= ~self.masks_[target.compactor]
        alive = int((~dead).sum())
        stay = max(alive, min(self.num_at_least, target.width))
        stay = math.ceil(stay / self.round_to) * self.round_to
        rows = dead.nonzero().flatten()
        rows = rows[norms[rows].argsort(stable=True)][: max(0, len(norms) - stay)]
        meant = norms[~dead & self.masks_[target.compactor]]
        if len(rows) and len(meant):
            gap = float(meant.min() / norms[rows].max().clamp_min(1e-12))
            self.gap_ = min(self.gap_, gap) if self.gap_ else gap
        return rows.sort().values

    def reshaped(self, change: Change) -> None:
        """Drop the masks of rows that are gone."""
        for target in self._targets:
            mask = self.masks_[target.compactor]
            at = change.positions(target.compactor, "out", len(mask))
            if at is None:
                raise UnsupportedSurgeryError(
                    f"{NAME}: the compactor {target.compactor} was taken out by another hand."
                )
            kept = torch.from_numpy(at).to(mask.device)
            self.masks_[target.compactor] = mask[kept]
            self.kept_[target.compactor] = self.kept_[target.compactor][kept]
            note = f"{len(kept)} of {target.width} channels, compactor behind {target.host}"
            self._session.effects[NAME].touched[target.conv] = note

    def export(self, model: nn.Module) -> None:
        """Merge every convolution with its batch norm and compactor into one convolution with bias."""
        for target in self._targets:
            merge(model, target)

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return choices and surgeries made, rows masked and removed, the share of MACs removed, and the gap in norms."""
        lost = self._lost()
        saved = 1 - self._work(lost) / self._work.whole if self._targets else 0.0
        masked = sum(int((~mask).sum()) for mask in self.masks_.values())
        return {**self.counts_, "rows_masked": masked, "rows_removed": int(lost.sum()), "macs_removed": saved,
                "gap": self.gap_}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return masks and original numbers of the rows, counters, the log of widths and the gap."""
        return {
            "masks_": dict(self.masks_), "kept_": dict(self.kept_), "counts_": dict(self.counts_),
            "log_": [list(row) for row in self.log_], "gap_": self.gap_,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for name, mask in self.masks_.items():
            self.masks_[name] = state["masks_"][name].to(mask.device, copy=True)
            self.kept_[name] = state["kept_"][name].to(mask.device, copy=True)
        self.counts_ = {name: int(count) for name, count in state["counts_"].items()}
        self.log_ = [list(row) for row in state["log_"]]
        self.gap_ = float(state["gap_"])


# -- what a session must be like
def _sgd_of(session: Session) -> SGD:
    for optimizer in session.optimizers:
        if type(optimizer) is SGD:
            return optimizer
    given = ", ".join(type(o).__name__ for o in session.optimizers)
    raise UnsupportedError(
        f"{NAME}: compactors need torch.optim.SGD, with a momentum of their own; given: {given}. Optimizers that rescale "
        f"gradients undo the balance of loss and penalty, and others are not tried."
    )


def _check_model(session: Session) -> None:
    there = [name for name, module in session.model.named_modules() if isinstance(module, Compactor)]
    if there:
        raise UnsupportedError(
            f"{NAME}: the network has compactors already ({', '.join(there[:3])}), and rows are compared only if all "
            f"begin as the identity. Go on with what Session.export() gave."
        )


def _group_of(optimizer: SGD, weight: Any) -> int:
    """Return the number of the parameter group that holds ``weight``, or 0."""
    held = [i for i, g in enumerate(optimizer.param_groups) if any(p is weight for p in g["params"])]
    return held[0] if held else 0
