"""Early instance filtering: the controller, the collapse guard, what unsure samples may touch, and the counters."""

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
from hasten.errors import SettingsError, UnsupportedError
from hasten.methods.samples.early_instance_filtering import (
    EarlyInstanceFiltering,
    label_weights,
    preserved,
    uncertain,
)
from hasten.methods.samples.filters import build_filter, filter_for
from hasten.models.resnet import ResNet
from hasten.session import Session


class Passes(nn.Module):
    """Returns the top-left pixels times a weight that starts at 1, so that an image says what its loss will be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0, :2] * self.weight


def first_value(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the first output of each sample as its loss."""
    each = outputs[:, 0]
    return each.mean() if reduction == "mean" else each


def only(session: Session) -> EarlyInstanceFiltering:
    (method,) = session.methods
    assert isinstance(method, EarlyInstanceFiltering)
    return method


def told(method: EarlyInstanceFiltering, size: int = 4) -> Session:
    """Return a session in which a sample's loss is its first pixel; the model learns nothing."""
    model, sample = Passes(), (torch.rand(8, 1, size, size), torch.zeros(8, dtype=torch.long))
    return Session(model, SGD(model.parameters(), lr=0.0), [method], sample=sample, loss=first_value)


def as_images(losses: Tensor, size: int = 4) -> tuple[Tensor, Tensor]:
    return losses.view(-1, 1, 1, 1).expand(-1, 1, size, size).contiguous(), torch.zeros(
        len(losses), dtype=torch.long
    )


def with_oracle(session: Session) -> EarlyInstanceFiltering:
    """Let the filter of ``session`` know every loss."""
    method = only(session)

    def judge(images: Tensor, trains: bool) -> Tensor:
        margin = 20 * (images[:, 0, 0, 0] - method.threshold_)
        return torch.stack([-margin, margin], dim=1).requires_grad_()

    method._judge = judge  # type: ignore[method-assign]
    return method


def network(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip


def images(n: int, *key: int | str) -> tuple[Tensor, Tensor]:
    g = keyed.generator("images", *key)
    return torch.randn(n, 3, 16, 16, generator=g), torch.randint(0, 4, (n,), generator=g)


def on_images(method: EarlyInstanceFiltering | None, model: nn.Module | None = None, **more: Any) -> Session:
    model = network() if model is None else model
    methods = [] if method is None else [method]
    return Session(
        model, SGD(model.parameters(), lr=0.05, momentum=0.9), methods, sample=images(16, 0), **more
    )


# -- the parts


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_label_weights_sum_to_one_and_balance_the_labels(ratio: float) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        high = torch.rand(64, generator=g) < torch.rand((), generator=g)
        assert label_weights(high, ratio).sum().item() == pytest.approx(1.0, abs=1e-6)
    high = torch.arange(100) < 100 * ratio
    assert label_weights(high, ratio)[high].sum().item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("least", "most", "round_to"),
    [(0, 64, 1), (8, 64, 1), (0, 64, 16), (20, 64, 8), (500, 64, 7), (4, 20, 1), (4, 20, 8)],
)
def test_preserved_rows_are_the_most_likely_ones(seed: int, least: int, most: int, round_to: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 2, generator=g) + torch.tensor([seed / 3, 1.0])
    rows = preserved(logits, least, most, round_to)
    high = set((logits[:, 1] > logits[:, 0]).nonzero().flatten().tolist())
    assert high <= set(rows.tolist()) or len(high) > most
    assert len(rows) == 64 or (len(rows) >= least and len(rows) % round_to == 0)
    assert len(rows) < max(min(len(high), most), least, 1) + round_to
    assert torch.equal(rows, rows.unique()), "ascending, each row once"
    p_high = logits.softmax(1)[:, 1]
    left_out = torch.ones(64, dtype=torch.bool).scatter_(0, rows, False)
    if len(rows) and left_out.any():
        assert p_high[rows].min() >= p_high[left_out].max()


@pytest.mark.parametrize("seed", range(8))
def test_unsure_rows_are_those_of_high_entropy_among_the_dropped(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(64, 2, generator=g)
    rows = preserved(logits, 0, 64, 1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    expected = {i for i in range(64) if i not in rows.tolist() and entropy[i] > 0.6}
    assert set(uncertain(logits, rows, 0.6, 1).tolist()) == expected
    filled = uncertain(logits, rows, 0.6, 8)
    assert expected <= set(filled.tolist())
    assert not set(filled.tolist()) & set(rows.tolist())
    assert len(filled) in (-(-len(expected) // 8) * 8, 64 - len(rows))


def test_filters_are_the_papers_and_keyed_by_the_seed() -> None:
    assert [filter_for(1, 28), filter_for(3, 32), filter_for(3, 224)] == ["lenet", "resnet8", "resnet10"]
    random = torch.get_rng_state()
    a, b, c = (build_filter("resnet8", 3, 16, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(random, torch.get_rng_state())
    first = [next(net.parameters()) for net in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    convs = {name: [m for m in net.modules() if isinstance(m, nn.Conv2d)] for name, net in
             ((n, build_filter(n, 3, 64, 64, 0)) for n in ("lenet", "resnet8", "resnet10"))}  # fmt: skip
    assert [(m.out_channels, m.kernel_size[0]) for m in convs["lenet"]] == [(6, 3), (16, 3)]
    assert [m.out_channels for m in convs["resnet8"]] == [16, 16, 16, 32, 32, 64, 64]
    assert [m.out_channels for m in convs["resnet10"] if m.kernel_size != (1, 1)] == [
        64, 64, 64, 128, 128, 256, 256, 512, 512,
    ]  # fmt: skip
    for name in ("lenet", "resnet8", "resnet10"):
        assert build_filter(name, 3, 64, 64, 0)(torch.randn(4, 3, 64, 64)).shape == (4, 2)
    with pytest.raises(UnsupportedError, match="larger scale"):
        build_filter("lenet", 1, 3, 3, 0)


# -- the controller


def run_controller(
    ratio: float, batches: int, decay: float = 1.0
) -> tuple[EarlyInstanceFiltering, list[float]]:
    method = with_oracle(
        told(
            EarlyInstanceFiltering(
                high_ratio=ratio, scale=1.0, warmup=0, min_keep=0, min_share=0.0, first_threshold=2.3
            )
        )
    )
    g, shares = torch.Generator().manual_seed(int(100 * ratio)), []
    for step in range(batches):
        before = method.counts_["true_high"]
        losses = torch.randn(128, generator=g).exp() * decay**step
        method._session.step(*as_images(losses))
        shares.append((method.counts_["true_high"] - before) / 128)
    return method, shares


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_controller_brings_true_highs_to_the_wanted_share(ratio: float) -> None:
    _, shares = run_controller(ratio, 500)
    assert sum(shares[-100:]) / 100 == pytest.approx(ratio, abs=0.02)


def test_controller_follows_falling_losses() -> None:
    method, shares = run_controller(0.3, 800, decay=0.998)
    assert sum(shares[-100:]) / 100 == pytest.approx(0.3, abs=0.04)
    quantile = math.exp(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.7)).item()) * 0.998**800
    assert method.threshold_ == pytest.approx(quantile, rel=0.15)


def test_a_share_near_one_keeps_everything() -> None:
    method, _ = run_controller(0.999, 700)
    before = method.counts_["kept"]
    g = torch.Generator().manual_seed(3)
    for _ in range(50):
        method._session.step(*as_images(torch.randn(128, generator=g).exp()))
    assert (method.counts_["kept"] - before) / (50 * 128) > 0.985


def test_threshold_moves_by_a_window_of_n_batches() -> None:
    method = only(
        told(EarlyInstanceFiltering(high_ratio=0.5, scale=1.0, window=3, raise_by=1.1, lower_by=0.8))
    )
    method.threshold_ = 1.0
    expected = 1.0
    counts = [4, 0, 2, 1, 4, 4, 0, 0]
    for step, count in enumerate(counts):
        method._control(count, 4)
        share = sum(counts[max(0, step - 2) : step + 1]) / (4 * min(3, step + 1))
        expected *= 1.1 if share >= 0.5 else 0.8
        assert method.threshold_ == pytest.approx(expected)


def test_first_threshold_is_the_loss_of_an_untrained_model() -> None:
    session = on_images(EarlyInstanceFiltering(warmup=5))
    session.step(*images(16, 1))
    assert only(session).threshold_ in (
        pytest.approx(math.log(4) * 1.005),
        pytest.approx(math.log(4) / 1.005),
    )


# -- the filter learns


def pessimist(use_uncertain: bool, bias: float = 0.2, min_keep: int = 0) -> EarlyInstanceFiltering:
    """Return a method whose filter starts by calling everything low; brightness tells the loss."""
    session = told(EarlyInstanceFiltering(warmup=0, min_keep=min_keep, min_share=0.0, use_uncertain=use_uncertain, filter="lenet",
                                          scale=1.0, filter_lr=0.02, first_threshold=1.0, raise_by=1.02))  # fmt: skip
    method = only(session)
    head = method.filter_.fc3
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([bias, -bias]))
    return method


def kept_share(method: EarlyInstanceFiltering, batches: int, last: int) -> float:
    g = torch.Generator().manual_seed(0)
    for step in range(batches):
        if step == batches - last:
            before = method.counts_["kept"]
        method._session.step(*as_images((torch.randn(64, generator=g) / 2).exp()))
    return (method.counts_["kept"] - before) / (last * 64)


def test_without_unsure_samples_a_filter_that_drops_all_stalls() -> None:
    method = pessimist(use_uncertain=False)
    assert kept_share(method, 100, 100) == 0.0
    assert method._session.counters["updates"] == 0


def test_unsure_samples_bring_the_filter_back() -> None:
    assert kept_share(pessimist(use_uncertain=True), 500, 100) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("min_share", "max_share", "kept"), [(None, 1.0, 0.3), (0.5, 1.0, 0.5), (0.0, 1.0, 0.0)]
)
def test_a_filter_that_calls_nothing_high_cannot_starve_the_model(
    min_share: float | None, max_share: float, kept: float
) -> None:
    method = EarlyInstanceFiltering(
        warmup=0, min_keep=0, min_share=min_share, max_share=max_share, first_threshold=1.0
    )
    session = on_images(method)
    acting = session.methods[0]
    with torch.no_grad():
        acting.filter_.fc.bias.copy_(torch.tensor([9.0, -9.0]))
    x, y = images(16, 0)
    session.step(x, y, torch.arange(16))
    assert session.counters["backward"] == -(-16 * kept // 1)


def test_max_share_bounds_what_a_filter_that_calls_everything_high_keeps() -> None:
    session = on_images(EarlyInstanceFiltering(warmup=0, max_share=0.5, first_threshold=1.0))
    with torch.no_grad():
        session.methods[0].filter_.fc.bias.copy_(torch.tensor([-9.0, 9.0]))
    x, y = images(16, 0)
    session.step(x, y, torch.arange(16))
    assert session.counters["backward"] == 8


def test_min_keep_brings_back_even_a_certain_filter() -> None:
    sure = pessimist(use_uncertain=True, bias=4.0)
    assert kept_share(sure, 100, 100) == 0.0
    assert kept_share(pessimist(use_uncertain=True, bias=4.0, min_keep=8), 500, 100) == pytest.approx(
        0.3, abs=0.05
    )


def test_losses_above_the_upper_quantile_teach_nothing() -> None:
    losses = torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.5
    for cut, taught in ((None, 16), (0.75, 12)):
        session = told(EarlyInstanceFiltering(scale=1.0, warmup=5, first_threshold=1.0, upper_quantile=cut))
        method, logits = only(session), torch.zeros(16, 2, requires_grad=True)
        method._judge = lambda images, trains, logits=logits: logits  # type: ignore[method-assign]
        session.step(*as_images(losses))
        assert logits.grad is not None
        rows = logits.grad.abs().sum(dim=1) > 0
        assert torch.equal(rows, losses <= losses.sort().values[taught - 1])
        assert method.counts_["true_high"] == int((losses[rows] >= 1.0).sum())


# -- in the step


def test_warmup_trains_on_everything_and_is_at_most_a_tenth_of_the_run() -> None:
    for total, expected in ((None, 6), (16 * 30, 3)):
        session = on_images(
            EarlyInstanceFiltering(warmup=6, min_keep=0, min_share=0.0, first_threshold=1.0),
            total_samples=total,
        )
        plain = on_images(None)
        for step in range(expected):
            assert session.step(*images(16, step)).item() == pytest.approx(
                plain.step(*images(16, step)).item()
            )
        assert only(session).counts_["judged"] == 0
        assert only(session).counts_["filter_steps"] == expected
        assert not any(session.witness()["early_instance_filtering"].values())
        session.step(*images(16, expected))
        assert only(session).counts_["judged"] == 16


def test_unsure_samples_change_neither_gradients_nor_running_statistics() -> None:
    results = []
    for use_uncertain in (True, False):
        session = on_images(EarlyInstanceFiltering(warmup=0, use_uncertain=use_uncertain, entropy=0.0))
        session.step(*images(16, 3))
        results.append((session, {n: p.grad for n, p in session.model.named_parameters()}))
    (looked, a), (blind, b) = results
    assert only(looked).counts_["uncertain"] > 0
    assert only(blind).counts_["uncertain"] == 0
    for name, gradient in a.items():
        other = b[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other), name
    for name, value in looked.model.state_dict().items():
        assert torch.equal(value, blind.model.state_dict()[name]), name


def test_running_statistics_are_those_of_the_preserved_samples() -> None:
    session = on_images(EarlyInstanceFiltering(warmup=0, entropy=0.0))
    model = copy.deepcopy(session.model)
    batch = copy.deepcopy(only(session)).select(Batch(*images(16, 3)))
    assert 0 < len(batch) < 16
    model(batch.inputs)
    session.step(*images(16, 3))
    buffers = dict(session.model.named_buffers())
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_counters_agree_with_the_session() -> None:
    session = on_images(EarlyInstanceFiltering(warmup=2, min_keep=2, min_share=0.0))
    forwards = 0

    def count(module: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        nonlocal forwards
        forwards += 0 if module.training else len(given[0])

    session.model.register_forward_hook(count)
    for step in range(12):
        session.step(*images(16, step))
    seen = session.witness()["early_instance_filtering"]
    assert seen["judged"] == 10 * 16 == seen["kept"] + seen["dropped"]
    assert seen["dropped"] > 0
    assert session.counters["backward"] == session.counters["forward"] == 12 * 16 - seen["dropped"]
    assert seen["uncertain"] == forwards
    assert seen["filter_steps"] == 12


def test_an_empty_selection_skips_the_update() -> None:
    session = on_images(
        EarlyInstanceFiltering(warmup=0, min_keep=0, min_share=0.0, first_threshold=1.0, entropy=0.0)
    )
    method = only(session)
    assert isinstance(method.filter_, ResNet)
    with torch.no_grad():
        method.filter_.fc.weight.zero_()
        method.filter_.fc.bias.copy_(torch.tensor([0.1, -0.1]))
    before = copy.deepcopy(session.model.state_dict())
    loss = session.step(*images(16, 0))
    assert session.counters["updates"] == 0
    assert loss.item() > 0, "the loss of the unsure samples"
    assert method.counts_["filter_steps"] == 1
    for name, value in session.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_everything_kept_is_plain_training() -> None:
    plain, filtering = (
        on_images(None),
        on_images(EarlyInstanceFiltering(warmup=0, min_keep=16, min_share=0.0)),
    )
    for session in (plain, filtering):
        for step in range(5):
            session.step(*images(16, step))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, filtering.model.state_dict()[name]), name
    assert only(filtering).counts_["filter_steps"] == 5


def test_train_every_trains_the_filter_on_every_third_batch() -> None:
    session = on_images(EarlyInstanceFiltering(warmup=0, train_every=3, entropy=0.0))
    for step in range(7):
        weights = [p.clone() for p in only(session).filter_.parameters()]
        unsure = only(session).counts_["uncertain"]
        session.step(*images(16, step))
        moved = any(
            not torch.equal(a, b) for a, b in zip(weights, only(session).filter_.parameters(), strict=True)
        )
        assert moved == (step % 3 == 0)
        assert only(session).counts_["uncertain"] == unsure or step % 3 == 0
    assert only(session).counts_["uncertain"] > 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resume_keeps_the_same_samples_bit_for_bit(memory_format: torch.memory_format) -> None:
    def run(session: Session, start: int, stop: int) -> list[tuple[float, int]]:
        out = []
        for step in range(start, stop):
            x, y = images(16, "r", step)
            loss = session.step(x.contiguous(memory_format=memory_format), y).item()
            out.append((loss, only(session).counts_["kept"]))
        return out

    def fresh() -> Session:
        return on_images(EarlyInstanceFiltering(warmup=4, raise_by=1.02, min_keep=2, min_share=0.0), seed=5)

    whole = fresh()
    run(whole, 0, 20)
    tensors, skeleton = pack(whole.state_dict())
    state = unpack({k: v.clone() for k, v in tensors.items()}, skeleton)
    expected = run(whole, 20, 70)
    again = fresh()
    again.load_state_dict(state)
    assert run(again, 20, 70) == expected
    assert len({kept for _, kept in expected}) > 25, "the counts kept vary, so equality says something"


def test_raw_losses_label_the_filter_under_label_smoothing() -> None:
    session = on_images(EarlyInstanceFiltering(warmup=3), loss=torch.nn.functional.cross_entropy)
    method = only(session)
    outputs, targets = torch.tensor([[9.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
    assert method._loss(outputs, targets).item() < 0.001
    from hasten.loss import cross_entropy

    smooth = on_images(EarlyInstanceFiltering(warmup=3), loss=cross_entropy(0.2))
    assert smooth.loss(outputs, targets).item() > 1
    assert only(smooth)._loss(outputs, targets).item() == pytest.approx(
        F.cross_entropy(outputs, targets).item()
    )


def test_bad_settings_are_listed_together_and_unusable_sessions_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        EarlyInstanceFiltering(high_ratio=1.0, raise_by=1.0, lower_by=1.5, window=0, entropy=0.8, filter="vgg",
                               round_to=0, upper_quantile=1.0, scale=0.0, filter_lr=0.0, train_every=0)  # fmt: skip
    for name in ("high_ratio", "raise_by", "lower_by", "window", "entropy", "filter", "round_to", "upper_quantile",
                 "scale", "filter_lr", "train_every"):  # fmt: skip
        assert name in str(caught.value)

    def scalar(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()

    with pytest.raises(UnsupportedError, match='reduction="none"'):
        on_images(EarlyInstanceFiltering(), loss=scalar)
    flat = nn.Linear(8, 4)
    with pytest.raises(UnsupportedError, match="images"):
        Session(flat, SGD(flat.parameters(), 0.1), [EarlyInstanceFiltering()],
                sample=(torch.rand(4, 8), torch.zeros(4, dtype=torch.long)))  # fmt: skip
