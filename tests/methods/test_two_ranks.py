"""Methods that act on a layer's products, on two ranks with different images: one network stays one network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.ranks import two_ranks

METHODS = (
    "activation_gradient_pruning",
    "actnn",
    "adaptive_deep_reuse",
    "approximate_tensor_ops",
    "error_map_pruning",
    "gradient_approximation",
    "limited_precision",
)

RANK = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from hasten.conformance import batches, network, start, subject
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
session = start([subject("{name}").make()], DistributedDataParallel(network()))
losses = []
for step, (x, y, index, epoch) in enumerate(batches(12)):
    if step % 6 == 0:
        session.start_epoch(epoch)
    losses.append(session.step(x[rank::2], y[rank::2], index[rank::2]).item())
torch.save({{"losses": losses, "witness": session.witness()["{name}"], "model": session.model.state_dict()}},
           f"{{folder}}/{{rank}}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_stay_one_network(name: str, tmp_path: Path) -> None:
    first, second = two_ranks(RANK.format(name=name), tmp_path)
    assert first["losses"] != second["losses"]
    assert any(first["witness"].values())
    assert any(second["witness"].values())
    for key, value in first["model"].items():
        if "running" not in key:  # batch statistics are each rank's own
            assert torch.equal(value, second["model"][key]), key
