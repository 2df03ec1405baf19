"""Lookahead (training_recipes.md 9.6) and EMA: exact moves, buffers included, state that round-trips."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hasten.errors import CheckpointError, SettingsError
from hasten.optim import EMA, Lookahead, lookahead_decay
from hasten.optim.average import float_tensors


def net(seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    move(model, seed)
    return model


def move(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in float_tensors(model).values():
            value.copy_(torch.rand(value.shape, generator=draw))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in float_tensors(model).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
def test_after_an_update_the_net_is_the_slow_weights(decay: float) -> None:
    model = net(0)
    lookahead = Lookahead(model, 100)
    slow = state(model)
    move(model, 1)
    fast = state(model)
    lookahead.apply(model, decay)
    assert equal(state(model), lookahead.slow)
    for key, value in lookahead.slow.items():
        assert torch.allclose(value, decay * slow[key] + (1 - decay) * fast[key], atol=1e-6)
    if decay == 1:
        assert equal(lookahead.slow, slow)
    if decay == 0:
        assert equal(state(model), fast)


def test_running_statistics_are_part_of_it_and_counters_are_not() -> None:
    lookahead = Lookahead(net(), 10)
    assert {"1.running_mean", "1.running_var"} <= set(lookahead.slow)
    assert "1.num_batches_tracked" not in lookahead.slow


@pytest.mark.parametrize("total", [10, 97])
def test_decay_follows_the_cube_of_progress(total: int) -> None:
    assert lookahead_decay(0, total) == 0
    assert lookahead_decay(total, total) == pytest.approx(0.95**5)
    assert lookahead_decay(total // 2, total) == pytest.approx(0.95**5 * (total // 2 / total) ** 3)
    values = [lookahead_decay(step, 64) for step in (8, 16, 32, 64)]
    assert [b / a for a, b in itertools.pairwise(values)] == pytest.approx([8, 8, 8])


def test_updates_come_every_five_steps_and_at_the_end() -> None:
    model = net()
    lookahead = Lookahead(model, 12)
    acted = [step for step in range(1, 13) if (move(model, step), lookahead.update(model, step))[1]]
    assert acted == [5, 10, 12]
    slow = {key: value.clone() for key, value in lookahead.slow.items()}
    move(model, 99)
    lookahead.update(model, 12)
    assert equal(state(model), slow)


def test_lookahead_and_ema_resume_exactly() -> None:
    def run(stop: int) -> tuple[nn.Module, Lookahead, EMA]:
        model = net()
        lookahead, ema = Lookahead(model, 20), EMA(model, 0.9)
        for step in range(1, stop + 1):
            one(model, lookahead, ema, step)
        return model, lookahead, ema

    def one(model: nn.Module, lookahead: Lookahead, ema: EMA, step: int) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9).add_(0.01 * step)
        lookahead.update(model, step)
        ema.update(model)

    whole, slow, average = run(20)
    model, begun, begun_ema = run(13)
    fresh = net(5)
    lookahead, ema = Lookahead(fresh, 20), EMA(fresh, 0.9)
    fresh.load_state_dict(model.state_dict())
    lookahead.load_state_dict(begun.state_dict())
    ema.load_state_dict(begun_ema.state_dict())
    for step in range(14, 21):
        one(fresh, lookahead, ema, step)
    assert equal(state(fresh), state(whole))
    assert equal(lookahead.slow, slow.slow)
    assert equal(ema.average, average.average)


def test_a_model_of_another_shape_is_refused_with_the_names() -> None:
    lookahead, ema = Lookahead(net(), 10), EMA(net(), 0.9)
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        lookahead.apply(other, 0.5)
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        ema.update(other)
    with pytest.raises(CheckpointError, match="missing"):
        lookahead.load_state_dict({"slow": {}})


def test_ema_is_the_weighted_sum_of_what_it_saw() -> None:
    model = net(0)
    ema = EMA(model, 0.8, warmup=False)
    expected = state(model)
    for seed in range(1, 6):
        move(model, seed)
        ema.update(model)
        expected = {key: 0.8 * value + 0.2 * float_tensors(model)[key] for key, value in expected.items()}
    assert all(torch.allclose(ema.average[key], expected[key], atol=1e-6) for key in expected)


def test_ema_with_warmup_forgets_the_start() -> None:
    """After t updates with decay t/(t+10) the start has the weight 1/binomial(t+10, 10), almost nothing."""
    model = net(0)
    ema = EMA(model, 0.9999)
    move(model, 1)
    for _ in range(20):
        ema.update(model)
    assert all(torch.allclose(ema.average[key], value, atol=1e-5) for key, value in state(model).items())


def test_weights_of_16_bits_are_averaged_in_float32() -> None:
    model = nn.Linear(2, 2).bfloat16()
    ema = EMA(model, 0.999, warmup=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.average["weight"].fill_(0.0)
    for _ in range(100):
        ema.update(model)
    expected = 1 - 0.999**100  # in bfloat16 the average would stand still where steps are below its own
    assert torch.allclose(ema.average["weight"], torch.full((2, 2), expected), rtol=1e-4)
    ahead = Lookahead(model, 10)
    assert {slow.dtype for slow in ahead.slow.values()} == {torch.float32}
    ahead.update(model, 5)
    assert model.weight.dtype == torch.bfloat16


def test_the_average_is_lent_for_a_block() -> None:
    model = net(0)
    ema = EMA(model, 0.5)
    move(model, 1)
    own = state(model)
    with ema.applied(model):
        assert equal(state(model), ema.average)
    assert equal(state(model), own)
    ema.copy_to(model)
    assert equal(state(model), ema.average)


def test_settings_out_of_range() -> None:
    with pytest.raises(SettingsError):
        EMA(net(), 1.0)
    with pytest.raises(SettingsError):
        Lookahead(net(), 0)
