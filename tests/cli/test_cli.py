"""The commands do what they say, in text and in JSON, from flags and from TOML."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hasten import registry
from hasten.cli import main
from loop.support import assert_same, final, write_npz


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


def test_methods_show_what_each_saves_and_gains_in_80_columns(hasten: Any) -> None:
    from importlib.resources import files

    stored = json.loads((files("hasten") / "measured.json").read_text())["methods"]
    rows = {row["name"]: row for row in hasten("methods", "--json").json()}
    listing = hasten("methods").out.splitlines()
    assert max(map(len, listing)) <= 80
    begins = {line.split()[0]: line for line in listing}
    for name, row in rows.items():
        assert row["saves"] in begins[name]
        gain = stored.get(name, {}).get("gain", "not measured")
        assert begins[name].split("  ")[-1].split()[0] in gain.split()[0]
    for name in ("error_map_pruning", "s3pool"):
        shown = hasten("methods", name).out
        assert max(map(len, shown.splitlines())) <= 80
        words = " ".join(shown.split())
        for key in ("paper", "gain", "use_when", "not_when"):
            assert stored[name][key] in words


@pytest.mark.parametrize(("gain", "short"), [
    ("1.41x [1.39, 1.43]: faster (step of vgg16, over strong)", "1.41x [1.39, 1.43]: step of vgg16, over strong"),
    ("1.02x [0.99, 1.04]: not shown; 0.5x over plain (time (of 2))", "1.02x [0.99, 1.04], not shown: time (of 2)"),
    ("66 MiB less (batch 10; 2 bytes) (weights, vgg16)", "66 MiB less (batch 10; 2 bytes): weights, vgg16"),
    ("not measured here", "not measured here"),
])  # fmt: skip
def test_a_gain_in_short_keeps_its_verdict_and_what_it_is_of(gain: str, short: str) -> None:
    from hasten.cli.methods import shortly

    assert shortly(gain) == short


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["--version"],
        ["train", "-h"],
        ["methods", "--help"],
        ["predict", "-h"],
        ["tarin"],
        [],
    ],
)
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
    assert "Usage" in ended.stdout + ended.stderr or "hasten 0" in ended.stdout


def test_the_version_and_the_module_and_a_misspelt_command(hasten: Any) -> None:
    from hasten import __version__

    assert hasten("--version").out == f"hasten {__version__}\n"
    ended = subprocess.run(
        [sys.executable, "-m", "hasten", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == f"hasten {__version__}\n"
    wrong = hasten("predcit")
    assert wrong.code == 2
    assert "Did you mean 'predict'?" in wrong.err
    assert "--show-completion" in hasten("--help").out


def test_completion_knows_the_commands() -> None:
    environment = {
        **os.environ,
        "_HASTEN_COMPLETE": "complete_bash",
        "COMP_WORDS": "hasten ev",
        "COMP_CWORD": "1",
    }
    ended = subprocess.run([sys.executable, "-m", "hasten"], capture_output=True, text=True, timeout=60, check=False,
                           env=environment)  # fmt: skip
    assert ended.stdout.split() == ["evaluate"]


# -- how commands end


def test_a_fault_is_one_line_and_its_traceback_a_file(
    hasten: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import tempfile

    def broken() -> list[str]:
        raise RuntimeError("the table\nfell over")

    monkeypatch.setattr(registry, "available", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = hasten("methods")
    assert result.code == 70
    assert result.err.count("\n") == 1
    assert "error: RuntimeError: the table fell over (in " in result.err
    assert "; traceback in " in result.err
    assert "HASTEN_TRACEBACK=1 shows it" in result.err
    (log,) = tmp_path.glob("hasten-*.log")
    assert str(log) in result.err
    assert "in broken" in log.read_text()
    monkeypatch.setenv("HASTEN_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in hasten("methods").err


def test_a_fault_in_the_users_code_names_its_line(hasten: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("def make():\n    return [][1]\n")
    result = hasten("train", "--model", "net.py:make", "--data", data, "--out", "run")
    assert result.code == 70
    assert (
        f"error: IndexError: list index out of range (in {tmp_path / 'net.py'}, line 2; traceback in "
        in result.err
    )


SLOW = """
import sys, time
from hasten.cli import main, methods
def slow(text):
    print("ready", flush=True)
    time.sleep(20)
methods.starting = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_a_command_like_control_c(name: str, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == "stopped\n"


def test_stopping_a_command_that_resumes_says_so(hasten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.cli import compare, report

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "add_to", lambda app: app.command("compare")(stop))
    monkeypatch.setattr(report, "add_to", lambda app: app.command("report")(stop))
    result = hasten("compare")
    assert result.code == 130
    assert result.err == "stopped; the same command goes on from there\n"
    assert hasten("report").err == "stopped\n"


def test_the_signals_are_as_they_were_after_a_command(hasten: Any) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    hasten("--version")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hasten", "--version"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode in (1, 141)


# -- what user code prints


def test_what_the_users_code_prints_leaves_standard_output_to_json(capfd: pytest.CaptureFixture[str]) -> None:
    from hasten.cli.output import program_output, say_json

    with program_output(True):
        print("from Python")
        os.system("echo from a process")
    say_json({"a": 1})
    shown = capfd.readouterr()
    assert json.loads(shown.out) == {"a": 1}
    assert "from Python" in shown.err
    assert "from a process" in shown.err
    with program_output(False):
        print("as it was")
    assert capfd.readouterr().out == "as it was\n"
    with pytest.raises(RuntimeError), program_output(True):
        raise RuntimeError
    print("after a failure")
    assert capfd.readouterr().out == "after a failure\n"
