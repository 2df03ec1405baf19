"""Selective-Backprop: percentiles, selection rate, the queue, stale losses, and a scoring pass without traces."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hasten import keyed
from hasten.checkpoint import pack, unpack
from hasten.contract import Batch
from hasten.errors import NonFiniteError, SettingsError, UnsupportedError
from hasten.methods.samples.selective_backprop import SelectiveBackprop, percentile, probabilities
from hasten.session import Session


class Passes(nn.Module):
    """Returns its input times a weight that starts at 1, so that an input can say what its loss will be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def first_value(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the first output of each sample as its loss."""
    each = outputs[:, 0]
    return each.mean() if reduction == "mean" else each


def told(method: SelectiveBackprop, n: int = 8, **more: Any) -> Session:
    """Return a session in which a sample's loss is its first input; nothing is learnt."""
    model = Passes()
    sample = (torch.rand(n, 2), torch.zeros(n, dtype=torch.long))
    return Session(model, SGD(model.parameters(), lr=0.0), [method], sample=sample, loss=first_value, **more)


def network(seed: int = 0) -> nn.Module:
    """Return a small network with batch norm and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.0),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip


def images(n: int, *key: int | str) -> tuple[Tensor, Tensor]:
    g = keyed.generator("images", *key)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 4, (n,), generator=g)


def on_images(method: SelectiveBackprop | None, seed: int = 0, n: int = 16) -> Session:
    model = network()
    methods = [] if method is None else [method]
    return Session(
        model, SGD(model.parameters(), lr=0.05, momentum=0.9), methods, sample=images(n, 0), seed=seed
    )


def only(session: Session) -> SelectiveBackprop:
    (method,) = session.methods
    assert isinstance(method, SelectiveBackprop)
    return method


@pytest.mark.parametrize("seed", range(5))
def test_percentile_counts_strictly_smaller_losses(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    history = torch.randint(0, 30, (257,), generator=g).float()  # with many ties
    losses = torch.randint(-2, 33, (40,), generator=g).float()
    expected = [sum(h < x for h in history.tolist()) / 257 for x in losses.tolist()]
    assert percentile(losses, history).tolist() == pytest.approx(expected, abs=1e-6)


def test_percentile_of_the_largest_loss_ever_is_one_less_than_all() -> None:
    history = torch.cat([torch.rand(1023), torch.tensor([2.0])])
    assert percentile(torch.tensor([2.0]), history).item() == pytest.approx(1023 / 1024)


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.0])
def test_selection_rate_is_one_over_beta_plus_one(beta: float) -> None:
    session = told(SelectiveBackprop(beta=beta, prime_epochs=0), n=128)
    g = torch.Generator().manual_seed(int(beta))
    for _ in range(250):
        session.step(torch.randn(128, 2, generator=g).exp(), torch.zeros(128, dtype=torch.long))
    counts = session.witness()["selective_backprop"]
    assert counts["kept"] + counts["dropped"] == counts["scored"] == 250 * 128
    assert counts["kept"] / counts["scored"] == pytest.approx(1 / (beta + 1), abs=0.02)


def test_selection_follows_the_probability_of_each_loss() -> None:
    """Among losses of percentile q, a share q^beta is selected (z-test in ten bins)."""
    session = told(SelectiveBackprop(beta=2.0, prime_epochs=0, history=100_000), n=1000)
    trained: list[Tensor] = []
    session.model.register_forward_hook(lambda m, i, o: trained.append(i[0][:, 0]) if m.training else None)
    g = torch.Generator().manual_seed(1)
    for _ in range(100):
        session.step(torch.rand(1000, 2, generator=g), torch.zeros(1000, dtype=torch.long))
    session.end_epoch()
    selected = torch.histc(torch.cat(trained), bins=10, min=0, max=1)
    lower = torch.arange(10) / 10
    p = ((lower + 0.1) ** 3 - lower**3) / 3 * 10  # mean of q^2 over the bin
    z = (selected / 10_000 - p) / (p * (1 - p) / 10_000).sqrt()
    assert z.abs().max() < 4.5, z


def test_sampling_min_is_a_floor() -> None:
    losses = torch.rand(64)
    p = probabilities(losses, losses, 3.0, 0.2)
    assert p.min() == pytest.approx(0.2)
    assert torch.equal(p > 0.2, percentile(losses, losses) ** 3 > 0.2)


def test_beta_zero_without_priming_is_plain_training_also_with_a_short_last_batch() -> None:
    plain, selecting = on_images(None), on_images(SelectiveBackprop(beta=0.0, prime_epochs=0))
    for session in (plain, selecting):
        for epoch in range(2):
            session.start_epoch(epoch)
            for step, n in enumerate((16, 16, 8)):
                session.step(*images(n, epoch, step))
            session.end_epoch()
    assert only(selecting).counts_ == {"scored": 80, "kept": 80, "dropped": 0}
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, selecting.model.state_dict()[name]), name


def test_every_selected_sample_trains_once_in_full_batches() -> None:
    session = told(SelectiveBackprop(beta=1.0, prime_epochs=0), n=32)
    trained: list[Tensor] = []
    session.model.register_forward_hook(lambda m, i, o: trained.append(i[0][:, 1]) if m.training else None)
    g = torch.Generator().manual_seed(0)
    for step in range(40):
        number = torch.arange(step * 32, (step + 1) * 32).float()
        x = torch.stack([torch.rand(32, generator=g), number], dim=1)
        session.step(x, torch.zeros(32, dtype=torch.long))
    session.end_epoch()
    kept = int(session.witness()["selective_backprop"]["kept"])
    assert [len(t) for t in trained[:-1]] == [32] * (kept // 32)
    order = torch.cat(trained)
    assert len(order) == kept
    assert Counter(order.tolist()).most_common(1)[0][1] == 1
    assert torch.equal(order, order.sort().values), "the order of the stream is kept"
    assert session.counters["backward"] == kept


def test_priming_trains_on_everything_without_scoring_and_fills_the_history() -> None:
    session = on_images(SelectiveBackprop(prime_epochs=1, history=40))
    session.start_epoch(0)
    for step in range(4):
        session.step(*images(16, step))
    assert session.witness()["selective_backprop"] == {"scored": 0, "kept": 0, "dropped": 0}
    assert session.counters["backward"] == 64
    assert len(only(session).losses_) == 40
    session.start_epoch(1)
    session.step(*images(16, 9))
    assert session.witness()["selective_backprop"]["scored"] == 16


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_scoring_leaves_no_trace(scale: float) -> None:
    session = on_images(SelectiveBackprop(prime_epochs=0, score_scale=scale))
    session.model[3].p = 0.5  # type: ignore[index, union-attr]
    before, random = copy.deepcopy(session.model.state_dict()), torch.get_rng_state()
    only(session).select(Batch(*images(16, 1)))
    for name, value in session.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in session.model.parameters())
    assert session.model.training


@pytest.mark.parametrize("n", [2, 3])
def test_stale_scores_each_sample_every_n_epochs_and_keeps_its_own_loss(n: int) -> None:
    session = told(SelectiveBackprop(stale_epochs=n, prime_epochs=0), n=20)
    value = torch.rand(100, generator=torch.Generator().manual_seed(n))
    forwards = 0

    def count(module: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        nonlocal forwards
        forwards += 0 if module.training else len(given[0])

    session.model.register_forward_hook(count)
    for epoch in range(4 * n):
        session.start_epoch(epoch)
        order = torch.from_numpy(keyed.permutation(100, epoch))
        for index in order.split(20):
            x = torch.stack([value[index], index.float()], dim=1)
            session.step(x, torch.zeros(20, dtype=torch.long), index)
        session.end_epoch()
        assert torch.equal(only(session).stale_["losses"][:100], value)
    assert forwards == only(session).counts_["scored"] == 4 * n * 100 // n


def test_stale_uses_the_old_loss_until_it_is_n_epochs_old() -> None:
    session = told(SelectiveBackprop(stale_epochs=2, prime_epochs=0), n=4)
    index, targets = torch.tensor([5, 2, 7, 0]), torch.zeros(4, dtype=torch.long)
    used = []
    for epoch in range(4):
        session.start_epoch(epoch)
        session.step(torch.full((4, 2), 10.0 + epoch), targets, index)
        used.append(only(session).losses_[-4:].tolist())
    assert used == [[10.0] * 4, [10.0] * 4, [12.0] * 4, [12.0] * 4]


def test_reweighting_makes_the_weighted_sum_unbiased() -> None:
    session = told(
        SelectiveBackprop(beta=2.0, sampling_min=0.1, prime_epochs=0, reweight=True, history=200), n=200
    )
    method, g = only(session), torch.Generator().manual_seed(3)
    x = torch.stack([torch.rand(200, generator=g).square(), torch.rand(200, generator=g)], dim=1)
    sums = []
    for step in range(400):
        session.counters["step"], method.queue_ = step, None
        p = probabilities(x[:, 0], x[:, 0], 2.0, 0.1)
        method.select(Batch(x, torch.zeros(200, dtype=torch.long)))
        chosen = method.queue_
        assert chosen is not None
        assert chosen.weights is not None
        sums.append((chosen.weights * chosen.inputs[:, 1]).sum() / (200 * p.mean()))
    estimate = torch.stack(sums)
    z = (estimate.mean() - x[:, 1].mean()) / (estimate.std() / len(estimate) ** 0.5)
    assert z.abs() < 4, z


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resume_is_bit_identical_with_a_queue_half_full(memory_format: torch.memory_format) -> None:
    def run(session: Session, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            session.start_epoch(step // 5)
            x, y = images(16, "r", step % 5)
            index = torch.arange(16) + 16 * (step % 5)
            losses.append(session.step(x.contiguous(memory_format=memory_format), y, index).item())
        return losses

    def fresh() -> Session:
        return on_images(SelectiveBackprop(beta=1.0, stale_epochs=2))

    whole = fresh()
    run(whole, 0, 12)
    queue = only(whole).queue_
    assert queue is not None
    assert 0 < len(queue) < 16
    tensors, skeleton = pack(whole.state_dict())
    state = unpack({k: v.clone() for k, v in tensors.items()}, skeleton)
    expected = run(whole, 12, 30)
    again = fresh()
    again.load_state_dict(state)
    assert run(again, 12, 30) == expected
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert only(again).counts_ == only(whole).counts_


def test_a_sample_without_a_finite_loss_stops_the_run_and_is_not_dropped() -> None:
    session = told(SelectiveBackprop(prime_epochs=0, beta=0.0), n=8)
    x = torch.rand(8, 2)
    x[3, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        session.step(x, torch.zeros(8, dtype=torch.long))


def test_bad_settings_are_listed_together() -> None:
    with pytest.raises(SettingsError) as caught:
        SelectiveBackprop(beta=-1.0, history=0, sampling_min=2.0, stale_epochs=0, score_scale=3.0)
    for name in ("beta", "history", "sampling_min", "stale_epochs", "score_scale"):
        assert name in str(caught.value)
    with pytest.raises(SettingsError, match="sampling_min above 0"):
        SelectiveBackprop(reweight=True)


def test_refusals_say_what_to_do() -> None:
    session = on_images(SelectiveBackprop(stale_epochs=3, prime_epochs=0))
    with pytest.raises(UnsupportedError, match="index"):
        session.step(*images(16, 1))

    def scalar(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()

    model = network()
    with pytest.raises(UnsupportedError, match='reduction="none"'):
        Session(model, SGD(model.parameters(), 0.1), [SelectiveBackprop()], sample=images(4, 0), loss=scalar)
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    with pytest.raises(UnsupportedError, match="score_scale"):
        Session(
            fixed, SGD(fixed.parameters(), 0.1), [SelectiveBackprop(score_scale=0.5)], sample=images(4, 0)
        )


def test_without_reweighting_the_loss_weights_stay_free_for_others() -> None:
    assert SelectiveBackprop().writes == {"samples"}
    assert SelectiveBackprop(reweight=True, sampling_min=0.1).writes == {"samples", "loss.weights"}
