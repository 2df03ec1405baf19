"""A run stopped at any step and built anew from its checkpoint ends in the same bits as one never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten import loop, registry
from hasten.conformance import subject
from hasten.contract import Method
from hasten.data import Loader
from hasten.errors import CheckpointError
from hasten.loop import fit

from .support import EPOCHS, PER_EPOCH, RECIPE, STEPS, assert_same, data, final, net, steps


class Stop(Exception):
    """The run ends here, as if it had crashed."""


def run(out: Path | None, methods: list[Method], **more: Any) -> loop.Result:
    return fit(net, data(), methods, **{"recipe": RECIPE, "seed": 5, "out": out} | more)


def snapshots(out: Path, kept: Path, methods: list[Method], **more: Any) -> loop.Result:
    """Run to the end and keep, for every step k, a copy of the folder as it is when step k + 1 has just been made."""

    def keep(step: int) -> None:
        if step > 1:
            shutil.copytree(out, kept / str(step - 1))

    return run(out, methods, save_every=0.0, on_step=keep, **more)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*registry.available(), ""])
def test_every_step_of_every_method_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    def methods() -> list[Method]:
        return [subject(name).make()] if name else []

    whole = snapshots(tmp_path / "whole", tmp_path / "kept", methods())
    expected = final(tmp_path / "whole")
    assert expected["step"] == STEPS
    assert [row["step"] for row in expected["steps"]] == list(range(1, STEPS + 1))
    assert len(expected["evaluations"]) == 2 * EPOCHS
    for k in range(1, STEPS):
        again = run(tmp_path / "kept" / str(k), methods(), save_every=1e9)
        assert f"continued from step {k} of {STEPS}" in again.messages[-1]
        assert_same(final(tmp_path / "kept" / str(k)), expected, f"{name or 'no method'} resumed at step {k}")
        assert again.counters == whole.counters
        assert again.accuracy == whole.accuracy
        assert_same(dict(again.model.state_dict()), dict(whole.model.state_dict()), k)  # type: ignore[union-attr]
    # saving all the time changes nothing either
    once = run(None, methods())
    assert_same(dict(once.model.state_dict()), dict(whole.model.state_dict()), "without checkpoints")  # type: ignore[union-attr]


def test_stopped_again_and_again_it_ends_the_same(tmp_path: Path) -> None:
    """Each resumed run is stopped too: after 1, 3, 2, ... steps, also by an error in the middle of a step's logs."""
    methods = [hasten.method("selective_backprop", prime_epochs=0, beta=1.0)]
    run(tmp_path / "whole", methods)

    def stop_after(count: int) -> Any:
        seen = 0

        def on_step(step: int) -> None:
            nonlocal seen
            seen += 1
            if seen > count:
                raise Stop

        return on_step

    stops = 0
    for count in [1, 3, 2, 5, 1, 1, 7, 2, 9]:
        try:
            run(tmp_path / "parts", methods, save_every=0.0, on_step=stop_after(count))
        except Stop:
            stops += 1
            with (tmp_path / "parts" / "steps.jsonl").open("a") as file:
                file.write('{"step": torn')
    assert stops >= 7
    run(tmp_path / "parts", methods)
    assert_same(final(tmp_path / "parts"), final(tmp_path / "whole"), "stopped again and again")


def test_dropout_resumes_exactly_and_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        return net(dropout=0.5)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    snapshots_of = {"recipe": RECIPE, "seed": 5, "save_every": 0.0}

    def keep(step: int) -> None:
        if step in (4, 12, 17):
            shutil.copytree(tmp_path / "whole", tmp_path / str(step))

    fit(make, data(), out=tmp_path / "whole", on_step=keep, **snapshots_of)  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())
    for step in (4, 12, 17):
        torch.manual_seed(step)  # what the caller's generator holds must not matter
        fit(make, data(), out=tmp_path / str(step), recipe=RECIPE, seed=5)
        assert_same(final(tmp_path / str(step)), final(tmp_path / "whole"), step)
    plain = fit(net, data(), recipe=RECIPE, seed=5)
    dropped = fit(make, data(), recipe=RECIPE, seed=5)
    assert not torch.equal(plain.model[-1].weight, dropped.model[-1].weight)  # type: ignore[index, union-attr]


def test_resume_draws_no_batch_before_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots(tmp_path / "whole", tmp_path / "kept", [])
    drawn: list[tuple[int, int]] = []
    batch = Loader.batch

    def counted(self: Loader, index: Any, epoch: int) -> Any:
        if self.shuffle:
            drawn.append((epoch, len(index)))
        return batch(self, index, epoch)

    monkeypatch.setattr(Loader, "batch", counted)
    for k in (1, 7, 8, 15, 20, 23):
        drawn.clear()
        run(tmp_path / "kept" / str(k), [])
        assert len(drawn) == 1 + STEPS - k  # one for the shapes, and one for each step that is left
        assert [epoch for epoch, _ in drawn[1:]] == [s // PER_EPOCH for s in range(k, STEPS)]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Return the folder of a run that died in step 11, with checkpoints of steps 9 and 10."""

    def on_step(step: int) -> None:
        if step == 11:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "run", [], save_every=0.0, on_step=on_step)
    return tmp_path / "run"


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("step-*/*")) if p.is_file()
    }


def test_another_recipe_is_refused_with_the_settings_that_differ(stopped: Path) -> None:
    before = folder_bytes(stopped)
    changes: list[tuple[dict[str, Any], list[str]]] = [
        (
            {"recipe": RECIPE.with_(lr=0.03, epochs=4)},
            ["recipe.lr: checkpoint 0.02, given 0.03", "recipe.epochs"],
        ),
        ({"seed": 6}, ["seed: checkpoint 5, given 6"]),
        ({"recipe": RECIPE.with_(augment=("flip",))}, ["recipe.augment"]),
    ]
    for change, lines in changes:
        with pytest.raises(CheckpointError, match="made with other settings") as caught:
            run(stopped, [], **change)
        for line in lines:
            assert line in str(caught.value)
        assert "another folder to begin anew" in str(caught.value)
    with pytest.raises(CheckpointError, match="methods"):
        run(stopped, [hasten.method("s3pool")])
    other = data()
    other.train.pixels[0] ^= 1
    with pytest.raises(CheckpointError, match="content"):
        fit(net, other, recipe=RECIPE, seed=5, out=stopped)
    assert folder_bytes(stopped) == before
    assert len(steps(stopped)) == 11  # logged past the last checkpoint, and untouched by the refusals
    run(stopped, [])
    assert [row["step"] for row in steps(stopped)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("how", ["cut short", "one bit", "file gone", "manifest edited", "tensor edited"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(
    stopped: Path, how: str, tmp_path: Path
) -> None:
    run(tmp_path / "whole", [])
    newest = stopped / "checkpoints" / "step-000010"
    model = next(p for p in newest.iterdir() if "model" in p.name and p.suffix == ".safetensors")
    if how == "cut short":
        model.write_bytes(model.read_bytes()[:-100])
    elif how == "file gone":
        model.unlink()
    elif how == "manifest edited":
        manifest = next(p for p in newest.iterdir() if "manifest" in p.name)
        manifest.write_text(manifest.read_text().replace("10", "11", 1))
    else:
        raw = bytearray(model.read_bytes())
        raw[-1 if how == "one bit" else len(raw) // 2] ^= 1
        model.write_bytes(raw)
    again = run(stopped, [])
    told = " ".join(again.messages)
    assert "step-000010" in told
    assert "quarantine" in told
    assert "step-000009 is used instead" in told
    assert f"continued from step 9 of {STEPS}" in told
    assert_same(final(stopped), final(tmp_path / "whole"), how)


def test_where_all_are_damaged_nothing_begins_anew_by_itself(stopped: Path) -> None:
    for file in stopped.glob("checkpoints/step-*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        run(stopped, [])


def test_a_whole_checkpoint_of_something_else_is_one_clear_error(tmp_path: Path) -> None:
    """Signed correctly, with this run's recipe, but not with what the loop stores."""
    from hasten.checkpoint import Store

    run(tmp_path / "run", [], recipe=RECIPE.with_(epochs=0.25))
    store = Store(tmp_path / "run" / "checkpoints")
    loaded = store.load()
    assert loaded is not None
    store.save(3, {"model": {}, "state": {"methods": []}}, loaded.recipe)
    with pytest.raises(CheckpointError, match="does not hold what this run needs"):
        run(tmp_path / "run", [], recipe=RECIPE.with_(epochs=0.25))


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path / "run", [])
    calls: list[int] = []
    again = run(tmp_path / "run", [], on_step=calls.append)
    assert calls == []
    assert again.accuracy == first.accuracy
    assert again.saved
    assert_same(dict(again.model.state_dict()), dict(first.model.state_dict()), "again")  # type: ignore[union-attr]
    assert len(steps(tmp_path / "run")) == STEPS
