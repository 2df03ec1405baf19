"""Peak memory: of a process, of a fresh process running a command, of the GPU, and of saved activations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from hasten.errors import UnsupportedError

# A child's ru_maxrss starts at its parent's size at the fork, so a command started from a large process would
# report that process's memory. This small interpreter stands in between; its own 10 MB are the floor.
_LAUNCHER = """
import json, os, sys, time
report, command = int(sys.argv[1]), sys.argv[2:]
start = time.perf_counter()
child = os.fork()
if child == 0:
    os.close(report)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\\n".encode())
    os._exit(127)
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - start
values = [os.waitstatus_to_exitcode(status), usage.ru_maxrss, usage.ru_utime + usage.ru_stime, wall]
os.write(report, json.dumps(values).encode())
"""


@dataclass(frozen=True)
class FreshRun:
    """A command that ran in its own process: exit code, peak resident bytes, seconds, and its output."""

    returncode: int
    peak_rss_bytes: int
    cpu_seconds: float
    wall_seconds: float
    stdout: str
    stderr: str


def fresh_process(
    command: Sequence[str],
    *,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> FreshRun:
    """Run ``command`` (no shell) in a fresh process and return what it took.

    The peak is the largest of the command's process and of any child it waited for, and at least about 10 MB.

    Raises:
        UnsupportedError: the system has no ``fork`` (Windows), or the measurement was cut off.
        subprocess.TimeoutExpired: it ran longer than ``timeout`` seconds; all of it has been ended.
    """
    if not hasattr(os, "fork"):
        raise UnsupportedError("measuring a fresh process needs fork; run this on Linux or macOS.")
    receive, send = os.pipe()
    with os.fdopen(receive, "rb") as report:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(send), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=(send,),
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        finally:
            os.close(send)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        text = report.read()
    if not text:
        raise UnsupportedError(
            f"the process measuring {command[0]!r} ended with code {process.returncode}: {stderr}"
        )
    code, peak, cpu, wall = json.loads(text)
    return FreshRun(code, _rss_bytes(peak), cpu, wall, stdout, stderr)


def peak_rss_bytes() -> int:
    """Return the largest resident size this process has had, in bytes.

    On Linux from VmHWM, which unlike ``ru_maxrss`` does not begin at the parent's size.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # Not Linux: ask getrusage below.
    import resource

    return _rss_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def cuda_peak_bytes(device: torch.device | str | None = None) -> dict[str, int] | None:
    """Return the GPU's peak ``allocated`` and ``reserved`` bytes since the last reset; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def reset_cuda_peak(device: torch.device | str | None = None) -> None:
    """Start a new peak, if there is a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats(device)


class SavedActivations:
    """Counts the bytes autograd keeps between forward and backward, while used as a context manager.

    ``bytes`` counts each storage once, whole, however many views of it are saved: that is what stays in
    memory. Storages of ``exclude`` (parameters and buffers, which exist anyway) are left out. Only tensors
    saved through autograd are seen; one that a function keeps as a Python attribute is not. ``peak`` memory
    differs: nothing here says when the tensors are freed. The counted storages are held until the block ends.
    """

    def __init__(self, exclude: Iterable[torch.Tensor] | torch.nn.Module = ()) -> None:
        if isinstance(exclude, torch.nn.Module):
            exclude = [*exclude.parameters(), *exclude.buffers()]
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
        self._held: dict[tuple[str, int], torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.bytes = 0
        self.tensors = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() == 0:
            raise UnsupportedError(
                f"a tensor on {tensor.device} has no memory to count; run on a real device."
            )
        key = (str(tensor.device), storage.data_ptr())
        if storage.nbytes() and key[1] not in self._excluded:
            self.tensors += 1
            if key not in self._held:
                self._held[key] = storage
                self.bytes += storage.nbytes()
        # Detached, because a saved output that returned itself would keep its own graph alive.
        return tensor.detach()

    @staticmethod
    def _unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._held.clear()


def _rss_bytes(ru_maxrss: int) -> int:
    """Linux counts ru_maxrss in KiB, macOS in bytes."""
    return ru_maxrss if sys.platform == "darwin" else ru_maxrss * 1024
