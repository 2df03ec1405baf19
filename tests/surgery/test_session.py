"""A session whose network changes shape: methods, averages, DDP, compile, checkpoints and exports follow."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.surgery.nets import images, net
from torch import nn
from torch.optim import SGD

from hasten import Session, fit, method
from hasten.conformance import advance, differences, start, through_file_format
from hasten.contract import Effect, Method, MethodSpec
from hasten.optim.ema import EMA, float_tensors
from hasten.recipe import STRONG
from hasten.surgery import DropBlock, RemoveChannels


@dataclass(kw_only=True, eq=False)
class Cuts(Method):
    """Remove two channels of a layer, and then a block, at given steps."""

    layer: str = "4"
    block: str = ""
    at: tuple[int, ...] = (3, 7)
    spec: ClassVar[MethodSpec] = MethodSpec(name="cuts", title="", paper="", saves="time per step", acts="",
                                            writes=frozenset({"structure"}), state=("cuts_",))  # fmt: skip
    seen: list[int] = field(default_factory=list)

    def attach(self, session: Session) -> Effect:
        self._session, self.cuts_ = session, 0
        return Effect(touched={self.layer: "loses channels"})

    def after_update(self) -> None:
        step = self._session.counters["step"] + 1
        if step in self.at:
            edits: list[Any] = [RemoveChannels(self.layer, (1, 4))]
            if self.block and step == self.at[-1]:
                edits.append(DropBlock(self.block))
            self._session.surgery.apply(edits)
            self.cuts_ += 1

    def witness(self) -> dict[str, float]:
        return {"cuts": self.cuts_}


def test_a_run_resumes_bit_for_bit_from_every_step_around_and_between_cuts() -> None:
    whole, saved = start([Cuts()]), []
    for step in range(12):
        saved.append(through_file_format(whole.state_dict()))
        advance(whole, step + 1)
    assert whole.model[4].out_channels == 60
    for state in saved:
        again = start([Cuts()])
        again.load_state_dict(state)
        advance(again)
        assert not differences(whole.state_dict(), again.state_dict())


@pytest.mark.parametrize("other", ["approximate_tensor_ops", "error_map_pruning", "selective_backprop",
                                   "s3pool", "mixed_precision", "early_instance_filtering"])  # fmt: skip
def test_other_methods_follow_and_resume(other: str) -> None:
    from hasten.table import METHODS

    def make() -> Session:
        return start([Cuts(), method(other, **METHODS[other].settings)])

    whole = make()
    advance(whole, 5)
    state = through_file_format(whole.state_dict())
    losses = advance(whole)
    assert all(x == x and abs(x) < 1e4 for x in losses)
    assert all(any(w.values()) for w in whole.witness().values())
    again = make()
    again.load_state_dict(state)
    advance(again)
    assert not differences(whole.state_dict(), again.state_dict())


def test_averages_follow() -> None:
    session = start([Cuts()])
    ema = EMA(session.model, 0.9)
    session.surgery.followers.append(
        lambda change: setattr(ema, "average", change.follow(ema.average, float_tensors(session.model)))
    )
    for step in range(12):
        advance(session, step + 1)
        ema.update(session.model)
    assert ema.average["4.weight"].shape == session.model[4].weight.shape


def test_a_dropped_block_and_its_optimizer_state_are_gone_after_a_resume() -> None:
    x, y = images(8, torch.float32), torch.arange(8) % 10

    def make() -> Session:
        model = net("resnet18", torch.float32)
        cuts = Cuts(layer="layer1.0.conv1", block="layer2.1", at=(2, 3))
        return Session(model, SGD(model.parameters(), lr=0.01, momentum=0.9), [cuts], sample=(x, y))

    whole = make()
    for _ in range(3):
        whole.step(x, y)
    state = through_file_format(whole.state_dict())
    again = make()
    again.load_state_dict(state)
    assert not any("layer2.1.conv" in name for name in again.model.state_dict())
    for session in (whole, again):
        for _ in range(2):
            session.step(x, y)
    assert not differences(whole.state_dict(), again.state_dict())
    exported = whole.export()
    assert torch.equal(exported(x), again.export()(x))


def test_compiled_steps_follow_cuts() -> None:
    session = start([Cuts(at=(2, 5, 8))])
    torch._dynamo.reset()
    session.wrap(lambda forward: torch.compile(forward, backend="eager", fullgraph=True))
    assert advance(session) == advance(start([Cuts(at=(2, 5, 8))]))
    assert session.model[4].out_channels == 58


def test_many_cuts_do_not_exhaust_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    session = start([Cuts(), method("mixed_precision", dtype="float32", compile=True)])
    advance(session)
    assert len(resets) == 2


def test_the_wrapper_of_ddp_is_made_anew() -> None:
    code = """
import tempfile, os, torch, torch.distributed as dist
from torch import nn
from hasten.conformance import start, advance, network
from tests.surgery.test_session import Cuts
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
    session = start([Cuts()], nn.parallel.DistributedDataParallel(network()))
    got = advance(session)
    dist.destroy_process_group()
assert got == advance(start([Cuts()])), got
assert session.wrapper.module is session.model and session.model[4].out_channels == 60
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_ranks_that_disagree_are_told_and_nothing_changes(tmp_path: Path) -> None:
    code = """
import sys, torch.distributed as dist
from hasten.errors import SurgeryDesyncError
from hasten.surgery import RemoveChannels
from tests.surgery.nets import net
from tests.surgery.test_remove import surgeon
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
hand = surgeon(net("resnet8"))
hand.apply([RemoveChannels("layer1.0.conv1", (0, 1))])
try:
    hand.apply([RemoveChannels("layer1.0.conv1", (rank,))])
except SurgeryDesyncError as error:
    assert len(hand.log) == 1 and "rank" in str(error)
    sys.exit(7)
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
                              cwd=Path(__file__).parents[2]) for rank in (0, 1)]  # fmt: skip
    assert [rank.wait(120) for rank in ranks] == [7, 7]


def test_fit_with_averaged_weights_resumes_across_a_cut(tmp_path: Path) -> None:
    recipe = STRONG.with_(epochs=1.0, batch_size=32, eval_every=0.0)
    from hasten.data import load

    data = load("fashion-mnist-12k")
    small = replace(data, train=data.train.stratified(320), test=data.test.stratified(100))

    def run(out: Path, stop: int | None = None) -> Any:
        class Stop(Exception):
            pass

        def on_step(step: int) -> None:
            if step == stop:
                raise Stop

        cuts = Cuts(layer="layer1.0.conv1", at=(3, 7))
        try:
            return fit("resnet8", small, [cuts], recipe=recipe, out=out, save_every=0.0, on_step=on_step)
        except Stop:
            return None

    whole = run(tmp_path / "whole")
    for stop in (2, 5, 8):
        out = tmp_path / f"stopped-{stop}"
        assert run(out, stop) is None
        again = run(out)
        assert again.accuracy == whole.accuracy
        assert not differences(dict(whole.model.state_dict()), dict(again.model.state_dict()))
    assert isinstance(whole.model, nn.Module)
