"""Importance sampling by gradient norm: train on the samples that move the model most, without bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hasten import keyed
from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.methods.samples.scoring import bad_scale, check_scale, logit_gradient_norms, scored
from hasten.session import Session


def variance_gain(scores: Tensor) -> float:
    """Return tau = sqrt(n * sum g_i^2) with g = scores / sum(scores): what drawing by score gains.

    It is how many times larger a uniform batch would have to be: 1 for equal scores, sqrt(n) for a single
    non-zero one. The paper writes 1 / sqrt(1 - sum (g_i - 1/n)^2 / sum g_i^2), the same number (section 3.3,
    eq. 26). Scores that are all zero count as equal; scores that are not finite give NaN.
    """
    total = float(scores.sum())
    if not total > 0:
        return 1.0 if total == 0 else math.nan
    return math.sqrt(len(scores) * float((scores / total).square().sum()))


def drawn(scores: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``count`` rows drawn with replacement with p_i = s_i / sum(s), and their weights 1 / (B p_i).

    scores (B,) >= 0 with a positive sum. The mean of weight * loss over the drawn rows has the mean loss over
    all B rows as its expectation, and so have the gradients.
    """
    rows = torch.multinomial(scores, count, replacement=True, generator=random)
    return rows, scores.sum() / (len(scores) * scores[rows])


@dataclass(kw_only=True, eq=False)
class ImportanceSampling(Method):
    """Score the incoming batch, train on a third of it drawn by gradient norm (Katharopoulos, Fleuret 2018).

    The batch that ``Session.step`` receives is the paper's pre-sample of B. While the gain tau is at most
    ``tau_th`` the update is uniform; above it, B samples are scored without a graph by the norm of the loss's
    gradient at the logits, and b = B / presample are drawn with replacement and weighted by 1 / (B p_i): the
    gradient stays unbiased.

    Cost for each incoming sample (forward 1, backward 2): plain 3; importance step 1 + 3 / presample, so 2.0
    for presample 3; a uniform step 3 with uniform="all", 3 / presample with uniform="part".

    presample: B / b (the authors' code: 3).
    tau_th: gain from which importance steps pay; None is (B + 3b) / (3b) = (presample + 3) / 3, where a
        step's cost B + 3b equals that of a uniform batch of tau * b (from the paper). 1e9 never takes an
        importance step.
    momentum: of the moving average of tau, which starts at 0 (the authors' code: 0.9).
    uniform: what a uniform step trains on: "all" B samples, so that the early phase is plain training and no
        data is passed over (our choice), or a random "part" of b as in the paper, whose stream is longer than
        its epochs.
    score_scale: scoring sees images resized by this factor (our choice; 1.0 is the paper's).
    """

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="importance_sampling",
        title="Importance sampling by gradient norm",
        paper="Katharopoulos, Fleuret, Not All Samples Are Created Equal, ICML 2018, arXiv 1803.00942",
        saves="samples",
        acts="trains on the samples with large gradients, weighted so that the gradient stays unbiased",
        writes=frozenset({"samples", "loss.weights"}),
        reads=frozenset({"inputs", "layout", "precision"}),
        excludes=frozenset({"batch"}),
        excludes_reason="the weight gradient would be sampled over samples that are already a sample.",
        requires=frozenset({"per_example_loss"}),
        state=("tau_", "uniform_steps_", "importance_steps_"),
        slower_when="gradient norms stay alike (early training, strong augmentation): tau then never passes "
        "tau_th, and every step is a uniform one.",
    )

    presample: float = 3.0
    tau_th: float | None = None
    momentum: float = 0.9
    uniform: Literal["all", "part"] = "all"
    score_scale: float = 1.0

    def problems(self) -> list[str]:
        """Return the settings that are out of range."""
        found = bad_scale("score_scale", self.score_scale)
        if not (self.presample > 1 and math.isfinite(self.presample)):
            found.append(f"presample must be above 1 (B larger than b), not {self.presample}.")
        if self.tau_th is not None and not (self.tau_th > 0 and math.isfinite(self.tau_th)):
            found.append(f"tau_th must be above 0, or None for (presample + 3) / 3, not {self.tau_th}.")
        if not 0 <= self.momentum < 1:
            found.append(f"momentum must lie in [0, 1), not {self.momentum}.")
        if self.uniform not in ("all", "part"):
            found.append(f'uniform must be "all" or "part", not {self.uniform!r}.')
        return found

    @property
    def threshold(self) -> float:
        """The gain tau from which importance steps are taken."""
        return (self.presample + 3.0) / 3.0 if self.tau_th is None else self.tau_th

    def attach(self, session: Session) -> Effect:
        """Start with tau = 0, so with uniform steps."""
        check_scale(session, "score_scale", self.score_scale)
        self._session = session
        self._uniform = True
        self.tau_ = 0.0
        self.uniform_steps_ = 0
        self.importance_steps_ = 0
        b = int(len(session.sample[0]) / self.presample)
        return Effect(
            touched={
                "batch": f"trains on {b} of {len(session.sample[0])} samples once tau, the gain in variance, "
                f"passes {self.threshold:.3g}"
            },
            saves="backward (and forward with a graph) of the samples not drawn, for a scoring pass",
        )

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Return the samples to train on, drawn by their scores once that pays."""
        # a batch norm layer may be unable to train on one sample
        b = int(len(batch) / self.presample)
        self._uniform = self.tau_ <= self.threshold or b < 2
        if self._uniform:
            return self._uniform_part(batch, b)
        outputs = scored(self._session, batch.inputs, self.score_scale)
        scores = logit_gradient_norms(self._session.loss, outputs, batch.targets).cpu()
        self._update_tau(scores)
        total = float(scores.sum())
        if not (0.0 < total < math.inf):
            return self._uniform_part(batch, b)
        self.importance_steps_ += 1
        rows, weights = drawn(scores, b, self._generator())
        chosen = batch.take(rows.to(batch.inputs.device))
        chosen.weights = weights.to(batch.inputs.device)
        return chosen

    def observe(self, batch: Batch, outputs: Tensor, losses: Tensor | None) -> None:
        """Update tau from the scores of a uniform step, which come free with its outputs."""
        if self._uniform:
            self._update_tau(logit_gradient_norms(self._session.loss, outputs, batch.targets))

    def witness(self) -> dict[str, float]:
        """Return the gain tau (a moving average) and how many steps of each kind were taken."""
        return {
            "tau": self.tau_,
            "importance_steps": float(self.importance_steps_),
            "uniform_steps": float(self.uniform_steps_),
        }

    # -- parts
    def _uniform_part(self, batch: Batch, b: int) -> Batch:
        self.uniform_steps_ += 1
        if self.uniform == "all" or b < 2:
            return batch
        rows = torch.randperm(len(batch), generator=self._generator())[:b]
        return batch.take(rows.to(batch.inputs.device))

    def _generator(self) -> torch.Generator:
        return keyed.generator(self._session.seed, self.spec.name, self._session.counters["step"])

    def _update_tau(self, scores: Tensor) -> None:
        gain = variance_gain(scores)
        if self._session.wrapper is not self._session.model:
            # ranks must agree on which kind of step comes next
            shared = torch.tensor(gain, device=scores.device)
            dist.all_reduce(shared)
            gain = float(shared) / dist.get_world_size()
        if math.isfinite(gain):
            self.tau_ = self.momentum * self.tau_ + (1.0 - self.momentum) * gain
