"""Every method keeps the contract, alone and in pairs; and the suite notices methods that break it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten import registry
from hasten.conformance import CHECKS, NotApplicable, check_method, check_pair, subject
from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.errors import HastenError
from hasten.session import Session

# PyTorch's tracer instantiates the Function class that it warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("name", registry.available())
def test_method_keeps_the_contract(name: str) -> None:
    report = check_method(name)
    assert len(report.passed) >= 10
    print(name, "none:", report.left_out)


@pytest.mark.parametrize(("a", "b"), list(combinations(registry.available(), 2)))
def test_pair_trains_or_is_refused(a: str, b: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {check_pair(subject(a), subject(b)), check_pair(subject(b), subject(a))}
    with capsys.disabled():
        print(f"\n{a} + {b}: {' / '.join(sorted(outcomes))}", end="")
    assert len(outcomes) == 1, "the outcome depends on the order in which the two are given"


# -- methods that break the contract, each in one way


def spec(name: str, **more: Any) -> MethodSpec:
    return MethodSpec(**{"name": name, "title": "", "paper": "", "saves": "samples", "acts": "",
                         "writes": frozenset({"gradients"})} | more)  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Good(Method):
    """Scales gradients by a factor that grows with the steps taken: keeps the contract."""

    spec: ClassVar[MethodSpec] = spec("good", state=("steps_",))
    rate: float = 0.01

    def attach(self, session: Session) -> Effect:
        self.steps_, self._session = 0, session
        return Effect({"gradients": "scaled"})

    def factor(self) -> float:
        return 1 + self.rate * self.steps_

    def gradients(self) -> None:
        self.steps_ += 1
        for p in self._session.model.parameters():
            if p.grad is not None:
                p.grad.mul_(self.factor())

    def witness(self) -> dict[str, float]:
        return {"steps": float(self.steps_)}


class Forgets(Good):
    spec = spec("forgets")


class ForgetsOneOfTwo(Good):
    """Saves a counter late: the state lags one step behind."""

    spec = spec("forgets_one", state=("steps_",))

    def state_dict(self) -> dict[str, Any]:
        return {"steps_": max(0, self.steps_ - 1)}


class ForgetsItsWitness(Good):
    """Counts what it did, but starts anew in a resumed run."""

    spec = spec("forgets_witness", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        self._acted = 0
        return super().attach(session)

    def gradients(self) -> None:
        super().gradients()
        self._acted += 1

    def witness(self) -> dict[str, float]:
        return {"acted": float(self._acted)}


class SavesAnObject(Good):
    spec = spec("saves_object", state=("steps_", "thing_"))

    def attach(self, session: Session) -> Effect:
        self.thing_ = object()
        return super().attach(session)


class UsesTorchRandom(Good):
    spec = spec("torch_random", state=("steps_",))

    def factor(self) -> float:
        return 1 + 0.01 * float(torch.rand(()))


class UsesNumpyRandom(Good):
    spec = spec("numpy_random", state=("steps_",))

    def factor(self) -> float:
        return 1 + 0.01 * float(np.random.rand())  # noqa: NPY002


class UsesPythonRandom(Good):
    spec = spec("python_random", state=("steps_",))

    def factor(self) -> float:
        return 1 + 0.01 * random.random()


class RandomByObject(Good):
    """Two runs differ although no global generator is touched."""

    spec = spec("by_object", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        self._noise = np.random.default_rng()
        return super().attach(session)

    def factor(self) -> float:
        return 1 + 0.01 * float(self._noise.random())


class Inactive(Good):
    spec = spec("inactive", state=("steps_",))

    def gradients(self) -> None:
        pass


class TouchesNothing(Good):
    spec = spec("touches_nothing", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        super().attach(session)
        return Effect()


class GivesNoReason(Good):
    spec = spec("no_reason", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        super().attach(session)
        return Effect({"gradients": "scaled"}, {"0": ""})


class LeavesAHook(Good):
    """Hooks at once, before every method has agreed, and never takes the hook off."""

    spec = spec("hook", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        session.model[0].register_forward_pre_hook(lambda m, x: None)  # type: ignore[index]
        return super().attach(session)


class HooksAParameter(Good):
    spec = spec("parameter_hook", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        session.model[0].weight.register_hook(lambda g: g)  # type: ignore[index]
        return super().attach(session)


class PatchesForward(Good):
    """Puts its own function in the place of a module's forward."""

    spec = spec("patch", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        module = session.model[0]  # type: ignore[index]
        module.forward = type(module).forward.__get__(module)
        return super().attach(session)


class MovesWeights(Good):
    spec = spec("moves", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        with torch.no_grad():
            session.model[0].weight.add_(1e-3)  # type: ignore[index]
        return super().attach(session)


class Own(nn.ReLU):
    """A module that plain PyTorch does not know."""


class ExportsItsModule(Good):
    spec = spec("own_module", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        session.replace("2", Own())
        return super().attach(session)


class ExportsAnotherNet(Good):
    spec = spec("another", state=("steps_",))

    def export(self, model: nn.Module) -> None:
        with torch.no_grad():
            model[-1].bias.add_(1.0)  # type: ignore[index]


class Diverges(Good):
    spec = spec("diverges", state=("steps_",))

    def factor(self) -> float:
        return 1e6


class Freezes(Good):
    spec = spec("freezes", state=("steps_",))

    def gradients(self) -> None:
        super().gradients()
        self._session.model[0].weight.grad = None  # type: ignore[index]


class ReprLies(Good):
    spec = spec("repr_lies", state=("steps_",))

    def __repr__(self) -> str:
        return "ReprLies(rate=0.5)"


class BreaksCompile(Good):
    """Looks at values in the forward pass, which a full graph cannot."""

    spec = spec("graph", state=("steps_",))

    def attach(self, session: Session) -> Effect:
        def look(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            return output * 2 if output.sum().item() > 1e9 else output

        session.edit(lambda: session.model[0].register_forward_hook(look))  # type: ignore[index, arg-type, return-value]
        return super().attach(session)

    def export(self, model: nn.Module) -> None:
        model[0]._forward_hooks.clear()  # type: ignore[index, operator]


class DropsUnderDdp(Good):
    """Acts differently where the model is wrapped."""

    spec = spec("ddp", state=("steps_",))

    def factor(self) -> float:
        return 0.5 if self._session.wrapper is not self._session.model else super().factor()


class SelectsNothing(Good):
    spec = spec("selects", state=("steps_",), writes=frozenset({"samples"}))

    def select(self, batch: Batch) -> Batch:
        self.steps_ += 1
        return batch.take(torch.arange(0))

    def gradients(self) -> None:
        pass


BROKEN: list[tuple[type[Method], str, str]] = [
    (Forgets, "resumes_bit_for_bit", "resumed at step"),
    (ForgetsOneOfTwo, "resumes_bit_for_bit", "resumed at step"),
    (ForgetsItsWitness, "resumes_bit_for_bit", "the witness does not count"),
    (SavesAnObject, "resumes_bit_for_bit", "object"),
    (UsesTorchRandom, "deterministic_and_private", "PyTorch's global generator"),
    (UsesNumpyRandom, "deterministic_and_private", "NumPy's global generator"),
    (UsesPythonRandom, "deterministic_and_private", "Python's global generator"),
    (RandomByObject, "deterministic_and_private", "two runs with one seed differ"),
    (Inactive, "trains_and_shows_it", "witness shows no action"),
    (TouchesNothing, "attaches_with_reasons", "has no effect"),
    (GivesNoReason, "attaches_with_reasons", "no reason"),
    (LeavesAHook, "refusal_changes_nothing", "hooks were left on ['0']"),
    (LeavesAHook, "exports_plain", "the export holds hooks on ['0']"),
    (HooksAParameter, "refusal_changes_nothing", "0.weight"),
    (PatchesForward, "refusal_changes_nothing", "modules were changed"),
    (MovesWeights, "refusal_changes_nothing", "weights were changed"),
    (ExportsItsModule, "exports_plain", "['Own']"),
    (ExportsAnotherNet, "exports_plain", "outputs differ"),
    (Diverges, "trains_and_shows_it", ""),
    (Freezes, "trains_and_shows_it", "did not move: ['0.weight']"),
    (ReprLies, "settings_are_kept", "does not recreate"),
    (BreaksCompile, "works_under_compile", ""),
    (DropsUnderDdp, "works_under_ddp", "differ from"),
    (SelectsNothing, "trains_and_shows_it", "did not move"),
]


BY_NAME = {check.__name__: check for check in CHECKS}


def test_a_method_that_keeps_the_contract_passes_and_the_generators_are_left_alone() -> None:
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    report = hasten.check_method(Good)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    assert set(report.left_out) == {"unknown_setting_is_refused", "limit_equals_plain"}


@pytest.mark.parametrize(
    ("broken", "check", "reason"), BROKEN, ids=lambda v: getattr(v, "__name__", "") or str(v)
)
def test_a_method_that_breaks_it_fails_the_right_check(broken: type[Method], check: str, reason: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the suite reports any error as a failed check
        BY_NAME[check](subject(broken))
    assert not isinstance(caught.value, NotApplicable)
    assert reason in str(caught.value)


def test_all_failures_are_listed_at_once() -> None:
    class Both(LeavesAHook):
        spec = spec("both")

    with pytest.raises(HastenError) as caught:
        check_method(Both)
    for check in ("resumes_bit_for_bit", "refusal_changes_nothing", "exports_plain"):
        assert f"  {check}: " in str(caught.value)


def test_a_pair_of_which_one_does_not_act_is_noticed() -> None:
    with pytest.raises(AssertionError, match="inactive shows no action"):
        check_pair(subject(Good), subject(Inactive))
