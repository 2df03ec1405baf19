"""The compiled extension, and what is said once where it is missing.

Environment: HASTEN_NATIVE=off uses the reference path, HASTEN_NATIVE=/path/to/_native.so another build;
HASTEN_ISA=portable, avx2 or avx512 an instruction set other than the best.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import torch
from torch import Tensor

from hasten.errors import SettingsError

ISAS = ("portable", "avx2", "avx512")


class SlowPathWarning(UserWarning):
    """Told once: native kernels are missing, so the reference path runs."""


@cache
def extension() -> ModuleType | None:
    """Return the native extension, or None where it was not built; the first call without it warns.

    Raises SettingsError for an instruction set (HASTEN_ISA) that does not exist or that this machine lacks.
    """
    module, problem = _load()
    if problem:
        warnings.warn(
            f"hasten's native kernels are not built ({problem}), so the methods that use them run their reference path, "
            "which is slower than no method at all. Install g++ and python3-dev, then install hasten again.",
            SlowPathWarning,
            stacklevel=2,
        )
    return module


def instruction_set() -> str:
    """Return which kernels run on the CPU: "avx512", "avx2", "portable", or "reference" without the extension."""
    module, _ = _load()
    return "reference" if module is None else str(module.isa())


@cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the extension, or None and why it is missing (nothing where that was asked for)."""
    given = os.environ.get("HASTEN_NATIVE", "")
    if given == "off":
        return None, ""
    try:
        module = _from_file(given) if given else importlib.import_module("hasten._native")
    except ImportError as error:
        return None, str(error)
    wanted = os.environ.get("HASTEN_ISA", "")
    if wanted and not module.set_isa(wanted):
        raise SettingsError(
            f"HASTEN_ISA={wanted!r} cannot run here; allowed: {', '.join(ISAS[: ISAS.index(module.best_isa()) + 1])}."
        )
    return module, ""


def _from_file(path: str) -> ModuleType:
    spec = spec_from_file_location("hasten._native", path, loader=ExtensionFileLoader("hasten._native", path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def threads() -> int:
    """Return how many threads a kernel uses: torch's setting."""
    return torch.get_num_threads()


def dense(x: Tensor) -> Tensor:
    """Return ``x`` if its elements fill its memory without gaps, in any order of dimensions; else a contiguous copy."""
    strides = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def line(x: Tensor) -> Tensor:
    """Return the elements of a `dense` tensor in the order of memory, detached; writing to it writes to ``x``."""
    return x.detach().as_strided((x.numel(),), (1,))


def flat(x: Tensor) -> Tensor:
    """Return `line` as the extension takes it: bfloat16 as int16 of the same bits."""
    elements = line(x)
    return elements.view(torch.int16) if elements.dtype == torch.bfloat16 else elements
