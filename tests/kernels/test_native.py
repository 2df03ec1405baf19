"""Where the extension is missing or misnamed, hasten says so once and goes on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tests.kernels.support import layouts

from hasten.kernels import native

SCRIPT = """
import warnings
import torch
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as told:
    from hasten.kernels.round_bfloat16 import round_bfloat16
    from hasten.kernels.native import instruction_set
    a = round_bfloat16(torch.arange(100.0) / 7, 3)
    b = round_bfloat16(torch.arange(100.0) / 7, 3)
    assert torch.equal(a, b)
print(instruction_set(), len(told), a.float().sum().item())
for warning in told:
    print(warning.message)
"""


def run(**environment: str) -> list[str]:
    """Return what the script prints with these variables set."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_missing_extension_is_told_once_and_changes_no_bit() -> None:
    broken = run(HASTEN_NATIVE="/nowhere/_native.so")
    assert broken[0].startswith("reference 1 ")
    assert "Install g++" in broken[1]
    assert run(HASTEN_NATIVE="off")[0].startswith("reference 0 ")
    assert broken[0].split()[2] == run(HASTEN_NATIVE="off")[0].split()[2]
    if native.extension() is not None:
        fast = run(HASTEN_ISA="portable")[0].split()
        assert fast[0] == "portable"
        assert fast[2] == broken[0].split()[2]


def test_an_unknown_instruction_set_is_refused() -> None:
    if native.extension() is None:
        pytest.skip("the extension is not built")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(HASTEN_ISA="neon9")
    assert "HASTEN_ISA='neon9' cannot run here; allowed: portable" in caught.value.stderr


def test_dense_and_flat_cover_every_element_once() -> None:
    x = torch.randn(3, 4, 5, 6)
    for name, y in layouts(x).items():
        kept = native.dense(y)
        assert torch.equal(kept, x), name
        line = native.flat(kept)
        assert line.numel() == x.numel()
        assert torch.equal(line.sort().values, x.flatten().sort().values), name
    last = layouts(x)["channels_last"]
    assert native.dense(last) is last
    expanded = torch.randn(1, 4).expand(3, 4)
    assert native.dense(expanded).is_contiguous()
    assert native.flat(torch.randn(5, dtype=torch.bfloat16)).dtype == torch.int16
