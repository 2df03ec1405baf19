"""What a result says about its machine: an allow-list, so no name, path or secret of the user gets in."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import socket
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from hasten.kernels.native import instruction_set
from hasten.measure.load import Limits, Load, Watch, busy, load_average, reading, steal_ticks

__all__ = [
    "FLAGS",
    "VARIABLES",
    "Limits",
    "Load",
    "Watch",
    "busy",
    "environment",
    "load_average",
    "reading",
    "source_version",
    "steal_ticks",
]

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
"""CPU features that change the speed of training."""

VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "OMP_WAIT_POLICY",
    "OMP_DYNAMIC",
    "OMP_SCHEDULE",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
)
"""Environment variables that change the speed of training; no other is ever read into a result."""

MASKED = "(masked)"

ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def environment() -> dict[str, object]:
    """Return the facts about machine, libraries and source that a result needs, JSON-ready.

    Everything is on an allow-list: no user name, host name, path or other environment variable is included,
    and an allowed variable with an unusual value is shown as "(masked)". What cannot be found out is None.
    """
    info = _cpu_info()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": info.get("model name") or None,
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_flags": [flag for flag in FLAGS if flag in info.get("flags", "").split()],
        "memory_bytes": _memory_bytes(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
        "scipy": _version("scipy"),
        "hasten": _version("hasten"),
        "parallel": _parallel(torch.__config__.parallel_info()),
        "kernels": instruction_set(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "variables": {name: _clean(os.environ[name]) for name in VARIABLES if name in os.environ},
        "allocator": _allocator(os.environ.get("LD_PRELOAD", "")),
        "gpu": _gpu(),
        "energy": "n/a",
        "source": source_version(),
    }


def source_version() -> dict[str, object] | None:
    """Return ``{"commit", "dirty"}`` of the repository that tracks hasten's source; None outside one.

    Stored results do not make the tree dirty; any other changed or untracked file does.
    """
    package = Path(__file__).resolve().parents[1]
    if _git(package, "ls-files", "--error-unmatch", "errors.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return None
    changed = _git(package, "status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _clean(value: str) -> str:
    """Return ``value`` if it can only be a setting: no path, no long token, no user or host name."""
    if len(value) > 80 or not re.fullmatch(r"[A-Za-z0-9_,.:{}()=*+\- ]*", value):
        return MASKED
    if re.search(r"[A-Za-z0-9_\-]{20,}", value):
        return MASKED
    words = {word.lower() for word in re.split(r"[^A-Za-z0-9_\-]+", value)}
    return MASKED if words & _names() else value


def _names() -> set[str]:
    names = {socket.gethostname().lower()}
    with contextlib.suppress(OSError, KeyError):  # A user without a name in the system has none to give away.
        names.add(getpass.getuser().lower())
    return {name for name in names if name}


def _allocator(preload: str) -> str:
    if not preload.strip():
        return "system"
    return next((name for name in ALLOCATORS if name in preload), "other")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo; elsewhere only what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {"model name": platform.processor()}
    fields: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _parallel(text: str) -> dict[str, str | None]:
    """Return the few facts of torch's parallel report that matter, by pattern: it also prints variables."""
    patterns = {
        "backend": r"ATen parallel backend: ([A-Za-z ]{1,30})",
        "openmp": r"^\s*OpenMP (\d+)",
        "mkl": r"Math Kernel Library Version ([0-9.]+)",
        "onednn": r"MKL-DNN v([0-9.]+)",
    }
    found = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in patterns.items()}
    return {name: match.group(1).strip() if match else None for name, match in found.items()}


def _gpu() -> dict[str, object] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cudnn: Callable[[], int | None] = torch.backends.cudnn.version
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": cudnn(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match.group(1) if match else None
