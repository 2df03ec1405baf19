"""Every format that was ever released still loads. A folder in ``saved/`` is never changed, only added to."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from hasten.checkpoint import Store
from hasten.checkpoint.manifest import FORMAT

from .trees import equal

SAVED = Path(__file__).parent / "saved"

# Written out here, not computed by the code that packs and unpacks.
WEIGHT = torch.tensor([[1.5, -2.0, math.inf], [0.0, 3.25, -1.0]])
PARTS = {
    "model": {"conv.weight": torch.arange(16.0).reshape(2, 2, 2, 2), "head": WEIGHT, "tied": WEIGHT},
    "optim": {
        "conv.weight": {"momentum": torch.tensor([1, 2], dtype=torch.bfloat16), "step": torch.tensor(7)}
    },
    "method-prune": {
        "kept": (0, 2),
        "scores": {3: [0.5, -math.inf, None]},
        "mask": torch.tensor([True, False]),
    },
    "state": {"step": 7, "big": 2**100, "rng": b"\x00\xff", "note": "café", "phase": torch.tensor([1 + 2j])},
}
RECIPE = {"model": "resnet20", "lr": 0.1, "methods": ["prune(ratio=0.5)"], "betas": (0.9, 0.999)}


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_a_checkpoint_of_each_format_loads(version: int, tmp_path: Path) -> None:
    shutil.copytree(SAVED / f"format-{version}", tmp_path / "run")
    loaded = Store(tmp_path / "run").load(RECIPE)
    assert loaded is not None
    assert loaded.step == 7
    assert equal(loaded.parts, PARTS)
    assert equal(loaded.recipe, RECIPE)
    model = loaded.parts["model"]
    assert model["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert model["head"] is model["tied"]
    assert not (tmp_path / "run" / "quarantine").exists()
