"""The record recipe: rates, freezing, the two reductions, resume, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from hasten import models
from hasten.errors import SettingsError, UnknownName, UnsupportedError
from hasten.models.record import RecordNet
from hasten.models.record_recipe import RECIPES, RecordTraining, make

Batches = list[tuple[Tensor, Tensor]]


def task(n: int = 24, batch: int = 32, size: int = 12) -> Batches:
    """Batches of four classes that differ in the direction of a wave."""
    draw = torch.Generator().manual_seed(0)
    grid = torch.arange(size).float()
    waves = torch.stack(
        [torch.sin(a * grid[:, None] + b * grid) for a, b in ((1, 0), (0, 1), (1, 1), (1, -1))]
    )
    batches = []
    for _ in range(n):
        labels = torch.randint(0, 4, (batch,), generator=draw)
        noise = torch.randn(batch, 3, size, size, generator=draw)
        batches.append((waves[labels][:, None] + 0.5 * noise, labels))
    return batches


def network(variant: str = "sgd", batches: Batches | None = None) -> RecordNet:
    model = models.build("record-small", num_classes=4, image_size=12, seed=1, variant=variant)
    assert isinstance(model, RecordNet)
    batches = task() if batches is None else batches
    model.init_whitening(torch.cat([x for x, _ in batches]))
    return model


def small(variant: str) -> str:
    return "B2-small" + ("-muon" if variant == "muon" else "")


def train(
    training: RecordTraining, model: nn.Module, batches: Batches, start: int = 0, stop: int | None = None
) -> None:
    for step in range(start, training.total_steps if stop is None else stop):
        x, y = batches[step % len(batches)]
        training.before_step(step)
        training.loss(model(x), y).backward()
        training.update()
        training.after_step(step + 1)


@pytest.mark.parametrize("variant", ["sgd", "muon"])
def test_the_recipe_learns(variant: str) -> None:
    batches = task()
    model = network(variant, batches)
    recipe = dataclasses.replace(RECIPES[small(variant)], batch_size=32)
    train(make(model, len(batches), 2, base=recipe), model, batches)
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    assert right / (32 * len(batches)) > 0.9


@pytest.mark.parametrize("variant", ["sgd", "muon"])
def test_groups_hold_every_trainable_parameter_once(variant: str) -> None:
    model = network(variant)
    training = make(model, 10, base=small(variant))
    held = [id(p) for o in training.optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["B2", "B2-small", "record95", "record96"])
def test_rates_are_the_decoupled_formulas(name: str) -> None:
    recipe = RECIPES[name]
    model = models.build(recipe.model, seed=0)
    assert isinstance(model, RecordNet)
    model.init_whitening(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    groups = {g["name"]: g for g in make(model, 48, base=name).optimizers[0].param_groups}
    scale = 1024 * (1 + 1 / (1 - 0.85))
    shrink = recipe.weight_decay * recipe.batch_size / scale
    assert groups["weights"]["lr"] == pytest.approx(recipe.lr / scale, rel=1e-12)
    assert groups["norm biases"]["lr"] == pytest.approx(64 * recipe.lr / scale, rel=1e-12)
    for group in groups.values():
        assert group["lr"] * group["weight_decay"] == pytest.approx(shrink, rel=1e-12)
    norms = [m.bias for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {id(p) for p in groups["norm biases"]["params"]} == {id(p) for p in norms}


def test_the_published_settings() -> None:
    b2, muon, r96 = RECIPES["B2"], RECIPES["B2-muon"], RECIPES["record96"]
    assert (b2.lr, b2.weight_decay, b2.epochs, b2.batch_size, b2.momentum) == (11.5, 0.0153, 9.9, 1024, 0.85)
    assert (muon.lr, muon.muon_momentum, muon.bias_lr, muon.head_lr) == (0.24, 0.6, 0.053, 0.67)
    assert (muon.batch_size, muon.epochs, muon.lookahead) == (2000, 8.0, False)
    assert (r96.lr, r96.weight_decay, r96.epochs, r96.cutout, r96.translate) == (9.0, 0.012, 37.0, 12, 4)


@pytest.mark.parametrize("variant", ["sgd", "muon"])
def test_whitening_bias_trains_for_three_epochs_only(variant: str) -> None:
    batches = task(4)
    model = network(variant, batches)
    training = make(model, 4, 5, base=small(variant))
    bias = model.whiten.bias
    assert bias is not None
    train(training, model, batches, stop=12)
    frozen = bias.clone()
    assert bool(frozen.any())
    training.lookahead = None  # lookahead averages the bias on; the optimizer must not move it
    train(training, model, batches, 12)
    assert torch.equal(bias, frozen)
    assert not bias.requires_grad


@pytest.mark.parametrize("variant", ["sgd", "muon"])
def test_mean_and_summed_loss_train_alike(variant: str) -> None:
    batches = task(6)
    results = []
    for reduction in ("sum", "mean"):
        model = network(variant, batches).double()
        recipe = dataclasses.replace(RECIPES[small(variant)], batch_size=32)
        doubled = [(x.double(), y) for x, y in batches]
        train(make(model, 6, 1, base=recipe, reduction=reduction), model, doubled)
        results.append(model)
    for (key, a), (_, b) in zip(results[0].named_parameters(), results[1].named_parameters(), strict=True):
        # Muon rounds to bfloat16 inside, where a last-bit difference of its input can show.
        tolerance = 1e-9 if variant == "sgd" else 2e-2
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), key


@pytest.mark.parametrize("variant", ["sgd", "muon"])
@pytest.mark.parametrize("cut", [3, 13])
def test_a_resumed_run_is_the_uninterrupted_one(variant: str, cut: int) -> None:
    batches = task(4)
    whole = network(variant, batches)
    train(make(whole, 4, 5, base=small(variant)), whole, batches)
    first = network(variant, batches)
    begun = make(first, 4, 5, base=small(variant))
    train(begun, first, batches, stop=cut)
    second = network(variant, batches)
    resumed = make(second, 4, 5, base=small(variant))
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(begun.state_dict())
    train(resumed, second, batches, cut)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_shorter_budget_rescales_the_schedule() -> None:
    model = network()
    long, short = make(model, 50, 8, base="B2-small"), make(model, 50, 4, base="B2-small")
    assert (long.total_steps, short.total_steps) == (400, 200)
    assert [short.factor(s) for s in range(200)] == pytest.approx([long.factor(2 * s) for s in range(200)])
    assert short.lookahead is not None
    assert short.lookahead.total == 200


def test_what_does_not_fit_is_refused() -> None:
    model = network()
    with pytest.raises(UnsupportedError, match="variant"):
        make(model, 10, variant="muon")
    with pytest.raises(UnsupportedError, match="LeNet"):
        make(models.build("lenet", seed=0), 10)
    with pytest.raises(UnsupportedError, match="init_whitening"):
        make(models.build("record-small", seed=0), 10)
    with pytest.raises(UnknownName, match="B2-small"):
        make(model, 10, base="B2-smal")
    with pytest.raises(SettingsError) as problem:
        make(model, 0, -1, reduction="none")
    assert all(word in str(problem.value) for word in ("steps_per_epoch", "epochs", "reduction"))
    with pytest.raises(SettingsError, match="contradicts"):
        make(model, 10, variant="muon", base=RECIPES["B2"])
