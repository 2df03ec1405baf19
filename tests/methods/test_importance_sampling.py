"""Importance sampling: scores, the gain tau, an unbiased gradient of less variance, and when it switches on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from hasten import keyed
from hasten.checkpoint import pack, unpack
from hasten.contract import Batch
from hasten.errors import NonFiniteError, SettingsError, UnsupportedError
from hasten.loss import cross_entropy
from hasten.methods.samples.importance_sampling import ImportanceSampling, drawn, variance_gain
from hasten.methods.samples.scoring import logit_gradient_norms
from hasten.session import Session

CLASSES = 4


def network(dropout: float = 0.0) -> nn.Module:
    """Return a small network with batch norm and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
        )  # fmt: skip


def images(n: int, *key: int | str) -> tuple[Tensor, Tensor]:
    g = keyed.generator("images", *key)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, CLASSES, (n,), generator=g)


def on_images(method: ImportanceSampling | None, model: nn.Module | None = None, **more: Any) -> Session:
    model = network() if model is None else model
    methods = [] if method is None else [method]
    return Session(
        model, SGD(model.parameters(), lr=0.05, momentum=0.9), methods, sample=images(24, 0), **more
    )


def only(session: Session) -> ImportanceSampling:
    (method,) = session.methods
    assert isinstance(method, ImportanceSampling)
    return method


@pytest.mark.parametrize("seed", range(10))
def test_tau_is_the_papers_formula(seed: int) -> None:
    scores = torch.rand(50, generator=torch.Generator().manual_seed(seed)).double().pow(seed + 1)
    g, u = scores / scores.sum(), 1 / 50
    paper = 1 / torch.sqrt(1 - (g - u).square().sum() / g.square().sum())
    assert variance_gain(scores) == pytest.approx(float(paper), rel=1e-9)


def test_tau_at_its_ends() -> None:
    assert variance_gain(torch.full((37,), 0.3)) == pytest.approx(1.0)
    assert variance_gain(torch.tensor([0.0] * 99 + [5.0])) == pytest.approx(10.0)
    assert variance_gain(torch.zeros(5)) == 1.0
    assert math.isnan(variance_gain(torch.tensor([1.0, math.nan])))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_score_is_the_norm_of_softmax_minus_target(smoothing: float) -> None:
    g = torch.Generator().manual_seed(1)
    z, y = 3 * torch.randn(30, 7, generator=g), torch.randint(0, 7, (30,), generator=g)
    target = F.one_hot(y, 7) * (1 - smoothing) + smoothing / 7
    expected = (z.softmax(1) - target).norm(dim=1)
    torch.testing.assert_close(logit_gradient_norms(cross_entropy(smoothing), z, y), expected)


def test_score_of_mixed_targets() -> None:
    g = torch.Generator().manual_seed(2)
    z, y = torch.randn(30, 7, generator=g), torch.rand(30, 7, generator=g).softmax(1)
    torch.testing.assert_close(logit_gradient_norms(cross_entropy(), z, y), (z.softmax(1) - y).norm(dim=1))


def linear_gradients(n: int = 30, features: int = 6) -> tuple[Tensor, Tensor]:
    """Return the gradients of n samples for a linear softmax model, (n, features * classes), and their scores.

    The inputs have norm 1, so that the score is the norm of the whole gradient.
    """
    g = torch.Generator().manual_seed(5)
    x = F.normalize(torch.randn(n, features, generator=g), dim=1)
    weight = 4 * torch.randn(CLASSES, features, generator=g)
    y = torch.where(torch.rand(n, generator=g) < 0.8, (x @ weight.T).argmax(1), 0)
    logits = x @ weight.T
    error = logits.softmax(1) - F.one_hot(y, CLASSES)
    return torch.einsum("nc,nf->ncf", error, x).flatten(1), logit_gradient_norms(cross_entropy(), logits, y)


def test_weighted_gradient_is_unbiased() -> None:
    gradients, scores = linear_gradients()
    torch.testing.assert_close(scores, gradients.norm(dim=1))
    random = torch.Generator().manual_seed(7)
    estimates = []
    for _ in range(10_000):
        rows, weights = drawn(scores, 10, random)
        estimates.append((weights[:, None] * gradients[rows]).mean(dim=0))
    found = torch.stack(estimates)
    z = (found.mean(0) - gradients.mean(0)) / (found.std(0) / len(found) ** 0.5)
    assert z.abs().max() < 4.5, z


def test_weights_have_mean_one_and_variance_is_below_uniform() -> None:
    gradients, scores = linear_gradients()
    n = 60_000
    rows, weights = drawn(scores, n, torch.Generator().manual_seed(8))
    assert abs(weights.mean() - 1) < 4.5 * weights.std() / n**0.5
    ours = (weights[:, None] * gradients[rows]).var(dim=0).sum()
    plain = (
        gradients[torch.randint(0, len(scores), (n,), generator=torch.Generator().manual_seed(9))]
        .var(0)
        .sum()
    )
    best = scores.mean() ** 2 - gradients.mean(0).square().sum()
    assert ours < 0.8 * plain
    assert ours == pytest.approx(float(best), rel=0.05)


def test_equal_norms_gain_nothing() -> None:
    g = torch.Generator().manual_seed(10)
    gradients = F.normalize(torch.randn(20, 5, generator=g), dim=1)
    rows, weights = drawn(torch.ones(20), 50_000, g)
    assert torch.equal(weights, torch.ones(50_000))
    assert gradients[rows].var(0).sum() == pytest.approx(
        float(gradients.var(0, correction=0).sum()), rel=0.02
    )


def test_below_the_threshold_training_is_plain() -> None:
    plain, sampling = on_images(None), on_images(ImportanceSampling())
    for session in (plain, sampling):
        for step in range(6):
            session.step(*images(24, step))
    assert only(sampling).importance_steps_ == 0
    assert only(sampling).uniform_steps_ == 6
    assert 0 < only(sampling).tau_ < 2
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, sampling.model.state_dict()[name], rtol=0, atol=1e-6, msg=name)


def test_tau_follows_the_moving_average_of_a_uniform_step() -> None:
    session = on_images(ImportanceSampling(momentum=0.75))
    tau = 0.0
    for step in range(4):
        x, y = images(24, step)
        model = copy.deepcopy(session.model)
        gain = variance_gain((model(x).softmax(1) - F.one_hot(y, CLASSES)).norm(dim=1).detach())
        tau = 0.75 * tau + 0.25 * gain
        session.step(x, y)
        assert only(session).tau_ == pytest.approx(tau, rel=1e-5)


@pytest.mark.parametrize("presample", [2.0, 3.0, 4.0])
def test_above_the_threshold_a_step_trains_on_b_weighted_rows(presample: float) -> None:
    session = on_images(ImportanceSampling(presample=presample, tau_th=0.01))
    assert ImportanceSampling(presample=presample).threshold == pytest.approx((presample + 3) / 3)
    session.step(*images(24, 0))
    method = only(session)
    assert (method.uniform_steps_, method.importance_steps_) == (1, 0)
    x, y = images(24, 1)
    batch = method.select(Batch(x, y, torch.arange(24)))
    assert len(batch) == int(24 / presample)
    assert batch.weights is not None
    assert batch.index is not None
    with session.inference() as forward:
        p = F.normalize((forward(x).softmax(1) - F.one_hot(y, CLASSES)).norm(dim=1), p=1, dim=0)
    torch.testing.assert_close(batch.weights, 1 / (24 * p[batch.index]))
    assert torch.equal(batch.inputs, x[batch.index])


def test_weights_reach_the_loss() -> None:
    """The step's loss is the mean of weight * loss over the drawn rows."""
    session = on_images(ImportanceSampling(tau_th=0.01))
    session.step(*images(24, 0))
    method, (x, y) = only(session), images(24, 1)
    model, batch = copy.deepcopy(session.model), copy.copy(method).select(Batch(x, y))
    each = F.cross_entropy(model(batch.inputs), batch.targets, reduction="none").detach()
    assert session.step(x, y).item() == pytest.approx(float((batch.weights * each).mean()), rel=1e-5)


def confident() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a linear model that is sure and right about 23 of 24 samples, and wrong about the last."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(CLASSES, CLASSES, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(12 * torch.eye(CLASSES))  # type: ignore[operator, union-attr]
    y = torch.arange(24) % CLASSES
    x = F.one_hot(y, CLASSES).float()
    y[-1] = 0
    return model, x.reshape(24, CLASSES, 1, 1), y


def test_default_threshold_is_passed_when_few_samples_matter() -> None:
    model, x, y = confident()
    session = Session(model, SGD(model.parameters(), lr=0.0), [ImportanceSampling()], sample=(x, y))
    for _ in range(20):
        session.step(x, y)
    method = only(session)
    assert method.tau_ > 2
    assert method.importance_steps_ >= 10
    counters = session.counters
    assert counters["backward"] == 24 * method.uniform_steps_ + 8 * method.importance_steps_


def test_uniform_part_trains_on_b_rows_without_weights() -> None:
    session = on_images(ImportanceSampling(uniform="part", tau_th=1e9))
    for step in range(3):
        session.step(*images(24, step))
    assert session.counters["backward"] == 3 * 8
    x, y = images(24, 9)
    batch = only(session).select(Batch(x, y, torch.arange(24)))
    assert batch.weights is None
    assert batch.index is not None
    assert len(batch.index.unique()) == 8


def test_scores_that_are_all_zero_are_uniform() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    x, y = torch.zeros(24, 4, 1, 1), torch.full((24, CLASSES), 1 / CLASSES)
    nn.init.zeros_(model[1].bias)  # type: ignore[arg-type, union-attr]
    session = Session(
        model, SGD(model.parameters(), lr=0.1), [ImportanceSampling(tau_th=0.01)], sample=(x, y)
    )
    for _ in range(3):
        session.step(x, y)
    assert only(session).importance_steps_ == 0
    assert session.counters["backward"] == 72


def test_scores_that_are_not_finite_stop_the_run() -> None:
    session = on_images(ImportanceSampling(tau_th=0.01))
    session.step(*images(24, 0))
    x, y = images(24, 1)
    x[5] = math.nan
    with pytest.raises(NonFiniteError):
        session.step(x, y)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_scoring_leaves_no_trace(scale: float) -> None:
    session = on_images(ImportanceSampling(tau_th=0.01, score_scale=scale), network(dropout=0.5))
    session.step(*images(24, 0))
    before, random = copy.deepcopy(session.model.state_dict()), torch.get_rng_state()
    only(session).select(Batch(*images(24, 1)))
    for name, value in session.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(random, torch.get_rng_state())
    assert session.model.training


def test_resume_is_bit_identical() -> None:
    def run(session: Session, start: int, stop: int) -> list[float]:
        return [session.step(*images(24, "r", step)).item() for step in range(start, stop)]

    whole = on_images(ImportanceSampling(tau_th=0.95))
    run(whole, 0, 25)
    tensors, skeleton = pack(whole.state_dict())
    state = unpack({k: v.clone() for k, v in tensors.items()}, skeleton)
    expected = run(whole, 25, 60)
    assert 0 < only(whole).importance_steps_ < 60
    again = on_images(ImportanceSampling(tau_th=0.95))
    again.load_state_dict(state)
    assert run(again, 25, 60) == expected
    assert again.witness() == whole.witness()


def test_bad_settings_and_losses_are_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        ImportanceSampling(presample=1.0, tau_th=0.0, momentum=1.0, uniform="none", score_scale=2.0)  # type: ignore[arg-type]
    for name in ("presample", "tau_th", "momentum", "uniform", "score_scale"):
        assert name in str(caught.value)

    def scalar(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()

    with pytest.raises(UnsupportedError, match='reduction="none"'):
        on_images(ImportanceSampling(), loss=scalar)

    def by_class(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        each = F.binary_cross_entropy_with_logits(
            outputs, F.one_hot(targets, CLASSES).float(), reduction="none"
        )
        return each.mean() if reduction == "mean" else each

    session = on_images(ImportanceSampling(), loss=by_class)
    with pytest.raises(UnsupportedError, match="one number for each"):
        session.step(*images(24, 0))
