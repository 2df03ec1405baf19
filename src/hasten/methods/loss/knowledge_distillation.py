"""Knowledge distillation: a teacher's softened class probabilities are targets beside the labels (Hinton et al. 2015).

An aid and no saving of its own: every step costs a forward pass of the teacher more. It pays where it shortens the
recovery after the network was cut, or lets a cheap network take the place of a dear one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import CheckpointError, SettingsError, UnsupportedError, unknown
from hasten.loss import weighted_mean
from hasten.measure.macs import macs
from hasten.methods.loss.teachers import (
    HANDED_OVER,
    LogitCache,
    digest,
    fitting,
    frozen,
    load_teacher,
    noted,
    outputs_of,
    refuse_task,
)
from hasten.surgery import Change, Surgeon

if TYPE_CHECKING:
    from hasten.session import Session

Labels = Literal["one", "many"]


# -- the mathematics
def soft_losses(outputs: Tensor, teacher: Tensor, temperature: float, labels: Labels = "one") -> Tensor:
    """Return T^2 * KL(teacher || student) of each sample, (N,), at temperature T, in float32 at least.

    outputs z_s and teacher z_t: logits (N, K). labels "one": p = softmax(z_t / T), q = softmax(z_s / T), summed over
    classes, so that the mean over the batch is PyTorch's ``batchmean``. "many": the divergence of each class's
    sigmoid, averaged over classes as PyTorch's binary cross-entropy is (our choice). T^2 keeps the size of the
    gradient, T * (q - p) / N of the mean: for large T it tends to (z_s - z_t) / (K N), logits centred.
    """
    s, t = _wide(outputs) / temperature, _wide(teacher) / temperature
    if labels == "one":
        kl = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)
    else:
        yes = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
        no = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
        kl = (yes + no).mean(1)
    return temperature**2 * kl


def feature_distance(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return ||f_s - f_t||^2 / ||f_t||^2 over a batch of outputs (N, ...) of one layer; weights (N,) weigh samples."""
    each = (_wide(student) - _wide(teacher)).square().flatten(1).sum(1)
    if weights is not None:
        each = weights * each
    return each.sum() / _wide(teacher).square().sum().clamp_min(1e-12)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- the method
@dataclass(kw_only=True, eq=False)
class KnowledgeDistillation(Method):
    """Train on L = a * L_soft + (1 - a) * the loss of the labels; L_soft = T^2 * KL(teacher || student) at T.

    The teacher sees the very images the network trains on, in eval mode and without gradients. Terms that other
    methods add to the loss are added to L and not scaled.

    soft_weight (a): weight of the soft loss, in [0, 1]; 0 is plain training, and no teacher runs. (our choice: 0.9,
        for small images; 0.5 for large ones or a network close to its teacher, such as a pruned copy. The paper
        found a small weight of the labels best.)
    temperature (T): softens both distributions (our choice: 4 beside a = 0.9, 1 to 2 beside 0.5; the paper: 1 to 20).
    teacher: "" is a frozen copy of the network itself, as other methods have set it up but before they change its
        structure in training: the teacher for the recovery after pruning. Or the folder of a run of hasten, or a
        .safetensors file with weights for a network of this very form. A module is handed over by `with_teacher`,
        which writes its digest here.
    at: share of the run at which teaching starts and, for teacher "", the copy is taken, so that a network that
        begins untrained can teach itself later (our choice: 0). Above 0 the run's length must be known.
    labels: "one" for one label an image (softmax), "many" for several (the sigmoid of each class; our choice).
    features: names of layers, the same in both networks, whose outputs are pulled towards the teacher's; those of
        another shape are left out. Block outputs usually agree, widths inside blocks do not (our choice: none).
    feature_weight (b): weight of the mean over these layers of ||f_s - f_t||^2 / ||f_t||^2 (our choice: 0).
    cache: "float16" or "float32" keeps the teacher's logits of each sample after the first pass and runs it no more;
        needs ``index`` in every ``Session.step`` and images that are the same in every epoch, which is checked.
        They are part of every checkpoint: samples * classes numbers (our choice: "", off).

    The copy of teacher "" is part of every checkpoint, other teachers only by their digest: a run that is continued
    with another teacher is refused. A teacher trained with label smoothing teaches less.
    """

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="knowledge_distillation",
        title="Knowledge distillation",
        paper="Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531",
        saves="iterations",
        acts="mixes into the loss how far the network's softened outputs are from a teacher's",
        writes=frozenset({"loss.blend"}),
        reads=frozenset({"inputs", "layout", "precision"}),
        state=("teaching_", "identity_", "structure_", "weights_", "cache_", "counts_", "last_"),
        slower_when="it removes fewer epochs than the teacher's forward passes cost: about a quarter of them where the "
        "teacher is as large as the network, and more the smaller the network is.",
    )

    soft_weight: float = 0.9
    temperature: float = 4.0
    teacher: str = ""
    at: float = 0.0
    labels: Labels = "one"
    features: tuple[str, ...] = ()
    feature_weight: float = 0.0
    cache: Literal["", "float16", "float32"] = ""

    def __post_init__(self) -> None:
        self._given: nn.Module | None = None
        super().__post_init__()

    @classmethod
    def with_teacher(cls, teacher: nn.Module, **settings: Any) -> KnowledgeDistillation:
        """Return the method with ``teacher``, in eval mode and on the network's device, and these settings.

        The module is used as it is, without a copy, and never changed. Settings cannot hold it, so the setting
        ``teacher`` becomes its digest: two teachers differ in ``repr``, in a run's identity and in a comparison, and
        a checkpoint is continued only with the same weights. Raises SettingsError for anything but a module.
        """
        if not isinstance(teacher, nn.Module):
            raise SettingsError(
                f"{cls.spec.name}: with_teacher takes a module, not {type(teacher).__name__}."
            )
        method = cls(teacher=digest(teacher), **settings)
        method._given = teacher
        return method

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        if not 0 <= self.soft_weight <= 1:
            found.append(f"soft_weight is {self.soft_weight}; allowed: 0 to 1.")
        if not 0 < self.temperature < math.inf:
            found.append(f"temperature is {self.temperature}; allowed: above 0.")
        if not isinstance(self.teacher, str):
            found.append(
                f"teacher is a {type(self.teacher).__name__}; allowed: '' or a path; hand a module over by "
                f"KnowledgeDistillation.with_teacher(module)."
            )
        if not 0 <= self.at < 1:
            found.append(f"at is {self.at}; allowed: from 0 to below 1.")
        if self.labels not in ("one", "many"):
            found.append(f"labels is {self.labels!r}; allowed: 'one', 'many'.")
        if not (isinstance(self.features, tuple) and all(isinstance(name, str) for name in self.features)):
            found.append(f"features is {self.features!r}; allowed: a tuple of names of layers.")
        if not 0 <= self.feature_weight < math.inf:
            found.append(f"feature_weight is {self.feature_weight}; allowed: from 0.")
        elif (self.feature_weight > 0) != bool(self.features):
            found.append(
                f"features is {self.features!r}, feature_weight {self.feature_weight}; give both or none."
            )
        if self.cache not in ("", "float16", "float32"):
            found.append(f"cache is {self.cache!r}; allowed: '', 'float16', 'float32'.")
        elif self.cache and self.features:
            found.append("cache keeps logits and no features; give cache='' or features=().")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Find the teacher and see that it fits.

        Raises SettingsError (a ValueError) for a teacher with other classes, in train mode, that shares memory with
        the network or does not run on its inputs; UnsupportedError for anything but classification by logits.
        """
        self._session = session
        self._teacher: nn.Module | None = None
        self._stages: tuple[str, ...] = ()
        self._seen: dict[str, Tensor] = {}
        self._macs = 0
        self.teaching_, self.identity_, self.structure_ = False, "", 0
        self.cache_ = LogitCache(torch.float16 if self.cache == "float16" else torch.float32)
        self.counts_ = {"batches": 0, "teacher_samples": 0, "cached_samples": 0, "feature_terms": 0}
        self.last_: Tensor | None = None
        if not self._active:
            return Effect(touched={"loss": "that of the labels alone: soft_weight is 0, and no teacher runs"})
        if self.at > 0 and session.total_samples is None:
            raise UnsupportedError(
                f"{self.spec.name}: at={self.at} follows the run: give Session(..., total_samples=epochs * samples)."
            )
        x = session.sample[0][:2]
        mine = outputs_of(session.model, x, self.features)
        refuse_task(mine.get(""), session.sample[1], self.labels)
        teacher = None if self._own else self._found(session.model)
        theirs = mine if teacher is None else fitting(teacher, session.model, x, mine[""], self.features)
        effect = self._effect(mine, theirs)
        if teacher is not None:
            self.identity_ = digest(teacher)
            self._take(teacher)
        # twice deferred: it has to see the network as the edits of all methods leave it
        session.edit(lambda: session.edit(self._start))
        return effect

    def _found(self, model: nn.Module) -> nn.Module:
        """Return the teacher that was handed over, or load it. Raises SettingsError, CheckpointError."""
        if not self.teacher.startswith(HANDED_OVER):
            return load_teacher(Path(self.teacher), model)
        if self._given is None:
            raise SettingsError(
                f"{self.spec.name}: the teacher {self.teacher!r} is an object that settings cannot hold; hand it over "
                f"again by KnowledgeDistillation.with_teacher(module, ...), or give the folder of its run."
            )
        if digest(self._given) != self.teacher:
            raise SettingsError(
                f"{self.spec.name}: the teacher's weights are no longer those that with_teacher was given; call it once "
                f"the teacher is trained."
            )
        return self._given

    def _effect(self, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> Effect:
        """Choose the layers whose outputs are compared, and say what is done."""
        effect = Effect(
            saves="epochs of recovery, or a dearer network; a step costs a forward of the teacher more"
        )
        known = dict(self._session.model.named_modules())
        for name in self.features:
            if name not in known:
                raise unknown(f"layer in the features of {self.spec.name}", name, known, SettingsError)
            if name not in mine or name not in theirs:
                whose = "the network" if name not in mine else "the teacher"
                effect.skipped[name] = f"it gives no tensor in a forward pass of {whose}"
            elif mine[name].shape != theirs[name].shape:
                a, b = (tuple(of[name].shape[1:]) for of in (mine, theirs))
                effect.skipped[name] = f"its output has shape {a} and the teacher's {b}"
            else:
                effect.touched[name] = (
                    f"its output is pulled to the teacher's, weight {self.feature_weight:g}"
                )
        self._stages = tuple(effect.touched)
        if self.soft_weight > 0:
            who = "a frozen copy of this network" if self._own else self.teacher
            when = f", from {self.at:.0%} of the run on" if self.at else ""
            effect.touched["loss"] = (
                f"{self.soft_weight:g} of it is the distance from {who} at temperature {self.temperature:g}, "
                f"{1 - self.soft_weight:g} the loss of the labels{when}"
            )
        return effect

    def _start(self) -> None:
        if self._own:
            self._copy()
        self.teaching_ = self.at == 0
        self._tap()

    def _copy(self) -> None:
        """Make the network as it is now, in plain modules, the teacher."""
        session = self._session
        teacher = frozen(session.export())
        if session.wrapper is not session.model:  # running statistics may differ between ranks
            for tensor in teacher.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.structure_ = len(session.surgery.log)
        self._take(teacher)

    def _take(self, teacher: nn.Module) -> None:
        self._teacher = teacher
        try:
            self._macs = macs(teacher, self._session.sample[0][:1]).forward
        except UnsupportedError:  # without a layer that has MACs there are none to report
            self._macs = 0

    def _tap(self) -> None:
        """Have the layers to compare leave their outputs, where they do not yet."""
        known, seen = dict(self._session.model.named_modules()), self._seen
        for name in self._stages:
            if name not in known or hasattr(known[name], HOOK):
                continue

            def note(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                if self.teaching_ and module.training and torch.is_grad_enabled():
                    seen[name] = output

            setattr(known[name], HOOK, known[name].register_forward_hook(note))

    # -- in the step
    def blend_loss(self, batch: Batch, outputs: Tensor, loss: Tensor) -> Tensor:
        """Return a * L_soft + (1 - a) * ``loss``, and the distance of the features where it is asked for.

        Weights of the samples weigh the soft loss as they weigh that of the labels.
        """
        if not self.teaching_:
            return loss
        logits, features = self._answers(batch)
        total = (1 - self.soft_weight) * loss
        if self.soft_weight > 0:
            each = soft_losses(outputs, logits, self.temperature, self.labels)
            soft = weighted_mean(each, batch.weights)
            self.last_ = soft.detach()
            total = total + self.soft_weight * soft
        terms = [
            feature_distance(self._seen[name], theirs, batch.weights)
            for name, theirs in features.items()
            if name in self._seen and self._seen[name].shape == theirs.shape
        ]
        self._seen.clear()
        if terms:
            total = total + self.feature_weight * torch.stack(terms).mean()
        self.counts_["feature_terms"] += len(terms)
        self.counts_["batches"] += 1
        return total

    def after_update(self) -> None:
        """Begin to teach once the run is so far."""
        if not self._active or self.teaching_ or self._session.progress < self.at:
            return
        if self._own:
            self._copy()
        self.teaching_ = True

    def reshaped(self, change: Change) -> None:
        """Look again at layers that were replaced; the teacher, a network of its own, stays as it is."""
        self._tap()

    def _answers(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the teacher's logits (N, K), and its outputs of the layers to compare."""
        if not self.cache:
            return self._ask(batch.inputs)
        if batch.index is None:
            raise UnsupportedError(
                f"{self.spec.name}: cache={self.cache!r} keeps logits by sample: give step(inputs, targets, index) with "
                f"the numbers of the samples in the training set, or cache=''."
            )
        index, device = batch.index.cpu(), batch.inputs.device
        rows = self.cache_.missing(index, batch.inputs)
        if len(rows):
            asked = batch if len(rows) == len(batch) else batch.take(rows.to(device))
            self.cache_.put(index[rows], self._ask(asked.inputs)[0])
        self.counts_["cached_samples"] += len(batch) - len(rows)
        return self.cache_.get(index).to(device), {}

    def _ask(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        teacher = self._teacher
        assert teacher is not None
        if teacher.training:
            raise SettingsError(
                f"{self.spec.name}: the teacher was put into train mode; leave it in eval mode."
            )
        self.counts_["teacher_samples"] += len(images)
        with torch.no_grad(), noted(teacher, self._stages) as features:
            logits: Tensor = teacher(images)
        return logits, features

    # -- evidence, state, export
    def witness(self) -> dict[str, float]:
        """Return batches taught, samples through the teacher and from the cache, the teacher's MACs, the soft loss."""
        counted = {name: float(count) for name, count in self.counts_.items()}
        extra = float(self._macs * self.counts_["teacher_samples"])
        return {**counted, "extra_macs": extra, "soft_loss": 0.0 if self.last_ is None else float(self.last_)}

    def state_dict(self) -> dict[str, Any]:
        """Return whether it teaches, who, and what is kept; the weights only of a copy of the network itself."""
        mine = self._teacher if self._own and self.teaching_ else None
        return {
            "teaching_": self.teaching_, "identity_": self.identity_, "structure_": self.structure_,
            "weights_": {} if mine is None else dict(mine.state_dict()), "cache_": self.cache_.state_dict(),
            "counts_": dict(self.counts_), "last_": self.last_,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave. Raises CheckpointError if the run had another teacher."""
        if state["identity_"] != self.identity_:
            was, now = (name or "a copy of the network" for name in (state["identity_"], self.identity_))
            raise CheckpointError(
                f"{self.spec.name}: the run was taught by {was}, and this teacher is {now} (digest of the weights); "
                f"continue with the teacher it began with."
            )
        if state["weights_"]:
            self._restore(int(state["structure_"]), state["weights_"])
        self.teaching_ = bool(state["teaching_"])
        self.cache_.load_state_dict(state["cache_"])
        self.counts_ = {name: int(count) for name, count in state["counts_"].items()}
        self.last_ = None if state["last_"] is None else state["last_"].clone()

    def _restore(self, changes: int, weights: dict[str, Tensor]) -> None:
        """Give the copy of the network the structure it had after so many changes, and its weights."""
        session, teacher = self._session, self._teacher
        assert teacher is not None
        if changes < self.structure_:
            raise CheckpointError(
                f"{self.spec.name}: the saved copy was taken after {changes} changes of structure, the one here after "
                f"{self.structure_}; load the state into a fresh session."
            )
        Surgeon(teacher, (), session.sample[0]).replay(session.surgery.records()[self.structure_ : changes])
        teacher.load_state_dict(weights)
        self.structure_ = changes
        self._take(frozen(teacher))

    def export(self, model: nn.Module) -> None:
        """Take the hooks off the layers that were compared."""
        for module in model.modules():
            if hasattr(module, HOOK):
                getattr(module, HOOK).remove()
                delattr(module, HOOK)

    @property
    def _active(self) -> bool:
        return self.soft_weight > 0 or self.feature_weight > 0

    @property
    def _own(self) -> bool:
        return not self.teacher


HOOK = "distillation_hook"
