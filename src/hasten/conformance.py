"""The contract as a suite that runs: what every method must keep, checked by training a small network.

``check_method`` is for authors of methods, here and elsewhere. Each check is a function that returns nothing or raises
AssertionError or HastenError; the suite runs all of them and reports every failure at once.
"""

from __future__ import annotations

import ast
import copy
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hasten import keyed, registry
from hasten.checkpoint import pack, unpack
from hasten.contract import Method, MethodSpec
from hasten.errors import ConflictError, HastenError, NoEffectError, SettingsError
from hasten.session import Session
from hasten.table import METHODS

STEPS, BATCH, CLASSES, SIZE = 12, 32, 4, 16


@dataclass
class Report:
    """What the suite found: checks passed, failed (with the reason) and not applicable (with the reason)."""

    method: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class NotApplicable(Exception):
    """Raised by a check that has nothing to check for this method."""


@dataclass(frozen=True)
class Subject:
    """A method's class with the settings the suite runs it with."""

    cls: type[Method]
    settings: dict[str, Any]
    limit: dict[str, Any] | None

    def make(self, **changes: Any) -> Method:
        """Return a fresh method object."""
        return self.cls(**{**self.settings, **changes})


def subject(method: str | type[Method], settings: dict[str, Any] | None = None) -> Subject:
    """Return what to test: a method by name or class, with its canonical settings unless others are given."""
    cls = registry.method_class(method) if isinstance(method, str) else method
    row = METHODS.get(cls.spec.name)
    chosen = settings if settings is not None else (row.settings if row else {})
    return Subject(cls, dict(chosen), row.limit if row else None)


def network() -> nn.Module:
    """Return the suite's network: three convolutions with batch norm, max pooling and a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = [(3, 32), (32, 64), (64, 64)]
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(widths):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i < 2 else [nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES))


def batches(steps: int = STEPS, epoch_steps: int = 6) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Return (inputs, targets, index, epoch) of each step: noisy images whose class shows in their pattern."""
    n = epoch_steps * BATCH
    g = keyed.generator("conformance")
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=g)
    targets = torch.arange(n) % CLASSES
    images = patterns[targets] + torch.randn(n, 3, SIZE, SIZE, generator=g)
    out = []
    for step in range(steps):
        epoch, at = divmod(step, epoch_steps)
        index = torch.from_numpy(keyed.permutation(n, "conformance", epoch))[at * BATCH : (at + 1) * BATCH]
        out.append((images[index], targets[index], index, epoch))
    return out


def start(
    methods: Sequence[Method], model: nn.Module | None = None, *, seed: int = 3, lr: float = 0.02
) -> Session:
    """Return a session on the suite's network."""
    model = network() if model is None else model
    x, y, _, _ = batches(1)[0]
    return Session(model, SGD(model.parameters(), lr=lr, momentum=0.9), methods, sample=(x, y), seed=seed,
                   total_samples=STEPS * BATCH)  # fmt: skip


def advance(session: Session, steps: int = STEPS) -> list[float]:
    """Run ``session`` from its present step to step ``steps`` and return the losses."""
    losses = []
    for x, y, index, epoch in islice(batches(steps), session.counters["step"], None):
        if session.counters["step"] % 6 == 0:
            session.start_epoch(epoch)
        losses.append(session.step(x, y, index).item())
        if session.counters["step"] % 6 == 0:
            session.end_epoch()
    return losses


def through_file_format(state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` after packing and unpacking by the checkpoint format, which holds no objects."""
    tensors, skeleton = pack(state)
    restored: dict[str, Any] = unpack({k: v.clone() for k, v in tensors.items()}, skeleton)
    return restored


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths at which two states differ in any bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return (
            []
            if same or ((a.isnan() == b.isnan()).all() and torch.equal(a.nan_to_num(), b.nan_to_num()))
            else [path]
        )
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}.{k}" for k in a.keys() ^ b.keys()]
        return missing + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [
            d for i, (p, q) in enumerate(zip(a, b, strict=True)) for d in differences(p, q, f"{path}[{i}]")
        ]
    return [] if a == b or (a != a and b != b) else [path]


# -- the checks


def settings_are_kept(s: Subject) -> None:
    """``repr`` shows every setting as given, and a changed copy of a method does not change the first."""
    method = s.make()
    call = ast.parse(repr(method), mode="eval").body
    assert isinstance(call, ast.Call), f"repr {method!r} is not a call that can be pasted back"
    shown = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    assert s.cls(**shown).settings() == method.settings(), f"repr {method!r} does not recreate the settings"


def unknown_setting_is_refused(s: Subject) -> None:
    """A setting that does not exist is refused with a suggestion."""
    if s.cls.spec.name not in registry.available():
        raise NotApplicable("the class is not registered by name")
    try:
        registry.method(s.cls.spec.name, no_such_setting=1)
    except SettingsError as error:
        assert "no_such_setting" in str(error)
        return
    raise AssertionError("an unknown setting was accepted")


def attaches_with_reasons(s: Subject) -> None:
    """Attaching touches something, and names a reason for every layer it leaves out."""
    session = start([s.make()])
    effect = session.effects[s.cls.spec.name]
    assert effect.touched, "the effect names nothing that was touched"
    assert all(effect.touched.values()), "a touched layer has no note"
    assert all(effect.skipped.values()), "a skipped layer has no reason"


def trains_and_shows_it(s: Subject) -> None:
    """Training learns (the loss falls), stays finite, moves the weights, and the witness counts something."""
    session = start([s.make()])
    before = copy.deepcopy(session.model.state_dict())
    losses = advance(session, 24) if not s.cls.spec.requires & {"progress"} else advance(session)
    assert all(x == x and abs(x) < 1e4 for x in losses), f"losses {losses}"
    after = session.model.state_dict()
    both = before.keys() & after.keys()  # a method may bring in layers or take some out
    still = [k for k in sorted(both) if after[k].dtype.is_floating_point and torch.equal(after[k], before[k])]
    assert not still, f"did not move: {still}"
    witness = session.witness()[s.cls.spec.name]
    assert any(witness.values()), f"witness shows no action: {witness}"


def limit_equals_plain(s: Subject) -> None:
    """At its limit settings the method equals plain training bit for bit."""
    if s.limit is None:
        raise NotApplicable("no setting makes this method equal to plain training")
    plain, limited = start([]), start([s.make(**s.limit)])
    assert advance(plain) == advance(limited), "losses differ from plain training"
    wrong = differences(plain.model.state_dict(), limited.model.state_dict())
    assert not wrong, f"weights differ from plain training: {wrong}"


def deterministic_and_private(s: Subject) -> None:
    """The same seed gives the same bits, and the global generators are left alone."""
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        np.random.seed(noise)  # noqa: NPY002 - the global generator is what is watched here
        random.seed(noise)
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
        session = start([s.make()])
        advance(session)
        assert torch.equal(before[0], torch.get_rng_state()), "PyTorch's global generator was used"
        assert before[1] == str(np.random.get_state()), "NumPy's global generator was used"  # noqa: NPY002
        assert before[2] == random.getstate(), "Python's global generator was used"
        states.append(session.state_dict())
    wrong = differences(states[0], states[1])
    assert not wrong, f"two runs with one seed differ at {wrong[:5]}"


def resumes_bit_for_bit(s: Subject) -> None:
    """A run rebuilt at any step from its saved state ends in the same bits as one never stopped."""
    whole = start([s.make()])
    saved = []
    for step in range(STEPS):
        saved.append(through_file_format(whole.state_dict()))
        advance(whole, step + 1)
    final = whole.state_dict()
    for step, state in enumerate(saved):
        again = start([s.make()])
        again.load_state_dict(state)
        advance(again)
        wrong = differences(final, again.state_dict())
        assert not wrong, f"resumed at step {step}, the end differs at {wrong[:5]}"
        wrong = differences(whole.witness(), again.witness())
        assert not wrong, f"resumed at step {step}, the witness does not count what was before: {wrong}"


def refusal_changes_nothing(s: Subject) -> None:
    """Where the method finds nothing to act on, or a later one fails, the model stays as it was, bit for bit."""

    class Fails(Method):
        # it reads what the method writes, so that it comes after it
        spec = MethodSpec(name="fails", title="", paper="", saves="memory", acts="", writes=frozenset(),
                          reads=s.make().writes)  # fmt: skip

        def attach(self, session: Session) -> Any:
            raise HastenError("on purpose")

    model = network()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    kinds = {n: (type(m), sorted(vars(m))) for n, m in modules.items()}
    try:
        start([s.make(), Fails()], model)
    except HastenError as error:
        assert "on purpose" in str(error), error
    else:
        raise AssertionError("a failing method was attached")
    now = dict(model.named_modules())
    assert list(now) == list(modules), "modules were added or removed by a session that failed"
    assert all(now[n] is modules[n] for n in now), "modules were replaced by a session that failed"
    changed = [n for n, m in now.items() if kinds[n] != (type(m), sorted(vars(m)))]
    assert not changed, f"modules were changed by a session that failed: {changed}"
    assert not differences(before, model.state_dict()), "weights were changed by a session that failed"
    assert not _hooked(model), f"hooks were left on {_hooked(model)} by a session that failed"


def _hooked(model: nn.Module) -> list[str]:
    """Return the names of modules and parameters that carry any hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
             "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip
    on_modules = [
        name or "the model" for name, m in model.named_modules() if any(getattr(m, k) for k in kinds)
    ]
    on_parameters = [
        name for name, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks
    ]
    return on_modules + on_parameters


def exports_plain(s: Subject) -> None:
    """The exported model has only PyTorch's modules, computes what the session computes, and is a copy."""
    session = start([s.make()])
    advance(session, 6)
    plain = session.export()
    # the suite's network is PyTorch's modules alone, so anything else was left there by the method
    foreign = [type(m).__name__ for m in plain.modules() if type(m).__module__.split(".")[0] != "torch"]
    assert not foreign, f"the export holds modules that are not PyTorch's: {foreign}"
    assert not _hooked(plain), f"the export holds hooks on {_hooked(plain)}"
    ours_at = {t.data_ptr() for t in session.model.state_dict().values() if t.numel()}
    shared = [n for n, t in plain.state_dict().items() if t.numel() and t.data_ptr() in ours_at]
    assert not shared, f"the export shares memory with the model in training: {shared}"
    x = batches(1)[0][0]
    with session.inference() as forward:
        ours = forward(x).float()
    with torch.no_grad():
        error = (plain(x) - ours).abs().max() / ours.abs().max()
    assert error < 0.05, f"the export's outputs differ by {error:.3g} of the largest"


def works_under(name: str, change: Callable[[Session], None]) -> Callable[[Subject], None]:
    """Return a check that training works after ``change`` if the method promises ``name``."""

    def check(s: Subject) -> None:
        if name not in s.cls.spec.promises:
            raise NotApplicable(f"{name} is not promised")
        session = start([s.make()])
        change(session)
        losses = advance(session, 6)
        assert all(x == x and abs(x) < 1e4 for x in losses), f"losses {losses}"
        assert any(session.witness()[s.cls.spec.name].values()), "the witness shows no action"

    check.__name__ = f"works_under_{name}"
    check.__doc__ = f"Trains under {name}, if promised."
    return check


def _autocast(session: Session) -> None:
    forward: Callable[[Tensor], Tensor] = session.forward

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(x)

    session.forward = cast


def _channels_last(session: Session) -> None:
    forward = session.forward
    session.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    session.forward = lambda x: forward(x.contiguous(memory_format=torch.channels_last))


def _compile(session: Session) -> None:
    torch._dynamo.reset()
    session.forward = torch.compile(session.model, backend="aot_eager", fullgraph=True, dynamic=False)


def lets_layers_work_in_place(s: Subject) -> None:
    """A ReLU that works in place may follow a convolution directly."""
    model = network()
    for name, module in list(model.named_children()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, nn.ReLU(inplace=True))
    model.set_submodule("5", nn.Identity())
    session = start([s.make()], model)
    if "channels_last" in s.cls.spec.promises:
        _channels_last(session)
    losses = advance(session, 6)
    assert all(x == x and abs(x) < 1e4 for x in losses), f"losses {losses}"


def works_under_ddp(s: Subject) -> None:
    """One rank of a gloo group under DistributedDataParallel trains as without it, if promised."""
    if "ddp" not in s.cls.spec.promises:
        raise NotApplicable("ddp is not promised")
    import torch.distributed as dist

    alone = start([s.make()])
    expected = advance(alone, 6)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1
        )
        try:
            session = start([s.make()], nn.parallel.DistributedDataParallel(network()))
            got = advance(session, 6)
        finally:
            dist.destroy_process_group()
    assert got == expected, f"losses {got} under DDP with one rank differ from {expected} without"


CHECKS: list[Callable[[Subject], None]] = [
    settings_are_kept,
    unknown_setting_is_refused,
    attaches_with_reasons,
    trains_and_shows_it,
    limit_equals_plain,
    deterministic_and_private,
    resumes_bit_for_bit,
    refusal_changes_nothing,
    exports_plain,
    lets_layers_work_in_place,
    works_under("autocast", _autocast),
    works_under("channels_last", _channels_last),
    works_under("compile", _compile),
    works_under_ddp,
]


def check_pair(a: Subject, b: Subject) -> str:
    """Return "trains" or "refused": the two methods train together, or are refused before anything changed.

    Raises AssertionError if neither is the case, or a refusal does not name both.
    """
    names = (a.cls.spec.name, b.cls.spec.name)
    try:
        session = start([a.make(), b.make()])
    except (ConflictError, NoEffectError) as error:
        missing = [n for n in names if n not in str(error)]
        assert isinstance(error, ConflictError), f"{names}: refused as {error}, which is not a conflict"
        assert not missing, f"the refusal does not name {missing}: {error}"
        return "refused"
    losses = advance(session)
    assert all(x == x and abs(x) < 1e4 for x in losses), f"{names}: losses {losses}"
    for name in names:
        assert any(session.witness()[name].values()), f"{names}: {name} shows no action"
    return "trains"


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    numbers, more = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(numbers)  # noqa: NPY002
            random.setstate(more)


def run_checks(method: str | type[Method], settings: dict[str, Any] | None = None) -> Report:
    """Run every check on ``method`` and return what was found."""
    s = subject(method, settings)
    report = Report(s.cls.spec.name)
    for check in CHECKS:
        try:
            with _global_generators_kept():
                check(s)
        except NotApplicable as reason:
            report.left_out[check.__name__] = str(reason)
        except Exception as error:
            report.failed[check.__name__] = f"{type(error).__name__}: {error}"
        else:
            report.passed.append(check.__name__)
    return report


def check_method(method: str | type[Method], settings: dict[str, Any] | None = None) -> Report:
    """Run the conformance suite on a method, by name or class, with its canonical settings or the ones given.

    Returns the report. Raises HastenError that lists every failed check.
    """
    report = run_checks(method, settings)
    if report.failed:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in report.failed.items())
        raise HastenError(f"{report.method} breaks the contract in {len(report.failed)} checks:\n{lines}")
    return report
