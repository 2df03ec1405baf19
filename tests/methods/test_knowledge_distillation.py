"""Distillation has the published loss and gradient, leaves its teacher alone, and refuses what it cannot teach."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from hasten import keyed, models
from hasten.comparison import Arm
from hasten.conformance import differences, through_file_format
from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.data import DataSet, Images
from hasten.errors import CheckpointError, SettingsError, UnsupportedError
from hasten.exporting import export
from hasten.loop import fit
from hasten.measure.macs import macs
from hasten.methods.forward.mixed_precision import MixedPrecision
from hasten.methods.loss.knowledge_distillation import KnowledgeDistillation, feature_distance, soft_losses
from hasten.methods.loss.standardization_loss import StandardizationLoss
from hasten.methods.loss.teachers import digest
from hasten.recipe import PLAIN, Recipe
from hasten.session import Session
from hasten.surgery import DropBlock, Edit, RemoveChannels

N, CLASSES, SIZE = 12, 4, 16


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("distill", seed), dtype=dtype)


def batch(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    g = keyed.generator("distill batch", seed)
    return torch.randn(n, 3, SIZE, SIZE, generator=g), torch.randint(CLASSES, (n,), generator=g)


def net(seed: int = 0, width: int = 8, classes: int = CLASSES, channels: int = 3) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(16, classes),
        )  # fmt: skip


def resnet(seed: int = 0) -> nn.Module:
    return models.build("resnet8", num_classes=CLASSES, image_size=SIZE, seed=seed)


def start(model: nn.Module, *methods: Method, lr: float = 0.05, steps: int = 10, **settings: Any) -> Session:
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
    settings = {"sample": batch(), "total_samples": steps * N, **settings}
    return Session(model, optimizer, methods, **settings)


def taught(teacher: nn.Module, **settings: Any) -> KnowledgeDistillation:
    return KnowledgeDistillation.with_teacher(teacher.eval(), **settings)


def by_hand(outputs: Tensor, teacher: Tensor, y: Tensor, a: float, temperature: float) -> Tensor:
    """Return the loss as it is written in the paper."""
    p = (teacher / temperature).exp() / (teacher / temperature).exp().sum(1, keepdim=True)
    q = (outputs / temperature).exp() / (outputs / temperature).exp().sum(1, keepdim=True)
    soft = (p * (p.log() - q.log())).sum() / len(y)
    return a * temperature**2 * soft + (1 - a) * F.cross_entropy(outputs, y)


# -- the soft loss
def test_equal_logits_give_no_loss_and_no_gradient() -> None:
    for labels in ("one", "many"):
        z = (5 * random(7, 10)).requires_grad_()
        loss = soft_losses(z, z.detach(), 3.0, labels).mean()  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(loss, z)
        assert abs(loss.item()) < 1e-14
        assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_loss_and_gradient_are_the_published_ones(temperature: float) -> None:
    s, t = (3 * random(9, 6, seed=1)).requires_grad_(), 3 * random(9, 6, seed=2)
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    each = soft_losses(s, t, temperature)
    assert (each - temperature**2 * (p * (p.log() - q.log())).sum(1)).abs().max() < 1e-11
    (grad,) = torch.autograd.grad(each.mean(), s)
    assert (grad - temperature * (q - p).detach() / 9).abs().max() < 1e-12


def test_at_a_large_temperature_the_gradient_is_the_difference_of_the_logits() -> None:
    s, t = (2 * random(8, 10, seed=3)).requires_grad_(), 2 * random(8, 10, seed=4)
    (grad,) = torch.autograd.grad(soft_losses(s, t, 1000.0).mean(), s)
    limit = ((s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))).detach() / (10 * 8)
    assert (grad - limit).norm() < 0.01 * limit.norm()
    (hotter,) = torch.autograd.grad(soft_losses(s, t, 3000.0).mean(), s)
    assert abs(float(hotter.norm() / grad.norm()) - 1) < 0.01


def test_several_labels_take_the_sigmoid_of_each_class() -> None:
    s, t, temperature = (3 * random(5, 7, seed=5)).requires_grad_(), 3 * random(5, 7, seed=6), 2.5
    p, q = (t / temperature).sigmoid(), (s / temperature).sigmoid()
    kl = p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())
    each = soft_losses(s, t, temperature, "many")
    assert (each - temperature**2 * kl.mean(1)).abs().max() < 1e-11
    (grad,) = torch.autograd.grad(each.mean(), s)
    assert (grad - temperature * (q - p).detach() / (5 * 7)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labels", ["one", "many"])
def test_extreme_logits_of_16_bit_stay_finite(dtype: torch.dtype, labels: Any) -> None:
    s = (6e4 * random(6, 5, seed=7).sign()).to(dtype).requires_grad_()
    t = (6e4 * random(6, 5, seed=8).sign()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_losses(s, t, 4.0, labels).mean()
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_the_distance_of_features_is_relative_and_weighs_samples() -> None:
    s, t, w = (
        random(4, 3, 2, 2, seed=9),
        random(4, 3, 2, 2, seed=10),
        torch.tensor([2.0, 0.0, 1.0, 1.0]).double(),
    )
    assert abs(feature_distance(s, t) - (s - t).norm() ** 2 / t.norm() ** 2) < 1e-12
    assert abs(feature_distance(5 * s, 5 * t) - feature_distance(s, t)) < 1e-12
    each = (s - t).flatten(1).norm(dim=1) ** 2
    assert abs(feature_distance(s, t, w) - (w * each).sum() / t.norm() ** 2) < 1e-12


# -- in a session
class Weighs(Method):
    spec = MethodSpec("weighs", "", "", "samples", "weighs", writes=frozenset({"loss.weights"}))
    weights = torch.linspace(0.1, 1.9, N)

    def attach(self, session: Session) -> Effect:
        return Effect(touched={"batch": "weighed"})

    def select(self, batch: Batch) -> Batch:
        batch.weights = self.weights
        return batch


class Adds(Method):
    spec = MethodSpec("adds", "", "", "samples", "adds 5", writes=frozenset({"loss.terms"}))

    def attach(self, session: Session) -> Effect:
        return Effect(touched={"loss": "5 more"})

    def loss_terms(self) -> Tensor:
        return torch.tensor(5.0)


@pytest.mark.parametrize(("a", "temperature"), [(0.7, 3.0), (1.0, 1.0), (0.1, 20.0)])
def test_the_loss_of_a_step_is_the_paper_s(a: float, temperature: float) -> None:
    teacher, (x, y) = net(1).eval(), batch(3)
    session = start(net(0), taught(teacher, soft_weight=a, temperature=temperature))
    outputs = copy.deepcopy(session.model)(x)
    with torch.no_grad():
        expected = by_hand(outputs.double(), teacher(x).double(), y, a, temperature)
    assert abs(session.step(x, y) - expected) < 5e-5
    assert "at temperature" in session.effects["knowledge_distillation"].touched["loss"]


def test_weights_of_samples_weigh_both_losses_and_other_terms_are_not_scaled() -> None:
    teacher, (x, y) = net(1).eval(), batch(3)
    session = start(net(0), taught(teacher, soft_weight=0.6, temperature=2.0), Weighs(), Adds())
    with torch.no_grad():
        outputs = copy.deepcopy(session.model)(x)
        soft = (Weighs.weights * soft_losses(outputs, teacher(x), 2.0)).mean()
        hard = (Weighs.weights * F.cross_entropy(outputs, y, reduction="none")).mean()
    assert abs(session.step(x, y) - (0.6 * soft + 0.4 * hard + 5)) < 1e-5
    assert abs(session.witness()["knowledge_distillation"]["soft_loss"] - float(soft)) < 1e-6


def test_without_weight_it_is_plain_training_and_the_teacher_is_never_called() -> None:
    teacher, calls = net(1).eval(), []
    method = taught(teacher, soft_weight=0.0)
    teacher.register_forward_hook(lambda *_: calls.append(1))
    sessions = [start(net(0)), start(net(0), method)]
    for step in range(6):
        a, b = (session.step(*batch(step)) for session in sessions)
        assert torch.equal(a, b)
    wrong = differences(*(session.model.state_dict() for session in sessions))
    assert not wrong
    assert not calls
    assert not any(sessions[1].witness()["knowledge_distillation"].values())


def test_the_teacher_and_the_global_generator_stay_as_they_were() -> None:
    teacher = nn.Sequential(*net(1), nn.Dropout(0.5)).eval()
    before, state = digest(teacher), torch.get_rng_state()
    session = start(net(0), taught(teacher), steps=20)
    for step in range(20):
        session.step(*batch(step))
    assert digest(teacher) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not any(m._forward_hooks for m in teacher.modules())


def test_a_student_learns_the_teacher_though_the_labels_are_noise() -> None:
    def linear(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))

    def small(seed: int, n: int = 64) -> tuple[Tensor, Tensor]:
        g = keyed.generator("noise", seed)
        return torch.randn(n, 3, 2, 2, generator=g), torch.randint(CLASSES, (n,), generator=g)

    teacher, agreed = linear(1).eval(), {}
    for a in (1.0, 0.0):
        session = start(linear(0), taught(teacher, soft_weight=a), sample=small(0), lr=0.1)
        for step in range(200):
            session.step(*small(step))
        x, _ = small(1000, 500)
        with session.inference() as forward:
            agreed[a] = float((forward(x).argmax(1) == teacher(x).argmax(1)).double().mean())
    assert agreed[1.0] > 0.97
    assert agreed[0.0] < 0.6


# -- the network's own copy
def test_the_copy_is_the_network_before_surgery() -> None:
    model, (x, _) = resnet(), batch(5)
    with torch.no_grad():
        first = copy.deepcopy(model).eval()(x)
    session = start(model, KnowledgeDistillation())
    teacher = session.methods[0]._teacher  # type: ignore[attr-defined]
    before = digest(teacher)
    for step in range(3):
        session.step(*batch(step))
        session.surgery.apply([RemoveChannels("layer2.0.conv1", (step, 5))])
    session.surgery.apply([DropBlock("layer1.0")])
    session.step(*batch(9))
    assert model.get_submodule("layer2.0.conv1").out_channels == 32 - 6
    assert teacher.get_submodule("layer2.0.conv1").out_channels == 32
    assert digest(teacher) == before
    with torch.no_grad():
        assert torch.equal(teacher(x), first)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert session.witness()["knowledge_distillation"]["batches"] == 4


def test_the_copy_is_taken_at_a_share_of_the_run() -> None:
    session, plain = start(net(0), KnowledgeDistillation(at=0.4)), start(net(0))
    for step in range(4):
        assert torch.equal(session.step(*batch(step)), plain.step(*batch(step)))
    method: Any = session.methods[0]
    assert method.teaching_
    assert not differences(dict(method._teacher.state_dict()), dict(session.model.state_dict()))
    assert not torch.equal(session.step(*batch(4)), plain.step(*batch(4)))
    assert session.witness()["knowledge_distillation"]["batches"] == 1
    assert "from 40%" in session.effects["knowledge_distillation"].touched["loss"]


def test_the_copy_is_of_the_network_that_other_methods_made_and_is_plain() -> None:
    session = start(net(0), KnowledgeDistillation(), StandardizationLoss(lambda_rel=0.1))
    teacher = next(m for m in session.methods if isinstance(m, KnowledgeDistillation))._teacher
    assert teacher is not None
    assert not any(isinstance(m, nn.BatchNorm2d) or m._forward_hooks for m in teacher.modules())
    session.step(*batch())
    assert all(any(counts.values()) for counts in session.witness().values())


class Cuts(Method):
    """Cuts a resnet8 after given steps."""

    spec = MethodSpec(
        "cuts", "", "", "time per step", "cuts", writes=frozenset({"structure"}), state=("cuts_",)
    )
    plan: ClassVar[dict[int, list[Edit]]] = {
        1: [RemoveChannels("layer1.0.conv1", (0, 7))],
        6: [DropBlock("layer1.0"), RemoveChannels("layer3.0.conv1", (1, 2, 3))],
    }

    def attach(self, session: Session) -> Effect:
        self._session, self.cuts_ = session, 0
        return Effect(touched={"layer1.0": "cut"})

    def after_update(self) -> None:
        edits = self.plan.get(self._session.counters["step"])
        if edits:
            self._session.surgery.apply(edits)
            self.cuts_ += 1

    def witness(self) -> dict[str, float]:
        return {"cuts": self.cuts_}


@pytest.mark.parametrize("at", [0.0, 0.4])
def test_a_run_whose_network_is_cut_resumes_bit_for_bit_from_any_step(at: float) -> None:
    def make() -> Session:
        method = KnowledgeDistillation(at=at, features=("layer1.0", "layer2"), feature_weight=0.3)
        return start(resnet(), method, Cuts())

    whole, saved = make(), []
    for step in range(10):
        saved.append(through_file_format(whole.state_dict()))
        whole.step(*batch(step))
    final, witness = whole.state_dict(), whole.witness()
    assert witness["cuts"]["cuts"] == 2
    assert witness["knowledge_distillation"]["batches"] == 10 - 10 * at
    for first, state in enumerate(saved):
        again = make()
        again.load_state_dict(state)
        for step in range(first, 10):
            again.step(*batch(step))
        assert not differences(final, again.state_dict()), f"resumed at step {first}"
        assert not differences(witness, again.witness()), f"resumed at step {first}"
    teacher = next(m for m in again.methods if isinstance(m, KnowledgeDistillation))._teacher
    assert teacher is not None
    assert teacher.get_submodule("layer1.0.conv1").out_channels == (14 if at else 16)
    assert teacher.get_submodule("layer3.0.conv1").out_channels == 64


# -- a teacher that is handed over
def test_a_teacher_that_is_handed_over_shows_in_the_settings_by_its_digest() -> None:
    teacher, other = net(1).eval(), net(2).eval()
    method = taught(teacher, temperature=2.0)
    assert repr(method) == repr(taught(copy.deepcopy(teacher), temperature=2.0))
    assert repr(method) != repr(taught(other, temperature=2.0))
    assert eval(repr(method)).settings() == method.settings()
    assert all(isinstance(v, str | int | float | tuple) for v in method.settings().values())
    arms = [Arm("taught", PLAIN, (m,)) for m in (method, taught(other, temperature=2.0))]
    assert arms[0].describe() != arms[1].describe()
    sent = pickle.loads(pickle.dumps(method))
    assert digest(sent._given) == method.teacher
    assert torch.equal(start(net(0), sent).step(*batch()), start(net(0), method).step(*batch()))
    with pytest.raises(SettingsError, match="hand it over again"):
        start(net(0), eval(repr(method)))
    with pytest.raises(SettingsError, match="takes a module"):
        KnowledgeDistillation.with_teacher("runs/teacher")  # type: ignore[arg-type]


def test_a_teacher_that_was_trained_on_is_refused() -> None:
    teacher = net(1)
    method = taught(teacher)
    with torch.no_grad():
        teacher[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(SettingsError, match="no longer those"):
        start(net(0), method)


def test_a_run_is_not_continued_with_another_teacher() -> None:
    first = start(net(0), taught(net(1)))
    first.step(*batch())
    state = through_file_format(first.state_dict())
    assert not state["methods"]["knowledge_distillation"]["weights_"]
    start(net(0), taught(net(1))).load_state_dict(state)
    with pytest.raises(CheckpointError, match="taught by sha256"):
        start(net(0), taught(net(2))).load_state_dict(state)
    with pytest.raises(CheckpointError, match="a copy of the network"):
        start(net(0), KnowledgeDistillation()).load_state_dict(state)


# -- a teacher from disk
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Return the folder of a finished run, with an export beside it, and the network it ended with."""
    folder = tmp_path_factory.mktemp("teacher")
    g = np.random.Generator(np.random.Philox(1))
    images = Images(g.integers(0, 256, (64, SIZE, SIZE, 3)).astype(np.uint8), np.arange(64) % CLASSES,
                    tuple("abcd"))  # fmt: skip
    recipe = Recipe(epochs=1, batch_size=16, augment=(), eval_every=0.0)
    result = fit(
        "resnet8", DataSet("noise", images, images, flip_ok=False), recipe=recipe, out=folder / "run"
    )
    export(folder / "run", folder / "net.safetensors")
    assert result.model is not None
    return folder, result.model


@pytest.mark.parametrize("file", ["run", "net.safetensors"])
def test_a_teacher_is_loaded_from_a_run_or_an_export(run: tuple[Path, nn.Module], file: str) -> None:
    folder, trained = run
    session = start(
        resnet(5), KnowledgeDistillation(teacher=str(folder / file), soft_weight=0.5, temperature=2.0)
    )
    x, y = batch(2)
    with torch.no_grad():
        outputs = copy.deepcopy(session.model)(x).double()
        expected = by_hand(outputs, trained(x).double(), y, 0.5, 2.0)
    assert abs(session.step(x, y) - expected) < 1e-4
    assert session.state_dict()["methods"]["knowledge_distillation"]["identity_"] == digest(trained)


def test_a_teacher_that_cannot_be_loaded_is_refused(run: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        start(resnet(), KnowledgeDistillation(teacher=str(tmp_path)))
    with pytest.raises(SettingsError, match="does not hold weights for this network"):
        start(net(), KnowledgeDistillation(teacher=str(run[0] / "net.safetensors")))
    with pytest.raises(SettingsError, match="does not hold weights"):
        start(net(), KnowledgeDistillation(teacher=str(tmp_path / "missing.safetensors")))


# -- features
def test_features_are_pulled_to_the_teacher_s() -> None:
    teacher, (x, y) = resnet(1).eval(), batch(4)
    names = ("layer1", "layer2")
    method = taught(teacher, soft_weight=0.4, temperature=2.0, features=names, feature_weight=0.5)
    session = start(resnet(0), method)
    found: list[dict[str, Tensor]] = []
    for model in (copy.deepcopy(session.model), copy.deepcopy(teacher)):
        seen: dict[str, Tensor] = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda _, __, o, n=name, s=seen: s.update({n: o}))  # type: ignore[misc]
        with torch.no_grad():
            seen[""] = model(x)
        found.append(seen)
    s, t = found
    apart = sum((s[n] - t[n]).square().sum() / t[n].square().sum() for n in names) / 2
    expected = by_hand(s[""].double(), t[""].double(), y, 0.4, 2.0) + 0.5 * apart
    assert abs(session.step(x, y) - expected) < 1e-4
    assert session.witness()["knowledge_distillation"]["feature_terms"] == 2
    without = start(resnet(0), taught(teacher, soft_weight=0.4, temperature=2.0))
    without.step(x, y)
    weight = "layer1.0.conv1.weight"
    grads = [dict(m.named_parameters())[weight].grad for m in (session.model, without.model)]
    assert not torch.allclose(*grads, rtol=1e-2)  # type: ignore[arg-type]
    assert not any(m._forward_hooks for m in session.export().modules())


def test_features_of_another_shape_are_left_out_with_the_reason() -> None:
    settings = {"features": ("2", "5"), "feature_weight": 1.0}
    session = start(net(0, width=8), taught(net(1, width=12), **settings))
    effect = session.effects["knowledge_distillation"]
    assert "(8, 16, 16) and the teacher's (12, 16, 16)" in effect.skipped["2"]
    assert set(effect.touched) == {"5", "loss"}
    session.step(*batch())
    assert session.witness()["knowledge_distillation"]["feature_terms"] == 1
    with pytest.raises(SettingsError, match=r"layer2\.0"):
        start(resnet(), taught(resnet(1), features=("layer2.9",), feature_weight=1.0))


def test_features_follow_the_network_when_it_is_cut() -> None:
    session = start(resnet(), KnowledgeDistillation(features=("layer1.0",), feature_weight=1.0))
    session.step(*batch(0))
    session.surgery.apply([DropBlock("layer1.0")])
    session.step(*batch(1))
    assert session.witness()["knowledge_distillation"]["feature_terms"] == 2
    assert not any(m._forward_hooks for m in session.export().modules())
    narrow = start(net(), KnowledgeDistillation(features=("2",), feature_weight=1.0))
    narrow.step(*batch(0))
    narrow.surgery.apply([RemoveChannels("0", (1, 4))])
    narrow.step(*batch(1))
    assert narrow.witness()["knowledge_distillation"]["feature_terms"] == 1
    later = start(net(), KnowledgeDistillation(features=("2",), feature_weight=1.0, at=0.5))
    later.step(*batch(0))
    assert not later.methods[0]._seen  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_features_are_seen_through_a_compiled_network() -> None:
    losses = []
    for compiled in (False, True):
        session = start(net(0), taught(net(1), features=("2",), feature_weight=0.5))
        if compiled:
            torch._dynamo.reset()
            session.forward = torch.compile(session.model, backend="aot_eager", fullgraph=True, dynamic=False)
        losses.append([session.step(*batch(step)).item() for step in range(3)])
        assert session.witness()["knowledge_distillation"]["feature_terms"] == 3
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


# -- the cache
def epochs(count: int, per_epoch: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    x, y = batch(7, per_epoch * N)
    order = [keyed.permutation(per_epoch * N, "order", e).reshape(per_epoch, N) for e in range(count)]
    rows = [torch.from_numpy(part) for epoch in order for part in epoch]
    return [(x[r], y[r], r) for r in rows]


@pytest.mark.parametrize(("cache", "within"), [("float32", 1e-5), ("float16", 2e-3)])
def test_kept_logits_give_the_loss_of_live_ones(cache: Any, within: float) -> None:
    teacher = net(1)
    live, kept = (start(net(0), taught(teacher, cache=c), lr=0.01) for c in ("", cache))
    for x, y, index in epochs(4):
        assert abs(live.step(x, y, index) - kept.step(x, y, index)) < within
    counts = kept.witness()["knowledge_distillation"]
    assert counts["teacher_samples"] == 2 * N
    assert counts["cached_samples"] == 6 * N
    per_image = macs(teacher, batch()[0][:1]).forward
    assert counts["extra_macs"] == 2 * N * per_image
    assert live.witness()["knowledge_distillation"]["extra_macs"] == 8 * N * per_image


def test_kept_logits_resume_bit_for_bit() -> None:
    def make() -> Session:
        return start(net(0), taught(net(1), cache="float16"))

    whole, saved = make(), []
    for x, y, index in epochs(3):
        saved.append(through_file_format(whole.state_dict()))
        whole.step(x, y, index)
    for first, state in enumerate(saved):
        again = make()
        again.load_state_dict(state)
        for x, y, index in epochs(3)[first:]:
            again.step(x, y, index)
        assert not differences(whole.state_dict(), again.state_dict()), f"resumed at step {first}"


@pytest.mark.parametrize(
    "change", [lambda x: x.flip(3), lambda x: x.roll(1, 2), lambda x: 0.9 * x + 0.1 * x.flip(0)]
)
def test_kept_logits_are_refused_for_images_that_change(change: Callable[[Tensor], Tensor]) -> None:
    session = start(net(0), taught(net(1), cache="float32"))
    x, y, index = epochs(1)[0]
    session.step(x, y, index)
    session.step(x.contiguous(memory_format=torch.channels_last), y, index)
    with pytest.raises(UnsupportedError, match="augmentation"):
        session.step(change(x), y, index)
    with pytest.raises(UnsupportedError, match="numbers of the samples"):
        session.step(x, y)


# -- beside others
def test_the_teacher_runs_in_the_precision_of_training() -> None:
    teacher, seen = net(1).eval(), []
    method = taught(teacher)
    teacher[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    session = start(net(0), method, MixedPrecision(dtype="bfloat16", force=True))
    seen.clear()
    losses = [session.step(*batch(step)).item() for step in range(4)]
    assert seen == [torch.bfloat16] * 4
    assert all(math.isfinite(loss) for loss in losses)


# -- refusals
class Boxes(nn.Module):
    """Gives two tensors, as a detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.net(x)


def shared_last() -> tuple[nn.Module, nn.Module]:
    model = net(0)
    teacher = copy.deepcopy(model).eval()
    teacher[-1] = model[-1].eval()
    return model, teacher


def test_a_teacher_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    same = net(0)
    cases = [
        (net(0), net(1, classes=5).eval(), "same classes"),
        (net(0), net(1).train(), r"teacher\.eval\(\)"),
        (net(0), nn.Sequential(net(1).eval(), nn.Softmax(1).train()).requires_grad_(), "train mode"),
        (same, same.eval(), "shares 14 tensors"),
        (*shared_last(), "shares 2 tensors"),
        (net(0), net(1, channels=1).eval(), "does not run on the network's inputs"),
    ]
    for model, teacher, reason in cases:
        before = copy.deepcopy(model.state_dict())
        method = KnowledgeDistillation.with_teacher(teacher, features=("2",), feature_weight=1.0)
        with pytest.raises(ValueError, match=reason) as caught:
            start(model, method)
        assert isinstance(caught.value, SettingsError)
        assert not differences(before, model.state_dict())
        assert not any(m._forward_hooks for m in (*model.modules(), *teacher.modules()))
    session = start(net(0), method := taught(net(1)))
    assert method._given is not None
    method._given.train()
    with pytest.raises(SettingsError, match="put into train mode"):
        session.step(*batch())


def test_what_is_no_classification_is_refused() -> None:
    x, y = batch()
    several = (torch.arange(N * CLASSES).reshape(N, CLASSES) % 3 == 0).float()
    shares = torch.full((N, CLASSES), 1 / CLASSES)
    cases: list[tuple[nn.Module, Tensor, Any]] = [
        (Boxes(), y, "one"),
        (net()[:6], y, "one"),  # a map of classes, as in segmentation
        (net(), y.float(), "one"),
        (net(classes=1), y.float()[:, None], "one"),
        (net(), several, "one"),
        (net(), y, "many"),
        (net(), several[:, :2], "many"),
    ]
    for model, targets, labels in cases:
        with pytest.raises(UnsupportedError, match="knowledge_distillation"):
            start(model, KnowledgeDistillation(labels=labels), sample=(x, targets))
    start(net(), KnowledgeDistillation(), sample=(x, shares)).step(x, shares)
    session = start(
        net(), taught(net(1), labels="many"), sample=(x, several), loss=F.binary_cross_entropy_with_logits
    )
    assert session.step(x, several).isfinite()
    with pytest.raises(UnsupportedError, match="total_samples"):
        start(net(), KnowledgeDistillation(at=0.5), total_samples=None)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        KnowledgeDistillation(soft_weight=1.5, temperature=0.0, teacher=net(), at=1.0, labels="some",  # type: ignore[arg-type]
                              features=["2"], feature_weight=float("nan"), cache="int8")  # type: ignore[arg-type]  # fmt: skip
    for name in (
        "soft_weight is 1.5",
        "temperature is 0",
        "with_teacher",
        "at is 1",
        "labels",
        "features",
        "feature_weight",
        "cache",
    ):
        assert name in str(error.value)
    for wrong in ({"features": ("2",)}, {"feature_weight": 1.0}):
        with pytest.raises(SettingsError, match="give both or none"):
            KnowledgeDistillation(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="cache keeps logits"):
        KnowledgeDistillation(features=("2",), feature_weight=1.0, cache="float16")
