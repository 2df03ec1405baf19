"""Triton decides when it is imported whether it interprets, so that is set before anything imports it."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def triton_interpreter() -> None:
    """Run Triton's kernels on the CPU where there is no GPU; skip where Triton is not installed."""
    pytest.importorskip("triton")
