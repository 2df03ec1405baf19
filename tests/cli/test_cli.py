"""The commands do what they say, in text and in JSON, from flags and from TOML."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hasten import registry
from hasten.cli import main
from loop.support import assert_same, final, write_npz
from loop.test_kill import FACTORY


class Outcome:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def hasten(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "patterns.npz")


SMALL = ("--model", "lenet", "--threads", "1", "--set", "batch_size=16", "--set", "lr=0.01")


# -- methods, check


def test_methods_as_json_hold_every_method_and_setting(hasten: Any) -> None:
    rows = hasten("methods", "--json").json()
    assert [row["name"] for row in rows] == registry.available()
    for row in rows:
        assert row["title"]
        assert row["paper"]
        assert row["doc"]
        shown = ast.parse(row["repr"], mode="eval").body
        assert isinstance(shown, ast.Call)
        assert {k.arg for k in shown.keywords} == set(row["settings"])


def test_one_method_shows_its_settings(hasten: Any) -> None:
    text = hasten("methods", "selective_backprop").out
    for setting, value in registry.method("selective_backprop").settings().items():
        assert f"    {setting} = {value!r}" in text.splitlines()
    assert "hasten compare --method selective_backprop" in text
    listing = hasten("methods").out
    assert all(name in listing for name in registry.available())


def test_check_passes_for_a_method_and_tells_its_checks(hasten: Any) -> None:
    report = hasten("check", "selective_backprop", "--json").json()
    assert report["failed"] == {}
    assert "resumes_bit_for_bit" in report["passed"]
    assert "works_under_ddp" in report["left_out"]
    text = hasten("check", "selective_backprop", "--settings", "prime_epochs=99")
    assert text.code == 1  # it never leaves its priming epochs, so it does not act
    assert "  FAIL  trains_and_shows_it: " in text.out
    assert "  pass  settings_are_kept" in text.out


# -- train


def test_train_twice_continues_and_the_json_is_the_result(hasten: Any, data: Path, tmp_path: Path) -> None:
    command = ("train", *SMALL, "--data", data, "--epochs", "2", "--method", "selective_backprop:prime_epochs=0,beta=1.0",
               "--json")  # fmt: skip
    first = hasten(*command)
    assert first.code == 0, first.err
    result = first.json()
    assert result["steps"] == 16
    assert result["counters"]["backward"] < result["counters"]["streamed"] == 256
    assert result["witness"]["selective_backprop"]
    assert result["effects"]["selective_backprop"]["touched"]
    out = tmp_path / result["out"]
    assert out.parent.name == "runs"
    assert (out / "steps.jsonl").is_file()
    again = hasten(*command)
    assert again.json()["accuracy"] == result["accuracy"]
    assert again.json()["out"] == result["out"]
    assert "continued from step 16 of 16" in again.err
    changed = hasten("train", *SMALL, "--data", data, "--epochs", "1", "--json")
    assert changed.json()["out"] != result["out"]


def test_train_tells_a_person_the_result_and_what_next(hasten: Any, data: Path) -> None:
    shown = hasten(
        "train", *SMALL, "--data", data, "--epochs", "1", "--method", "mixed_precision", "--out", "run"
    )
    assert shown.code == 0, shown.err
    assert "Result accuracy" in shown.out
    assert "Effect mixed_precision:" in shown.out
    assert "Next   hasten compare" in shown.out


def test_flags_win_over_toml_and_the_stored_settings_repeat_the_run(
    hasten: Any, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(
        f'model = "lenet"\ndata = "{data}"\nepochs = 3\nthreads = 1\nset = ["batch_size=16", "lr=0.01", "ema=None"]\n'
        'method = "mixed_precision"\nsave-every = 0.0\nout = "fromfile"\nseed = 4\n'
    )
    result = hasten("train", "--config", "run.toml", "--epochs", "1", "--json")
    assert result.code == 0, result.err
    assert result.json()["steps"] == 8
    assert "mixed_precision" in result.json()["witness"]
    stored = tomllib.loads((tmp_path / "fromfile" / "config.toml").read_text())
    assert stored["epochs"] == 1.0
    assert stored["seed"] == 4
    assert stored["save-every"] == 0.0
    again = hasten("train", "--config", "fromfile/config.toml", "--out", "again", "--json")
    assert again.code == 0, again.err
    assert_same(final(tmp_path / "again"), final(tmp_path / "fromfile"), "repeated from its own settings")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('epoch = 3', "unknown setting in run.toml: 'epoch'. Did you mean 'epochs'?"),
        ('sede = 3', "Did you mean 'seed'?"),
        ('json = 1', "json must be true or false, got 1"),
        ('epochs = true', "epochs must be text or a number, got True"),
        ('epochs = [1, 2]', "epochs must be text or a number, got [1, 2]"),
        ('method = [["s3pool"]]', "method must be text or a number, or a list of them, got ['s3pool']"),
        ('epochs = ', "cannot read the settings in run.toml"),
        ('epochs = "many"', "--epochs"),
    ],
)  # fmt: skip
def test_a_wrong_settings_file_is_one_clear_error(hasten: Any, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "run.toml").write_text(line)
    result = hasten("train", "--config", "run.toml")
    assert result.code == 2
    assert words in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err
    assert hasten("train", "--config", "gone.toml").code == 2
    assert not (tmp_path / "runs").exists()


# -- export


LOADER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hasten":
            raise ImportError("hasten is not installed here")
sys.meta_path.insert(0, Refuse())
import torch
x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
program = torch.export.load(sys.argv[1] + ".pt2").module()
from safetensors.torch import load_file
weights = load_file(sys.argv[1] + ".safetensors")
named = dict(program.named_parameters()) | dict(program.named_buffers())
assert set(weights) <= set(named), set(weights) - set(named)
assert all(torch.equal(weights[k], named[k]) for k in weights)
print([round(float(v), 4) for v in program(x).sum(1)])
"""


def test_export_loads_without_hasten_and_computes_the_same(hasten: Any, data: Path, tmp_path: Path) -> None:
    from hasten.exporting import load_run

    (tmp_path / "net.py").write_text(FACTORY)
    trained = hasten("train", *SMALL, "--model", "net.py:make", "--data", data, "--epochs", "1", "--out", "run",
                     "--method", "s3pool", "--method", "mixed_precision")  # fmt: skip
    assert trained.code == 0, trained.err
    for suffix in (".safetensors", ".pt2"):
        written = hasten("export", "run", f"net{suffix}", "--trust-code")
        assert written.code == 0, written.err
        assert f"wrote net{suffix}" in written.out
    (tmp_path / "load.py").write_text(LOADER)
    ended = subprocess.run([sys.executable, "-W", "ignore", "load.py", "net"], cwd=tmp_path, capture_output=True, text=True,
                           timeout=100, check=False)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    import torch

    net, _ = load_run(tmp_path / "run", trust_code=True)
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net(x).sum(1)
    assert torch.allclose(torch.tensor(json.loads(ended.stdout)), expected, atol=2e-4)
    assert sorted(p.name for p in tmp_path.glob("*net*")) == ["net.pt2", "net.py", "net.safetensors"]


def test_export_refuses_what_it_cannot_do(hasten: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, 4))\n"
    )
    run = (
        "train",
        "--model",
        "net.py:make",
        "--data",
        data,
        "--epochs",
        "0.25",
        "--set",
        "batch_size=16",
        "--out",
        "run",
    )
    assert hasten(*run).code == 0
    cases = [
        (("export", "run", "net.onnx"), "end it in .safetensors or .pt2"),
        (("export", "nowhere", "net.pt2"), "holds no good checkpoint"),
        (("export", "run", "net.pt2"), "--trust-code"),
        (
            ("export", "run", "missing/net.safetensors", "--trust-code"),
            "cannot write missing/net.safetensors: No such",
        ),
        (
            ("export", "run", "patterns.npz/net.pt2", "--trust-code"),
            "cannot write patterns.npz/net.pt2: Not a dir",
        ),
    ]
    for arguments, words in cases:
        result = hasten(*arguments)
        assert result.code == 2, arguments
        assert words in result.err
    assert hasten("export", "run", "net.safetensors", "--trust-code").code == 0


# -- data, report


def test_data_list_and_check(hasten: Any, data: Path, tmp_path: Path) -> None:
    assert "fashion-mnist-12k" in hasten("data", "list", "--json").json()
    assert "cifar10" in hasten("data", "list").out
    found = hasten("data", "check", data, "--json").json()
    assert sum(found["counts"]["train"].values()) == 133
    assert sum(found["counts"]["test"].values()) == 20
    assert "133 train / 20 test" in hasten("data", "check", data).out
    data.write_bytes(data.read_bytes()[:-3000])
    broken = hasten("data", "check", data)
    assert broken.code == 2
    assert "damaged or truncated" in broken.err


def test_report_is_made_again_from_its_data(hasten: Any, tmp_path: Path) -> None:
    from report.fixture import report

    (tmp_path / "report.json").write_text(json.dumps(report()))
    assert hasten("report", tmp_path).code == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert "," in hasten("report", tmp_path, "--csv").out.splitlines()[0]
    assert "give the folder of a finished comparison" in hasten("report", tmp_path / "no").err


# -- start-up


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["methods", "--help"], []])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom hasten.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code in (0, 2, None), end.code\n"
        "heavy = [m for m in ('torch', 'numpy', 'scipy', 'PIL') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "Usage" in ended.stdout + ended.stderr
