"""fit with what users have: their data, weights, losses, optimizers, frozen layers and loops; and what they get wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hasten
from hasten import loop
from hasten.checkpoint import Store
from hasten.errors import (
    CheckpointError,
    HastenError,
    NonFiniteError,
    SettingsError,
    UnsupportedError,
)
from hasten.loop import fit, identity_of
from hasten.measure.clock import Clock
from hasten.own_loop import Budget, TrainingData
from hasten.progress import Progress
from hasten.recipe import STRONG, Recipe
from hasten.session import Session

from .support import BATCH, CLASSES, PER_EPOCH, RECIPE, SIZE, STEPS, assert_same, data, final, net, steps

SHORT = RECIPE.with_(epochs=0.5, eval_every=0.0)
SHORT_STEPS = PER_EPOCH // 2


def weights(result: loop.Result) -> dict[str, Tensor]:
    assert result.model is not None
    return dict(result.model.state_dict())


def same(a: loop.Result, b: loop.Result) -> bool:
    one, other = weights(a), weights(b)
    return all(torch.equal(one[name], other[name]) for name in one)


class Told(Progress):
    """Keeps the messages in their order among the steps."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, step: int, total: int, loss: float) -> None:
        self.lines.append(f"step {step}")

    def message(self, text: str) -> None:
        self.lines.append(text)


# -- data


def test_arrays_datasets_and_loaders_train() -> None:
    whole = data()
    x, y, x_test, y_test = whole.train.pixels, whole.train.labels, whole.test.pixels, whole.test.labels
    result = fit(net, ((x, y), (x_test, y_test)), recipe=SHORT, seed=3)
    assert result.steps == SHORT_STEPS
    assert same(result, fit(net, ((x, y), (x_test, y_test)), recipe=SHORT, seed=3))

    floats = [torch.from_numpy(a).permute(0, 3, 1, 2).float() / 255 - 0.5 for a in (x, x_test)]
    sets = TensorDataset(floats[0], torch.from_numpy(y)), TensorDataset(floats[1], torch.from_numpy(y_test))
    streams = fit(net, sets, recipe=SHORT)
    assert streams.steps == SHORT_STEPS
    assert streams.preprocessing["mean"] is None

    loaders = (
        DataLoader(sets[0], batch_size=10, shuffle=True, drop_last=True),
        DataLoader(sets[1], batch_size=20),
    )
    result = fit(net, loaders, recipe=SHORT)
    assert result.counters["streamed"] == 10 * result.steps
    assert any("batches of 10 come from the DataLoader" in m for m in result.messages)
    with pytest.raises(UnsupportedError, match="index"):
        fit(
            net,
            loaders,
            ["actnn:use_gradient=True,num_samples=133,min_bytes=0"],
            recipe=SHORT,
            allow_no_effect=True,
        )


def test_the_validation_part_is_measured_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    whole = data().hold_out(0.2)
    evaluation = type(whole).evaluation
    monkeypatch.setattr(type(whole), "evaluation", lambda self, part="test", **kw: (seen.append(part), evaluation(self, part, **kw))[1])  # fmt: skip
    result = fit(net, whole, recipe=SHORT.with_(epochs=2.0, eval_every=1.0))
    assert seen == ["test", "validation"]
    assert result.validation is not None
    assert 0 <= result.validation <= 1
    assert result.validation * len(whole.validation.labels) == pytest.approx(round(result.validation * len(whole.validation.labels)))  # type: ignore[union-attr]  # fmt: skip
    assert fit(net, data(), recipe=SHORT).validation is None
    assert result.recipe == SHORT.with_(epochs=2.0, eval_every=1.0)
    assert result.preprocessing == whole.preprocessing()
    assert result.device == "cpu"


def test_attaching_counts_as_time_of_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.methods.forward.mixed_precision import MixedPrecision

    attach = MixedPrecision.attach

    def slow(self: MixedPrecision, session: Session) -> Any:
        session.clock.add("method", 0.0)
        for _ in range(3):
            Clock.span(session.clock, "method")
        ticks[0] += 100.0
        return attach(self, session)

    ticks = [0.0]

    def now() -> float:
        ticks[0] += 1e-6
        return ticks[0]

    monkeypatch.setattr(MixedPrecision, "attach", slow)
    monkeypatch.setattr(loop, "Clock", partial(Clock, now=now))
    result = fit(net, data(), ["mixed_precision"], recipe=SHORT)
    assert 100 < result.seconds_attach < 101
    assert result.spans["method"] > 100
    assert 100 < result.seconds_train < 102


def test_the_checkpoint_holds_preprocessing_and_accuracy(tmp_path: Path) -> None:
    result = fit(net, data(), recipe=SHORT, out=tmp_path / "run")
    loaded = Store(tmp_path / "run/checkpoints").load()
    assert loaded is not None
    assert loaded.parts["state"]["data"] == data().preprocessing()
    assert loaded.parts["state"]["accuracy"] == result.accuracy
    assert loaded.recipe["data"] == data().identity()


# -- recipes


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adamw"},
        {"optimizer": "rmsprop", "lr": 1e-4},
        {"optimizer": "muon"},
        {"schedule": "one_cycle"},
        {"clip_norm": 0.5},
        {"accumulate": 4},
        {"augment": ("mixup",)},
        {"augment": ("random_resized_crop", "flip", "trivialaugment", "random_erasing", "cutmix")},
        {"augment": ("randaugment",)},
    ],
)
def test_every_kind_of_recipe_learns_and_resumes_bit_for_bit(tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = RECIPE.with_(epochs=1.0, eval_every=0.0, **change)

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole = fit(net, data(), recipe=recipe, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(net, data(), recipe=recipe, out=tmp_path / "cut", save_every=0.0, on_step=stop)
    again = fit(net, data(), recipe=recipe, out=tmp_path / "cut")
    assert any("continued from step 2 " in m for m in again.messages)
    assert_same(final(tmp_path / "cut"), final(tmp_path / "whole"), change)
    losses = [row["loss"] for row in steps(tmp_path / "whole")]
    assert np.isfinite(losses).all()
    assert not same(whole, fit(net, data(), recipe=RECIPE.with_(epochs=1.0, eval_every=0.0)))


def test_an_optimizer_brings_its_own_rates() -> None:
    assert (Recipe().with_(optimizer="adamw").lr, Recipe().with_(optimizer="adamw").weight_decay) == (
        1e-3,
        0.05,
    )
    assert Recipe().with_(optimizer="adamw", lr=0.5).lr == 0.5
    assert Recipe().with_(optimizer="sgd").lr == 0.1
    assert STRONG.describe() == "SGD lr 0.1, batch 128, 10 epochs"
    with pytest.raises(SettingsError, match="Did you mean 'randaugment'"):
        Recipe(augment=("randaugmet",))


def test_muon_takes_the_filters_and_adamw_the_rest() -> None:
    model = net()
    muon, rest = Recipe().with_(optimizer="muon").optimizers(model)
    assert type(rest).__name__ == "AdamW"
    held = {id(p) for g in muon.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.ndim == 4}
    with pytest.raises(UnsupportedError, match="no trainable convolution filters"):
        Recipe().with_(optimizer="muon").optimizers(nn.Linear(3, 3))


def test_own_optimizers_follow_the_schedule_from_their_own_rates() -> None:
    seen: list[list[float]] = []

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        rows = list(model.parameters())
        made = [torch.optim.Adam(rows[:1], lr=0.01), torch.optim.SGD([{"params": rows[1:], "lr": 0.1}])]
        step = made[0].step
        made[0].step = lambda: (seen.append([g["lr"] for o in made for g in o.param_groups]), step())[1]  # type: ignore[method-assign, func-returns-value]  # fmt: skip
        return made

    fit(net, data(), recipe=SHORT.with_(epochs=1.0, schedule="linear", warmup=0.0), optimizer=make)
    assert seen[0] == [0.01, 0.1]
    assert seen[4] == pytest.approx([0.005, 0.05])
    with pytest.raises(SettingsError, match="returned a int; it must take the model and return an optimizer"):
        fit(net, data(), recipe=SHORT, optimizer=lambda model: 3)  # type: ignore[arg-type, return-value]


def test_an_own_loss_trains() -> None:
    plain = fit(net, data(), recipe=SHORT.with_(label_smoothing=0.0))
    module = fit(net, data(), recipe=SHORT, loss=nn.CrossEntropyLoss())
    weighed = fit(net, data(), recipe=SHORT, loss=nn.CrossEntropyLoss(weight=torch.linspace(0.1, 2, CLASSES)))
    assert same(plain, module)
    assert not same(plain, weighed)
    with pytest.raises(SettingsError, match=r"cannot be computed from .* soft labels"):
        fit(net, data(), recipe=SHORT.with_(augment=("mixup",)), loss=nn.NLLLoss())
    with pytest.raises(SettingsError, match=r'must return one number.*reduction="mean"'):
        fit(net, data(), recipe=SHORT, loss=nn.CrossEntropyLoss(reduction="none"))


def test_layers_frozen_as_given_stay_so() -> None:
    model = net()
    model[1].eval().requires_grad_(False)  # type: ignore[index]
    model[1].running_mean.fill_(0.25)  # type: ignore[index, union-attr]
    result = fit(model, data(), recipe=SHORT.with_(eval_every=0.25))
    assert torch.equal(weights(result)["1.running_mean"], torch.full((16,), 0.25))
    assert torch.equal(weights(result)["1.weight"], torch.ones(16))
    assert not torch.equal(weights(result)["4.running_mean"], torch.zeros(32))


# -- initial weights


def test_initial_weights_of_every_kind_begin_the_same_run(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = net().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    torch.save({f"_orig_mod.module.{k}": v for k, v in state.items()}, tmp_path / "c.pth")
    first = fit(net, data(), recipe=SHORT, init=state)
    assert any(f"{len(state)} tensors loaded" in m for m in first.messages)
    for name in ("w.safetensors", "w.pt", "c.pth"):
        assert same(first, fit(net, data(), recipe=SHORT, init=tmp_path / name)), name
    assert not same(first, fit(net, data(), recipe=SHORT))


def test_a_head_of_another_size_stays_fresh_and_is_named(tmp_path: Path) -> None:
    state = net().state_dict()
    state["13.weight"], state["13.bias"] = torch.randn(1000, 32), torch.randn(1000)
    state["extra.weight"] = torch.zeros(1)
    del state["4.weight"]
    told = next(m for m in fit(net, data(), recipe=SHORT, init=state).messages if "initial weights" in m)
    assert "13.weight (1000x32 in the weights, 4x32 here)" in told
    assert "4.weight (not in the weights)" in told
    assert "not used: extra.weight" in told


def test_weights_of_another_network_or_with_code_are_refused(tmp_path: Path) -> None:
    for init, words in (
        ({"a": torch.zeros(3)}, "They are of another network"),
        (tmp_path / "no.pt", "there is no file"),
        ({"epoch": 3}, "holds no state dict"),
    ):
        with pytest.raises(SettingsError, match=words):
            fit(net, data(), recipe=SHORT, init=init)  # type: ignore[arg-type]
    torch.save(net(), tmp_path / "whole.pt")
    with pytest.raises(SettingsError, match="could run code"):
        fit(net, data(), recipe=SHORT, init=tmp_path / "whole.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(SettingsError, match="cannot be read as safetensors"):
        fit(net, data(), recipe=SHORT, init=tmp_path / "torn.safetensors")
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(SettingsError, match="of no known kind"):
        fit(net, data(), recipe=SHORT, init=tmp_path / "w.npz")


# -- a training function of the user's own


def own(session: Session, given: TrainingData, budget: Budget) -> None:
    """The ready loop's steps at a constant rate."""
    done = 0
    for epoch in range(99):
        session.start_epoch(epoch)
        for inputs, targets, index in given.epoch(epoch):
            session.step(inputs, targets, index)
            done += 1
            if done == budget.steps:
                return
        session.end_epoch()


def test_an_own_training_function_is_the_ready_loop_when_it_does_the_same(tmp_path: Path) -> None:
    recipe = RECIPE.with_(epochs=1.5, schedule="constant", warmup=0.0, ema=None, eval_every=0.0)
    ready = fit(net, data(), ["selective_backprop:prime_epochs=0,beta=1.0"], recipe=recipe)
    mine = fit(
        net,
        data(),
        ["selective_backprop:prime_epochs=0,beta=1.0"],
        recipe=recipe,
        train_fn=own,
        out=tmp_path / "run",
    )
    assert same(ready, mine)
    assert mine.accuracy == ready.accuracy
    assert mine.counters["updates"] == ready.counters["updates"]
    assert mine.steps == 12
    assert mine.saved
    assert "train" in mine.spans
    with pytest.raises(CheckpointError, match=r"neither continued nor repeated there.*another folder"):
        fit(
            net,
            data(),
            recipe=recipe,
            train_fn=own,
            out=tmp_path / "run",
            methods=["selective_backprop:prime_epochs=0,beta=1.0"],
        )


def test_an_own_function_is_told_its_budget_and_its_evaluations_do_not_count() -> None:
    seen: list[Any] = []

    def train(session: Session, given: TrainingData, budget: Budget) -> None:
        seen.append((budget.epochs, budget.steps, budget.share, budget.batch_size, len(given), given.shape))
        inputs, targets, _ = next(given.epoch(0))
        session.backward(nn.functional.cross_entropy(session.forward(inputs), targets))
        session.update()
        seen.append(budget.evaluate())

    result = fit(net, data(), recipe=RECIPE.with_(epochs=0.5), train_fn=train, share=0.25)
    assert seen[0] == (0.5, SHORT_STEPS, 0.25, BATCH, PER_EPOCH, (SIZE, SIZE, 3))
    assert [row[2] for row in result.curve] == [seen[1], result.accuracy]
    assert result.spans["eval"] > 0
    assert result.seconds_train == pytest.approx(
        sum(v for k, v in result.spans.items() if k not in ("eval", "save", "setup"))
    )
    with pytest.raises(HastenError, match="returned without an update"):
        fit(net, data(), recipe=RECIPE, train_fn=lambda session, given, budget: None)


# -- identity


def test_an_identity_changes_with_all_that_shapes_a_run(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    code = "import torch.nn as nn\nfrom helper import WIDTH\ndef make(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes))\n"
    (tmp_path / "net.py").write_text(code)
    target = f"{tmp_path / 'net.py'}:make"

    def of(model: Any = target, seed: int = 0, methods: Any = (), recipe: Recipe = SHORT, **more: Any) -> str:
        return repr(identity_of(model, data(), methods, recipe, seed, **more))

    first = of()
    assert first == of()
    seen = {first, of(seed=1), of(methods=[hasten.method("s3pool")]), of(recipe=RECIPE), of(loss=nn.CrossEntropyLoss()),
            of(loss=nn.CrossEntropyLoss(weight=torch.ones(4))), of(loss=nn.CrossEntropyLoss(ignore_index=1)),
            of(optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.1)), of(train_fn=own),
            of(optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.2)), of(init={"a": torch.ones(1)}),
            of(init={"a": torch.zeros(1)})}  # fmt: skip
    assert len(seen) == 12
    (tmp_path / "helper.py").write_text("WIDTH = 5\n")
    seen.add(of())
    (tmp_path / "net.py").write_text(code + "\n")
    seen.add(of())
    assert len(seen) == 14
    one, other = net(), net()
    assert of(one) == of(other)
    assert of(one, weights=True) != of(other, weights=True)
    assert of(one, weights=True) == of(one, weights=True)


# -- easy mistakes


class Scripted:
    """Makes the models that cannot be trained here."""

    @staticmethod
    def frozen() -> nn.Module:
        return net().requires_grad_(False)

    @staticmethod
    def meta() -> nn.Module:
        with torch.device("meta"):
            return net()

    @staticmethod
    def narrow() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE * 3, 3))

    @staticmethod
    def pair() -> nn.Module:
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.f = nn.Linear(SIZE * SIZE * 3, CLASSES)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.f(x.flatten(1)), x

        return Pair()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"methods": [type(hasten.method("actnn"))]}, r"is the class; give ActNN\(\) or 'actnn'"),
    "name": ({"methods": ["actn"]}, "Did you mean 'actnn'"),
    "frozen": ({"model": Scripted.frozen}, "no parameter that trains"),
    "meta": ({"model": Scripted.meta}, "lies on the meta device"),
    "double": (
        {"model": lambda: net().double()},
        r"must be float32, but 0\.weight is torch\.float64; give model\.float",
    ),
    "outputs": ({"model": Scripted.narrow}, "the network has 3 outputs, the data 4 classes"),
    "pair": ({"model": Scripted.pair}, "returns a tuple"),
    "size": (
        {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(7, 4))},
        "does not run on inputs of shape",
    ),
    "device meta": ({"device": "meta"}, "device 'meta' cannot be used here"),
    "device": ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    "data": ({"data": 3}, "data"),
    "epoch": ({"loss": "mse"}, "is no function"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_easy_mistake_is_one_clear_error(name: str) -> None:
    given, words = MISTAKES[name]
    with pytest.raises(HastenError, match=words) as caught:
        fit(**{"model": net, "data": data(), "recipe": SHORT} | given)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_and_a_double_default_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.jit script"):
        fit(torch.jit.script(net()), data(), recipe=SHORT)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(
            UnsupportedError, match=r"default type is torch\.float64: torch\.set_default_dtype"
        ):
            fit(net, data(), recipe=SHORT)
    finally:
        torch.set_default_dtype(torch.float32)


def test_methods_by_name_are_those_methods() -> None:
    by_name = fit(net, data(), ["selective_backprop:prime_epochs=0"], recipe=SHORT)
    assert same(
        by_name, fit(net, data(), [hasten.method("selective_backprop", prime_epochs=0)], recipe=SHORT)
    )


# -- messages, the lock


def test_messages_come_when_things_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoint.faulty import Failing

    told = Told()
    monkeypatch.setattr(
        loop, "Store", partial(Store, files=Failing(at=1, times=10**9), sleep=lambda seconds: None)
    )
    result = fit(net, data(), recipe=RECIPE, out=tmp_path / "run", save_every=0.0, progress=told)
    failures = [i for i, line in enumerate(told.lines) if "could not save" in line]
    assert len(failures) == 1  # the rest only now and then
    assert told.lines[failures[0] - 1] == "step 1"
    assert sum("could not save" in m for m in result.messages) == STEPS + 1
    assert not result.saved
    assert result.curve[-1][2] == result.accuracy
    monkeypatch.undo()
    fit(net, data(), recipe=SHORT, out=tmp_path / "two")
    told = Told()
    fit(net, data(), recipe=SHORT, out=tmp_path / "two", progress=told)
    assert any("continued from step 4 of 4" in line for line in told.lines)


HOLDER = """
import sys
from pathlib import Path
from hasten.checkpoint import claim_folder, folder_lock
with folder_lock(claim_folder(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_in_which_another_process_trains_is_refused_with_its_number(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:  # fmt: skip
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {other.pid} trains in .*another folder"):
            fit(net, data(), recipe=SHORT, out=out)
        assert not (out / "steps.jsonl").exists()
        other.kill()
    fit(net, data(), recipe=SHORT, out=out)
    assert (out / ".hasten-lock").read_text() == str(os.getpid())
    fit(net, data(), recipe=SHORT, out=out)


def test_losses_of_a_device_that_runs_behind_are_all_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: checked a step late, read back now and then."""
    fit(net, data(), recipe=RECIPE, out=tmp_path / "direct")
    monkeypatch.setattr(loop, "Session", partial(Session, late_check=True))
    monkeypatch.setattr(loop, "behind", lambda loss: True)
    monkeypatch.setattr(loop, "LOG_EVERY", 1e9)
    fit(net, data(), recipe=RECIPE, out=tmp_path / "late")
    assert_same(final(tmp_path / "late"), final(tmp_path / "direct"), "late")
    diverging = RECIPE.with_(lr=1e9, schedule="constant", warmup=0.0)
    with pytest.raises(NonFiniteError):
        fit(net, data(), recipe=diverging, out=tmp_path / "bad", save_every=0.0)
    loaded = Store(tmp_path / "bad/checkpoints").load()
    if loaded is not None:
        assert all(v.isfinite().all() for k, v in loaded.parts["model"].items() if "running" not in k)
