"""What goes wrong in a run is one clear error or message, and the last checkpoint stays."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.faulty import Failing
from hasten import loop
from hasten.checkpoint import Store
from hasten.data import DataSet
from hasten.errors import CheckpointError, DataError, HastenError, NonFiniteError, SettingsError
from hasten.logs import Logs
from hasten.loop import fit
from hasten.recipe import Recipe

from .support import PER_EPOCH, RECIPE, STEPS, assert_same, data, final, net, steps


def test_a_diverging_run_stops_before_the_update_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    recipe = RECIPE.with_(lr=1e9, schedule="constant", warmup=0.0)
    with pytest.raises(NonFiniteError) as caught:
        fit(net, data(), recipe=recipe, out=tmp_path / "run", save_every=0.0)
    loaded = Store(tmp_path / "run" / "checkpoints").load()
    assert loaded is not None
    assert f"at step {loaded.step} (0-based)" in str(caught.value)
    assert "first seen in" in str(caught.value)
    weights = [value for name, value in loaded.parts["model"].items() if "running" not in name]
    assert all(value.isfinite().all() for value in weights)
    with pytest.raises(NonFiniteError) as again:
        fit(net, data(), recipe=recipe, out=tmp_path / "run", save_every=0.0)
    assert str(again.value) == str(caught.value)
    assert len(steps(tmp_path / "run")) == loaded.step


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_disk_full_for_a_while_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    disk = Failing(at=at, times=3)
    monkeypatch.setattr(loop, "Store", partial(Store, files=disk, sleep=lambda seconds: None))
    result = fit(net, data(), recipe=RECIPE, out=tmp_path / "run", save_every=0.0)
    assert disk.raised == 3
    assert any("No space left" in message for message in result.messages)
    assert result.saved
    assert result.steps == STEPS
    monkeypatch.undo()
    fit(net, data(), recipe=RECIPE, out=tmp_path / "plain")
    assert_same(final(tmp_path / "run"), final(tmp_path / "plain"), "after a full disk")


def test_a_disk_full_to_the_end_is_told_and_the_earlier_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Failing):
        """Full from the moment a save of step 6 begins."""

        def before(self, operation: str, path: Path) -> None:
            if (tmp_path / "run/checkpoints/step-000005").exists():
                self.at = min(self.at, len(self.calls) + 1)
            super().before(operation, path)

    monkeypatch.setattr(
        loop, "Store", partial(Store, files=Late(at=10**9, times=10**9), sleep=lambda seconds: None)
    )
    result = fit(net, data(), recipe=RECIPE, out=tmp_path / "run", save_every=0.0)
    assert result.steps == STEPS
    assert not result.saved
    assert "could not save the checkpoint of step 24" in result.messages[-1]
    monkeypatch.undo()
    again = fit(net, data(), recipe=RECIPE, out=tmp_path / "run")
    assert any("continued from step 5 " in message for message in again.messages)
    assert [row["step"] for row in steps(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert_same(dict(again.model.state_dict()), dict(result.model.state_dict()), "same end")  # type: ignore[union-attr]


class Refusing:
    """A log file on a disk that takes a few bytes of each write, or none."""

    def __init__(self, file: Any) -> None:
        self.file, self.full = file, False

    def write(self, content: bytes) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(bytes(content)[:7]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_log_lines_that_a_full_disk_refuses_are_written_later(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    disk = Refusing(logs._files["steps.jsonl"])
    logs._files["steps.jsonl"] = disk  # type: ignore[assignment]
    for step in range(3000):
        disk.full = step % 1000 > 500
        logs.step({"step": step, "loss": 0.5})
    disk.full = True
    with pytest.raises(OSError, match="No space left"):
        logs.offsets()
    disk.full = False
    lengths = logs.offsets()
    logs.step({"step": -1})
    logs.close()
    text = (tmp_path / "steps.jsonl").read_bytes()[: lengths["steps.jsonl"]].decode()
    assert text == "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(3000))


def test_a_full_disk_under_the_logs_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets, calls = Logs.offsets, []

    def refuse(self: Logs) -> dict[str, int]:
        calls.append(1)
        if len(calls) in (3, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        return offsets(self)

    monkeypatch.setattr(Logs, "offsets", refuse)
    result = fit(net, data(), recipe=RECIPE, out=tmp_path / "run", save_every=0.0)
    assert [m for m in result.messages if "could not write the logs at step 3" in m]
    assert result.saved
    assert [row["step"] for row in steps(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_logs_that_somebody_cut_are_not_padded(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n')
    logs = Logs(tmp_path)
    logs.rewind({"steps.jsonl": 500})
    logs.close()
    assert (tmp_path / "steps.jsonl").read_text() == '{"step": 1}\n'


# -- input


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"batch_size 200 is larger than the data \(133 images\): take 133 or fewer"
    ):
        fit(net, data(), recipe=RECIPE.with_(batch_size=200))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.0}, "lr (=0.0) must be above 0"),
        ({"lr": float("nan")}, "lr (=nan)"),
        ({"epochs": -1}, "epochs (=-1)"),
        ({"momentum": 1.0}, "momentum (=1.0) must be in [0, 1)"),
        ({"ema": 1.0}, "ema (=1.0)"),
        ({"batch_size": 0}, "batch_size (=0) must be between 1"),
        ({"schedule": "cosin"}, "schedule (='cosin') must be one of 'constant'"),
        ({"augment": ("flipp",)}, "Did you mean 'flip'"),
        ({"larning_rate": 1}, "unknown recipe setting 'larning_rate'"),
    ],
)
def test_a_recipe_out_of_range_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Recipe().with_(**change)
    assert words in str(caught.value)


def test_folders_that_are_not_ours_or_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="Choose one you can write to"):
        fit(net, data(), recipe=RECIPE, out=tmp_path / "file" / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match=r"'thesis\.tex'.*Give a new or an empty folder"):
        fit(net, data(), recipe=RECIPE, out=tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    (tmp_path / "logs").mkdir()
    fit(net, data(), recipe=RECIPE.with_(epochs=0.125), out=tmp_path / "logs")
    (tmp_path / "logs" / "steps.jsonl").unlink()
    (tmp_path / "logs" / "steps.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*steps\.jsonl"):
        fit(net, data(), recipe=RECIPE.with_(epochs=0.125), out=tmp_path / "logs")


def test_one_error_base_class() -> None:
    for error in (NonFiniteError, DataError, SettingsError, CheckpointError):
        assert issubclass(error, HastenError)


def test_fractional_epochs_and_every_sample_once_an_epoch() -> None:
    seen: list[int] = []
    result = fit(net, data(), recipe=RECIPE.with_(epochs=1.5, eval_every=0.0), on_step=seen.append)
    assert seen == list(range(1, PER_EPOCH * 3 // 2 + 1))
    assert len(result.curve) == 1
    assert isinstance(data(), DataSet)
    assert result.counters["streamed"] == 12 * RECIPE.batch_size
    assert np.isfinite(result.accuracy)
    assert not result.saved
