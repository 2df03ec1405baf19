"""Selective-Backprop: train on a sample with a probability that grows with the rank of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten import keyed
from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import UnsupportedError
from hasten.methods.samples.scoring import bad_scale, check_scale, per_example, refuse_ranks, scored
from hasten.session import Session

_NEVER = -(2**30)


def percentile(losses: Tensor, history: Tensor) -> Tensor:
    """Return, for each loss, the share of ``history`` that is strictly below it, in [0, 1)."""
    below = torch.searchsorted(history.sort().values, losses.contiguous(), right=False)
    return below.to(losses.dtype) / len(history)


def probabilities(losses: Tensor, history: Tensor, beta: float, sampling_min: float) -> Tensor:
    """Return max(sampling_min, percentile^beta), the probability with which each sample is trained on."""
    return percentile(losses, history).pow(beta).clamp_min(sampling_min)


@dataclass(kw_only=True, eq=False)
class SelectiveBackprop(Method):
    """Forward every sample without a graph, and backpropagate those with large losses (Jiang et al. 2019).

    A sample with loss L is trained on with probability max(sampling_min, q(L)^beta), q(L) being the share of
    the last ``history`` losses below L. Samples are queued until a batch as large as the incoming ones is
    full, so a step updates the model or not at all, and its kernels stay dense. Selected samples train on the
    view that was scored.

    Cost for each incoming sample (forward 1, backward 2, plain training 3), with rho = 1/(beta+1) the share
    selected: 1 + 3 rho, or 1/n + 3 rho with ``stale_epochs`` = n. The selection is biased towards hard
    samples, by design, and so towards wrong labels. Rates that follow ``Session.progress`` follow incoming
    samples ("forwardlr" of the paper).

    beta: selectivity; 1, 2, 3 train on 1/2, 1/3, 1/4 of the samples (the authors' script: 3).
    history: R, how many losses the percentile is taken over (from the authors' code).
    sampling_min: least probability (the authors' code: 0).
    prime_epochs: epochs at the start that train on everything, their losses filling the history (the paper's:
        1).
    stale_epochs: n; a sample is scored again when its loss is n epochs old, and its last loss is used before
        (StaleSB). 1 scores every sample every epoch. More than 1 needs ``index`` in every ``Session.step``.
    score_scale: scoring sees images resized by this factor (our choice, as Composer does; 1.0 is the
        paper's).
    reweight: weigh selected samples by 1/P, so that the gradient's expectation is that of plain training (our
        choice, off in the paper). Needs sampling_min > 0, which bounds the weights.
    """

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="selective_backprop",
        title="Selective-Backprop",
        paper="Jiang et al., Accelerating Deep Learning by Focusing on the Biggest Losers, arXiv 1910.00762",
        saves="samples",
        acts="trains on a sample with a probability that grows with the rank of its loss",
        writes=frozenset({"samples", "loss.weights"}),
        reads=frozenset({"inputs", "layout", "precision"}),
        excludes=frozenset({"batch"}),
        excludes_reason="the weight gradient would be sampled over samples that are already a selection.",
        requires=frozenset({"per_example_loss"}),
        state=("losses_", "queue_", "largest_", "stale_", "counts_"),
        promises=frozenset({"autocast", "channels_last", "compile"}),
        slower_when="the scoring pass costs more than the skipped updates save (beta below about 0.5), or "
        "the run is so short that the samples left out are still needed.",
    )

    beta: float = 3.0
    history: int = 1024
    sampling_min: float = 0.0
    prime_epochs: int = 1
    stale_epochs: int = 1
    score_scale: float = 1.0
    reweight: bool = False

    @property
    def writes(self) -> frozenset[str]:
        """The weights of samples are decided only with ``reweight``."""
        return self.spec.writes if self.reweight else frozenset({"samples"})

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        found = bad_scale("score_scale", self.score_scale)
        if not self.beta >= 0:
            found.append(f"beta must be 0 (select everything) or more, not {self.beta}.")
        if self.history < 1:
            found.append(f"history must be at least 1, not {self.history}.")
        if not 0 <= self.sampling_min <= 1:
            found.append(f"sampling_min must lie in [0, 1], not {self.sampling_min}.")
        if self.prime_epochs < 0:
            found.append(f"prime_epochs must be 0 or more, not {self.prime_epochs}.")
        if self.stale_epochs < 1:
            found.append(f"stale_epochs must be at least 1 (score every epoch), not {self.stale_epochs}.")
        if self.reweight and self.sampling_min <= 0:
            found.append(
                "reweight needs sampling_min above 0, for example 0.05: weights are 1/P, and P can be 0."
            )
        return found

    def attach(self, session: Session) -> Effect:
        """Create the history, the queue and the table of stale losses."""
        refuse_ranks(session, self.spec.name)
        check_scale(session, "score_scale", self.score_scale)
        self._session = session
        self.losses_ = torch.zeros(0)
        self.queue_: Batch | None = None
        self.largest_ = 0
        self.stale_ = {"losses": torch.zeros(0), "epochs": torch.zeros(0, dtype=torch.int32)}
        self.counts_ = {"scored": 0, "kept": 0, "dropped": 0}
        rho = max(1.0 / (self.beta + 1.0), self.sampling_min)
        return Effect(
            touched={
                "batch": f"trains on about {rho:.0%} of the samples after {self.prime_epochs} epoch(s) on all"
            },
            saves="forward and backward of the samples left out, for a scoring pass",
            work=(self.score_scale**2 / self.stale_epochs + 3.0 * rho) / 3.0,
        )

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Score ``batch`` and queue what is selected. Return a full batch once queued, else an empty one."""
        self.largest_ = max(self.largest_, len(batch))
        if self._priming:
            return batch
        losses = self._losses(batch)
        self._remember(losses)
        p = probabilities(losses, self.losses_, self.beta, self.sampling_min)
        rows = self._draw(p)
        self.counts_["kept"] += len(rows)
        self.counts_["dropped"] += len(batch) - len(rows)
        chosen = batch if len(rows) == len(batch) else batch.take(rows.to(batch.inputs.device))
        if self.reweight:
            # the mean of P keeps the weights' mean at 1, and so the size of the step
            chosen.weights = (p.mean() / p[rows]).to(batch.inputs.device)
        return self._queued(chosen, losses.mean().to(batch.inputs.device))

    def flush(self) -> Batch | None:
        """Return what is queued at the end of an epoch; a single sample waits on: batch norm needs two."""
        rest = self.queue_
        if rest is None or len(rest) < 2:
            return None
        self.queue_ = None
        return rest

    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Fill the history from the training losses of the priming epochs, which need no scoring pass."""
        if not self._priming:
            return
        if losses is None:
            losses = per_example(self._session.loss, outputs, batch.targets)
        losses = losses.float().cpu()
        self._remember(losses)
        if self.stale_epochs > 1:
            index = self._index(batch)
            self._store(index, losses)

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return samples scored by a forward pass, kept and dropped, all after priming."""
        return {name: float(count) for name, count in self.counts_.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the history, the queue (images, so that the view scored is trained), the stale losses."""
        return {
            "losses_": self.losses_,
            "queue_": _packed(self.queue_),
            "largest_": self.largest_,
            "stale_": dict(self.stale_),
            "counts_": dict(self.counts_),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.losses_ = state["losses_"].clone()
        self.queue_ = _unpacked(state["queue_"])
        self.largest_ = int(state["largest_"])
        self.stale_ = {name: values.clone() for name, values in state["stale_"].items()}
        self.counts_ = {name: int(count) for name, count in state["counts_"].items()}

    # -- parts
    @property
    def _priming(self) -> bool:
        return self._session.counters["epoch"] < self.prime_epochs

    def _remember(self, losses: Tensor) -> None:
        self.losses_ = torch.cat([self.losses_, losses])[-self.history :]

    def _draw(self, p: Tensor) -> Tensor:
        random = keyed.generator(self._session.seed, self.spec.name, self._session.counters["step"])
        # "not >=" also selects a sample whose loss is NaN: training on it stops the run, dropping it hides it
        return (~(torch.rand(len(p), generator=random) >= p)).nonzero().flatten()

    def _losses(self, batch: Batch) -> Tensor:
        if self.stale_epochs == 1:
            return self._scored(batch)
        index = self._index(batch)
        self._grow(index)
        epoch = self._session.counters["epoch"]
        old = (epoch - self.stale_["epochs"][index] >= self.stale_epochs).nonzero().flatten()
        if len(old) == len(batch):
            self._store(index, self._scored(batch))
        elif len(old):
            self._store(index[old], self._scored(batch.take(old.to(batch.inputs.device))))
        return self.stale_["losses"][index]

    def _scored(self, batch: Batch) -> Tensor:
        self.counts_["scored"] += len(batch)
        outputs = scored(self._session, batch.inputs, self.score_scale)
        return per_example(self._session.loss, outputs, batch.targets).cpu()

    def _index(self, batch: Batch) -> Tensor:
        if batch.index is None:
            raise UnsupportedError(
                f"selective_backprop: stale_epochs={self.stale_epochs} remembers the loss of each sample, so "
                f"every step needs the samples' numbers: call session.step(inputs, targets, index), or use "
                f"stale_epochs=1."
            )
        return batch.index.cpu()

    def _grow(self, index: Tensor) -> None:
        missing = int(index.max()) + 1 - len(self.stale_["losses"])
        if missing > 0:
            more = max(missing, len(self.stale_["losses"]))
            self.stale_["losses"] = torch.cat([self.stale_["losses"], torch.zeros(more)])
            unknown = torch.full((more,), _NEVER, dtype=torch.int32)
            self.stale_["epochs"] = torch.cat([self.stale_["epochs"], unknown])

    def _store(self, index: Tensor, losses: Tensor) -> None:
        self._grow(index)
        self.stale_["losses"][index] = losses
        self.stale_["epochs"][index] = self._session.counters["epoch"]

    def _queued(self, chosen: Batch, loss: Tensor) -> Batch:
        if self.queue_ is None and len(chosen) == self.largest_:
            return chosen
        # one joined batch rather than a list, so that a resumed run joins the same tensors in the same way
        waiting = _joined(self.queue_, chosen)
        full = len(waiting) >= self.largest_
        end = self.largest_ if full else 0
        out, rest = _slice(waiting, 0, end), _slice(waiting, end, len(waiting))
        self.queue_ = rest if len(rest) else None
        out.loss = loss
        return out


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[start:stop]

    inputs, targets = batch.inputs[start:stop], batch.targets[start:stop]
    return Batch(inputs, targets, cut(batch.index), cut(batch.weights))


def _joined(first: Batch | None, second: Batch) -> Batch:
    if first is None:
        return second

    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return Batch(
        torch.cat([first.inputs, second.inputs]),
        torch.cat([first.targets, second.targets]),
        both(first.index, second.index),
        both(first.weights, second.weights),
    )


def _packed(queue: Batch | None) -> dict[str, Any]:
    if queue is None:
        return {}
    parts = {name: getattr(queue, name) for name in ("inputs", "targets", "index", "weights")}
    return {name: part.clone() for name, part in parts.items() if part is not None}


def _unpacked(saved: dict[str, Any]) -> Batch | None:
    return Batch(**{name: part.clone() for name, part in saved.items()}) if saved else None
