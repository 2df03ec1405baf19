"""What export writes works where hasten is not: pixels in, the run's accuracy to the last image out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import hasten
from hasten.errors import HastenError, SettingsError, UnsupportedError
from hasten.exporting import StoredRun
from hasten.exporting import formats as formats_module
from hasten.loop import Result

from .support import CLASSES, RECIPE, SIZE, TEST, data, right, run_python, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of the user's own code in bfloat16, and its test images as a user has them."""
    folder = tmp_path_factory.mktemp("own")
    result = trained(folder)
    test = data().test
    np.save(folder / "pixels.npy", test.pixels.transpose(0, 3, 1, 2))
    np.save(folder / "labels.npy", test.labels)
    return folder, result


def test_a_program_gets_the_runs_accuracy_without_hasten_by_the_printed_lines(
    run: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = run
    monkeypatch.chdir(folder)
    done = hasten.export("run", "net.pt2", trust_code=True)
    assert done.error == 0.0
    lines = done.snippet.splitlines()
    assert len(lines) == 4  # they run as they stand, and then with the test images, as bytes and as floats
    lines += [
        "import numpy",
        'images, truth = torch.from_numpy(numpy.load("pixels.npy")), numpy.load("labels.npy")',
    ]
    for given in ("images", "images.float() / 255", "images[:1]"):
        answers = (
            lines[3].removeprefix("print(").removesuffix(")").replace("network(images)", f"network({given})")
        )
        lines.append(f"print(sum(a == classes[i] for a, i in zip({answers}, truth)))")
    shown = run_python("\n".join(lines), folder).splitlines()
    assert json.loads(shown[0].replace("'", '"'))[0] in CLASSES
    assert list(map(int, shown[1:3])) == [right(result)] * 2
    assert int(shown[3]) <= 1
    labels = json.loads((folder / "net.labels.json").read_text())
    inside = {"labels.json": ""}
    torch.export.load(folder / "net.pt2", extra_files=inside)
    assert json.loads(inside["labels.json"]) == labels | {"input": "pixels"}
    assert labels["classes"] == list(CLASSES)
    assert labels["size"] == [SIZE, SIZE]
    assert labels["accuracy"] == result.accuracy
    assert labels["precision"] == "bfloat16"
    assert labels["hasten"] == hasten.__version__
    assert labels["mean"] == list(data().train.mean)
    for file in ("net.pt2", "net.labels.json"):  # nothing of the machine it was made on
        assert str(folder).encode() not in (folder / file).read_bytes()
        assert str(Path(hasten.__file__).parent).encode() not in (folder / file).read_bytes()
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


def test_onnx_is_checked_by_onnxruntime_and_carries_its_labels(run: tuple[Path, Result]) -> None:
    folder, result = run
    done = hasten.export(folder / "run", folder / "net.onnx", trust_code=True)
    assert done.error is not None
    assert done.error < 0.05  # at other sizes a tie of the resize moves a level
    assert any("bfloat16" in line for line in done.notes)
    code = done.snippet.replace(str(folder) + "/", "")
    lines = code.splitlines()
    lines[2] = 'images = numpy.load("pixels.npy")'
    lines[3] = (
        'outputs = network.run(None, {"images": images})[0]; print(int((outputs.argmax(1) == numpy.load("labels.npy")).sum()))'
    )
    lines.append("print(json.dumps(network.get_modelmeta().custom_metadata_map))")
    count, labels = run_python("\n".join(lines), folder).splitlines()
    assert abs(int(count) - right(result)) <= 3  # float32 of a network measured in bfloat16
    assert json.loads(json.loads(labels)["classes"]) == list(CLASSES)
    assert str(folder).encode() not in (folder / "net.onnx").read_bytes()


def test_onnx_of_a_float32_run_is_right_as_often_as_the_run(tmp_path: Path) -> None:
    result = trained(tmp_path, low=False, model="resnet8")
    assert hasten.export(tmp_path / "run", tmp_path / "net.onnx").notes == ()
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    test = data().test
    outputs = session.run(None, {"images": test.pixels.transpose(0, 3, 1, 2)})[0]
    assert int((outputs.argmax(1) == test.labels).sum()) == right(result)
    other = session.run(None, {"images": np.zeros((1, 3, 31, 9), np.uint8)})[0]
    assert other.shape == (1, len(CLASSES))


def test_onnx_without_the_extra_is_one_clear_error(
    run: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    folder, _ = run
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hasten\[onnx\]', or write \.pt2"):
        hasten.export(folder / "run", folder / "gone.onnx", trust_code=True)
    assert not (folder / "gone.onnx").exists()


def test_weights_alone_run_none_of_the_users_code(
    run: tuple[Path, Result], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, result = run
    capfd.readouterr()
    done = hasten.export(folder / "run", folder / "net.safetensors")
    assert capfd.readouterr().out == ""  # net.py prints
    assert result.model is not None
    own = result.model.state_dict()
    with safe_open(folder / "net.safetensors", "pt") as file:
        header = file.metadata()
        assert set(file.keys()) == set(own)
        assert all(torch.equal(file.get_tensor(name), own[name].cpu()) for name in own)  # the averaged ones
    assert json.loads(header["classes"]) == list(CLASSES)
    assert json.loads(header["accuracy"]) == result.accuracy
    assert json.loads(header["model"])["target"] == "net.py:make"
    assert json.loads(header["input"]) == "normalised"
    assert "tensor(" in run_python(
        done.snippet, folder
    )  # the lines import her net.py, and build what it takes


def test_weights_of_a_known_network_load_by_the_printed_lines(tmp_path: Path) -> None:
    trained(tmp_path, model="resnet8", low=False)
    done = hasten.export(tmp_path / "run", tmp_path / "net.safetensors")
    assert "tensor(" in run_python(done.snippet, tmp_path, without_hasten=False)


@pytest.mark.parametrize("method", ["s3pool", "prunetrain", "error_map_pruning", "actnn"])
def test_weights_are_those_of_the_network_built_again(method: str, tmp_path: Path) -> None:
    from hasten.table import METHODS

    chosen = hasten.method(method, **METHODS[method].settings)
    hasten.fit("resnet8", data(), [chosen], recipe=RECIPE.with_(epochs=0.5), out=tmp_path / "run", device="cpu",
               allow_no_effect=True)  # fmt: skip
    stored = StoredRun(tmp_path / "run")
    alone, built = stored.weights(), stored.trained().network.state_dict()
    if method in ("s3pool", "actnn"):  # these change modules until export, so their weights need the network
        assert alone is None
    else:
        assert alone is not None
        assert alone.keys() == built.keys()
        assert all(torch.equal(alone[name], built[name]) for name in built)
    hasten.export(tmp_path / "run", tmp_path / "net.safetensors")


def test_raw_takes_normalised_images_and_keeps_the_names_of_the_weights(run: tuple[Path, Result]) -> None:
    folder, result = run
    done = hasten.export(folder / "run", folder / "raw.pt2", raw=True, trust_code=True)
    program = torch.export.load(folder / "raw.pt2").module()
    assert result.model is not None
    assert dict(program.named_parameters()).keys() == dict(result.model.named_parameters()).keys()
    batch = next(data().evaluation().epoch(0))
    with torch.no_grad():
        assert torch.allclose(program(batch.inputs), result.model(batch.inputs), atol=1e-5)
    assert done.labels["input"] == "normalised"
    assert "normalised" in done.snippet or "255" in done.snippet


# -- what cannot be written


class ReadsTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3 * SIZE * SIZE, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x.reshape(int(x.shape[0]), 3 * SIZE * SIZE))


class LooksAtValues(ReadsTheBatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = -x
        return self.f(x.flatten(1))


@pytest.mark.parametrize(
    ("kind", "word"), [(ReadsTheBatch, "specialized"), (LooksAtValues, "data-dependent")]
)
@pytest.mark.parametrize("raw", [False, True])
def test_a_forward_that_cannot_be_traced_names_the_way_that_works(
    kind: type[nn.Module], word: str, raw: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = hasten.fit(kind(), data(), recipe=RECIPE.with_(epochs=0.2), out=tmp_path / "run", device="cpu")
    capfd.readouterr()
    with pytest.raises(UnsupportedError) as caught:
        hasten.export(result, tmp_path / "net.pt2", raw=raw)
    text = str(caught.value)
    assert "\n" not in text
    assert ".safetensors" in text
    assert word in text
    said = capfd.readouterr()
    assert said.out + said.err == ""
    assert list(tmp_path.glob("net*")) == []
    hasten.export(result, tmp_path / "net.safetensors")
    hasten.export(tmp_path / "run", tmp_path / "again.safetensors")  # of an object without a factory
    with pytest.raises(UnsupportedError, match="its weights can be written"):
        hasten.export(tmp_path / "run", tmp_path / "net.pt2")


def test_code_that_is_not_trusted_is_not_run(
    run: tuple[Path, Result], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    with pytest.raises(UnsupportedError, match="--trust-code"):
        hasten.export(folder / "run", folder / "gone.pt2")
    assert "net.py" not in capfd.readouterr().out
    with pytest.raises(SettingsError, match=r"end it in \.pt2, \.onnx or \.safetensors"):
        hasten.export(folder / "run", folder / "net.pth")
    with pytest.raises(UnsupportedError, match="cannot write"):
        hasten.export(folder / "run", folder / "missing" / "net.safetensors")
    (folder / "full.safetensors").mkdir(exist_ok=True)
    with pytest.raises(UnsupportedError, match=r"cannot write .*full"):
        hasten.export(folder / "run", folder / "full.safetensors")


def test_a_run_of_an_older_version_is_exported_raw_only(
    run: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    read = StoredRun.__init__

    def older(self: StoredRun, where: Path) -> None:
        read(self, where)
        self.preprocessing = None

    monkeypatch.setattr(StoredRun, "__init__", older)
    with pytest.raises(HastenError, match="--raw"):
        hasten.export(folder / "run", folder / "old.pt2", trust_code=True)
    hasten.export(folder / "run", folder / "old.pt2", raw=True, trust_code=True)
    loaded = hasten.load(folder / "run", trust_code=True)
    with pytest.raises(HastenError, match="older version"):
        loaded.predict(data().test.pixels.transpose(0, 3, 1, 2))


def test_weights_of_a_later_step_than_the_last_evaluation_claim_no_accuracy(tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hasten.fit("resnet8", data(), recipe=RECIPE.with_(eval_every=1.0), out=tmp_path / "run", save_every=0, on_step=stop,
                   device="cpu")  # fmt: skip
    stored = StoredRun(tmp_path / "run")
    assert stored.loaded.step == 13
    assert stored.loaded.parts["state"]["accuracy"] is not None
    assert stored.accuracy is None
    done = hasten.export(tmp_path / "run", tmp_path / "net.safetensors")
    assert done.labels["accuracy"] is None
    assert any("not known" in line for line in done.notes)


def test_a_failed_write_leaves_what_was_there(
    run: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    (folder / "kept.safetensors").write_bytes(b"before")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats_module, "save_file", full)
    with pytest.raises(UnsupportedError, match="No space left on device"):
        hasten.export(folder / "run", folder / "kept.safetensors")
    assert (folder / "kept.safetensors").read_bytes() == b"before"


# -- in Python


def test_a_result_and_a_loaded_run_predict_and_export_the_same(
    run: tuple[Path, Result], tmp_path: Path
) -> None:
    folder, result = run
    loaded = hasten.load(folder / "run", trust_code=True)
    assert loaded.classes == CLASSES
    assert loaded.accuracy == result.accuracy
    pixels = data().test.pixels.transpose(0, 3, 1, 2)
    answers = loaded.predict(pixels)
    assert answers.probabilities.shape == (TEST, len(CLASSES))
    assert torch.allclose(answers.probabilities.sum(1), torch.ones(TEST), atol=1e-5)
    truth = [CLASSES[i] for i in data().test.labels]
    assert sum(a == b for a, b in zip(answers.classes, truth, strict=True)) == right(result)
    assert result.model is not None
    normal = next(data().evaluation().epoch(0)).inputs
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        evaluated = result.model(normal).float()
    assert torch.equal(loaded.logits(pixels), evaluated)  # in the run's precision, to the bit
    with torch.no_grad():
        assert not torch.equal(result.model(normal), evaluated)
    for source, name in ((result, "a"), (loaded, "b")):
        hasten.export(source, tmp_path / f"{name}.pt2")
        program = torch.export.load(tmp_path / f"{name}.pt2").module()
        assert torch.equal(program(torch.from_numpy(pixels)).softmax(1), answers.probabilities)


@pytest.mark.parametrize(("images", "words"), [
    (np.zeros((2, 16, 16, 3), np.uint8), r"give images.transpose\(0, 3, 1, 2\)"),
    (np.zeros((3, 16, 16), np.uint8), "must have shape"),
    (np.zeros((0, 3, 16, 16), np.uint8), "must have shape"),
    (np.zeros((2, 1, 16, 16), np.uint8), "must have shape"),
    (np.full((2, 3, 16, 16), 9.0), "got values from 9 to 9"),
    (np.full((2, 3, 16, 16), np.nan), "got values from nan"),
    (np.zeros((2, 3, 16, 16), np.int64), "got int64"),
    (["gone.png"], "gone.png"),
    ([], "no images"),
])  # fmt: skip
def test_wrong_images_are_refused(run: tuple[Path, Result], images: object, words: str) -> None:
    loaded = hasten.load(run[0] / "run", trust_code=True)
    with pytest.raises(hasten.HastenError, match=words):
        loaded.predict(images)  # type: ignore[arg-type]
