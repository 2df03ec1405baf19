"""Peak memory: measured against allocations of known size."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from hasten.errors import UnsupportedError
from hasten.measure.memory import SavedActivations, cuda_peak_bytes, fresh_process, peak_rss_bytes

MB = 2**20


def test_a_fresh_process_shows_what_the_command_used_not_what_we_use() -> None:
    ours = bytearray(b"x") * (300 * MB)
    run = [fresh_process([sys.executable, "-S", "-c", f"x = b'x' * ({size} * {MB})"]) for size in (0, 120)]
    assert peak_rss_bytes() > len(ours)
    assert all(result.returncode == 0 for result in run)
    grown = run[1].peak_rss_bytes - run[0].peak_rss_bytes
    assert grown == pytest.approx(120 * MB, rel=0.1)
    assert run[0].peak_rss_bytes < 60 * MB


def test_a_fresh_process_returns_output_code_and_cpu_time() -> None:
    code = "import sys, time\nprint('out'); print('err', file=sys.stderr)\n"
    code += "while time.process_time() < 0.2: pass\nsys.exit(3)"
    result = fresh_process([sys.executable, "-S", "-c", code])
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")
    assert 0.2 <= result.cpu_seconds < 30
    assert result.wall_seconds >= 0.15
    assert fresh_process([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).returncode == -9
    assert fresh_process(["no-such-command-here"]).returncode == 127


def test_a_fresh_process_that_takes_too_long_is_ended_with_its_children() -> None:
    start = time.perf_counter()
    with pytest.raises(subprocess.TimeoutExpired):
        fresh_process([sys.executable, "-S", "-c", "import time; time.sleep(600)"], timeout=0.5)
    assert time.perf_counter() - start < 60


def test_saved_activations_are_counted_once_and_without_parameters() -> None:
    layer = torch.nn.Linear(32, 16)
    x = torch.randn(8, 32)
    with SavedActivations(layer) as saved:
        layer(x).relu().sum()
    # the input of the linear layer, and the output of relu
    assert saved.bytes == (8 * 32 + 8 * 16) * 4

    y = torch.randn(1000, requires_grad=True)
    z = y * 2
    with SavedActivations() as saved:
        (z * z).sum()
    assert (saved.bytes, saved.tensors) == (4000, 2)

    with SavedActivations() as view:
        z[:10].exp().sum()
    assert view.bytes == 10 * 4  # exp keeps its output
    with SavedActivations() as whole:
        torch.log(z[:10].abs() + 1)
        z[:10].sin()
    assert whole.bytes >= 4000  # sin keeps its input, a view that holds all 1000 numbers


def test_counting_does_not_change_the_gradients() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Sigmoid())
    x = torch.randn(2, 3, 8, 8)
    net(x).square().sum().backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with SavedActivations(net):
        loss = net(x).square().sum()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, net.parameters(), strict=True))


def test_tensors_without_memory_are_refused() -> None:
    x = torch.randn(4, device="meta", requires_grad=True)
    with pytest.raises(UnsupportedError, match="meta"), SavedActivations():
        (x * x).sum()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_gpu_gives_no_gpu_figure() -> None:
    assert cuda_peak_bytes() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_peak_covers_an_allocation() -> None:
    before = cuda_peak_bytes()
    x = torch.empty(64 * MB, dtype=torch.uint8, device="cuda")
    after = cuda_peak_bytes()
    assert before is not None
    assert after is not None
    assert after["allocated"] >= x.numel()
    assert after["reserved"] >= after["allocated"]
