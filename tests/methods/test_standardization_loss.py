"""The standardization loss is the published divergence, with its gradient, on a network without batch norm."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from hasten import keyed, models
from hasten.contract import Effect, Method, MethodSpec
from hasten.errors import ConflictError, NoEffectError, SettingsError
from hasten.methods.loss.batch_norm_removal import remove_batch_norm
from hasten.methods.loss.standardization_loss import StandardizationLoss, divergence
from hasten.session import Session


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("std", seed), dtype=dtype)


def plain_divergence(x: Tensor, eps: float = 1e-5) -> Tensor:
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims)
    var = (x * x).mean(dims) - mean**2
    return 0.5 * (mean**2 + var - torch.log(var + eps) - 1).sum()


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)


# -- the divergence
def test_it_is_zero_at_mean_0_variance_1_and_positive_elsewhere() -> None:
    z = standardized(random(64, 3, 4, 4, dtype=torch.float64))
    assert abs(divergence(z, eps=1e-12)) < 1e-9
    assert abs(divergence(2 + 3 * z, eps=1e-12) / 3 - 0.5 * (4 + 9 - math.log(9) - 1)) < 1e-6
    assert abs(0.5 * (4 + 9 - math.log(9) - 1) - 4.9014) < 1e-4
    for seed in range(20):
        shift, scale = random(2, seed=seed).tolist()
        assert divergence(shift + math.exp(scale) * z) > 1e-4


def test_it_is_the_kl_divergence_of_two_gaussians() -> None:
    t = np.linspace(-40, 40, 400_001)
    for mean, var in ((2.0, 9.0), (-0.5, 0.3), (1.0, 1.0)):
        p = np.exp(-((t - mean) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)
        log_q = -(t**2) / 2 - 0.5 * math.log(2 * math.pi)
        log_p = -((t - mean) ** 2) / (2 * var) - 0.5 * math.log(2 * math.pi * var)
        kl = np.trapezoid(p * (log_p - log_q), t)
        x = mean + math.sqrt(var) * standardized(random(64, 1, 2, 2, dtype=torch.float64))
        assert abs(float(divergence(x, eps=1e-12)) - kl) < 1e-6


@pytest.mark.parametrize(("shape", "dim"), [((6, 3, 4, 5), 1), ((7, 3), -1), ((4, 5, 3), -1), ((4, 3, 6), 1)])
def test_its_gradient_is_that_of_autograd_and_of_finite_differences(shape: tuple[int, ...], dim: int) -> None:
    x = (1 + 2 * random(*shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: 3 * divergence(t, dim), (x,))
    (ours,) = torch.autograd.grad(divergence(x, dim), x)
    (theirs,) = torch.autograd.grad(plain_divergence(x.movedim(dim, 1)), x)
    assert (ours - theirs).abs().max() < 1e-9


def test_order_and_layout_do_not_matter_and_channels_add_up() -> None:
    x = 0.5 + 2 * random(8, 3, 6, 6, dtype=torch.float64)
    order = torch.randperm(8, generator=keyed.generator("order"))
    assert abs(divergence(x[order]) - divergence(x)) < 1e-12
    assert abs(divergence(x.flip(2).transpose(2, 3)) - divergence(x)) < 1e-12
    assert abs(divergence(x.to(memory_format=torch.channels_last)) - divergence(x)) < 1e-12
    assert abs(divergence(torch.cat([x, x], 1)) - 2 * divergence(x)) < 1e-12


def test_minimising_it_standardizes() -> None:
    x = 3 + 5 * random(256, 4, dtype=torch.float64)
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        divergence(scale * x + shift).backward()
        optimizer.step()
    y = scale * x + shift
    assert y.mean(0).abs().max() < 1e-2
    assert (y.var(0, correction=0) - 1).abs().max() < 1e-2


def test_moments_of_bfloat16_are_float32_ones() -> None:
    x = (100 + random(512, 2, 8, 8)).bfloat16().requires_grad_()
    d = divergence(x)
    assert d.dtype == torch.float32
    assert abs(d / plain_divergence(x.double()) - 1) < 1e-3
    (grad,) = torch.autograd.grad(d, x)
    assert grad.dtype == torch.bfloat16


def test_a_dead_channel_stays_finite() -> None:
    x = random(4, 3, 5, 5)
    x[:, 1] = 0
    x.requires_grad_()
    d = divergence(x)
    (grad,) = torch.autograd.grad(d, x)
    assert d.isfinite()
    assert grad.isfinite().all()


# -- the method
def network(*, norm: bool = True, inplace: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, 8), (8, 12)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(c_out)] if norm else []
            layers += [nn.ReLU(inplace=inplace)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


def seasoned(model: nn.Module) -> nn.Module:
    """Give batch norms statistics, scales and shifts as after some training."""
    for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        with torch.no_grad():
            m.weight.copy_(1 + 0.3 * random(m.num_features, seed=i))
            m.bias.copy_(random(m.num_features, seed=i + 50))
        m.running_mean.copy_(random(m.num_features, seed=i + 100))  # type: ignore[union-attr]
        m.running_var.copy_(random(m.num_features, seed=i + 150).exp())  # type: ignore[union-attr]
        m.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return model


def start(model: nn.Module, size: int = 8, **settings: Any) -> tuple[Session, Tensor, Tensor]:
    x, y = random(6, 3, size, size, seed=5), torch.arange(6) % 4
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Session(model, optimizer, [StandardizationLoss(**settings)], sample=(x, y), seed=0), x, y


def test_the_loss_is_the_task_plus_lambda_times_the_sum_over_layers() -> None:
    session, x, y = start(network(), lam=0.3)
    model = copy.deepcopy(session.model)
    a = F.conv2d(x, model[0].weight, model[0].bias, padding=1)
    b = F.conv2d(a.relu(), model[3].weight, model[3].bias, padding=1)
    expected = F.cross_entropy(model[8](b.relu().mean((2, 3))), y) + 0.3 * (
        plain_divergence(a) + plain_divergence(b)
    )
    assert abs(session.step(x, y) - expected) < 1e-4
    assert session.witness()["standardization_loss"]["terms"] == 2
    assert list(session.effects["standardization_loss"].touched) == ["0", "3"]
    assert "classifier" in session.effects["standardization_loss"].skipped["8"]


def test_lambda_rel_is_lambda_times_the_channels() -> None:
    a, x, y = start(network(), lambda_rel=2.0)
    b, _, _ = start(network(), lam=2.0 / 20)
    assert a.step(x, y) == b.step(x, y)
    assert "lambda = 0.1" in a.effects["standardization_loss"].saves
    assert "lambda_rel = 2 over 20 channels" in b.effects["standardization_loss"].saves


def test_a_layer_used_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.conv(x).relu())
            out: Tensor = self.fc(x.mean((2, 3)))
            return out

    session, x, y = start(Twice(), lam=1.0)
    session.step(x, y)
    assert session.witness()["standardization_loss"]["terms"] == 2


def test_without_weight_it_is_the_network_without_batch_norm_bit_for_bit() -> None:
    session, x, y = start(network(), lam=0.0)
    plain = network(norm=False)
    plain.load_state_dict(dict(zip(plain.state_dict(), session.model.state_dict().values(), strict=True)))
    optimizer = SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        optimizer.step()
        assert torch.equal(session.step(x, y), loss.detach())
    for a, b in zip(plain.parameters(), session.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fresh_weights_are_kept_bit_for_bit() -> None:
    session, _, _ = start(network())
    assert torch.equal(session.model[0].weight, network()[0].weight)  # type: ignore[index]
    assert not session.model[0].bias.any()  # type: ignore[index]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_taking_batch_norm_out_keeps_the_function_and_so_does_the_export(affine: bool, inplace: bool) -> None:
    model = seasoned(network(inplace=inplace))
    x = random(6, 3, 8, 8, seed=5)
    with torch.no_grad():
        expected = model.eval()(x)
    session, x, y = start(model, affine=affine)
    with session.inference() as forward:
        torch.testing.assert_close(forward(x), expected, rtol=1e-4, atol=1e-5)
    for _ in range(3):
        session.step(x, y)
    plain = session.export()
    assert {type(m) for m in plain.modules()} <= {
        nn.Sequential, nn.Conv2d, nn.Identity, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear
    }  # fmt: skip
    assert not [m for m in plain.modules() if m._forward_hooks or m._forward_pre_hooks]
    with session.inference() as forward, torch.no_grad():
        torch.testing.assert_close(plain(x), forward(x), rtol=1e-4, atol=1e-5)
    session.step(x, y)


def test_parameters_move_with_the_batch_norms_in_the_optimizer() -> None:
    model = network()
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    rest = [p for p in model.parameters() if all(p is not q for q in norms)]
    optimizer = SGD(
        [{"params": rest, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=0.1, momentum=0.9
    )
    x, y = random(6, 3, 8, 8), torch.arange(6) % 4
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    session = Session(model, optimizer, [StandardizationLoss()], sample=(x, y))
    held = optimizer.param_groups[1]["params"]
    assert len(held) == 2
    assert held[0] is session.model[0].bias  # type: ignore[index]
    assert all(any(k is p for p in model.parameters()) for k in optimizer.state)
    kept, _, _ = start(network(), affine=True)
    assert isinstance(kept.model[1].weight, nn.Parameter)  # type: ignore[index]
    assert len(kept.optimizers[0].param_groups[0]["params"]) == 10


@pytest.mark.parametrize("name", ["resnet8", "vgg16", "densenet40", "mobilenet-v1"])
def test_known_networks_lose_the_batch_norms_that_follow_a_layer(name: str) -> None:
    model = seasoned(models.build(name, num_classes=4, in_channels=3, image_size=32, seed=0))
    x = random(4, 3, 32, 32)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with torch.no_grad():
        expected = model.eval()(x)
    session, x, y = start(model, size=32, lambda_rel=0.1)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in session.model.modules())
    effect = session.effects["standardization_loss"]
    assert left == sum("its input is" in r or "read elsewhere" in r for r in effect.skipped.values())
    # in DenseNet every batch norm reads a concatenation or a map that others read too
    assert left == (norms if name == "densenet40" else 0)
    with session.inference() as forward:
        got = forward(random(4, 3, 32, 32))
    assert (got - expected).abs().max() < 1e-2 * expected.abs().max()
    session.step(x, y)
    assert session.witness()["standardization_loss"]["last_penalty"] > 0


def test_a_functional_change_in_place_does_not_spoil_the_gradient() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn(self.conv(x))
            out += x
            logits: Tensor = self.fc(F.relu_(out).mean((2, 3)))
            return logits

    model = Adds()
    session, x, y = start(model, lam=1.0)
    reference = copy.deepcopy(model)
    session.step(x, y)
    a = F.conv2d(x, reference.conv.weight, reference.conv.bias, padding=1)
    logits = F.linear((a + x).relu().mean((2, 3)), reference.fc.weight, reference.fc.bias)
    (F.cross_entropy(logits, y) + plain_divergence(a)).backward()
    torch.testing.assert_close(model.conv.weight.grad, reference.conv.weight.grad, rtol=1e-4, atol=1e-4)


def test_outputs_of_an_image_do_not_depend_on_the_others() -> None:
    session, x, y = start(network())
    session.step(x, y)
    other = x.clone()
    other[0] = 9.0
    with torch.no_grad():
        assert session.model.training
        a, b = session.model(x), session.model(other)
        normed = network()
        c, d = normed(x), normed(other)
    assert torch.equal(a[1:], b[1:])
    assert not torch.equal(c[1:], d[1:])


def test_a_second_reader_of_a_layer_is_noticed() -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            logits: Tensor = self.fc((self.bn(x).relu() + x).mean((2, 3)))
            return logits

    for model in (Forks(), seasoned(Forks())):
        with pytest.raises(NoEffectError, match="bn: skipped, the output of conv is read elsewhere too"):
            start(model)


def test_layers_it_cannot_help_are_left_out_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(NoEffectError, match="normalised by 1"):
        start(model)
    session, _, _ = start(network(norm=False))
    assert session.witness()["standardization_loss"]["batch_norms_removed"] == 0


def test_methods_that_change_the_network_are_refused() -> None:
    class Prunes(Method):
        spec = MethodSpec("prunes", "P", "none", "time per step", "prunes", writes=frozenset({"structure"}))

        def attach(self, session: Session) -> Effect:
            return Effect(touched={"0": "pruned"})

    model = network()
    with pytest.raises(ConflictError, match="dies away"):
        Session(model, SGD(model.parameters(), lr=0.1), [StandardizationLoss(), Prunes()],
                sample=(random(2, 3, 8, 8), torch.arange(2)))  # fmt: skip


def test_wrapping_for_distributed_training_comes_after_taking_batch_norm_out() -> None:
    model = network()
    x = random(2, 3, 8, 8)
    optimizer = SGD(model.parameters(), lr=0.1)
    seen = remove_batch_norm(model, x, [optimizer])
    assert seen.pairs == {"0": "1", "3": "4"}
    session = Session(model, optimizer, [StandardizationLoss()], sample=(x, torch.arange(2)))
    assert session.effects["standardization_loss"].touched["0"] == "8 channels standardized"


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        StandardizationLoss(lam=-1.0, lambda_rel=float("nan"), eps=0.0, affine=2)  # type: ignore[arg-type]
    for name in ("lam is -1", "lambda_rel", "eps", "affine"):
        assert name in str(error.value)
