"""The worked example of "Adding a method" passes the suite that every method passes."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest

from hasten import check_method, registry
from hasten.conformance import check_pair, subject
from hasten.table import METHODS, Row

from .pages import ROOT, blocks

PAGE = ROOT / "docs/adding-a-method.md"


@pytest.fixture
def gradient_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The example's file as a module, with its row in the table."""
    (code,) = [code for comment, code, _ in blocks(PAGE, "python") if comment == "worked example"]
    module = types.ModuleType("worked_example")
    monkeypatch.setitem(sys.modules, "worked_example", module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    (row,) = [code for comment, code, _ in blocks(PAGE, "python") if comment.startswith("not run")]
    rows = eval(
        "{" + row.replace("hasten.methods.update.gradient_noise", "worked_example") + "}", {"Row": Row}
    )
    monkeypatch.setitem(METHODS, "gradient_noise", rows["gradient_noise"])
    registry.method_class.cache_clear()
    yield module
    registry.method_class.cache_clear()


def test_it_passes_the_suite(gradient_noise: types.ModuleType) -> None:
    report = check_method("gradient_noise")
    assert set(report.left_out) == {"works_under_ddp"}, "what else does the example not show?"


def test_it_trains_with_every_other_method(gradient_noise: types.ModuleType) -> None:
    others = [name for name in registry.available() if name != "gradient_noise"]
    outcomes = {name: check_pair(subject("gradient_noise"), subject(name)) for name in others}
    assert set(outcomes.values()) == {"trains"}, outcomes


def test_a_class_alone_can_be_checked(gradient_noise: types.ModuleType) -> None:
    assert "resumes_bit_for_bit" in check_method(gradient_noise.GradientNoise, {"eta": 0.01}).passed


def test_its_noise_falls_as_the_paper_says(gradient_noise: types.ModuleType) -> None:
    assert gradient_noise.noise_scale(0, 0.3, 0.55) == pytest.approx(0.3**0.5)
    assert gradient_noise.noise_scale(99, 0.3, 0.55) ** 2 == pytest.approx(0.3 / 100**0.55)
