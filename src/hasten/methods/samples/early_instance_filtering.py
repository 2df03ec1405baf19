"""Early instance filtering: a small network predicts which samples have a low loss, and these are dropped."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten import keyed
from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import NonFiniteError, UnsupportedError
from hasten.loss import without_smoothing
from hasten.methods.samples.filters import FILTERS, HIGH, LOW, build_filter, filter_for
from hasten.methods.samples.scoring import bad_scale, per_example, refuse_ranks, scored, shrink
from hasten.optim.named import load_named_state, named_state
from hasten.session import Session


def label_weights(high: Tensor, high_ratio: float) -> Tensor:
    """Return the weights in the filter's loss: w_H = 1/R_set and w_L = 1/(1 - R_set), scaled to sum to 1.

    high (K,) says which samples are labelled high.
    """
    weights = torch.where(high, 1.0 / high_ratio, 1.0 / (1.0 - high_ratio))
    return weights / weights.sum()


def uncertain(logits: Tensor, taken: Tensor, entropy: float, round_to: int) -> Tensor:
    """Return the rows not ``taken`` whose prediction has entropy -sum p ln p above ``entropy``.

    Their count is filled up to a multiple of ``round_to`` with the next least certain, as far as there are rows.
    """
    log_p = F.log_softmax(logits, dim=1)
    doubt = -(log_p.exp() * log_p).sum(dim=1)
    doubt[taken] = -1.0
    count = int((doubt > entropy).sum())
    count = min(len(doubt) - len(taken), -(-count // round_to) * round_to)
    return doubt.topk(count).indices.sort().values


def preserved(logits: Tensor, least: int, most: int, round_to: int) -> Tensor:
    """Return the rows to train on, ascending: those predicted high, between ``least`` and ``most`` of them.

    Where the prediction gives fewer or more, the most likely ones are taken. The count is filled up to a multiple of
    ``round_to`` as far as there are rows.
    """
    margin = logits[:, HIGH] - logits[:, LOW]
    wanted = min(max(int((margin > 0).sum()), least), max(most, least))
    wanted = min(len(margin), -(-wanted // round_to) * round_to)
    return margin.topk(wanted).indices.sort().values


@dataclass(kw_only=True, eq=False)
class EarlyInstanceFiltering(Method):
    """Drop the samples that a small filter network expects to have a low loss (Wu et al. 2020, section IV).

    The filter f sees every incoming image before the model does. Samples it predicts high are preserved and
    trained on. Samples it predicts low but is unsure of only pass forward, to label the filter. Each known
    loss is labelled high if it is at least T_l; the filter takes one SGD step on these labels; and T_l moves
    so that true highs, samples preserved and labelled high, are R_set of the stream. The count preserved is
    larger than R_set by the false highs.

    Cost for each incoming sample: the filter's three passes on a smaller image, the model's three passes on
    the preserved samples, its forward pass on the unsure ones.

    high_ratio: R_set, the wanted share of true highs, in (0, 1) (from the paper: 0.1 to 0.5).
    raise_by, lower_by: alpha1 > 1 and alpha2 < 1, factors of T_l; None is 1 / alpha1 (our choice; not in the
        paper). A batch moves T_l by half a percent, so hundreds of batches pass until it settles; short runs
        want more.
    window: n, batches over which the share of true highs is taken (our choice: 10, updated every batch).
    entropy: entropyT, in nats; 0.693 = ln 2 is the greatest there is (our choice: 0.6).
    first_threshold: T_l at the start; None is ln(number of classes), an untrained model's loss (our choice).
    warmup: batches at the start that are all trained on, so that filter and T_l start calibrated, and at most
        a tenth of the run where ``total_samples`` is known (our choice: 200).
    use_uncertain: whether unsure samples are labelled. Without them the filter never sees what it wrongly
        dropped.
    min_share: share of the stream trained on at least, the next most likely ones added; None is R_set, for that many
        true highs are wanted (our choice). A filter that cannot tell samples apart yet calls now all and now none of
        them high; without this bound the model then takes full steps on a handful of samples.
    max_share: share of the stream trained on at most, the most likely ones kept (our choice: 1.0, no bound).
    min_keep: samples trained on at least (our choice: 8; with min_share=0, 0 lets a step be skipped). Batch norm needs
        some, and they bring a filter back that calls everything low with certainty.
    round_to: the counts preserved and unsure are filled up to a multiple of this with the next most likely
        (our choice: 1; torch.compile needs 16 or more, or it compiles for every count).
    upper_quantile: losses above this quantile of a batch's known ones teach the filter nothing and count as no
        true highs, against wrong labels; None is off (our choice).
    filter: "auto" for the paper's network by image kind, or one of "lenet", "resnet8", "resnet10".
    scale: the filter sees images resized by this factor (our choice: 0.5; 1.0 is the paper's).
    train_every: the filter trains, and unsure samples are labelled, every so many batches (the paper: 1).
    filter_lr, filter_momentum, filter_weight_decay: of the filter's SGD (from the paper; held constant, our
        choice).
    """

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="early_instance_filtering",
        title="Early instance filtering",
        paper="Wu, Wang, Shi, Hu, Enabling On-Device CNN Training by Self-Supervised Instance Filtering and "
        "Error Map Pruning, TCAD 2020, arXiv 2007.03213",
        saves="samples",
        acts="drops samples that a small network predicts to have a low loss",
        writes=frozenset({"samples"}),
        reads=frozenset({"inputs", "layout", "precision"}),
        excludes=frozenset({"batch"}),
        excludes_reason="the weight gradient would be sampled over samples that are already a selection.",
        requires=frozenset({"per_example_loss"}),
        state=("filter_", "optimizer_", "threshold_", "recent_", "batches_", "counts_"),
        promises=frozenset({"autocast", "channels_last", "compile"}),
        slower_when="the model is hardly larger than the filter, noisy labels keep most losses high, or the run is "
        "short: a filter that cannot predict losses yet keeps most samples, and the rest is missed.",
    )

    high_ratio: float = 0.3
    raise_by: float = 1.005
    lower_by: float | None = None
    window: int = 10
    entropy: float = 0.6
    first_threshold: float | None = None
    warmup: int = 200
    use_uncertain: bool = True
    min_share: float | None = None
    max_share: float = 1.0
    min_keep: int = 8
    round_to: int = 1
    upper_quantile: float | None = None
    filter: str = "auto"
    scale: float = 0.5
    train_every: int = 1
    filter_lr: float = 0.1
    filter_momentum: float = 0.9
    filter_weight_decay: float = 1e-4

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        found = bad_scale("scale", self.scale)
        if not 0 < self.high_ratio < 1:
            found.append(f"high_ratio must lie between 0 and 1, both excluded, not {self.high_ratio}.")
        if not (self.raise_by > 1 and math.isfinite(self.raise_by)):
            found.append(f"raise_by must be above 1, not {self.raise_by}.")
        if self.lower_by is not None and not 0 < self.lower_by < 1:
            found.append(
                f"lower_by must lie between 0 and 1, or be None for 1/raise_by, not {self.lower_by}."
            )
        if not 0 <= self.entropy <= math.log(2):
            found.append(f"entropy must lie in [0, ln 2 = 0.693], not {self.entropy}.")
        if self.first_threshold is not None and not self.first_threshold > 0:
            found.append(
                f"first_threshold must be above 0, or None for ln(classes), not {self.first_threshold}."
            )
        if self.min_share is not None and not 0 <= self.min_share <= 1:
            found.append(f"min_share must lie in [0, 1], or be None for high_ratio, not {self.min_share}.")
        if not 0 < self.max_share <= 1:
            found.append(f"max_share must lie in (0, 1], not {self.max_share}.")
        elif self.min_share is not None and self.min_share > self.max_share:
            found.append(f"min_share ({self.min_share}) must not be above max_share ({self.max_share}).")
        if self.upper_quantile is not None and not 0 < self.upper_quantile < 1:
            found.append(f"upper_quantile must lie between 0 and 1, or be None, not {self.upper_quantile}.")
        if self.filter not in ("auto", *FILTERS):
            found.append(
                f"filter must be one of 'auto', {', '.join(map(repr, FILTERS))}, not {self.filter!r}."
            )
        for name, least in (
            ("window", 1),
            ("warmup", 0),
            ("min_keep", 0),
            ("round_to", 1),
            ("train_every", 1),
        ):
            if getattr(self, name) < least:
                found.append(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if not self.filter_lr > 0:
            found.append(f"filter_lr must be above 0, not {self.filter_lr}.")
        if not 0 <= self.filter_momentum < 1:
            found.append(f"filter_momentum must lie in [0, 1), not {self.filter_momentum}.")
        if not self.filter_weight_decay >= 0:
            found.append(f"filter_weight_decay must be 0 or more, not {self.filter_weight_decay}.")
        return found

    def attach(self, session: Session) -> Effect:
        """Build the filter network and its optimizer."""
        name = self.spec.name
        refuse_ranks(session, name)
        images = session.sample[0]
        if images.dim() != 4:
            raise UnsupportedError(
                f"{name} needs images (N, C, H, W), not inputs of shape {tuple(images.shape)}."
            )
        kind = filter_for(images.shape[1], max(images.shape[2:])) if self.filter == "auto" else self.filter
        small = shrink(images[:1].float(), self.scale)
        _, channels, height, width = small.shape
        net = build_filter(kind, channels, height, width, keyed.key64(session.seed, name, "filter"))
        device = next(session.model.parameters()).device
        self.filter_ = net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer_ = torch.optim.SGD(
            self.filter_.parameters(),
            self.filter_lr,
            self.filter_momentum,
            weight_decay=self.filter_weight_decay,
        )
        self._session = session
        self._loss = without_smoothing(session.loss)
        self._pending: _Pending | None = None
        self.threshold_ = self.first_threshold or 0.0  # 0 until the number of classes is seen
        self.recent_: deque[tuple[int, int]] = deque(
            maxlen=self.window
        )  # (true highs, samples) of each batch
        self.batches_ = 0
        self.counts_ = {
            "judged": 0,
            "kept": 0,
            "dropped": 0,
            "uncertain": 0,
            "true_high": 0,
            "filter_steps": 0,
        }
        size = "x".join(str(side) for side in small.shape[2:])
        weights = sum(p.numel() for p in self.filter_.parameters())
        return Effect(
            touched={
                "batch": f"{kind} filter ({weights:,} weights, {size} images) aims at {self.high_ratio:.0%}"
            },
            saves="forward and backward of the samples predicted low, for the filter's own passes",
        )

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Return the samples predicted high; label the unsure ones by a forward pass of the model."""
        trains = self.batches_ % self.train_every == 0
        warming = self._warming
        self.batches_ += 1
        logits = self._judge(batch.inputs, trains)
        seen = logits.detach()
        everything = torch.arange(len(batch), device=seen.device)
        rows = everything if warming else preserved(seen, *self._bounds(len(batch)), self.round_to)
        pending = _Pending(logits, rows, len(batch), trains)
        if not warming:
            self.counts_["judged"] += len(batch)
            self.counts_["kept"] += len(rows)
            self.counts_["dropped"] += len(batch) - len(rows)
            if trains and self.use_uncertain and len(rows) < len(batch):
                self._look_at_unsure(batch, seen, pending)
        if len(rows):
            self._pending = pending
            return batch if len(rows) == len(batch) else batch.take(rows)
        nothing = batch.take(rows)
        nothing.loss = pending.losses.mean() if len(pending.losses) else seen.new_zeros(())
        self._learn(pending, seen.new_zeros(0))
        return nothing

    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Label the preserved samples by their losses, move T_l, and train the filter."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if self.threshold_ == 0.0:
            self.threshold_ = math.log(max(2, outputs.shape[1]))
        self._learn(pending, per_example(self._loss, outputs, batch.targets))

    def witness(self) -> dict[str, float]:
        """Return samples judged after the warm-up, kept, dropped, unsure and truly high, and T_l."""
        if not self.counts_["judged"]:
            return dict.fromkeys((*self.counts_, "threshold"), 0.0)
        return {**{name: float(count) for name, count in self.counts_.items()}, "threshold": self.threshold_}

    # -- state
    def state_dict(self) -> dict[str, Any]:
        """Return the filter, its optimizer, T_l, the window of true highs and the counters."""
        return {
            "filter_": dict(self.filter_.state_dict()),
            "optimizer_": named_state(self.optimizer_, self.filter_),
            "threshold_": self.threshold_,
            "recent_": [list(pair) for pair in self.recent_],
            "batches_": self.batches_,
            "counts_": dict(self.counts_),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.filter_.load_state_dict(state["filter_"])
        load_named_state(self.optimizer_, self.filter_, state["optimizer_"])
        self.threshold_ = float(state["threshold_"])
        self.recent_ = deque(((int(high), int(of)) for high, of in state["recent_"]), maxlen=self.window)
        self.batches_ = int(state["batches_"])
        self.counts_ = {name: int(count) for name, count in state["counts_"].items()}
        self._pending = None

    # -- parts
    @property
    def _warming(self) -> bool:
        if self.batches_ >= self.warmup:
            return False
        return self._session.total_samples is None or self._session.progress <= 0.1

    def _bounds(self, streamed: int) -> tuple[int, int]:
        """Return how many of a batch are trained on at least and at most."""
        share = min(self.high_ratio, self.max_share) if self.min_share is None else self.min_share
        return max(self.min_keep, math.ceil(share * streamed)), math.floor(self.max_share * streamed)

    def _judge(self, images: Tensor, trains: bool) -> Tensor:
        """Return the filter's logits (N, 2) in float32, with their graph where it trains on this batch."""
        device = images.device.type
        with torch.set_grad_enabled(trains), self._session._inside():
            half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
            # its gradients are not scaled, so float16 would lose them
            with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not half):
                logits: Tensor = self.filter_(shrink(images.float(), self.scale)).float()
        return logits

    def _look_at_unsure(self, batch: Batch, logits: Tensor, pending: _Pending) -> None:
        rows = uncertain(logits, pending.rows, self.entropy, self.round_to)
        if len(rows):
            looked = batch.take(rows)
            pending.unsure = rows
            pending.losses = per_example(self._loss, scored(self._session, looked.inputs), looked.targets)
            self.counts_["uncertain"] += len(rows)

    def _learn(self, pending: _Pending, kept: Tensor) -> None:
        """Label all known losses, move T_l by the true highs among the preserved, and step the filter."""
        if self.threshold_ == 0.0:
            return
        losses = torch.cat([kept, pending.losses])
        if len(losses):
            high = losses >= self.threshold_
            rows = torch.cat([pending.rows, pending.unsure])
            true_high = int(high[: len(kept)].sum())
            if self.upper_quantile is not None:
                believed = losses <= losses.quantile(self.upper_quantile)
                true_high = int((high & believed)[: len(kept)].sum())
                high, rows = high[believed], rows[believed]
            if pending.trains:
                self._step_filter(pending.logits[rows], high)
        else:
            true_high = 0
        self.counts_["true_high"] += true_high
        self._control(true_high, pending.streamed)

    def _control(self, true_high: int, streamed: int) -> None:
        """Move T_l: up if true highs are at least R_set of the last n batches, else down."""
        self.recent_.append((true_high, streamed))
        share = sum(high for high, _ in self.recent_) / sum(of for _, of in self.recent_)
        lower = 1.0 / self.raise_by if self.lower_by is None else self.lower_by
        self.threshold_ *= self.raise_by if share >= self.high_ratio else lower

    def _step_filter(self, logits: Tensor, high: Tensor) -> None:
        each = F.cross_entropy(logits, high.long(), reduction="none")
        loss = (label_weights(high, self.high_ratio) * each).sum()
        if not math.isfinite(loss.item()):
            raise NonFiniteError(
                f"early_instance_filtering: the filter's loss became NaN or infinite at step "
                f"{self._session.counters['step']} (0-based); lower filter_lr (now {self.filter_lr}) or "
                f"check the images."
            )
        self.optimizer_.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer_.step()
        self.counts_["filter_steps"] += 1


class _Pending:
    """What ``select`` leaves for ``observe``: logits, the rows preserved, those unsure, and their losses."""

    def __init__(self, logits: Tensor, rows: Tensor, streamed: int, trains: bool) -> None:
        self.logits, self.rows, self.streamed, self.trains = logits, rows, streamed, trains
        self.unsure = rows.new_zeros(0)
        self.losses = logits.new_zeros(0, dtype=torch.float32)
