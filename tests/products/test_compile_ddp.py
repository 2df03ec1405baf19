"""Planned layers under torch.compile and in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.products import install

from .support import CHANNELS_LAST, Identity, TopK, run


def network(planned: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).to(memory_format=CHANNELS_LAST)
    if planned:
        install(model[0]).transform("x", Identity(), "id")
        install(model[2]).select("in_channels", TopK(8), "a")
        install(model[2]).select("out_channels", TopK(8), "b")
        install(model[6]).select("in_channels", TopK(8), "a")
        install(model[6]).select("batch", TopK(2, dim=0), "c")
        install(model[6]).select("out_channels", TopK(4), "b", ["grad_input"])
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=CHANNELS_LAST
    )


# Dynamo itself instantiates the Function class to trace it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_one_graph_with_the_same_results(planned: bool, autocast: bool) -> None:
    model = network()
    if not planned:
        for layer in (model[0], model[2], model[6]):
            layer.plan.active = False
    wanted = run(model, images(), autocast)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run(compiled, images(), autocast)
    for name, tensor in wanted.items():
        got = found[name] if name in found else found[f"_orig_mod.{name}"]
        torch.testing.assert_close(got, tensor)
    assert torch._dynamo.explain(model)(images()).graph_break_count == 0


def test_turning_a_method_off_and_on_compiles_twice_at_most() -> None:
    model = network()
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(1)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    x = images()
    outputs = {on: [] for on in (True, False)}
    for step in range(6):
        for layer in (model[2], model[6]):
            layer.plan.activate("a", step % 2 == 0)
        outputs[step % 2 == 0].append(compiled(x).detach())
    assert len(graphs) == 2
    assert not torch.equal(outputs[True][0], outputs[False][0])
    for same in outputs.values():
        assert torch.equal(same[0], same[-1])


WORKER = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from products.test_compile_ddp import network, images
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
model = network()
ddp = DistributedDataParallel(model)
ddp(images()[2 * rank : 2 * rank + 2]).square().mean().backward()
torch.save({n: p.grad for n, p in model.named_parameters()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_average_the_gradients_of_their_halves(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", WORKER, root]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    total: dict[str, Tensor] = {}
    for rank in range(2):
        model = network()
        model(images()[2 * rank : 2 * rank + 2]).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, torch.zeros(())) + parameter.grad / 2
    for name, tensor in total.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor)
