"""Mixed precision keeps what must be exact, scales losses as published, and never goes slower in silence."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from hasten import keyed
from hasten.contract import Effect, Method, MethodSpec
from hasten.errors import CheckpointError, NonFiniteError, SettingsError, UnsupportedError
from hasten.methods.forward import machine_dtype
from hasten.methods.forward.mixed_precision import MixedPrecision, not_channels_last
from hasten.session import Session

LAYERS = 4


def net(seed: int = 0, width: int = 16) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 5),
        )


def batch(seed: int = 0, n: int = 16, size: int = 12) -> tuple[Tensor, Tensor]:
    g = keyed.generator("test", seed)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(5, (n,), generator=g)


def session(model: nn.Module | None = None, *methods: Method, lr: float = 0.05, **settings: Any) -> Session:
    model = net() if model is None else model
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
    return Session(model, optimizer, methods, sample=batch(), **settings)


def bf16(**changes: Any) -> MixedPrecision:
    return MixedPrecision(**{"dtype": "bfloat16", "force": True, **changes})


def fp16(**changes: Any) -> MixedPrecision:
    return MixedPrecision(**{"dtype": "float16", "force": True, "channels_last": False, **changes})


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_gradients_point_where_float32_ones_do(seed: int) -> None:
    x, y = batch(seed, n=64)
    plain, fast = session(net(seed), lr=0.0), session(net(seed), bf16(), lr=0.0)
    plain.step(x, y)
    fast.step(x, y)
    for name, layer in plain.model.named_children():
        theirs = fast.model.get_submodule(name)
        a, b = ([p.grad.flatten() for p in m.parameters() if p.grad is not None] for m in (layer, theirs))
        if a:
            cosine = F.cosine_similarity(torch.cat(a), torch.cat(b), dim=0)
            assert cosine > 0.99, f"{name}: {cosine}"
    kept = [
        *fast.model.state_dict().values(),
        *[v["momentum_buffer"] for v in fast.optimizers[0].state.values()],
    ]
    assert {t.dtype for t in kept} <= {torch.float32, torch.int64}


def test_the_convolutions_really_run_in_bfloat16() -> None:
    s = session(None, bf16())
    seen = []
    for module in s.model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    s.step(*batch())
    assert seen == [torch.bfloat16] * LAYERS
    assert s.effects["mixed_precision"].touched["0"] == "bfloat16, channels_last"
    assert s.witness()["mixed_precision"]["forward_bfloat16"] == 1


def test_float16_skips_an_overflow_halves_the_scale_and_doubles_it_after_2000_clean_steps() -> None:
    model = nn.Sequential(nn.Linear(8, 5))
    s = Session(
        model, SGD(model.parameters(), lr=0.01), [fp16()], sample=(torch.randn(4, 8), torch.arange(4))
    )
    scaler = s.methods[0].scaler_  # type: ignore[attr-defined]
    x, y = torch.randn(4, 8, generator=keyed.generator("x")), torch.arange(4)
    bad = model[0].weight.register_hook(lambda g: g * float("inf"))
    before = copy.deepcopy(model.state_dict())
    s.step(x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert scaler.get_scale() == 32768
    assert s.witness()["mixed_precision"]["skipped_updates"] == 1
    bad.remove()
    for _ in range(1999):
        s.step(x, y)
    assert scaler.get_scale() == 32768
    assert not torch.equal(model[0].weight, before["0.weight"])
    s.step(x, y)
    assert scaler.get_scale() == 65536


def test_float16_shows_zeros_instead_of_infinities_and_gives_up_when_the_scale_is_used_up() -> None:
    s = session(None, fp16(init_scale=2.0**-14), check_gradients=True)
    s.model[0].weight.register_hook(lambda g: g * float("nan"))  # type: ignore[index]
    for _ in range(2):
        s.step(*batch())
        assert all(p.grad is not None and not p.grad.any() for p in s.model.parameters())
    with pytest.raises(NonFiniteError, match="loss scale fell"):
        s.step(*batch())


def test_tiny_gradients_vanish_in_float16_without_scaling_and_survive_with_it() -> None:
    gradients = []
    for scale in (1.0, 65536.0):
        model = nn.Sequential(nn.Linear(8, 5, bias=False))
        s = Session(
            model,
            SGD(model.parameters(), lr=0.0),
            [fp16(init_scale=scale)],
            sample=(torch.ones(4, 8), torch.arange(4)),
            loss=lambda outputs, targets: 1e-8 * outputs.sum(),
        )
        s.step(torch.ones(4, 8), torch.arange(4))
        gradients.append(model[0].weight.grad)
    assert not gradients[0].any()
    assert torch.allclose(gradients[1], torch.full((5, 8), 4e-8), rtol=1e-2, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_channels_last_computes_the_same_and_nothing_falls_out_of_it(seed: int) -> None:
    x, _ = batch(seed)
    s = session(net(seed), MixedPrecision(dtype="float32"))
    with torch.no_grad():
        error = (s.model.eval()(x.to(memory_format=torch.channels_last)) - net(seed).eval()(x)).abs().max()
    assert error < 1e-5
    assert not_channels_last(s.model, x) == []
    s.model.train()
    seen = []
    s.model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[index]
    s.step(*batch(seed))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_what_falls_out_of_channels_last_is_named() -> None:
    class Contiguous(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.contiguous()

    model = net()
    model[2] = Contiguous()
    s = session(model, MixedPrecision(dtype="float32"))
    skipped = s.effects["mixed_precision"].skipped
    assert [k for k in skipped if k.startswith("output")] == ["output of 2"]
    assert "parameter 0.weight" in not_channels_last(net(), batch()[0])


def test_grey_images_start_in_channels_last_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(4, 1, 8, 8, generator=keyed.generator("grey"))
    s = Session(
        model,
        SGD(model.parameters(), lr=0.1),
        [MixedPrecision(dtype="float32")],
        sample=(x, torch.arange(4)),
    )
    assert not [k for k in s.effects["mixed_precision"].skipped if k.startswith("output")]
    s.step(x, torch.arange(4))


def fake(ratio: float) -> Any:
    return lambda channels_last, *names: {name: 1.0 if name == "float32" else ratio for name in names}


def test_auto_stays_in_float32_and_says_why_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_dtype, "conv_seconds", fake(3.0))
    s = session(None, MixedPrecision())
    effect = s.effects["mixed_precision"]
    assert "3.00 times as long" in effect.skipped["precision"]
    assert "stays in float32" in effect.skipped["precision"]
    assert set(effect.touched.values()) == {"channels_last"}
    seen = []
    s.model[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))  # type: ignore[index]
    s.step(*batch())
    assert seen == [torch.float32]
    with pytest.raises(UnsupportedError, match=r"float16 convolution takes 3.00 times.*force=True"):
        session(None, MixedPrecision(dtype="float16"))
    monkeypatch.setattr(machine_dtype, "conv_seconds", fake(0.5))
    assert session(None, MixedPrecision()).witness()["mixed_precision"] == {
        "forward_bfloat16": 0,
        "channels_last_batches": 0,
        "skipped_updates": 0,
    }


def test_the_probe_times_every_dtype_it_is_asked_for() -> None:
    seconds = machine_dtype.conv_seconds(True, "float32", "bfloat16")
    assert set(seconds) == {"float32", "bfloat16"}
    assert all(0 < t < 5 for t in seconds.values())


def test_saved_activations_take_half_the_bytes() -> None:
    sizes = []
    for methods in ((MixedPrecision(dtype="float32"),), (bf16(),)):
        s = session(net(width=32), *methods)
        weights = {p.data_ptr() for p in s.model.parameters()}
        seen: dict[int, int] = {}

        def pack(t: Tensor, weights: set[int] = weights, seen: dict[int, int] = seen) -> Tensor:
            if t.data_ptr() not in weights and t.dim() == 4 and t.shape[0] == 16 and t.is_floating_point():
                seen[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            s.step(*batch())
        sizes.append(sum(seen.values()))
    assert 0.45 <= sizes[1] / sizes[0] <= 0.6


def test_checkpoints_cross_between_a_compiled_bfloat16_run_and_plain_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    x, y = batch()
    fast = session(None, bf16(compile=True))
    for _ in range(3):
        fast.step(x, y)
    saved = fast.state_dict()["model"]
    plain = net(seed=9)
    plain.load_state_dict(saved)
    plain.eval()

    def off(forward: Any) -> float:
        with torch.no_grad():
            expected = plain(x)
        return float((forward(x) - expected).abs().max() / expected.abs().max())

    with fast.inference() as forward:
        assert off(forward) < 1e-2
    back = session(net(seed=5), bf16(compile=True))
    back.load_state_dict({**back.state_dict(), "model": plain.state_dict()})
    with back.inference() as forward:
        assert off(forward) < 1e-2


def test_a_loss_of_ones_own_is_computed_in_float32() -> None:
    x, y = batch()
    seen: list[torch.dtype] = []

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return -outputs.softmax(1)[torch.arange(len(targets)), targets].log().mean()

    ours = session(None, bf16(), loss=own)
    assert abs(ours.step(x, y) - session(None, bf16()).step(x, y)) < 1e-6
    assert seen == [torch.float32]
    with ours.inference() as forward:
        assert forward(x).dtype == torch.float32


def test_a_method_that_steps_the_optimizer_keeps_its_place_beside_bfloat16() -> None:
    class Own(Method):
        spec = MethodSpec(
            "own", "Own", "none", "iterations", "steps the optimizer", writes=frozenset({"update"})
        )
        steps = 0

        def attach(self, session: Session) -> Effect:
            return Effect(touched={"optimizer": "stepped here"})

        def update(self, optimizers: tuple[Optimizer, ...]) -> None:
            self.steps += 1

    s = session(None, bf16(), Own())
    s.step(*batch())
    assert [m.steps for m in s.methods if isinstance(m, Own)] == [1]


def test_at_float32_without_channels_last_training_is_plain_training() -> None:
    x, y = batch()
    off = MixedPrecision(dtype="float32", channels_last=False)
    assert off.writes == frozenset()
    runs = [session(), session(None, off, allow_no_effect=True)]
    for s in runs:
        for _ in range(3):
            s.step(x, y)
    a, b = (s.model.state_dict() for s in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_is_not_continued_in_another_dtype() -> None:
    state = session(None, bf16()).state_dict()
    with pytest.raises(CheckpointError, match="was in bfloat16"):
        session(None, MixedPrecision(dtype="float32")).load_state_dict(state)
    first = session(None, fp16(growth_interval=2))
    for _ in range(3):
        first.step(*batch())
    again = session(None, fp16(growth_interval=2))
    again.load_state_dict(first.state_dict())
    first.step(*batch())
    again.step(*batch())
    assert again.methods[0].scaler_.state_dict() == first.methods[0].scaler_.state_dict()  # type: ignore[attr-defined]


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        MixedPrecision(
            dtype="int8",  # type: ignore[arg-type]
            init_scale=0,
            growth_factor=1.0,
            backoff_factor=1.0,
            growth_interval=0,
            channels_last="yes",  # type: ignore[arg-type]
        )
    for name in (
        "dtype",
        "init_scale",
        "growth_factor",
        "backoff_factor",
        "growth_interval",
        "channels_last",
    ):
        assert name in str(error.value)
