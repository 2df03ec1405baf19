"""What a result says about the machine, and what it must never say."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hasten.measure import environment as module
from hasten.measure import load as load_module
from hasten.measure.environment import (
    Limits,
    Load,
    Watch,
    busy,
    environment,
    load_average,
    reading,
    steal_ticks,
)

SECRETS = {
    "OMP_NUM_THREADS": "2",
    "OMP_PLACES": "/home/quincy/places",
    "OMP_SCHEDULE": "ghp_0123456789abcdefABCDEF0123456789abcd",
    "KMP_AFFINITY": "granularity=fine,compact,1,0",
    "OMP_PROC_BIND": "quincy",
    "GOMP_SPINCOUNT": "zebra-host-17",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "LD_PRELOAD": "/home/quincy/lib/libtcmalloc.so.4",
}


def test_no_name_path_or_secret_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/quincy")
    monkeypatch.setattr(getpass, "getuser", lambda: "quincy")
    monkeypatch.setattr(socket, "gethostname", lambda: "zebra-host-17")
    facts = environment()
    text = json.dumps(facts)
    for word in ("quincy", "zebra", "ghp_", "wJalr", "/home", "AWS", str(Path.home()) + "/", str(Path.cwd())):
        assert word not in text, word
    assert facts["variables"] == {
        "OMP_NUM_THREADS": "2",
        "OMP_PLACES": "(masked)",
        "OMP_SCHEDULE": "(masked)",
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "OMP_PROC_BIND": "(masked)",
        "GOMP_SPINCOUNT": "(masked)",
    }
    assert facts["allocator"] == "tcmalloc"


def test_no_value_holds_a_path() -> None:
    def texts(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        return [value] if isinstance(value, str) else []

    found = [text for text in texts(environment()) if text != "n/a"]
    assert not [text for text in found if "/" in text or "\\" in text]


def test_it_says_what_a_result_needs() -> None:
    import torch

    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] == os.cpu_count()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["energy"] == "n/a"
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        assert facts["cpu_flags"] == [flag for flag in module.FLAGS if flag in flags]
    json.dumps(facts, allow_nan=False)


def test_the_commit_is_that_of_the_source_and_only_in_its_own_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "hasten"
    (package / "measure").mkdir(parents=True)
    (package / "errors.py").write_text("")
    (package / "measure" / "environment.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(package / "measure" / "environment.py"))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert module.source_version() is None
    git("init", "-q")
    assert module.source_version() is None  # a repository that does not track hasten, like a user's project
    git("add", "-A")
    git("commit", "-q", "-m", "start")
    commit = git("rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert module.source_version() == {"commit": commit, "dirty": False}
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "x.json").write_text("{}")
    assert module.source_version() == {"commit": commit, "dirty": False}
    (package / "new.py").write_text("x = 1\n")
    assert module.source_version() == {"commit": commit, "dirty": True}


def fake_proc(folder: Path, *, user: int, steal: int, own: int, child: int, swap: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {user} 0 0 1000 0 0 0 {steal} 0 0\n")
    (folder / "vmstat").write_text(f"pswpin {swap}\npswpout 0\n")
    me = os.getpid()
    for pid, parent, ticks in ((me, 1, own), (me + 1, me, child), (me + 2, 1, 99999)):
        (folder / str(pid)).mkdir(exist_ok=True)
        fields = ["S", str(parent), *["0"] * 9, str(ticks), "0", "0", "0", *["0"] * 20]
        (folder / str(pid) / "stat").write_text(f"{pid} (a (b) c) {' '.join(fields)}\n")


def test_others_are_all_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "PROC", tmp_path / "proc")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    tick = os.sysconf("SC_CLK_TCK")
    fake_proc(tmp_path / "proc", user=1000 * tick, steal=10 * tick, own=100 * tick, child=50 * tick, swap=5)
    start = reading()
    fake_proc(tmp_path / "proc", user=1030 * tick, steal=11 * tick, own=114 * tick, child=58 * tick, swap=7)
    end = reading()
    load = load_module.between(start, load_module.Reading(**{**vars(end), "at": start.at + 20.0}))
    # 30 busy CPU seconds, 14 + 8 of them ours, over 20 s of 4 cores
    assert load == Load(20.0, pytest.approx(0.05), pytest.approx(0.1), 2)
    assert len(load.disturbed(Limits())) == 2
    assert load.disturbed(Limits(steal=0.06, foreign=0.11)) == []
    assert steal_ticks() == 11 * tick


def test_a_block_is_dropped_by_the_limits_and_by_nothing_else() -> None:
    quiet = Load(1.0, 0.0, 0.0, 0)
    assert quiet.disturbed(Limits()) == []
    assert Load(1.0, 0.011, 0.0, 0).disturbed(Limits())[0].startswith("steal")
    assert Load(1.0, 0.0, 0.06, 0).disturbed(Limits())[0].startswith("other processes")
    assert Load(1.0, 0.0, 0.0, 257).disturbed(Limits())[0].startswith("swapped")
    assert Load(1e9, 0.0, 0.0, 0).disturbed(Limits()) == []


def test_a_system_that_tells_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "PROC", tmp_path / "none")
    load, reasons = Watch().stop()
    assert (load.steal, load.foreign, load.swap_pages, reasons) == (None, None, None, [])
    assert load.unknown() == ["steal", "other processes", "swap"]
    assert steal_ticks() is None
    assert busy(reading()) is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_our_own_work_and_our_children_are_not_strangers() -> None:
    before = reading()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        end = time.perf_counter() + 0.6
        while time.perf_counter() < end:
            pass
        after = reading()
    finally:
        child.kill()
        child.wait()
    assert before.own is not None
    assert after.own is not None
    # This process alone cannot take more than the wall time; with the child it must have taken CPU of both.
    assert 0.1 < after.own - before.own <= 2 * (after.at - before.at) + 0.5
    share = load_module.between(before, after).foreign
    assert share is not None
    assert 0.0 <= share <= 1.0
    average = load_average()
    assert average is None or min(average) >= 0.0
